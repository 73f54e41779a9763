"""Kernels for the `python` tool, seen from the trainer: a pool of warm ones and how to talk to one.

In: cells and images. Out: `CellResult`s. The processes are described in `sandbox.server`; this
module starts the fork server, asks it for kernels ahead of need, and kills them on request.
Everything here runs on one event loop (`background`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import PIL.Image

from axpo_jax.agent.tools.sandbox import wire
from axpo_jax.agent.tools.sandbox.server import NAMESPACES, RLIMITS
from axpo_jax.model.pictures import to_rgb

_ROOT = str(pathlib.Path(__file__).parents[3])
_START = ("import sys; sys.path.append(sys.argv[1]); "
          "from axpo_jax.agent.tools.sandbox import server; server.main(int(sys.argv[2]))")
_START_SECONDS = 120  # a cold disk and matplotlib's first font list included
ANSWER_GRACE = 10.0  # seconds beyond a cell's own limit after which its kernel is given up


class SandboxError(RuntimeError):
  """No kernel can be started; the message says why and what to set."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
  """Limits of a kernel; docs/tools.md says what each holds back.

  Attributes:
    isolation: "namespaces", or "rlimits" where the host allows no namespaces: then code can read
      what the trainer's user can read (docs/tools.md).
    memory_mb: address space of a process, and memory of all processes of a kernel together.
    cpu_seconds: CPU time of each process, over all cells of an episode.
    file_mb: files that a kernel may hold (with "rlimits": the size of one).
    processes: processes and threads at once.
    output_kb: kept of a cell's stdout and of its stderr.
    warm: kernels kept ready.
  """

  isolation: str = NAMESPACES
  memory_mb: int = 2048
  cpu_seconds: int = 120
  file_mb: int = 64
  processes: int = 16
  output_kb: int = 24
  warm: int = 4

  def __post_init__(self):
    if self.isolation not in (NAMESPACES, RLIMITS):
      raise ValueError(f"isolation={self.isolation!r}; choose {NAMESPACES!r} or {RLIMITS!r}")
    for field in dataclasses.fields(self):
      if field.name != "isolation" and getattr(self, field.name) < 1:
        raise ValueError(f"{field.name}={getattr(self, field.name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class CellResult:
  """What one cell did.

  Attributes:
    status: "ok"; "failed", it raised and the kernel lives; "timeout" or "died": the kernel is gone.
    stdout, stderr: what was printed, the middle of a flood left out.
    figures: pictures it showed.
    reason: why a kernel died.
  """

  status: str
  stdout: str = ""
  stderr: str = ""
  figures: tuple[PIL.Image.Image, ...] = ()
  reason: str = ""

  @property
  def kernel_is_gone(self) -> bool:
    return self.status in ("timeout", "died")


class BaseKernel:
  """One running kernel, on this machine or another.

  Attributes:
    images_sent: how many of the episode's images it holds.
    alive: False once it was killed or died.
  """

  def __init__(self):
    self.images_sent = 0
    self.alive = True

  async def run(self, code: str, timeout: float,
                images: Sequence[PIL.Image.Image] = ()) -> CellResult:
    """Runs a cell; `images` are added to the kernel's own before. A cancelled call kills it."""
    try:
      result = await self._run(code, timeout, images)
    except SandboxError as error:
      result = CellResult("died", reason=f"it was lost: {error}")
    except asyncio.CancelledError:
      self.kill()
      raise
    self.images_sent += len(images)
    if result.kernel_is_gone:
      self.kill()
    return result

  def kill(self) -> None:
    """Ends the kernel and everything it has started; again is harmless. On the pool's event loop."""
    if self.alive:
      self.alive = False
      self._end()

  async def _run(self, code: str, timeout: float, images: Sequence[PIL.Image.Image]) -> CellResult:
    """Runs a cell. Raises SandboxError if the kernel is lost."""
    raise NotImplementedError

  def _end(self) -> None:
    """Lets go of the kernel, once."""
    raise NotImplementedError


class Kernel(BaseKernel):
  """One running kernel of this machine."""

  def __init__(self, sock: socket.socket, handle: int, *, separate: bool):
    super().__init__()
    self._sock, self._handle, self._separate = sock, handle, separate

  async def _run(self, code, timeout, images) -> CellResult:
    try:
      async with asyncio.timeout(timeout + ANSWER_GRACE):
        return await self._exchange(code, timeout, images)
    except (TimeoutError, OSError, wire.WireError, EOFError) as error:
      raise SandboxError(type(error).__name__) from error

  async def _exchange(self, code, timeout, images) -> CellResult:
    # Pixels are copied in a thread: a dozen photographs take a while.
    payloads = await asyncio.to_thread(
      lambda: [to_rgb(image).tobytes() for image in images]) if images else []
    loop = asyncio.get_running_loop()
    head = wire.pack({"op": "run", "code": code, "timeout": timeout,
                      "images": [image.size for image in images]}, payloads)
    for part in (head, *payloads):
      await loop.sock_sendall(self._sock, part)
    length = wire.header_length(await self._exactly(wire.HEADER.size))
    answer = wire.parse_header(await self._exactly(length))
    wire.check_figures(answer)  # before anything is allocated for them
    pixels = [await self._exactly(size) for size in answer["sizes"]]
    return _result(answer, pixels)

  async def _exactly(self, size: int) -> bytes:
    loop, data, view = asyncio.get_running_loop(), bytearray(size), 0
    while view < size:
      count = await loop.sock_recv_into(self._sock, memoryview(data)[view:])
      if not count:
        raise EOFError
      view += count
    return bytes(data)

  def _end(self) -> None:
    if self._separate:  # with process 1 its namespace dies; without namespaces it must clean up
      with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(self._handle, signal.SIGKILL)
    os.close(self._handle)
    self._sock.close()


def _result(answer: dict[str, Any], pixels: Sequence[bytes]) -> CellResult:
  """Raises WireError unless the answer is what a supervisor says."""
  try:
    figures = tuple(PIL.Image.frombytes("RGB", (width, height), data)
                    for (width, height), data in zip(answer["figures"], pixels))
    return CellResult(str(answer["status"]), str(answer["stdout"]), str(answer["stderr"]), figures,
                      str(answer.get("reason", "")))
  except (ValueError, TypeError, KeyError) as error:
    raise wire.WireError(f"not an answer: {error}") from error


class KernelPool:
  """Starts kernels ahead of need. Made anywhere, used on one event loop.

  Raises:
    ImportError: a package that kernels load is not installed.
    SandboxError: the host is no Linux.
  """

  def __init__(self, config: KernelConfig):
    check_host()
    self.config = config
    self._server: subprocess.Popen | None = None
    self._control: socket.socket | None = None
    self._ready: asyncio.Queue[Kernel] = asyncio.Queue()
    self._starting: set[asyncio.Task] = set()
    self._lock = asyncio.Lock()

  async def take(self) -> Kernel:
    """A fresh kernel, the caller's to kill.

    Raises:
      SandboxError: the host lacks something, or kernels do not start any more.
    """
    await self.start()
    kernel = await self._spawn() if self._ready.empty() else self._ready.get_nowait()
    self._refill()
    return kernel

  async def start(self) -> None:
    """Starts the fork server and the first kernels; again is harmless. Raises as `take`."""
    async with self._lock:
      if self._server is not None and self._server.poll() is not None:
        await self.close()  # it was killed; nobody would watch kernels that it left
      if self._server is None:
        await self._start_server()
        self._refill()

  async def close(self) -> None:
    """Ends the fork server and all kernels that nobody has taken. They end with this process too."""
    if self._server is None:
      return
    await asyncio.gather(*self._starting, return_exceptions=True)
    while not self._ready.empty():
      self._ready.get_nowait().kill()
    self._control.close()
    await asyncio.to_thread(self._server.wait)
    self._server = None

  async def _start_server(self) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
      environment = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
                     "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8",
                     "HOME": _cache_folder()}
      self._server = subprocess.Popen(
        [sys.executable, "-I", "-c", _START, _ROOT, str(theirs.fileno())], env=environment, cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    deadline = time.monotonic() + _START_SECONDS
    settings = {"isolation": self.config.isolation, "memory": self.config.memory_mb << 20,
                "cpu_seconds": self.config.cpu_seconds, "file_bytes": self.config.file_mb << 20,
                "processes": self.config.processes, "output_bytes": self.config.output_kb << 10}
    try:
      await asyncio.to_thread(wire.send, ours, {"settings": settings}, (), deadline)
      answer, _ = await asyncio.to_thread(wire.receive, ours, deadline)
    except wire.WireError as error:
      answer = {"error": str(error)}
    if "error" in answer:
      self._server.kill()
      self._server.wait()
      self._server = None
      ours.close()
      raise SandboxError(_advice(answer["error"]))
    ours.setblocking(False)
    self._control = ours

  def _refill(self) -> None:
    missing = self.config.warm - self._ready.qsize() - len(self._starting)
    for _ in range(missing):
      task = asyncio.create_task(self._add())
      self._starting.add(task)
      task.add_done_callback(self._starting.discard)

  async def _add(self) -> None:
    with contextlib.suppress(SandboxError):  # whoever needs one will meet the error
      self._ready.put_nowait(await self._spawn())

  async def _spawn(self) -> Kernel:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
      with theirs:
        socket.send_fds(self._control, [b"s"], [theirs.fileno()])
      async with asyncio.timeout(_START_SECONDS):
        handle = await _receive_handle(ours)
    except (OSError, TimeoutError) as error:
      ours.close()
      raise SandboxError(f"a kernel did not start ({type(error).__name__}: {error}); the sandbox's "
                         "own messages are in this process's stderr") from error
    return Kernel(ours, handle, separate=self.config.isolation == NAMESPACES)


async def _receive_handle(sock: socket.socket) -> int:
  """Waits for the descriptor by which the new kernel can be killed."""
  loop = asyncio.get_running_loop()
  readable = loop.create_future()
  loop.add_reader(sock, lambda: readable.done() or readable.set_result(None))
  try:
    await readable
  finally:
    loop.remove_reader(sock)
  data, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
  if not data or len(descriptors) != 1:
    raise OSError("it ended at once")
  return descriptors[0]


def _cache_folder() -> str:
  """Where matplotlib keeps its list of fonts between runs; kernels do not see it.

  In the user's own cache. Where that cannot be written, a folder of the shared temporary one, if it is
  this user's and nobody else can write there: others may have made it first.
  """
  for folder in (pathlib.Path("~/.cache/axpo_jax/kernels").expanduser(),
                 pathlib.Path(tempfile.gettempdir(), f"axpo_jax_kernels_{os.getuid()}")):
    with contextlib.suppress(OSError):
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      found = folder.lstat()
      if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return str(folder)
  raise SandboxError(f"neither ~/.cache/axpo_jax/kernels nor {folder} can be a folder of this user's "
                     "alone: remove the latter if another user has made it, or set TMPDIR")


def check_host() -> None:
  """Raises SandboxError off Linux, and ImportError where a package is missing that kernels load."""
  if sys.platform != "linux":
    raise SandboxError(f"the python tool needs Linux, this is {sys.platform}")
  for package in ("IPython", "scipy", "sympy", "matplotlib"):
    if importlib.util.find_spec(package) is None:
      raise ImportError(f"the python tool needs {package}: pip install 'axpo_jax[tools]'")


def _advice(error: str) -> str:
  return (f"the python tool's sandbox cannot be built here: {error}. What hosts must allow, and what "
          f"config.agent.python.isolation={RLIMITS!r} gives up, is in docs/tools.md")
