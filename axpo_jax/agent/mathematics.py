"""Whether two expressions are equal, asked of math-verify in processes that can be killed.

In: texts. Out: a verdict, or None where math-verify ran out of time or memory: such an answer is
wrong, which the caller counts. The processes (`agent.math_worker`) start with the first question and
end with this one. Any thread may ask; an event loop awaits `same_soon`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from absl import logging

MAX_CHARACTERS = 200  # longer texts are not handed to math-verify
CPU_SECONDS = 2.0  # of one comparison; math-verify's own limits are 5 s for each of its three parts
MEMORY = 2 << 30  # bytes of address space of one process
_WALL_SECONDS = 60.0  # of one comparison, where the process gets no CPU time
_START_SECONDS = 120.0  # a cold disk included
_WORKERS = 2
# What this Python may need to start and to find its packages. No secrets.
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")

_WORKER = str(pathlib.Path(__file__).with_name("math_worker.py"))


class MathematicsError(RuntimeError):
  """math-verify cannot be asked at all: it is not installed, or its process does not start."""


def same(answer: str, gold: str) -> bool | None:
  """Whether two expressions are equal; None if that took too much time or memory. Blocks.

  Raises:
    MathematicsError: see there.
  """
  if max(len(answer), len(gold)) > MAX_CHARACTERS:
    return False
  found = _asked("same", answer, gold)
  return None if "died" in found else bool(found["result"])


async def same_soon(answer: str, gold: str) -> bool | None:
  """`same`, beside the event loop."""
  return await asyncio.wrap_future(_threads().submit(same, answer, gold))


def value(text: str) -> float | None:
  """The value of an expression; None if it has none, or is too long or costly. Blocks."""
  if len(text) > MAX_CHARACTERS:
    return None
  found = _asked("value", text).get("result")
  return None if found is None else float(found)


@functools.lru_cache(maxsize=4096)
def _asked(*request: str) -> dict[str, Any]:
  # The cache holds what ran out of time too: a group's rollouts often give the same answer.
  # One process per thread of the pool; other threads hand their question over.
  if not hasattr(_mine, "worker"):
    return _threads().submit(_asked.__wrapped__, *request).result()
  found = _mine.worker.ask(request)
  if "died" in found:
    logging.log_first_n(
        logging.WARNING, "math-verify was stopped (%s); the answer counts as wrong: %s", 20,
        found["died"], ascii(request))
  return found


class _Worker:
  """One process, started when it is first needed."""

  def __init__(self):
    self._process: subprocess.Popen | None = None

  def ask(self, request: tuple[str, ...]) -> dict[str, Any]:
    line = json.dumps(request).encode() + b"\n"
    for _ in range(2):
      process = self._process or self._start()
      try:
        process.stdin.write(line)
        return self._read(_WALL_SECONDS)
      except TimeoutError:
        self._kill()
        return {"died": "wall time"}
      except (OSError, EOFError):  # somebody has killed it: not this answer's fault
        self._kill()
    raise MathematicsError("the process that runs math-verify was killed twice; see this process's "
                           "stderr for what it said")

  def _start(self) -> subprocess.Popen:
    self._process = subprocess.Popen(
        [sys.executable, "-P", _WORKER, str(CPU_SECONDS), str(MEMORY)], bufsize=0, cwd="/",
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {
            "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
      self._read(_START_SECONDS)
    except (TimeoutError, OSError, EOFError) as error:
      self._kill()
      raise MathematicsError("the process that runs math-verify does not start (is it installed for "
                             f"{sys.executable}?); what it said is in stderr") from error
    return self._process

  def _read(self, seconds: float) -> dict[str, Any]:
    output = self._process.stdout
    poll = select.poll()  # a trainer may have more descriptors than select can name
    poll.register(output, select.POLLIN)
    if not poll.poll(seconds * 1000):
      raise TimeoutError
    line = output.readline()
    if not line.endswith(b"\n"):
      raise EOFError
    return json.loads(line)

  def _kill(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)  # its fork too
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()
    self._process = None


_mine = threading.local()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(
      _WORKERS, "mathematics", initializer=lambda: setattr(_mine, "worker", _Worker()))
