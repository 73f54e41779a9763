"""The fork server: loads Python's packages once, then makes a kernel in milliseconds.

It runs as `python -I` with a small environment of its own and talks over one descriptor. Settings
come in, {"ready"} or {"error"} goes out; then every byte brings the socket of a new kernel, over which
the trainer is sent a handle to kill it. What else a kernel's socket carries is said in `supervisor`.

    trainer ── fork server (no untrusted code; sees neither the trainer's files nor a network)
                 └─ supervisor, process 1 of the kernel's namespaces: time limit, output
                      └─ kernel, process 2: the cells, and whatever they start

It ends when the trainer closes the descriptor or dies; so do the supervisors, whose own sockets
close then. Meanwhile it checks the memory of every kernel and kills those whose processes together hold
too much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
import select
import signal
import socket
import tempfile
import time
from typing import Any

from axpo_jax.agent.tools.sandbox import cgroup, isolation, processes, supervisor, wire
from axpo_jax.agent.tools.sandbox.isolation import IsolationError

NAMESPACES, RLIMITS = "namespaces", "rlimits"
_WATCH_SECONDS = 0.1  # between two checks of memory


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the trainer asks for.

  Attributes:
    isolation: NAMESPACES, or RLIMITS where the host allows none.
    memory: bytes of one process's address space, and of all processes of a kernel together.
    cpu_seconds: CPU time of each process of a kernel, over all its cells.
    file_bytes: of one file; with namespaces, of all files together.
    processes: processes and threads of a kernel at once; without namespaces the limit is this much
      above what the user runs when the kernel starts.
    output_bytes: kept of a cell's stdout, and of its stderr; the middle of more is dropped.
  """

  isolation: str
  memory: int
  cpu_seconds: int
  file_bytes: int
  processes: int
  output_bytes: int


def main(descriptor: int) -> None:
  """Serves until the other side of `descriptor` is closed."""
  control = socket.socket(fileno=descriptor)
  message, _ = wire.receive(control)
  settings = Settings(**message["settings"])
  proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  # Files in memory count there too. Opened here: in the empty world there is no /sys.
  groups = cgroup.Groups(cgroup.open_parent(), settings.memory + settings.file_bytes)
  try:
    from axpo_jax.agent.tools.sandbox import shell
    kernel = _warmed(shell)
    isolation.adopt_orphans()
    if settings.isolation == NAMESPACES:
      isolation.enter_empty_world()
    isolation.check_kernel()
  except (IsolationError, ImportError, OSError) as error:
    wire.send(control, {"error": f"{type(error).__name__}: {error}"})
    return
  os.environ.clear()
  os.environ.update({"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": isolation.FOLDER,
                     "TMPDIR": isolation.FOLDER, "LANG": "C.UTF-8"})
  tempfile.tempdir = None
  gc.collect()
  gc.freeze()  # the collector would write to, and so copy, every shared page
  wire.send(control, {"ready": True})
  _serve(control, settings, proc, kernel, groups)


def _warmed(shell) -> Any:
  """A kernel that has loaded what cells usually need and drawn a figure once."""
  import scipy  # noqa: F401
  import sympy  # noqa: F401
  kernel = shell.Kernel()
  kernel.run("import matplotlib.pyplot as plt\nplt.plot([0])\nplt.show()")
  kernel.shown.clear()
  kernel.shell.user_ns.pop("plt", None)
  return kernel


def _serve(control: socket.socket, settings: Settings, proc: int, kernel: Any, groups: cgroup.Groups) -> None:
  known: set[int] = set()  # supervisors, where they are forked without a helper
  watch = time.monotonic()
  while True:
    if select.select([control], [], [], _WATCH_SECONDS)[0]:
      data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
      if not data:
        break
      for descriptor in descriptors:
        _spawn(control, descriptor, settings, proc, kernel, known, groups)
    if time.monotonic() >= watch:  # not after every message: it takes a while when there are many
      _watch(settings, proc, known, groups)
      watch = time.monotonic() + _WATCH_SECONDS


def _watch(settings: Settings, proc: int, known: set[int], groups: cgroup.Groups) -> None:
  """Reaps exited kernels, enforces memory limits, and kills kernels whose supervisor died."""
  with contextlib.suppress(ChildProcessError):
    while (dead := os.waitpid(-1, os.WNOHANG)[0]):
      known.discard(dead)
      groups.ended(dead)
  groups.remove()
  for child in processes.children(os.getpid(), proc):
    if settings.isolation == RLIMITS and child not in known:
      os.kill(child, signal.SIGKILL)
    else:
      _check_memory(child, settings, proc)


def _spawn(control: socket.socket, descriptor: int, settings: Settings, proc: int, kernel: Any,
           known: set[int], groups: cgroup.Groups) -> None:
  """Forks a supervisor, or a helper that enters new namespaces and forks the supervisor in them.

  The trainer is sent a handle by which it can kill the supervisor.
  """
  group = groups.make()
  child = os.fork()
  with socket.socket(fileno=descriptor) as trainer:
    if child:
      groups.keep(group, child)
      if settings.isolation == RLIMITS:
        known.add(child)
        _send_handle(trainer, child)
      return
    status = 1
    try:
      control.close()
      groups.enter(group)
      _become_supervisor(trainer, settings, proc, kernel)
      status = 0
    except BaseException as error:  # a forked child must never return into the server's loop
      os.write(2, f"a kernel could not start: {type(error).__name__}: {error}\n".encode())
    finally:
      os._exit(status)


def _become_supervisor(trainer: socket.socket, settings: Settings, proc: int, kernel: Any) -> None:
  separate = settings.isolation == NAMESPACES
  isolation.drop_root()
  with open(os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc), "w") as file:
    file.write("1000")  # if the machine runs out of memory, kernels go first and not the trainer
  if separate:
    isolation.unshare_cell(proc)
    child = os.fork()
    if child:
      _send_handle(trainer, child)
      return
  else:
    settings = dataclasses.replace(settings, processes=settings.processes + _threads_of_user())
  os.close(proc)
  supervisor.run(trainer, settings, kernel, separate=separate)


def _send_handle(trainer: socket.socket, pid: int) -> None:
  handle = os.pidfd_open(pid)
  with contextlib.suppress(OSError):  # the trainer may have lost interest
    socket.send_fds(trainer, [b"k"], [handle])
  os.close(handle)


def _check_memory(supervisor_pid: int, settings: Settings, proc: int) -> None:
  """Kills a kernel whose processes hold more memory together than one of them may.

  RLIMIT_AS bounds one process; this bounds several together.
  """
  family = [supervisor_pid, *processes.descendants(supervisor_pid, proc)]
  if len(family) <= 2:
    return
  inherited = _own_memory(os.getpid(), proc)  # pages of the fork server that nobody has copied
  if sum(max(_own_memory(pid, proc) - inherited, 0) for pid in family) > settings.memory:
    for pid in family[1:]:  # the supervisor reports it, and ends what is left
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _own_memory(pid: int, proc: int) -> int:
  """Resident bytes that no file backs."""
  try:
    with open(os.open(f"{pid}/status", os.O_RDONLY, dir_fd=proc)) as file:
      fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
  except (OSError, ValueError, KeyError):  # it has just died
    return 0


def _threads_of_user() -> int:
  """Processes and threads that the process limit of this user counts already."""
  count = 0
  for folder in pathlib.Path("/proc").iterdir():
    with contextlib.suppress(OSError):
      if folder.name.isdigit() and folder.stat().st_uid == os.getuid():
        count += len(os.listdir(folder / "task"))
  return count
