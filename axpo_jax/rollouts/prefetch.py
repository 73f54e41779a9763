"""Prefetching rollouts: those of the next steps are collected while this step is trained.

In: a coroutine that collects the rollouts of one step, and up to which step it may run. Out: the
collections, in order. Two never run at once, so that a step's rollouts have the sampler to themselves
and its counters are the step's own.

  staleness 1   collect 1 | collect 2 | collect 3 | ...
                          | train 1   | train 2   | ...
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
  """Runs `collect(step)` for steps `first`, `first` + 1, ... before `last`, as far as allowed."""

  def __init__(self, collect: Callable[[int], Awaitable[T]], first: int, last: int):
    self._collect, self._next, self._last = collect, first, last
    self._tasks: collections.deque[asyncio.Task[T]] = collections.deque()

  def allow(self, step: int) -> None:
    """From now on everything up to `step`, included, may be collected."""
    while self._next <= min(step, self._last - 1):
      before = self._tasks[-1] if self._tasks else None
      self._tasks.append(asyncio.create_task(self._after(before, self._next)))
      self._next += 1

  async def _after(self, before: asyncio.Task | None, step: int) -> T:
    if before is not None:
      await asyncio.wait([before])
      before.result()  # a failed or cancelled collection ends those behind it
    return await self._collect(step)

  async def next(self) -> T:
    """The oldest collection that was not taken yet; raises what ended it."""
    if not self._tasks:
      raise RuntimeError("nothing may be collected; call allow first")
    collected = await self._tasks[0]
    self._tasks.popleft()
    return collected

  async def settle(self) -> None:
    """Waits for all that was begun; for work that must not share the sampler with it."""
    if self._tasks:
      await asyncio.wait(self._tasks)

  async def close(self) -> None:
    """Cancels what runs and waits for its end."""
    for task in self._tasks:
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)
    self._tasks.clear()
