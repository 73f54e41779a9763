"""One thread with an event loop of its own, for tools that wait for something outside.

The embedded engine holds up the loop that episodes run on, for as long as a device call or a
compilation takes. A tool that waits there would be late, its answer and its time limit would fall
due at once, and it could not begin before the engine pauses. Here it goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_running: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a forked child has no such thread


def loop() -> asyncio.AbstractEventLoop:
  """The loop; its thread starts with the first use and ends with the process."""
  with _lock:
    found = _running.get(os.getpid())
    if found is None:
      found = _running[os.getpid()] = asyncio.new_event_loop()
      threading.Thread(target=found.run_forever, name="tools", daemon=True).start()
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
  """Runs `work` there and waits for it, holding up whoever asks."""
  return asyncio.run_coroutine_threadsafe(work, loop()).result()


async def submit(work: Coroutine[Any, Any, T]) -> T:
  """Runs `work` there; the caller's own loop goes on. Cancelling the caller cancels `work`."""
  return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop()))


def keep(work: Coroutine[Any, Any, Any]) -> asyncio.Task:
  """Begins `work` on the running loop, whose own reference to a task is weak."""
  task = asyncio.get_running_loop().create_task(work)
  _kept.add(task)
  task.add_done_callback(_kept.discard)
  return task


_kept: set[asyncio.Task] = set()
