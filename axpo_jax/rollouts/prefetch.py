"""Prefetching: rollouts of the next steps are collected while a step is trained.

In: a coroutine that collects the rollouts of one step, and the step up to which it may run. Out: the
collections, in order. They run one at a time, so that the sampler's counters belong to one step.

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
    """Allows collecting every step up to `step`, included."""
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
    """The oldest collection that was not taken yet; raises the exception that ended it."""
    if not self._tasks:
      raise RuntimeError("nothing may be collected; call allow first")
    collected = await self._tasks[0]
    self._tasks.popleft()
    return collected

  async def settle(self) -> None:
    """Waits for all collections that have started, before work that must not share the sampler with them."""
    if self._tasks:
      await asyncio.wait(self._tasks)

  async def close(self) -> None:
    """Cancels the running collections and waits for their end."""
    for task in self._tasks:
      task.cancel()
    await asyncio.gather(*self._tasks, return_exceptions=True)
    self._tasks.clear()
