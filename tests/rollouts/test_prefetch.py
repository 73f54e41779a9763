"""Collecting ahead of training: order, bound, failure and end."""

import asyncio

import pytest

from axpo_jax.rollouts.prefetch import Prefetch


class Diary:
  """A collection that takes some turns of the event loop, and writes down when it ran."""

  def __init__(self, fails_at: int | None = None):
    self.running, self.begun, self.most, self.fails_at = 0, [], 0, fails_at

  async def collect(self, step: int) -> str:
    self.begun.append(step)
    self.running += 1
    self.most = max(self.most, self.running)
    try:
      for _ in range(5):
        await asyncio.sleep(0)
      if step == self.fails_at:
        raise RuntimeError(f"step {step} broke")
      return f"rollouts {step}"
    finally:
      self.running -= 1


async def turns(count: int = 50) -> None:
  for _ in range(count):
    await asyncio.sleep(0)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_never_further_ahead_than_allowed_and_one_at_a_time(staleness):
  async def run():
    diary = Diary()
    ahead = Prefetch(diary.collect, first=2, last=8)
    for done in range(2, 8):
      ahead.allow(done + staleness)
      assert await ahead.next() == f"rollouts {done}"
      await turns()  # training, during which the allowed ones finish
      assert diary.begun == list(range(2, min(done + staleness, 7) + 1))
    assert diary.most == 1
    await ahead.close()

  asyncio.run(run())


def test_settled_means_nothing_runs():
  async def run():
    diary = Diary()
    ahead = Prefetch(diary.collect, 0, 10)
    ahead.allow(2)
    await ahead.settle()
    assert diary.begun == [0, 1, 2] and diary.running == 0
    assert [await ahead.next() for _ in range(3)] == ["rollouts 0", "rollouts 1", "rollouts 2"]
    with pytest.raises(RuntimeError, match="allow"):
      await ahead.next()

  asyncio.run(run())


def test_failure_reaches_the_trainer_and_stops_those_behind():
  async def run():
    diary = Diary(fails_at=1)
    ahead = Prefetch(diary.collect, 0, 10)
    ahead.allow(3)
    assert await ahead.next() == "rollouts 0"
    with pytest.raises(RuntimeError, match="step 1 broke"):
      await ahead.next()
    await turns()
    assert diary.begun == [0, 1]
    await ahead.close()

  asyncio.run(run())


def test_close_ends_what_runs():
  async def run():
    diary = Diary()
    ahead = Prefetch(diary.collect, 0, 10)
    ahead.allow(5)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await ahead.close()
    assert diary.begun == [0] and diary.running == 0

  asyncio.run(run())
