"""The supervisor: processes that die, hang, pause, or never come up; a real SGLang server last.

What needs no model is tried on small HTTP servers that behave as a file tells them to.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time

import pytest

import axpo_jax
from axpo_jax.engine.sglang.server import Sidecar, SidecarError, SidecarSpec, sizing
from axpo_jax.engine.sglang.server.sidecar import Keeper, Program, ask, group_members
from axpo_jax.engine.sglang.server.spec import (
  API_KEY_VARIABLE,
  free_port,
  server_command,
  server_environment,
)
from tests.children import until

CHECKPOINT = str(pathlib.Path(axpo_jax.__file__).parent / "assets" / "warm_start")
# Answers like a server that is healthy, paused, or broken, as the word in the file argv[2] says.
SERVER = """
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    mood = pathlib.Path(sys.argv[2]).read_text()
    good = mood == "healthy" or (mood == "paused" and self.path == "/server_info")
    self.send_response(200 if good else 503)
    self.end_headers()
  def log_message(self, *args):
    pass
if pathlib.Path(sys.argv[2]).read_text() == "broken":
  sys.exit("no weights in this folder")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def spec(**fields) -> SidecarSpec:
  return SidecarSpec(**{"model": CHECKPOINT, "device": "cpu", "port": 0, **fields})


@pytest.fixture
def keep(tmp_path):
  """keep(mood, **spec fields): a keeper of a small HTTP server, and what it reports."""
  kept = []

  def make(mood="healthy", **fields):
    (tmp_path / "mood").write_text(mood)
    port = free_port("127.0.0.1")
    fields = {"probe_every": 0.1, "hang_after": 20.0, "backoff": 0.1, "start_timeout": 30, **fields}
    reports = []
    program = Program(
      "server 0", "http://a-name-for-others", f"http://127.0.0.1:{port}",
      lambda: [sys.executable, "-c", SERVER, str(port), str(tmp_path / "mood")],
      lambda scratch: dict(os.environ), tmp_path / "log",
    )  # fmt: skip
    keeper = Keeper(program, spec(**fields), reports.append)
    keeper.start()
    kept.append(keeper)
    return keeper, reports

  yield make
  for keeper in kept:
    keeper.end()
    keeper.join()


def test_killed_server_comes_back_at_the_same_url(keep):
  keeper, reports = keep()
  pid = until(lambda: keeper.state == "serving" and keeper.status().pid)
  os.killpg(pid, signal.SIGKILL)
  until(lambda: keeper.restarts == 1 and keeper.state == "serving")
  assert keeper.status().pid != pid
  assert ask(f"{keeper.program.address}/health") == 200
  assert "was ended by SIGKILL" in reports[0]


def test_hanging_server_is_replaced(keep):
  keeper, reports = keep(hang_after=1.0)
  pid = until(lambda: keeper.state == "serving" and keeper.status().pid)
  os.killpg(pid, signal.SIGSTOP)
  until(lambda: keeper.restarts == 1 and keeper.state == "serving")
  assert not group_members(pid)
  assert "gave no answer" in reports[0]


def test_paused_server_is_left_alone_until_the_limit(keep, tmp_path):
  """A server in a weight push answers but does not generate; for ever means it was forgotten."""
  keeper, reports = keep(hang_after=1.5, pause_limit=4.0)
  until(lambda: keeper.state == "serving")
  (tmp_path / "mood").write_text("paused")
  began = time.monotonic()
  until(lambda: keeper.state != "serving")
  assert time.monotonic() - began > 3.5
  assert "generated nothing" in reports[0]


def test_waits_longer_before_every_restart_in_a_row(keep, tmp_path):
  keeper, reports = keep(backoff=1.0, backoff_max=3.0)
  pid = until(lambda: keeper.state == "serving" and keeper.status().pid)
  (tmp_path / "mood").write_text("broken")
  os.killpg(pid, signal.SIGKILL)
  until(lambda: len(reports) == 4)
  assert [r.split("again in ")[1].split()[0] for r in reports] == ["1", "2", "3", "3"]
  assert "ended with code 1" in reports[1]


def test_server_that_never_comes_up_is_not_tried_again(keep):
  keeper, reports = keep("broken")
  keeper.join(30)
  assert keeper.state == "failed"
  assert keeper.restarts == 0
  assert "no weights in this folder" in keeper.tail()
  assert not reports


def test_start_timeout_ends_a_server_that_is_never_healthy(keep):
  keeper, _ = keep("unhealthy", start_timeout=1.0)
  keeper.join(30)
  assert keeper.state == "failed"
  assert "not healthy within start_timeout" in keeper.reason


def test_tail_is_of_the_last_life_only(keep, tmp_path):
  (tmp_path / "log").write_text("an old story\n")
  keeper, _ = keep("broken")
  keeper.join(30)
  assert "an old story" not in keeper.tail()
  assert "an old story" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("fields, named", [
  ({"device": "tpu"}, "tpu"),
  ({"servers": 0}, "servers=0"),
  ({"model": "/nowhere"}, "/nowhere"),
  ({"tensor_parallel": 3}, "tensor_parallel=3"),
  ({"host": "0.0.0.0"}, API_KEY_VARIABLE),
  ({"host": "gpu-host"}, API_KEY_VARIABLE),
  ({"device": "cuda", "servers": 2, "tensor_parallel": 2, "gpus": ("0", "1", "2")}, "takes 4"),
])
def test_wrong_spec_is_refused_by_name(fields, named):
  with pytest.raises(SidecarError, match=named):
    spec(**fields)


def test_gpus_are_dealt_out_in_turn(tmp_path):
  wanted = spec(device="cuda", servers=2, tensor_parallel=2, gpus=("3", "5", "6", "7"))
  assert [server_environment(wanted, i, "/s")["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == [
    "3,5", "6,7"]
  assert "--tensor-parallel-size=2" in server_command(wanted, 1)
  counted = spec(device="cuda", servers=2, tensor_parallel=2)
  assert server_environment(counted, 1, "/s")["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_key_is_on_no_command_line_and_in_no_text():
  wanted = spec(host="0.0.0.0", api_key="tell-nobody", extra_flags=("--log-level=debug",))
  assert "tell-nobody" not in repr(wanted)
  assert not any("tell-nobody" in word for word in server_command(wanted, 1))
  assert server_environment(wanted, 0, "/s")[API_KEY_VARIABLE] == "tell-nobody"
  assert server_command(wanted, 1)[-1] == "--log-level=debug"  # the user's flags win


def test_parameters_are_those_of_the_model():
  import jax
  from flax import nnx

  from axpo_jax.model.presets import PRESETS
  from axpo_jax.model.qwen3_vl import Qwen3VL

  for name in ("tiny", "2b", "8b"):
    config = PRESETS[name]
    shapes = nnx.eval_shape(lambda config=config: nnx.state(Qwen3VL(config, rngs=nnx.Rngs(0))))
    assert sizing.parameters(config) == sum(x.size for x in jax.tree.leaves(shapes)), name


def test_kv_pool_of_the_8b_on_one_gpu():
  """36 layers x 8 heads x 128 x (K and V) x 2 bytes; 80 GB x 0.8 less 8.767 billion weights."""
  from axpo_jax.model.presets import PRESETS

  assert sizing.kv_bytes_per_token(PRESETS["8b"]) == 147_456
  tokens = sizing.tokens_that_fit(PRESETS["8b"], 1, 80, 0.8)
  assert abs(tokens - (64e9 - 2 * 8.767e9) / 147_456) < 100


def test_larger_policy_needs_more_gpus(tmp_path):
  from axpo_jax.model.presets import PRESETS

  for name, gpus in (("2b", 1), ("8b", 1), ("32b", 2)):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name].to_hf()))
    assert sizing.gpus_needed(str(tmp_path), "cuda", 80, 0.8) == gpus
  assert sizing.gpus_needed(str(tmp_path), "cpu", 80, 0.8) == 1
  with pytest.raises(SidecarError, match="16 GB"):
    sizing.gpus_needed(str(tmp_path), "cuda", 16, 0.5)


# --- a real SGLang server; more of it in tests/launch/test_sidecar.py ---


def test_bad_checkpoint_says_so_and_leaves_nothing(sidecar_python, tmp_path):
  """Fails after SGLang has started its processes: they must end too."""
  for file in pathlib.Path(CHECKPOINT).iterdir():
    data = b"not weights" if file.suffix == ".safetensors" else file.read_bytes()
    (tmp_path / file.name).write_bytes(data)
  sidecar = Sidecar(spec(model=str(tmp_path)), tmp_path / "logs")
  with pytest.raises(SidecarError, match=r"(?s)server 0 .*ended .*server-0\.log.*SafetensorError"):
    sidecar.start()
  assert not session(sidecar.status()[0].pid)
  assert sidecar.status()[0].state == "failed"


def session(leader: int) -> list[int]:
  """Live processes of a session."""
  found = []
  for entry in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      dead = "\nState:\tZ" in (entry / "status").read_text()
      if os.getsid(int(entry.name)) == leader and not dead:
        found.append(int(entry.name))
  return found
