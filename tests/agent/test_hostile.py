"""Code that means harm, in the python tool. Each attempt is contained, the episode goes on, the
trainer's memory stays flat, and a list of attempts and outcomes is printed.

Run with `-s` to see the list. What only namespaces hold back is skipped where the host forbids
them or where the sandbox is the other one; docs/tools.md says which guarantees are left there. Every attempt stays small where it is
*not* contained (a fork bomb of bounded depth, files of bounded size), so that a broken sandbox
fails a test and not the machine.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
from axpo_jax.agent.tools.python import PythonTool

SECRET = "the gold answers"
MEMORY_MB = 1024
NAMESPACES = "namespaces"
RESULTS = []

# Bounded: at most 2,000 forks even where nothing stops them, all of which end by themselves.
FORK_BOMB = """
import os, time
born, failed = 0, 0
for i in range(2000):
  try:
    if os.fork() == 0:
      time.sleep(3)
      os._exit(0)
    born += 1
  except OSError:
    failed += 1
print('born', born, 'failed', failed)
"""

SHARED_BURDEN = """
import os, mmap, time
for i in range(6):
  if os.fork() == 0:
    held = bytearray(400 << 20)
    for at in range(0, len(held), 4096): held[at] = 1
    time.sleep(20)
    os._exit(0)
time.sleep(20)
"""

BACKGROUND = """
import os, subprocess, sys
code = "import os, time\\nwhile True:\\n  open('beat', 'a').write('x'); time.sleep(0.01)"
for i in range(3): subprocess.Popen([sys.executable, '-S', '-c', code], start_new_session=True)
import time
while not (os.path.exists('beat') and os.path.getsize('beat')): time.sleep(0.01)
print('left', True)
"""

OUTSIDE = """
import os
done = []
for path in ('/usr/x', '/etc/x', '/x', '/bin/x', '/dev/x', '/root/x', os.path.expanduser('~root/x')):
  try:
    open(path, 'w').write('x'); done.append(path)
  except OSError: pass
print('written', done)
"""

NETWORK = """
import socket
done = []
for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_INET, ('1.1.1.1', 53)),
                        (socket.AF_INET6, ('::1', {port})), (socket.AF_UNIX, {path!r}),
                        (socket.AF_UNIX, '\\0' + {path!r})):
  try:
    s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(1); s.connect(address)
    done.append(address)
  except OSError: pass
print('connected', done)
"""

# The first environment of a process stays in its memory, whatever os.environ says now: it lies
# above the stack, after the name of the program.
READ_OWN_MEMORY = """
import ctypes
start = ctypes.c_void_p.in_dll(ctypes.CDLL(None), 'program_invocation_name').value
print(ctypes.string_at(start, 4096 - start % 4096))
"""


@pytest.fixture(scope="module", params=[NAMESPACES, "rlimits"])
def tool(request):
  """Both kinds of sandbox, with limits tighter than a run's."""
  config = KernelConfig(isolation=request.param, memory_mb=MEMORY_MB, cpu_seconds=10,
                        file_mb=16, processes=16, warm=1)
  made = PythonTool(config)
  os.environ["AXPO_TEST_KEY"] = SECRET
  try:
    made.start()
  except SandboxError as error:
    pytest.skip(str(error))
  finally:
    del os.environ["AXPO_TEST_KEY"]
  yield made
  made.close()


@pytest.fixture(scope="module", autouse=True)
def printed_list():
  yield
  width = max((len(name) for name, _ in RESULTS), default=0)
  print("\n" + "\n".join(f"{name:{width}}  {outcome}" for name, outcome in RESULTS))


@pytest.fixture
def attempt(tool, request):
  """Runs cells in one episode, and afterwards checks that all is as it was."""
  box = ToolBox([tool], ["execute"])
  state = EpisodeState("q", [])
  before = resident_mb()

  def run(code, timeout=10):
    seen = asyncio.run(box.call("python", {"code": code, "timeout": timeout}, state))
    RESULTS.append((request.node.name.removeprefix("test_"), summary(seen)))
    return seen

  yield run
  assert asyncio.run(box.call("python", {"code": "6 * 7"}, state)).text == "42", "it goes on"
  assert resident_mb() - before < 64, "the trainer's memory is flat"
  box.end_episode(state)


@pytest.fixture
def namespaces_only(tool):
  if tool.isolation != NAMESPACES:
    pytest.skip("only namespaces hold this back")


def summary(seen):
  last = seen.text.strip().splitlines()[-1] if seen.text.strip() else ""
  return ascii(f"{seen.error or 'ok'}: {last[:100]}")[1:-1]


def resident_mb():
  with open("/proc/self/status") as status:
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def test_fork_bomb(attempt):
  seen = attempt(FORK_BOMB)
  assert "failed" in seen.text
  born = int(seen.text.split()[1])
  assert 0 < born <= 100  # 16, and without namespaces as many as the user's others ended meanwhile


def test_fork_bomb_that_replaces_itself(attempt):
  seen = attempt("import os, time\nend = time.time() + 8\nwhile time.time() < end:\n"
                 "  try:\n    if os.fork(): time.sleep(0.01)\n  except OSError: time.sleep(0.01)",
                 timeout=2)
  assert seen.error in ("timeout", "kernel_died")


def test_100_GB_allocation(attempt):
  seen = attempt("import numpy as np\nnp.ones(100 << 30, np.uint8).sum()")
  assert seen.error == "cell_error" and "MemoryError" in seen.text


def test_100_GB_bit_by_bit(attempt):
  seen = attempt("held = []\nfor i in range(100): held.append(bytearray(1 << 30))")
  assert seen.error in ("cell_error", "kernel_died")


def test_memory_shared_among_children(attempt):
  seen = attempt(SHARED_BURDEN, timeout=15)
  assert seen.error == "kernel_died" and "memory" in seen.text


def test_infinite_loop(attempt):
  assert attempt("while True: pass", timeout=1).error == "timeout"


def test_infinite_loop_that_ignores_signals(attempt):
  seen = attempt("import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
                 "  except (OSError, ValueError): pass\nwhile True: pass", timeout=1)
  assert seen.error == "timeout"


def test_output_flood(attempt):
  seen = attempt("while True: print('x' * 1000)", timeout=2)
  assert seen.error == "timeout" and "left out" in seen.text and len(seen.text) < 200_000


def test_binary_flood_from_children(attempt):
  seen = attempt("import subprocess\nsubprocess.run('cat /dev/urandom', shell=True)", timeout=2)
  assert seen.error == "timeout" and len(seen.text) < 200_000


def test_forged_answers(attempt):
  """The kernel's own channel, found by its number, filled with lengths that lie."""
  seen = attempt("import os\nos.write(3, b'\\xff\\xff\\xff\\xff' + b'x' * 1000)\nNone")
  assert seen.error == "kernel_died"
  seen = attempt("import os, struct\nh = b'{\"failed\": false, \"figures\": [[99999, 99999]], "
                 "\"sizes\": [29999400003]}'\nos.write(3, struct.pack('!I', len(h)) + h)\nNone")
  assert seen.error == "kernel_died"


def test_figure_of_1e9_pixels(attempt):
  seen = attempt("import matplotlib.pyplot as plt\nplt.figure(figsize=(316.3, 316.3), dpi=100)\n"
                 "plt.plot([1]); plt.show()", timeout=30)
  assert seen.error is None and seen.images[0].width * seen.images[0].height <= 2_000_000
  seen = attempt("import PIL.Image\nPIL.Image.new('RGB', (31623, 31623))", timeout=30)
  assert not seen.images and seen.error in ("cell_error", "kernel_died")


def test_large_files(attempt):
  seen = attempt("open('f', 'wb').write(bytes(64 << 20))")
  assert seen.error == "cell_error" and "OSError" in seen.text


def test_many_large_files(attempt, namespaces_only):
  seen = attempt("for i in range(64): open(f'f{i}', 'wb').write(bytes(4 << 20))")
  assert seen.error == "cell_error" and "No space left" in seen.text


def test_environment(attempt):
  """The trainer's environment holds a secret while the sandbox starts (see `tool`)."""
  seen = attempt("import os, json\nprint(json.dumps(sorted(os.environ)))")
  assert set(json.loads(seen.text)) <= {"PATH", "HOME", "LANG", "TMPDIR"}
  seen = attempt(READ_OWN_MEMORY)
  assert "OPENBLAS_NUM_THREADS=1" in seen.text  # the right place
  assert SECRET not in seen.text


def test_trainers_files(attempt, tmp_path, namespaces_only):
  (tmp_path / "gold.json").write_text(SECRET)
  places = [str(tmp_path / "gold.json"), str(pathlib.Path(__file__)), "/etc/shadow", "/etc/hosts",
            "/proc/1/environ", f"/proc/{os.getpid()}/environ", "/proc/self/root", "/sys", "/var"]
  seen = attempt(f"import os\nprint([p for p in {places} if os.path.exists(p)])")
  assert seen.text == "[]"
  seen = attempt("import subprocess\nprint(subprocess.run('grep -rl \"gold answers\" / "
                 "--include=gold.json -s', shell=True, capture_output=True, text=True).stdout)", 60)
  assert "gold" not in seen.text


def test_writing_outside_its_folder(attempt, namespaces_only):
  assert attempt(OUTSIDE).text == "written []"


def test_leaving_by_chroot_mount_and_namespaces(attempt, namespaces_only):
  seen = attempt("import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                 "print(libc.mount(b'none', b'/usr', b'tmpfs', 0, None), libc.umount2(b'/sandbox', 2),"
                 " libc.chroot(b'/sandbox'), libc.sethostname(b'x', 1), libc.setuid(0),"
                 " libc.ptrace(16, 1, 0, 0))")
  assert seen.text == "-1 -1 -1 -1 -1 -1"


def test_sockets(attempt, tmp_path):
  import socket
  path = str(tmp_path / "s")
  with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
    local.bind(path)
    local.listen()
    seen = attempt(NETWORK.format(port=server.getsockname()[1], path=path))
  assert seen.text == "connected []"


def test_killing_its_parent(attempt, namespaces_only):
  """Process 1 of the namespaces cannot be killed from within, nor anyone outside be named."""
  seen = attempt("import os, signal, time\nfor pid in (os.getppid(), 0, -1):\n"
                 "  try:\n    if pid or not os.setsid(): os.kill(pid, 9)\n"
                 "  except OSError as e: print(e)\nprint('still here')")
  assert seen.text.endswith("still here") or seen.error == "kernel_died"
  seen = attempt(f"import os\nfor pid in ({os.getpid()}, {os.getppid()}):\n"
                 "  try: os.kill(pid, 9); print('killed')\n  except OSError as e: print(e)")
  assert "killed" not in seen.text


def test_reading_its_parents_memory(attempt):
  seen = attempt("import os, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                 "handle = os.pidfd_open(1)\n"
                 "print([libc.syscall(438, handle, fd, 0) for fd in range(3, 12)])")  # pidfd_getfd
  assert set(seen.text.strip("[]").split(", ")) == {"-1"}


def test_background_processes(attempt, tool):
  """They stop with the cell, and die with the kernel."""
  assert attempt(BACKGROUND).text == "left True"
  size = int(attempt("import os\nos.path.getsize('beat')").text)
  time.sleep(0.3)  # time in which one that still ran would write
  assert int(attempt("os.path.getsize('beat')").text) == size


def test_background_threads(attempt):
  code = ("import threading, time\ncount = 0\ndef tick():\n  global count\n  while True:\n"
          "    count += 1; time.sleep(0.001)\nthreading.Thread(target=tick, daemon=True).start()")
  attempt(code)
  time.sleep(1)
  assert int(attempt("count").text) < 400  # stopped between the cells; it would be near 1,000


def test_a_kernel_that_is_let_go_dies_with_everything(tool):
  """Also what set itself apart: the number of processes is what it was."""
  box, state = ToolBox([tool], ["execute"]), EpisodeState("q", [])
  before = settled_descendants()
  code = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(600)"
  seen = asyncio.run(box.call("python", {"code": code}, state))
  assert seen.error is None
  box.end_episode(state)
  assert settles(lambda: len(descendants()) <= len(before))


def test_a_fork_server_that_was_killed_is_started_again(tool):
  box = ToolBox([tool], ["execute"])
  os.kill(tool._pool._server.pid, signal.SIGKILL)
  assert settles(lambda: tool._pool._server is None or tool._pool._server.poll() is not None)
  for _ in range(3):
    state = EpisodeState("q", [])
    assert asyncio.run(box.call("python", {"code": "6 * 7"}, state)).text == "42"
    box.end_episode(state)


def test_everything_ends_with_the_trainer(tool):
  """SIGKILL of the trainer leaves no process."""
  script = ("import asyncio, sys, os, signal\n"
            "from axpo_jax.agent.tools.base import EpisodeState, ToolBox\n"
            "from axpo_jax.agent.tools.kernels import KernelConfig\n"
            "from axpo_jax.agent.tools.python import PythonTool\n"
            f"tool = PythonTool(KernelConfig(isolation={tool.isolation!r}, warm=2))\n"
            "box = ToolBox([tool], ['execute'])\n"
            "seen = asyncio.run(box.call('python', {'code': '1'}, EpisodeState('q', [])))\n"
            "assert seen.text == '1', seen\n"
            "from pathlib import Path\n"
            "me = os.getpid()\n"
            "def children(pid): return [c for f in Path(f'/proc/{pid}/task').glob('*/children')"
            " for c in f.read_text().split()]\n"
            "server = children(me)\n"
            "inner = [c for s in server for c in children(s)]\n"
            "print(*server, *inner, flush=True)\n"
            "os.kill(me, signal.SIGKILL)\n")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
  family = [int(pid) for pid in done.stdout.split()]
  assert len(family) >= 2, done.stderr
  assert settles(lambda: not [pid for pid in family if alive(pid)])


def alive(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def descendants():
  family = [os.getpid()]
  for pid in family:
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
      with contextlib.suppress(OSError):
        family += [int(child) for child in path.read_text().split()]
  return family[1:]


def settled_descendants():
  """Once the pool has started the kernel that it keeps warm: for half a second there is no new one."""
  now, since = descendants(), time.monotonic()
  while time.monotonic() - since < 0.5:
    time.sleep(0.05)
    if (found := descendants()) != now:
      now, since = found, time.monotonic()
  return now


def settles(condition, seconds=60):
  """True as soon as the condition holds; False if it never does."""
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      return False
    time.sleep(0.05)
  return True
