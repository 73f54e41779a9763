"""SIGTERM: a machine is about to be taken away (TPU preemption, Slurm, Kubernetes), or someone ends the run.

The run saves what it has and stops, all processes at the same point, whichever of them got the signal:

  while rollouts or an evaluation are under way   they are cancelled; the last step's state is saved
  in an update                                    it is finished first
  while SFT trains                                at the end of the step
  while a stage that samples is under way         finished shards stay
  before a stage, or while it loads               at once: there is nothing to save

The same command resumes from there. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import jax

from axpo_jax import processes

T = TypeVar("T")

# 128 + 15, as shells and schedulers say of what SIGTERM has ended.
EXIT_CODE = 143
# Seconds that cancelled work has to end, and seconds between two checks of the coordinator's keys.
_GRACE, _EVERY = 10.0, 0.5
_FOLDER = "axpo_stop"  # of the coordinator's keys: one for each process that got the signal

_requested = threading.Event()
_holding = False  # whether an exception out of the signal's handler would do harm
_checked = 0.0  # when the coordinator's keys were read last


class Stopped(Exception):
  """The run was asked to stop.

  Attributes:
    in_all_processes: it is raised in all of them, so none has to end the others.
  """

  in_all_processes = True


def install() -> None:
  """Makes SIGTERM a request to stop. Call it in the main thread, after `distributed.initialize`, whose own
  handler it replaces."""
  signal.signal(signal.SIGTERM, _on_signal)
  if jax.process_count() > 1:
    threading.Thread(target=_publish, name="preemption", daemon=True).start()


def _on_signal(*_) -> None:
  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, signal.SIG_DFL)
  os.write(2, b"\nSIGTERM: the run saves and stops; a second signal ends it at once\n")
  _requested.set()
  if not _holding and jax.process_count() == 1:
    raise Stopped


def _publish() -> None:
  """Waits for this process's signal and writes it to the coordinator, where the main process reads it."""
  _requested.wait()
  processes.coordinator().key_value_set(f"{_FOLDER}/{jax.process_index()}", "requested")


def stop_requested() -> bool:
  """Whether this process got the signal; in the main process: whether any process did."""
  global _checked
  of_several = jax.process_count() > 1 and jax.process_index() == 0
  if of_several and not _requested.is_set() and time.monotonic() - _checked > _EVERY:
    _checked = time.monotonic()
    if processes.coordinator().key_value_dir_get(_FOLDER):
      _requested.set()
  return _requested.is_set()


def check() -> None:
  """Raises Stopped if the run was asked to stop. Of several processes the main one decides: call it by
  `distributed.on_main`."""
  if stop_requested():
    raise Stopped


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Within, only `check` and `cancel_on_stop` raise Stopped, and the signal's handler does not: it could
  interrupt an update half-way, or an event loop."""
  global _holding
  _holding = True
  try:
    yield
  finally:
    _holding = False
  if jax.process_count() == 1:
    check()


async def cancel_on_stop(work: Callable[[], Awaitable[T]]) -> T:
  """The result of `work`, which is cancelled when the run is asked to stop.

  Raises:
    Stopped: it was cancelled.
  """
  check()
  task = asyncio.ensure_future(work())
  try:
    while not task.done():
      await asyncio.wait([task], timeout=_EVERY)
      if not task.done() and stop_requested():
        task.cancel()
        await asyncio.wait([task], timeout=_GRACE)
        raise Stopped
    return task.result()
  finally:
    task.cancel()
