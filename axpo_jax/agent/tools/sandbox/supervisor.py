"""The process between the trainer and one kernel; in namespaces it is process 1 of them.

Trainer to supervisor: {"op": "run", "code", "timeout", "images"} with raw pixels. Supervisor to
trainer, one answer a message:
  {"status": "ok" | "failed" | "timeout" | "died", "stdout", "stderr", "figures"} with raw pixels.
After "timeout" and "died" the kernel and all it started are dead, and the supervisor ends.

The clock is here and not with the trainer, whose event loop may be held up by its own work for
longer than a cell may take. Between two cells everything that the kernel has started is stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import tempfile
import time
from typing import Any

from axpo_jax.agent.tools.sandbox import isolation, processes, seccomp, wire


def run(trainer: socket.socket, settings: Any, kernel: Any, *, separate: bool) -> None:
  """Starts the kernel and serves the trainer until one of them is gone.

  Args:
    trainer: the kernel's socket.
    settings: server.Settings.
    kernel: the warmed shell.Kernel to fork.
    separate: whether this is process 1 of its own namespaces.
  """
  os.setsid()  # a signal to the process group must not reach the fork server
  isolation.adopt_orphans()
  with contextlib.ExitStack() as stack:
    if separate:
      isolation.enter_cell(settings.file_bytes)
    else:
      os.chdir(stack.enter_context(tempfile.TemporaryDirectory(prefix="axpo_kernel_")))
      os.environ.update({"HOME": os.getcwd(), "TMPDIR": os.getcwd()})
    isolation.hide_memory()
    cell = _Cell(trainer, settings, kernel, separate=separate)
    try:
      cell.serve()
    except wire.WireError:
      pass  # the trainer has closed the kernel
    finally:
      cell.signal_all(signal.SIGKILL)


class _Cell:
  """One kernel under supervision; the arguments are those of `run`."""

  def __init__(self, trainer: socket.socket, settings: Any, kernel: Any, *, separate: bool):
    self.trainer, self.separate = trainer, separate
    self.proc = -1 if separate else os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    self.stdout, self.stderr = _Output(settings.output_bytes), _Output(settings.output_bytes)
    self.sock, theirs = socket.socketpair()
    self.exit_status: int | None = None
    self.pid = os.fork()
    if self.pid == 0:
      self._become_kernel(theirs, settings, kernel)
    theirs.close()
    self.handle = os.pidfd_open(self.pid)
    for output in (self.stdout, self.stderr):
      os.close(output.writer)

  def _become_kernel(self, sock: socket.socket, settings: Any, kernel: Any) -> None:
    try:
      os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
      os.dup2(self.stdout.writer, 1)
      os.dup2(self.stderr.writer, 2)
      mine = os.dup2(sock.detach(), 3)
      os.closerange(4, os.sysconf("SC_OPEN_MAX"))
      isolation.limit_resources(
        memory=settings.memory, cpu_seconds=settings.cpu_seconds, file_bytes=settings.file_bytes,
        processes=settings.processes)
      isolation.leave_keyring()
      seccomp.put_on(sockets=self.separate)
      kernel.serve(socket.socket(fileno=mine))
    except BaseException as error:  # the supervisor reports it to the trainer
      os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
      os._exit(1)

  def serve(self) -> None:
    """One answer to every message, until the kernel dies."""
    status = "ok"
    while status in ("ok", "failed"):
      message, images = wire.receive(self.trainer)
      self.stdout.drain()  # what was said after an earlier cell's end
      self.stderr.drain()
      self.stdout.clear()
      self.stderr.clear()
      answer, figures = self._run(message, images)
      status = answer["status"]
      answer |= {"stdout": self.stdout.text(), "stderr": self.stderr.text()}
      wire.send(self.trainer, answer, figures)

  def _run(self, message: dict[str, Any], images: list[bytes]) -> tuple[dict, list[bytes]]:
    deadline = time.monotonic() + message["timeout"]
    answer: dict[str, Any] = {"status": "timeout", "figures": []}
    figures: list[bytes] = []
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, signal.SIGCONT)
    try:
      wire.send(self.sock, message, images, deadline)
      if self._wait(deadline):
        # An answer that has begun at the last moment gets a moment.
        result, figures = wire.receive_result(self.sock, max(deadline, time.monotonic() + 0.1))
        answer = {"status": "failed" if result["failed"] else "ok", "figures": result["figures"]}
    except (wire.WireError, KeyError):  # dead, or no kernel of ours any more
      figures = []
      if time.monotonic() < deadline:  # else it has only been slow to take its images or to answer
        answer = {"status": "died", "reason": self._cause_of_death(), "figures": []}
    self.signal_all(signal.SIGSTOP if answer["status"] in ("ok", "failed") else signal.SIGKILL)
    self.stdout.drain()
    self.stderr.drain()
    return answer, figures

  def _wait(self, deadline: float) -> bool:
    """Collects output until the kernel answers (True) or the time is over.

    Raises:
      WireError: the kernel is dead, or the trainer is gone.
    """
    poll = select.poll()
    outputs = {output.reader: output for output in (self.stdout, self.stderr)}
    for descriptor in (*outputs, self.trainer.fileno(), self.handle, self.sock.fileno()):
      poll.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
      # Not longer than this: orphans are adopted here and must be reaped.
      ready = dict(poll.poll(min(left, 0.2) * 1000))
      for descriptor in outputs.keys() & ready.keys():
        outputs[descriptor].drain()
        if ready[descriptor] & select.POLLHUP:
          poll.unregister(descriptor)
      if self.trainer.fileno() in ready:
        raise wire.WireError("the trainer is gone")
      if self.sock.fileno() in ready:
        return True
      if self.handle in ready:
        raise wire.WireError("the kernel is dead")
      self._reap()
    return False

  def signal_all(self, number: int) -> None:
    """To the kernel and all it has started."""
    if self.separate and os.getpid() == 1:  # the same call elsewhere would reach the whole user
      with contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)
      return
    for pid in processes.descendants(os.getpid(), self.proc):
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)  # first, so that none starts others meanwhile
    for pid in processes.descendants(os.getpid(), self.proc):
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)

  def _reap(self) -> None:
    with contextlib.suppress(ChildProcessError):
      while (dead := os.waitpid(-1, os.WNOHANG))[0]:
        if dead[0] == self.pid:
          self.exit_status = dead[1]

  def _cause_of_death(self) -> str:
    select.select([self.handle], [], [], 0.5)
    self._reap()
    if self.exit_status is None:
      return "it no longer answered as it should"
    code = os.waitstatus_to_exitcode(self.exit_status)
    if code >= 0:
      return f"it exited with code {code}"
    name = signal.Signals(-code).name
    return {"SIGXCPU": "it used up its CPU time", "SIGKILL": "it was killed, most likely for using "
            "too much memory or CPU time"}.get(name, f"it crashed with {name}")


class _Output:
  """One of the kernel's text streams: its beginning and its end, and how much lies between."""

  def __init__(self, most: int):
    self.most = most
    self.reader, self.writer = os.pipe()
    os.set_blocking(self.reader, False)
    self.clear()

  def clear(self) -> None:
    self.head, self.tail, self.total = b"", b"", 0

  def drain(self, most_reads: int = 64) -> None:
    """Reads what there is, but returns now and then even if a flood never ends."""
    for _ in range(most_reads):
      try:
        data = os.read(self.reader, 1 << 16)
      except BlockingIOError:
        return
      if not data:
        return
      self.total += len(data)
      room = self.most // 2 - len(self.head)
      self.head += data[:room]
      self.tail = (self.tail + data[room:])[-(self.most // 2):]

  def text(self) -> str:
    left_out = self.total - len(self.head) - len(self.tail)
    middle = f"\n[... {left_out} bytes left out ...]\n" if left_out > 0 else ""
    return self.head.decode("utf-8", "replace") + middle + self.tail.decode("utf-8", "replace")
