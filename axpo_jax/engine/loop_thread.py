"""An event loop in a thread of its own.

A client of servers must answer health checks and time limits while the trainer's thread sits in a
device call for a minute; on the trainer's own loop such a minute looks like a dead server. In:
coroutines from any loop. Out: their results, in the caller's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any

from absl import logging

_MOST_CANCELS = 30  # a second apart


class LoopThread:
  """Runs coroutines on one loop, from now until `stop`. Threads and loops of any kind may call."""

  def __init__(self, name: str):
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
    self._thread.start()

  def start(self, coroutine: Coroutine) -> concurrent.futures.Future:
    """Begins a coroutine; the future may be waited for in any thread but the loop's own."""
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  async def run(self, coroutine: Coroutine) -> Any:
    """Its result. Cancelling the caller cancels the coroutine."""
    return await asyncio.wrap_future(self.start(coroutine))

  def stop(self) -> None:
    """Cancels what runs, waits half a minute for its end, and ends the thread. Idempotent."""
    if self._loop.is_closed():
      return
    self.start(_cancel_all()).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()


async def _cancel_all() -> None:
  """Again and again, since a cancellation that arrives together with a time limit can be lost; but
  not for ever, since whoever closes must not hang on a task that will not end."""
  for _ in range(_MOST_CANCELS):
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if not tasks:
      return
    for task in tasks:
      task.cancel()
    await asyncio.wait(tasks, timeout=1.0)
  logging.warning("given up after %d cancellations: %s", _MOST_CANCELS, [
    task for task in tasks if not task.done()])
