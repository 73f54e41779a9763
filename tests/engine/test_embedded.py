"""What is particular to the embedded engine: its pool, its schedule, its failures."""

import asyncio
import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from axpo_jax.engine.embedded import engine as embedded_module
from axpo_jax.engine.embedded import sampling
from axpo_jax.engine.embedded.device import DecodeInputs, Device, PrefillInputs
from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.protocol import EngineClosed, RequestError
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import sharding
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL

the_embedded = pytest.mark.parametrize("_served", ["embedded"], indirect=True)


@the_embedded
def test_a_pool_smaller_than_the_work_gives_the_same_samples(
  subject, embedded, ask, text, image, monkeypatch
):
  def planned(*args, capacity, **kwargs):
    assert capacity  # else every block would look up the prompts of all that wait
    return plan(*args, capacity=capacity, **kwargs)

  plan = embedded_module.plan_wave
  monkeypatch.setattr(embedded_module, "plan_wave", planned)
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


# Where a failure can come from, and whether it takes the donated pool with it.
FAULTS = [("device", "encode", False), ("device", "copy", False), ("device", "copy", True),
          ("device", "prefill", False), ("device", "prefill", True), ("device", "decode", False),
          ("device", "decode", True), ("module", "plan_wave", False), ("module", "wave_images", False),
          ("module", "prefill_batches", False), ("module", "decode_inputs", False),
          ("engine", "_resolve_if_finished", False)]


@pytest.mark.parametrize(("where", "name", "loses_pool"), FAULTS)
def test_every_future_is_answered_whatever_fails(
  embedded, ask, text, image, monkeypatch, where, name, loses_pool
):
  """The first, second, ... call of each part fails once, while requests run, wait and arrive."""
  subject = embedded(rows=4, max_running=3)
  picture = text(0, 9) + subject.picture + text(1, 3)
  requests = [ask(picture, (image(i % 2),), 6, seeds=(i, i + 9)) for i in range(3)]
  requests += [ask(text(i, 9), max_new=9, seeds=(i,)) for i in range(2)]
  good = subject.run(*requests)
  owner = {"device": subject.engine._device, "module": embedded_module, "engine": subject.engine}[where]
  real = getattr(owner, name)

  async def submit():
    async def late(number, request):
      for _ in range(40 * number):  # in the middle of what the earlier ones do
        await asyncio.sleep(0)
      return await subject.engine.generate(request)
    jobs = [late(number, request) for number, request in enumerate(requests)]
    return await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 600)

  for failing in range(4):
    calls = iter([False] * failing + [True] + [False] * 1000)

    def sabotaged(*args, calls=calls, **kwargs):
      if next(calls):
        if loses_pool:
          jax.tree.map(lambda leaf: leaf.delete(), subject.engine._device._pool)
        raise RuntimeError("injected")
      return real(*args, **kwargs)

    subject.reset()
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, sabotaged)
      outcomes = asyncio.run(submit())
    for outcome, samples in zip(outcomes, good, strict=True):
      if not isinstance(outcome, RuntimeError):
        assert [s.ids for s in outcome] == [s.ids for s in samples]
    assert not subject.engine._queue and not subject.engine._running
    assert subject.engine._pool.busy == 0
    again = subject.run(*requests)
    assert [[s.ids for s in samples] for samples in again] == [
      [s.ids for s in samples] for samples in good]


def test_a_request_that_cannot_start_fails_alone(embedded, ask, text, image, monkeypatch):
  subject, poison = embedded(), image(7, 2, 2)
  asked = [ask(text(i, 9) + subject.picture + text(1, 3), (shown,), 6, seeds=(i, i + 9))
           for i, shown in enumerate([image(0), poison, image(1), image(2)])]
  good = subject.run(*asked)
  real, waves = embedded_module.wave_images, []

  def fails(jobs, *args, **kwargs):
    waves.append({prompt for prompt, _ in jobs})
    if any(poison in prompt.request.images for prompt, _ in jobs):
      raise RuntimeError("poison")
    return real(jobs, *args, **kwargs)

  subject.reset()
  monkeypatch.setattr(embedded_module, "wave_images", fails)
  told = []
  monkeypatch.setattr(embedded_module.logging, "error", lambda *args, **_: told.append(args))

  async def all_of_them():
    jobs = [subject.engine.generate(request) for request in asked]
    return await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 600)

  outcomes = asyncio.run(all_of_them())
  assert [isinstance(outcome, RuntimeError) for outcome in outcomes] == [False, True, False, False]
  for number in (0, 2, 3):
    assert [s.ids for s in outcomes[number]] == [s.ids for s in good[number]]
  assert len(waves[0]) > 1 and len(told) == 1  # twice the same reason, told once
  assert "poison" in told[0][-1]


def test_a_pool_that_cannot_be_allocated_again_breaks_the_engine(embedded, ask, text, monkeypatch):
  subject, request = embedded(), ask(text(0, 9))
  monkeypatch.setattr(subject.engine._device, "decode", lambda *a, **k: 1 / 0)
  monkeypatch.setattr(subject.engine._device, "reset_pool", lambda: {}["no memory"])

  async def scenario():
    jobs = [subject.engine.generate(ask(text(i, 9))) for i in range(24)]  # more than may run
    outcomes = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 600)
    assert {type(outcome) for outcome in outcomes} == {ZeroDivisionError, KeyError}
    for call in (subject.engine.generate(request), subject.engine.update_weights(None, 1)):
      with pytest.raises(EngineClosed, match="broken: KeyError: 'no memory'"):
        await call

  asyncio.run(scenario())


def test_numbers_that_no_array_holds_are_refused(embedded, ask, text):
  """They would fail the whole block that the request ran in."""
  subject = embedded()
  for bad, said in (({"top_k": 2**31}, "top_k=.*out of bounds"),
                    ({"stop_ids": (2**40,)}, "stop_ids holds .* outside the vocabulary")):
    request = ask(text(0, 3))
    request = dataclasses.replace(request, params=dataclasses.replace(request.params, **bad))
    with pytest.raises(RequestError, match=said):
      subject.run(request)


def test_images_that_do_not_fit_are_refused(embedded, ask, text, image):
  subject = embedded(patch_lengths=(16, 32))
  with pytest.raises(RequestError, match=r"image 1 has 48 patches, .* at most 32"):
    subject.run(ask(text(0, 3) + 2 * subject.picture + text(1, 2), (image(0), image(1, 6, 8))))
  wrong = ImageProcessor(8, 2, 2, [0.5] * 3, [0.5] * 3)(image(0).picture(), ImageLimits(256, 512))
  with pytest.raises(RequestError, match=r"image 0: .*patch_size=8.* 96 values"):
    subject.run(ask(text(0, 3) + subject.picture, (wrong,)))


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
  """Four devices share the rows of the pool and two its heads. The samples are those of one device, and
  no program moves a device's part of the pool, or holds it twice."""
  mesh = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
  reference = subject.reference
  params = jax.device_put(reference.params, sharding.param_shardings(reference.params, mesh))
  engine = EmbeddedEngine(
    subject.engine._model, reference.graphdef, params, config=subject.engine.config, mesh=mesh
  )
  device = engine._device
  assert device.shards == 4 and device.rows == 16
  own = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), device._pool)
  assert own.k_LxRxKxHxS == (3, 4, 1, 16, 96) and own.v_LxRxKxSxH == (3, 4, 1, 96, 16)
  programs = {}

  def noting(name, varying, *args, **sizes):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                          if isinstance(x, jax.Array) else x, args)
    programs[name] = getattr(device._run, name).lower(*shapes, **sizes).compile()
    return call(name, varying, *args, **sizes)

  call, device._call = device._call, noting
  spread = dataclasses.replace(subject, engine=engine)
  ids, images = text(0, 9) + subject.picture + text(1, 3), (image(0),)
  requests = [ask(ids, images, 6, seeds=range(3)), ask(text(2, 30), seeds=(7,)),
              ask(text(3, 12), max_new=10, seeds=(8, 9))]
  for samples, wanted in zip(spread.run(*requests), subject.run(*requests), strict=True):
    for sample, want in zip(samples, wanted, strict=True):
      assert (sample.ids, sample.cached_tokens) == (want.ids, want.cached_tokens)
      np.testing.assert_allclose(sample.logprobs, want.logprobs, atol=1e-4)
  assert programs.keys() == {"encode", "pick", "copy", "prefill", "decode"}
  part = 4 * np.prod(own.k_LxRxKxHxS)
  for name in ("copy", "prefill", "decode"):
    moved = [_bytes(line) for line in programs[name].as_text().splitlines() if COLLECTIVE.search(line)]
    assert moved and max(moved) < part / 2, name
    memory = programs[name].memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * part  # updated in place
    assert memory.temp_size_in_bytes < 4 * part  # of the 8 that all have together


@the_embedded
def test_the_images_of_a_wave_do_not_decide_which_prefill_is_compiled(subject, ask, text, image):
  """Waves of two prompts, with one small image and with two larger ones."""
  engine = EmbeddedEngine(subject.engine._model, subject.reference.graphdef, subject.reference.params,
                          config=subject.engine.config)
  device, met, subject = engine._device, [], dataclasses.replace(subject, engine=engine)
  call = device._call

  def noting(name, *args, **sizes):
    before = device.compilations
    out = call(name, *args, **sizes)
    met.extend([name] * (device.compilations - before))
    return out

  device._call = noting
  for images in ((image(0), image(0)), (image(1, 6, 8), image(2, 6, 8))):
    subject.run(*(ask(text(number, 12) + subject.picture + text(9, 2), (shown,), 4)
                  for number, shown in enumerate(images)))
  assert sorted(met) == ["decode", "encode", "encode", "pick", "pick", "prefill"]


def test_decoding_moves_activations_and_no_weights():
  """The 8B's widths in three layers over eight devices, compiled and not run: every collective is no
  larger than the logits of all rows, while one matrix of the MLP is ten times as large."""
  sizes = dataclasses.replace(PRESETS["8b"], dtype="float32", text=dataclasses.replace(
    PRESETS["8b"].text, num_layers=3))
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(sizes, rngs=nnx.Rngs(0))))
  device = Device(sizes, graphdef, rows=32, length=256, dtype="float32",
                  mesh=sharding.make_mesh({"fsdp": 8}))
  prompts = PrefillInputs(*(np.zeros((8, *rest), np.int32) for rest in ((), (), (), (4,), (4, 3), (4,))),
                          None)
  rows = sampling.row_params([], [], rows=32, width=4)
  running = DecodeInputs(*[np.zeros(32, np.int32)] * 6, rows, None)
  decode = device.trace(params, prompts, running, 4)["decode"].lower().compile()
  moved = [_bytes(line) for line in decode.as_text().splitlines() if COLLECTIVE.search(line)]
  assert max(moved) == 4 * 32 * sizes.text.vocab_size < 4 * 4096 * 12_288 / 10


COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[(-]")


def _bytes(line: str) -> int:
  """Of the result of an operation of a compiled program."""
  sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
  shapes = re.findall(r"(\w+)\[([\d,]*)\]", line.partition(" = ")[2].partition("(%")[0])
  return sum(sizes[kind] * int(np.prod([int(n) for n in shape.split(",") if n]))
             for kind, shape in shapes if kind in sizes)


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


@the_embedded
def test_layers_in_a_loop_give_what_layers_written_out_give(subject, ask, text, image):
  """Deep models scan their layers and gather each layer's rows in the loop."""
  config = dataclasses.replace(subject.engine._model, remat="full")
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))
  engine = EmbeddedEngine(config, graphdef, subject.reference.params, config=subject.engine.config)
  requests = [ask(text(0, 9) + subject.picture + text(1, 3), (image(0),), 6, seeds=range(3)),
              ask(text(2, 30), seeds=(7,))]
  looped = dataclasses.replace(subject, engine=engine).run(*requests)
  for samples, wanted in zip(looped, subject.run(*requests), strict=True):
    for sample, want in zip(samples, wanted, strict=True):
      assert sample.ids == want.ids
      np.testing.assert_allclose(sample.logprobs, want.logprobs, atol=1e-4)
