"""What is particular to the embedded engine: its pool, its schedule, its failures."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from axpo_jax.model import sharding
from axpo_jax.rollout.embedded import EmbeddedConfig, EmbeddedEngine
from axpo_jax.rollout.engine import EngineClosed

the_embedded = pytest.mark.parametrize("_served", ["embedded"], indirect=True)


@the_embedded
def test_a_pool_smaller_than_the_work_gives_the_same_samples(subject, embedded, ask, text, image):
  small = embedded(rows=3, max_running=2)

  def episode(subject, number):
    async def play():
      ids, images, out = text(number % 2, 12) + subject.picture + text(9, 2), (image(number % 2),), []
      for turn in range(3):
        (sample,) = await subject.engine.generate(
          ask(ids, images, 4 + number, seeds=(10 * number + turn,))
        )
        out.append(sample.ids)
        ids += sample.ids + text(number, 3)
      return out

    return play()

  async def all_episodes(subject):
    return await asyncio.gather(*(episode(subject, number) for number in range(6)))

  wide, narrow = asyncio.run(all_episodes(subject)), asyncio.run(all_episodes(small))
  assert narrow == wide
  counted = small.engine.stats(), subject.engine.stats()
  assert counted[0].prefill_tokens_computed > counted[1].prefill_tokens_computed


@the_embedded
def test_a_small_prefill_budget_changes_nothing(subject, embedded, ask, text):
  tight = embedded(prefill_tokens=1, min_tokens=8)
  requests = [ask(text(i, 5 + 9 * i), temperature=0) for i in range(6)]
  for (one,), (other,) in zip(tight.run(*requests), subject.run(*requests), strict=True):
    assert one.ids == other.ids


def test_the_schedule_is_a_function_of_the_submissions(embedded, ask, text, monkeypatch):
  def schedule():
    subject, seen = embedded(), []
    decode = subject.engine._device.decode
    monkeypatch.setattr(
      subject.engine._device, "decode",
      lambda inputs, **kw: seen.append(jax.tree.map(np.asarray, inputs)) or decode(inputs, **kw),
    )  # fmt: skip
    subject.run(*(ask(text(i % 5, 8), max_new=3 + i, seeds=(i, i + 50)) for i in range(12)))
    return seen

  first, second = schedule(), schedule()
  assert len(first) == len(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_it_owns_its_weights(embedded, ask, text, reference):
  subject = embedded()
  mine = jax.tree.map(lambda x: x.copy(), reference.params)
  asyncio.run(subject.engine.update_weights(mine, 3))
  jax.tree.map(lambda x: x.delete(), mine)  # what donation does
  ((sample,),) = subject.run(ask(text(0, 9), temperature=0))
  assert sample.ids == reference.greedy(text(0, 9), (), 8) and sample.weight_version == 3


def test_foreign_weights_are_refused_and_the_old_ones_stay(embedded, ask, text, reference):
  subject = embedded()
  wrong = jax.tree.map(lambda x: x[:1], reference.params)
  with pytest.raises(ValueError, match="not of the engine's model"):
    asyncio.run(subject.engine.update_weights(wrong, 1))
  ((sample,),) = subject.run(ask(text(0, 9), temperature=0))
  assert sample.ids == reference.greedy(text(0, 9), (), 8) and sample.weight_version == 0


def test_a_failed_device_call_fails_its_requests_and_no_later_ones(
  embedded, ask, text, reference, monkeypatch
):
  subject, request = embedded(), ask(text(0, 9), temperature=0)
  subject.run(request)
  with monkeypatch.context() as patch:
    patch.setattr(subject.engine._device, "decode", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      subject.run(request, ask(text(1, 9), seeds=range(20)))
  ((sample,),) = subject.run(request)
  assert sample.ids == reference.greedy(text(0, 9), (), 8)
  assert sample.cached_tokens == 0  # the pool's content was given up


def test_closing_fails_what_runs_and_what_comes(embedded, ask, text):
  subject, request = embedded(), ask(text(0, 9), max_new=60)

  async def scenario():
    running = asyncio.create_task(subject.engine.generate(request))
    while not subject.engine.stats().decode_tokens:
      await asyncio.sleep(0)
    await subject.engine.close()
    await subject.engine.close()
    with pytest.raises(EngineClosed):
      await running
    with pytest.raises(EngineClosed):
      await subject.engine.generate(request)
    assert not await subject.engine.health()

  asyncio.run(scenario())


def test_finished_episodes_submit_before_the_next_admission(embedded, ask, text):
  """A next turn that is asked for after a few awaits still joins the very next block."""
  subject = embedded()

  async def episode():
    for turn in range(3):
      await subject.engine.generate(ask(text(turn, 9), max_new=4))
      await asyncio.sleep(0)

  async def all_episodes():
    await asyncio.gather(*(episode() for _ in range(3)))

  blocks, decode = [], subject.engine._device.decode
  subject.engine._device.decode = lambda *a, **k: blocks.append(1) or decode(*a, **k)
  asyncio.run(all_episodes())
  assert len(blocks) == 3  # of decode_block = 4 tokens: one a turn


def test_bfloat16_copies_keep_norms_exact(embedded, ask, text, reference):
  subject = embedded(dtype="bfloat16")
  ((sample,),) = subject.run(ask(text(0, 20), max_new=12, temperature=0))
  expected = reference.logprobs(text(0, 20), (), sample.ids)
  assert np.abs(np.subtract(sample.logprobs, expected)).mean() < 0.1
  dtypes = {x.dtype.name for x in jax.tree.leaves(subject.engine._device._params)}
  assert dtypes == {"bfloat16", "float32"}


@the_embedded
def test_on_a_mesh_of_devices(subject, ask, text, image):
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
  config, reference = subject.engine.config, subject.reference
  params = jax.device_put(reference.params, sharding.param_shardings(reference.params, mesh))
  engine = EmbeddedEngine(
    subject.engine._model, reference.graphdef, params, config=config, mesh=mesh
  )
  spread = dataclasses.replace(subject, engine=engine)
  ids, images = text(0, 9) + subject.picture + text(1, 3), (image(0),)
  (samples,) = spread.run(ask(ids, images, 6, seeds=range(3)))
  for sample in samples:
    np.testing.assert_allclose(
      sample.logprobs, reference.logprobs(ids, images, sample.ids), atol=1e-4
    )
  assert sorted(s.cached_tokens for s in samples) == [0, 19, 19]


@pytest.mark.parametrize(
  "bad", [{"rows": 0}, {"decode_block": 0}, {"rows": 4, "max_running": 5}], ids=str
)
def test_sizes_that_make_no_sense_are_refused(bad):
  with pytest.raises(ValueError, match=list(bad)[-1]):
    EmbeddedConfig(**bad)


def test_event_loops_that_end_or_stop_leave_the_cache_in_order(embedded, ask, text, reference):
  subject, request = embedded(), ask(text(0, 9), max_new=60)

  async def abandon():
    task = asyncio.ensure_future(subject.engine.generate(request))
    while not subject.engine.stats().decode_tokens:
      await asyncio.sleep(0)
    return task

  asyncio.run(abandon())  # cancels what still runs
  subject.engine.stats(reset=True)
  with asyncio.Runner() as stopped:
    left = stopped.run(abandon())
    ((sample,),) = subject.run(ask(text(0, 9), temperature=0))  # on a loop of its own
    assert not left.done()
  assert sample.ids == reference.greedy(text(0, 9), (), 8) and sample.cached_tokens == 8
