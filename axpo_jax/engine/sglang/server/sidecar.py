"""Keeps the servers of a `SidecarSpec` alive: start, watch, restart, stop.

In: a spec, and a folder for logs. Out: URLs that stay the same however often a server is restarted.
A restarted server has the weights of the checkpoint folder again; whoever pushed others must push
again before using it.

  with Sidecar(SidecarSpec(model="checkpoint", device="cpu", port=0), "logs") as sidecar:
    sidecar.urls            # ["http://127.0.0.1:41234"], healthy

One thread per server owns its process. The same thread must start the process and outlive it: Linux sends the parent-death signal (serve.py asks for it) when the *thread* that started a process
ends. So no server survives the process that supervises it, even after kill -9.
"""

import atexit
import contextlib
import dataclasses
import http.client
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from axpo_jax.engine.sglang.server.environment import find_python
from axpo_jax.engine.sglang.server.spec import (
  SidecarError,
  SidecarSpec,
  free_port,
  local,
  reachable,
  server_command,
  server_environment,
)

_LOG = logging.getLogger(__name__)
_GRACE = 2.0  # seconds that a killed server's children get to end by themselves
_TAIL_LINES = 40
# Paths that answer 200: when the server has made a token since, without a key; when its scheduler answers.
_HEALTH, _LIVENESS = "/health", "/server_info"
# Ignores proxies that the environment names: a server is on this machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def ask(url: str, key: str = "", timeout: float = 10.0) -> int:
  """The HTTP status with which GET `url` is answered; 0 without an answer in `timeout` seconds."""
  headers = {"Authorization": f"Bearer {key}"} if key else {}
  try:
    with _open(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
      reply.read()
      return reply.status
  except urllib.error.HTTPError as error:
    return error.code
  except (OSError, http.client.HTTPException):  # refused, reset, late, not HTTP
    return 0


def group_members(group: int) -> list[int]:
  """Processes of a process group, those that ended but were not collected left out."""
  found = []
  for entry in os.listdir("/proc"):
    with contextlib.suppress(OSError, ValueError):
      pid = int(entry)
      # "pid (name) state ppid pgrp ...", where the name may hold anything
      state, _, pgrp = pathlib.Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:3]
      if int(pgrp) == group and state not in "ZX":
        found.append(pid)
  return found


def end_group(process: subprocess.Popen) -> None:
  """Kills a session's leader, then what is left of its process group; returns when nothing is.

  A server holds nothing worth saving, so it is not asked first. Its children end with it; a moment is
  left to them because one of them (multiprocessing's tracker) removes shared memory on its way out.
  """
  now = time.monotonic()
  while process.poll() is None or group_members(process.pid):
    with contextlib.suppress(ProcessLookupError):
      if process.poll() is None:
        process.kill()
      elif time.monotonic() > now + _GRACE:
        os.killpg(process.pid, signal.SIGKILL)
    if time.monotonic() > now + 30:  # it is stuck in the kernel
      _LOG.error("process group %d does not end after SIGKILL", process.pid)
      return
    time.sleep(0.02)


@dataclasses.dataclass(frozen=True)
class ServerStatus:
  """state: starting, serving, down (waiting to be restarted), failed (never served), stopped."""

  url: str
  state: str
  restarts: int
  pid: int | None  # of the process, its group and its session; of the last life if it is down
  log: pathlib.Path
  reason: str  # why it went down last


@dataclasses.dataclass(frozen=True)
class Program:
  """What a keeper runs.

  url: for clients. address: the same server, for us (a server on all interfaces is asked on loopback).
  command(): read at every start. environment(scratch): its variables, given a folder of its own.
  """

  name: str
  url: str
  address: str
  command: Callable[[], list[str]]
  environment: Callable[[str], dict[str, str]]
  log: pathlib.Path


class Keeper(threading.Thread):
  """One server's process and its lives. Limits are those of `spec`."""

  def __init__(self, program: Program, spec: SidecarSpec, report: Callable[[str], None]):
    super().__init__(name=f"sidecar {program.name}", daemon=True)
    self.program, self._spec, self._report = program, spec, report
    self.state, self.reason, self.restarts = "starting", "", 0
    self._process: subprocess.Popen | None = None  # while it may be alive
    self._pid: int | None = None
    self._ending = threading.Event()
    self._log_start = 0  # where the present life's lines begin

  def status(self) -> ServerStatus:
    return ServerStatus(
      self.program.url, self.state, self.restarts, self._pid, self.program.log, self.reason)

  def run(self):
    try:
      self.state = self._keep()
    except Exception:  # whatever it is, others must not believe that this server is kept
      self.state = "failed"
      _LOG.exception("%s is not kept any more", self.program.name)

  def _keep(self) -> str:
    """Life after life, until asked to end or the first one fails; the state to end in."""
    wait, served_once = self._spec.backoff, False
    while not self._ending.is_set():
      served = self._live()
      served_once |= served > 0
      if self._ending.is_set():
        break
      if not served_once:
        return "failed"
      if served > self._spec.backoff_max:
        wait = self._spec.backoff
      self.state = "down"
      self._report(f"{self.program.name} {self.reason}; starting it again in {wait:.0f} s "
                   f"({self.program.log})")
      if self._ending.wait(wait):
        break
      wait = min(2 * wait, self._spec.backoff_max)
      self.restarts += 1
    return "stopped"

  def end(self):
    """Ends the process now, and the thread soon. May be called from any thread, more than once."""
    self._ending.set()
    if process := self._process:
      end_group(process)

  def tail(self) -> str:
    """The last lines that the present life, or the last one, wrote into its log."""
    if not self.program.log.exists():
      return ""
    with self.program.log.open("rb") as file:
      file.seek(self._log_start)
      lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])

  def _live(self) -> float:
    """One life of the process. Returns for how many seconds it served; sets `reason`."""
    self.state, served_from = "starting", None
    scratch = tempfile.mkdtemp(prefix="axpo-sidecar-")  # short: sockets' paths are limited
    try:
      self._process = self._start(scratch)
      self._pid = self._process.pid
      self.reason = self._until_healthy()
      if not self.reason:
        self.state, served_from = "serving", time.monotonic()
        if self.restarts:
          self._report(f"{self.program.name} is healthy again, with the weights of {self._spec.model}")
        self.reason = self._until_bad()
      return time.monotonic() - served_from if served_from else 0.0
    except OSError as error:
      self.reason = f"cannot be started: {error}"
      return 0.0
    finally:
      if self._process:
        end_group(self._process)
        self._process = None  # its number may be another's from now on
      shutil.rmtree(scratch, ignore_errors=True)

  def _start(self, scratch: str) -> subprocess.Popen:
    command = self.program.command()
    descriptor = os.open(self.program.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as log:
      self._log_start = log.seek(0, os.SEEK_END)
      log.write(f"--- {time.strftime('%F %T')} {' '.join(command)}\n".encode())
      log.flush()
      return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        env=self.program.environment(scratch), start_new_session=True,
      )  # fmt: skip

  def _until_healthy(self) -> str:
    """Empty, or why it did not become healthy."""
    deadline = time.monotonic() + self._spec.start_timeout
    while not self._ending.wait(0.2):
      if ended := self._ended():
        return ended
      if ask(self.program.address + _HEALTH) == 200:
        return ""
      if time.monotonic() > deadline:
        return f"was not healthy within start_timeout={self._spec.start_timeout:.0f} s"
    return "was asked to end"

  def _until_bad(self) -> str:
    """Watches a serving process until it ends, hangs, or is asked to end; says which."""
    spec, key = self._spec, self._spec.api_key
    patience = min(10.0, spec.hang_after)
    health_url = self.program.address + _HEALTH
    liveness_url = self.program.address + _LIVENESS
    answered = generated = probed = time.monotonic()
    while not self._ending.wait(min(0.2, spec.probe_every)):
      if ended := self._ended():
        return ended
      now = time.monotonic()
      if now - probed < spec.probe_every:
        continue
      health = ask(health_url, timeout=patience)
      if health == 200:  # a token was made since the question
        answered = generated = time.monotonic()
      elif health and ask(liveness_url, key, patience) == 200:
        answered = time.monotonic()  # paused: its scheduler answers, no more
      probed = time.monotonic()
      if probed - answered > spec.hang_after:
        return f"gave no answer for {probed - answered:.0f} s"
      if probed - generated > spec.pause_limit:
        return f"generated nothing for {probed - generated:.0f} s"
    return "was asked to end"

  def _ended(self) -> str:
    code = self._process.poll()
    if code is None:
      return ""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class Sidecar:
  """Servers of one spec. `start` and `stop` may be called once each; a context manager calls both.

  report: is called from any thread with one line for the user (progress of the start, restarts).
    Default: a warning in the log.
  """

  def __init__(self, spec: SidecarSpec, log_folder: str | os.PathLike,
               report: Callable[[str], None] = _LOG.warning):  # fmt: skip
    self.spec, self._report = spec, report
    self._folder = pathlib.Path(log_folder)
    self._python = find_python(spec.device)
    self._keepers: list[Keeper] = []

  @property
  def urls(self) -> list[str]:
    return [keeper.program.url for keeper in self._keepers]

  def start(self) -> list[str]:
    """Starts all servers. Returns `urls` when all are healthy.

    Raises: SidecarError with the end of the log if one does not come up; then none is left running.
    """
    self._folder.mkdir(parents=True, exist_ok=True)
    atexit.register(self.stop)
    try:
      self._keepers = [self._server(index) for index in range(self.spec.servers)]
      self._wait(self._keepers)
    except BaseException:
      self.stop()
      raise
    return self.urls

  def stop(self):
    """Ends every process and waits until none is left."""
    atexit.unregister(self.stop)
    enders = [threading.Thread(target=keeper.end) for keeper in self._keepers]
    for ender in enders:
      ender.start()
    for thread in (*enders, *self._keepers):
      if thread.ident:  # it was started
        thread.join()

  def __enter__(self) -> "Sidecar":
    self.start()
    return self

  def __exit__(self, *_):
    self.stop()

  def status(self) -> list[ServerStatus]:
    return [keeper.status() for keeper in self._keepers]

  def _server(self, index: int) -> Keeper:
    spec, name = self.spec, f"server {index}"
    port = spec.port + index if spec.port else free_port(spec.host)
    url, address = (f"http://{host}:{port}" for host in (reachable(spec.host), local(spec.host)))
    program = Program(
      name, url, address, lambda: [self._python, *server_command(spec, port)],
      lambda scratch: server_environment(spec, index, scratch), self._folder / f"server-{index}.log")
    return Keeper(program, spec, self._report)

  def _wait(self, keepers: list[Keeper]):
    """Starts them; returns when all serve."""
    for keeper in keepers:
      keeper.start()
    began = reported = time.monotonic()
    while any(keeper.state != "serving" for keeper in keepers):
      for keeper in keepers:
        if not keeper.is_alive():
          raise SidecarError(f"{keeper.program.name} {keeper.reason}. The end of "
                             f"{keeper.program.log}:\n{keeper.tail()}")
      if time.monotonic() - reported > 10:
        reported = time.monotonic()
        ready = sum(keeper.state == "serving" for keeper in keepers)
        self._report(f"{ready} of {len(keepers)} healthy after {reported - began:.0f} s ({self._folder})")
      time.sleep(0.1)
