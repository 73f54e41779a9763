"""Two processes train with a real SGLang server: whole runs, killed and resumed, and a server that dies."""

import contextlib
import json
import math
import signal

import pytest

from axpo_jax.engine.sglang.server import Sidecar, SidecarSpec
from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.stages.questions import question_batches
from tests import children
from tests.stages import micro_config, rigged

CONFIG, STEPS = "tests/stages/micro_config.py", 3


@pytest.fixture(scope="module")
def policy(sidecar_python, tmp_path_factory):
  return rigged.write_policy(tmp_path_factory.mktemp("policy"), layers=1)


@pytest.fixture(scope="module")
def start_server(policy, tmp_path_factory):
  """start_server(): a real server with the policy that every run begins with."""
  def make() -> Sidecar:
    return Sidecar(SidecarSpec(
      model=str(policy), device="cpu", port=0, context_length=400, max_running=16,
      max_total_tokens=8192, extra_env={"OMP_NUM_THREADS": "1"}), tmp_path_factory.mktemp("sidecar"))

  return make


@pytest.fixture(scope="module")
def changes(policy, tmp_path_factory) -> dict:
  """Of the micro config: parameters and rows are split over both processes."""
  questions = rigged.write_questions(tmp_path_factory.mktemp("data"))
  return {
    "stages": ("rl",), "model.checkpoint": str(policy), "data.path": str(questions),
    "data.eval_path": str(questions), "mesh.fsdp": 2, "mesh.tensor": 2, "batch.rows": 4,
    "rl.steps": STEPS, "rl.questions": 2, "eval.questions": 1, "eval.rollouts": 1, "eval.every": 0,
    "checkpoint.every": 1, "log.dump_every": 0, "rollout.engine": "sglang",
    "rollout.sglang.length": 384, "rollout.sglang.push_dtype": "float32",
    "rollout.sglang.push_shard_bytes": 100_000, "rollout.sglang.fleet.probe_s": 0.5}


def job(workdir, changes, server: Sidecar, count: int = 2):
  changes = changes | {"rollout.urls": tuple(server.urls)}
  return children.job(CONFIG, workdir, changes, count, free_port("127.0.0.1"))


def steps(workdir):
  return [line["step"] for line in read_metrics(workdir)] if workdir.exists() else []


def test_killed_and_resumed(changes, start_server, tmp_path):
  """Killed in the second step, the main process alone, and in the third, both at once; then one process
  goes on to the end."""
  workdir = tmp_path / "run"
  with start_server() as server:
    with job(workdir, changes, server) as broken:
      broken.until(lambda: 1 in steps(workdir))
      broken.processes[0].send_signal(signal.SIGKILL)
      main, other = broken.wait()
      # The other one ends by itself: its coordinator is gone.
      assert main == -signal.SIGKILL and other not in (None, 0), str(broken)
    with job(workdir, changes, server) as broken:
      broken.until(lambda: 2 in steps(workdir))
      for process in broken.processes:
        process.send_signal(signal.SIGKILL)
      assert broken.wait() == [-signal.SIGKILL] * 2, str(broken)
    with job(workdir, changes, server, count=1) as whole:
      assert whole.wait() == [0], str(whole)
  lines = read_metrics(workdir)
  assert [line["step"] for line in lines] == list(range(STEPS + 1))
  assert all(math.isfinite(value) for line in lines for value in line.values())
  for line in lines[1:]:
    # Each step was drawn from the weights before it, which both processes wrote and one installed.
    assert (line["engine/servers_healthy"], line["rollout/failed"], line["rollout/lag_max"]) == (1, 0, 0)
    assert line["train/logp_gap_abs_mean"] < 1e-5 and line["train/logp_gap_abs_max"] < 1e-3
  assert min(line["engine/push_bytes"] for line in lines[1:]) > 1e5
  assert (workdir / "rl" / "policy" / "model.safetensors").exists()
  # No question was left out or asked twice.
  saved = workdir / "rl" / "checkpoints" / str(STEPS) / "iterator" / "value.json"
  assert json.loads(saved.read_text())["value"] == frontier(changes)


def frontier(changes: dict):
  """Where the questions of all steps end, in a run that nothing breaks."""
  config = micro_config.get_config()
  config.update_from_flattened_dict({name: changes[name] for name in ("data.path", "rl.questions")})
  questions = question_batches(config)
  for _ in range(STEPS):
    next(questions)
  return questions.get_state()


def test_all_end_with_the_error_when_the_server_dies_for_good(changes, start_server, tmp_path):
  """The main process asks in vain; the other one learns why, and neither waits for ever."""
  workdir = tmp_path / "run"
  few = changes | {"rollout.sglang.fleet.deadline_s": 4, "rollout.sglang.fleet.probe_timeout_s": 4}
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(start_server())
    with job(workdir, few, server) as lost:
      lost.until(lambda: 0 in steps(workdir))
      stack.close()
      codes = lost.wait()
      assert None not in codes and 0 not in codes, str(lost)
      for error in lost.errors():
        assert "NoServer: none of 1 servers was healthy for 4 s" in error
  assert STEPS not in steps(workdir)
