"""launch/sidecar.py: a real SGLang server on the CPU, killed, stopped, and left by its supervisor."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import axpo_jax
from tests.children import until

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
CHECKPOINT = str(REPO / "axpo_jax" / "assets" / "warm_start")
KEY = "tell-nobody-17"
LOOPBACK = ("0100007F:", "00000000000000000000000001000000:")  # as /proc/net writes 127.0.0.1 and ::1


def status_of(pid: int) -> dict[str, str]:
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  return dict(line.split(":\t", 1) for line in lines)


def alive(test) -> set[int]:
  """Processes that are no zombies and pass `test(pid)`."""
  found = set()
  for entry in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if test(int(entry.name)) and not status_of(int(entry.name))["State"].startswith("Z"):
        found.add(int(entry.name))
  return found


def session(leader: int) -> set[int]:
  return alive(lambda pid: os.getsid(pid) == leader)


class Launched:
  """A running launch/sidecar.py."""

  def __init__(self, folder: pathlib.Path, *flags: str):
    self.folder, self.errors = folder, folder / "stderr"
    command = [
      sys.executable, str(REPO / "launch" / "sidecar.py"), "--device=cpu", f"--model={CHECKPOINT}",
      "--port=0", f"--log_folder={folder}", f"--urls_file={folder}/urls.json", *flags,
    ]  # fmt: skip
    self.process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=self.errors.open("w"), text=True, cwd=REPO,
      env=os.environ | {"AXPO_SIDECAR_API_KEY": KEY},
    )  # fmt: skip

  def leaders(self) -> set[int]:
    """The servers: each the leader of a session."""
    return alive(lambda pid: status_of(pid)["PPid"] == str(self.process.pid))

  def server(self) -> int:
    """The process of SGLang once it has children of its own, else 0."""
    return next((pid for pid in self.leaders() if len(session(pid)) > 1), 0)

  def back_after(self, reason: str, times: int) -> int:
    """Waits for the report that the server is back, the n-th time; its process."""
    until(lambda: self.errors.read_text().count("healthy again") == times, 400)
    assert reason in self.errors.read_text()
    assert generates(self.url, KEY) == 4
    return self.server()

  @property
  def url(self) -> str:
    return json.loads((self.folder / "urls.json").read_text())["urls"][0]


def generates(url: str, key: str) -> int:
  """Tokens of an answer; 0 if there is none."""
  body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
  headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
  request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
  with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as reply:
    return len(json.loads(reply.read())["output_ids"])
  return 0


def listening(pids: set[int]) -> set[str]:
  """Addresses where these processes accept TCP connections, as /proc/net writes them."""
  sockets = set()
  for pid in pids:
    for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
      with contextlib.suppress(OSError):
        sockets.add(os.readlink(descriptor))
  lines = [line.split() for table in ("tcp", "tcp6")
           for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]]
  return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.fixture(scope="module")
def launched(sidecar_python, tmp_path_factory):
  running = Launched(tmp_path_factory.mktemp("sidecar"), "--hang_after=10")
  try:
    line = running.process.stdout.readline()
    assert line, running.errors.read_text()
    running.told = json.loads(line)
    yield running
  finally:
    running.process.terminate()
    running.process.wait(60)


def test_serves_where_it_says(launched):
  assert launched.told["urls"] == [launched.url]
  assert generates(launched.url, KEY) == 4


def test_key_is_asked_for_and_told_to_nobody(launched):
  assert not generates(launched.url, "another")
  for pid in set().union(*map(session, launched.leaders())):
    assert KEY.encode() not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  for log in launched.folder.iterdir():
    assert KEY not in log.read_text(), log


def test_listens_on_loopback_only(launched):
  found = listening(set().union(*map(session, launched.leaders())))
  ports = {int(address.rpartition(":")[2], 16) for address in found}
  assert int(launched.url.rpartition(":")[2]) in ports  # we did look at the right processes
  assert not {address for address in found if not address.startswith(LOOPBACK)}


def test_killed_and_hung_servers_come_back(launched):
  first = launched.server()
  os.kill(first, signal.SIGKILL)  # its children must go by themselves
  second = launched.back_after("was ended by SIGKILL", 1)
  assert not session(first)
  os.killpg(second, signal.SIGSTOP)
  launched.back_after("gave no answer", 2)
  assert not session(second)


def test_killed_supervisor_leaves_no_process(launched):
  """Last of those that share the servers. Nobody is left to clean up, so the kernel must."""
  leaders = launched.leaders()
  assert len(leaders) == 1
  os.kill(launched.process.pid, signal.SIGKILL)
  until(lambda: not set().union(*map(session, leaders)), 30)


def test_stop_during_the_start_leaves_no_process(sidecar_python, tmp_path):
  running = Launched(tmp_path)
  leader = until(running.server, 300)  # it has started processes of its own
  running.process.terminate()
  assert running.process.wait(60) == 0
  assert not session(leader)
  assert not (tmp_path / "urls.json").exists()


@pytest.mark.parametrize("flags, named", [
  ([], "--model"),
  (["--model=/nowhere"], "/nowhere"),
  ([f"--model={CHECKPOINT}", "--host=0.0.0.0"], "AXPO_SIDECAR_API_KEY"),
  ([f"--model={CHECKPOINT}", "--device=abacus"], "abacus"),
  ([f"--model={CHECKPOINT}", "--api_key_file=/nowhere"], "/nowhere"),
])
def test_wrong_command_is_refused_in_one_line(flags, named):
  env = {k: v for k, v in os.environ.items() if k != "AXPO_SIDECAR_API_KEY"}
  done = subprocess.run([sys.executable, "launch/sidecar.py", *flags], cwd=REPO, env=env,
                        capture_output=True, text=True, timeout=120)
  assert done.returncode != 0
  assert named in done.stderr
  assert "Traceback" not in done.stderr


def test_sizing_of_the_docs_is_what_is_computed():
  done = subprocess.run([sys.executable, "launch/sidecar.py", "--print_sizing"], cwd=REPO,
                        capture_output=True, text=True, timeout=120, check=True)
  assert done.stdout.strip() in (REPO / "docs" / "sidecar.md").read_text()


def test_the_install_needs_nothing_but_absl():
  """CI and new users run it before anything else is installed."""
  code = """
import runpy, sys

class Only:
  def find_spec(self, name, path=None, target=None):
    top = name.partition(".")[0]
    if top not in sys.stdlib_module_names and top not in ("absl", "axpo_jax"):
      raise ModuleNotFoundError(f"{name} is not installed yet")

sys.meta_path.insert(0, Only())
runpy.run_path("launch/sidecar.py", run_name="imported")
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
