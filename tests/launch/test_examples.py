"""Every example by the command that its file begins with, from a wheel, in a folder that holds nothing else.

What a command takes from the network is made here: the files of ChartQA in the form in which they are published. The
LLM that plays the user is a server on loopback: any OpenAI-compatible endpoint can be one.
"""

import contextlib
import io
import json
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from axpo_jax.stages.metrics import read_metrics
from tests import children
from tests.agent import chat_server
from tests.launch.conftest import environment_of
from tests.stages import rigged

pytestmark = pytest.mark.slow
REPO = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def folder(once, installed) -> pathlib.Path:
  """A folder with the examples that the wheel has, and what examples/own_reward.py leaves, which others take."""
  def make(folder):
    rigged.write_questions(folder)
    (repository,) = installed.parent.glob("lib/python*/site-packages/axpo_jax/_repository")
    shutil.copytree(repository / "examples", folder / "examples")
    run(installed, folder, "own_reward")

  return once("examples", make)


def command(name: str) -> str:
  """The command of an example, without what needs the network."""
  text = (REPO / "examples" / f"{name}.py").read_text().split('"""')[1].replace("\\\n", "")
  lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
  (found,) = [line for line in lines if not line.startswith("hf download")]
  return found


def run(installed, folder, name, *more) -> str:
  """Runs it there; what it printed."""
  done = subprocess.run(["bash", "-c", " ".join([command(name), *map(shlex.quote, more)])], cwd=folder,
                        env=environment_of(installed), capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def test_none_is_left_out():
  tested = {name for name in globals() if name.startswith("test_")}
  names = {path.stem for path in (REPO / "examples").glob("*.py")}
  assert {name for name in names if f"test_{name}" not in tested} == set()
  setup = (REPO / "setup.py").read_text()
  assert '"examples/*.py"' in setup  # so a wheel has them


def test_own_reward(folder):
  lines = read_metrics(folder / "runs" / "own_reward")
  assert len(lines) == 2
  assert all("rollout/reward/care/failed_calls" in line and line["rollout/failed"] == 0 for line in lines)


def test_ten_minutes_from_nothing(folder, installed, tmp_path):
  """The block of docs/extending.md, behind its installation."""
  page = (REPO / "docs" / "extending.md").read_text()
  block = page.partition("## Ten minutes from nothing")[2].partition("```bash\n")[2].partition("```")[0]
  install, _, rest = block.partition("\n")
  assert "pip install" in install
  done = subprocess.run(["bash", "-ec", rest], cwd=tmp_path, env=environment_of(installed), capture_output=True,
                        text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-4000:]
  assert len(re.findall(r'^"rollout/reward/brevity": -0', done.stdout, re.MULTILINE)) == 2
  assert (tmp_path / "my_run" / "runs" / "first" / "rl" / "rollouts" / "step_000001.txt").read_text()


def test_own_tool(folder, installed):
  run(installed, folder, "own_tool")
  config = json.loads((folder / "runs" / "own_tool" / "config.json").read_text())
  assert "own_tool:brightness" in config["agent"]["tools"]
  assert len(read_metrics(folder / "runs" / "own_tool")) == 2


def test_own_environment(folder, installed):
  run(installed, folder, "own_environment")
  lines = read_metrics(folder / "runs" / "own_environment")
  assert len(lines) == 2 and all(line["rollout/failed"] == 0 for line in lines)
  assert any(line.get("rollout/stop/done", 0) > 0 for line in lines)  # somebody guessed right


def test_the_user_of_own_environment_may_be_an_llm(folder, installed):
  with chat_server.serving(lambda text: f"Well... {text}") as (url, asked):
    arguments = json.dumps({"url": url, "model": "user"})
    run(installed, folder, "own_environment", f"--config.agent.environment_args={arguments}", "--workdir=runs/llm_user")
  lines = read_metrics(folder / "runs" / "llm_user")
  assert asked and all(line["rollout/failed"] == 0 for line in lines)
  assert {body["model"] for body in asked} == {"user"}


def test_own_benchmark(folder, installed):
  buffer = io.BytesIO()
  Image.new("RGB", (64, 48), "white").save(buffer, "PNG")
  (folder / "bench" / "chartqa").mkdir(parents=True)
  pq.write_table(pa.table({
    "image": [{"bytes": buffer.getvalue(), "path": None}] * 2, "query": ["How many?", "Which one?"],
    "label": [["40"], ["Peru"]], "human_or_machine": ["human", "machine"]}),
    folder / "bench" / "chartqa" / "test.parquet")
  run(installed, folder, "own_benchmark")
  assert "chartqa" in (folder / "runs" / "chartqa" / "eval" / "results.json").read_text()


def test_evaluate_checkpoint(folder, installed):
  printed = run(installed, folder, "evaluate_checkpoint")
  assert "Pass@1" in printed or "pass_at_1" in printed
  assert (folder / "runs" / "evaluated" / "eval" / "results.json").exists()


def test_own_program(folder, installed):
  printed = run(installed, folder, "own_program")
  assert "step 2: gradient norm" in printed
  assert (folder / "runs" / "own" / "policy" / "model.safetensors").exists()


def test_own_trainer(folder, installed):
  printed = run(installed, folder, "own_trainer")
  assert {"prefix", "continuation"} <= set(printed.split())
  assert re.search(r"advantage \+1\.\d+", printed)  # a continuation that came right among others


def test_executor(folder, installed):
  """It runs cells for a pool of another process, as a trainer's `agent.python.url` does."""
  from axpo_jax.agent.tools.remote import KEY_VARIABLE

  with contextlib.closing(socket.socket()) as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
  line = command("executor").replace("--port=8400", f"--port={port}")
  assert f"--port={port}" in line and line.startswith(f"{KEY_VARIABLE}=")
  server = subprocess.Popen(["bash", "-c", f"exec env {line}"], cwd=folder, env=environment_of(installed))

  def ask(method, path, body=None):
    request = urllib.request.Request(
      f"http://127.0.0.1:{port}{path}", method=method, headers={"Authorization": "Bearer secret"},
      data=None if body is None else json.dumps(body).encode())
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as response:
      return json.load(response)

  try:
    children.until(lambda: server.poll() is not None or ask("GET", "/"))
    kernel = ask("POST", "/kernels")["kernel"]
    answer = ask("POST", f"/kernels/{kernel}/cells", {"code": "print(6 * 7)", "timeout": 20, "images": []})
    assert answer["stdout"].strip() == "42"
  finally:
    server.terminate()
    server.wait(30)
