"""What every engine must do (`subject`), whatever is behind it."""

import asyncio
import itertools

import numpy as np
import pytest

from axpo_jax.engine.protocol import Engine, PromptTooLong, RequestError


def _needs_seeds(subject):
  if not subject.seeded:
    pytest.skip("SGLang heeds sampling_seed with --enable-deterministic-inference only: GPUs only")


def test_it_is_an_engine(subject):
  assert isinstance(subject.engine, Engine)


def test_greedy_equals_full_forwards(subject, ask, text, image):
  images = (image(1), image(2, 6, 4))
  prompts = [
    (text(0, 1), ()),
    (text(1, 33), ()),
    (text(2, 9) + subject.picture + text(3, 5) + subject.picture + text(4, 1), images),
  ]
  done = subject.run(*(ask(ids, shown, 11, temperature=0) for ids, shown in prompts))
  for (ids, shown), (sample,) in zip(prompts, done, strict=True):
    assert sample.ids == subject.reference.greedy(ids, shown, 11)
    assert sample.finish_reason == "length" and sample.weight_version == 0
    np.testing.assert_allclose(
      sample.logprobs, subject.reference.logprobs(ids, shown, sample.ids), atol=1e-4
    )
  assert done[2][0].prompt_tokens == 9 + 8 + 5 + 8 + 1 and done[2][0].cached_tokens == 0


def test_logprobs_are_those_of_a_full_forward(subject, ask, text, image):
  ids, images, banned = text(0, 6) + subject.picture + text(1, 6), (image(0),), (20, 21, 22)
  (samples,) = subject.run(ask(
    ids, images, 9, seeds=range(6), temperature=0.6, top_p=0.9, top_k=30, banned_ids=banned))
  assert len({sample.ids for sample in samples}) > 1
  for sample in samples:
    expected = subject.reference.logprobs(ids, images, sample.ids, temperature=0.6, banned=banned)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_a_shared_prompt_is_computed_once(subject, ask, text, image):
  ids, images = text(0, 12) + subject.picture + text(1, 7), (image(3),)
  (samples,) = subject.run(ask(ids, images, 5, seeds=range(8)))
  size = 22 + 5
  assert [s.prompt_tokens for s in samples] == [size] * 8
  assert sorted(s.cached_tokens for s in samples) == [0] + [size - 1] * 7
  stats = subject.engine.stats()
  assert (stats.requests, stats.samples, stats.images_encoded) == (1, 8, 1)
  assert stats.prefill_tokens_computed == size - 1 + 8 * subject.recomputed
  assert stats.prompt_tokens == 8 * size and stats.cached_tokens == 7 * (size - 1)
  assert stats.decode_tokens == 8 * 5
  subject.engine.stats(reset=True)
  assert subject.engine.stats().prompt_tokens == 0


def test_separate_requests_share_too(subject, ask, text):
  """Episodes ask one by one, for one sample each: the prompt is still computed once."""
  prompt, other = text(0, 40), text(1, 30)
  subject.run(*(ask(ids, seeds=(i,)) for i, ids in enumerate([prompt, other] * 4)))
  again = 8 * subject.recomputed
  assert subject.engine.stats().prefill_tokens_computed == 39 + 29 + again


def test_questions_share_the_system_prompt(subject, ask, text):
  if not subject.batches_share:
    pytest.skip("this server finds prefixes of finished prefills only, not of one in the same batch")
  system = text(0, 50)
  subject.run(*(ask(system + text(i, 10)) for i in range(1, 5)))
  assert subject.engine.stats().prefill_tokens_computed == 50 + 4 * 9


def test_continuations_of_a_frozen_prefix(subject, ask, text, image):
  ids, images = text(0, 8) + subject.picture + text(1, 4), (image(5, 6, 6),)
  ((source,),) = subject.run(ask(ids, images, 12))
  prefix = ids + source.ids[:5]
  (samples,) = subject.run(ask(prefix, images, 6, seeds=range(10, 14)))
  size = len(prefix) + 8
  assert [(s.prompt_tokens, s.cached_tokens) for s in samples] == [(size, size - 1)] * 4
  assert subject.engine.stats().images_encoded == 1
  for sample in samples:
    expected = subject.reference.logprobs(prefix, images, sample.ids)
    np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_turns_of_an_episode_reuse_their_row(subject, ask, text, image):
  ids, images = text(0, 8) + subject.picture + text(1, 4), (image(6),)
  known = 0
  for turn in range(3):
    ((sample,),) = subject.run(ask(ids, images, 5, temperature=0))
    assert sample.ids == subject.reference.greedy(ids, images, 5)
    assert sample.cached_tokens == known
    known = sample.prompt_tokens + len(sample.ids) - 1
    ids += sample.ids + text(turn, 3) + subject.picture + text(turn, 2)
    images += (image(10 + turn),)
  assert subject.engine.stats().images_encoded == 3


def test_same_ids_with_another_picture_do_not_match(subject, ask, text, image):
  ids = text(0, 8) + subject.picture + text(1, 4)
  first, second = (image(7),), (image(8),)
  subject.run(ask(ids, first, temperature=0))
  ((sample,),) = subject.run(ask(ids, second, temperature=0))
  assert sample.cached_tokens == 9
  assert sample.ids == subject.reference.greedy(ids, second, 8)


def test_draws_do_not_depend_on_place_or_company(subject, ask, text):
  _needs_seeds(subject)
  requests = [
    ask(text(i, 5 + 3 * i), max_new=10, seeds=(100 + i,), temperature=(1.0, 0.5)[i % 2],
        top_k=(0, 4, 0)[i % 3], presence_penalty=(0.0, 0.0, 0.0, 1.0)[i % 4])
    for i in range(10)
  ]  # fmt: skip
  together = subject.run(*requests)
  subject.reset()
  order = np.random.default_rng(0).permutation(10)
  shuffled = subject.run(*(requests[i] for i in order))
  assert [s[0].ids for s in shuffled] == [together[i][0].ids for i in order]
  for i in (0, 3, 7):
    subject.reset()
    ((alone,),) = subject.run(requests[i])
    assert alone.ids == together[i][0].ids
    np.testing.assert_allclose(alone.logprobs, together[i][0].logprobs, atol=1e-5)


def test_seeds_make_samples(subject, ask, text):
  _needs_seeds(subject)
  (samples,) = subject.run(ask(text(0, 10), seeds=(1, 2, 1, 1 + 2**40)))
  assert samples[0].ids == samples[2].ids
  assert len({sample.ids for sample in samples}) == 3


def test_a_stop_id_ends_the_sample_and_belongs_to_it(subject, ask, text):
  ids = text(0, 10)
  free = subject.reference.greedy(ids, (), 12)
  for stop in (free[0], free[6]):
    upto = free.index(stop) + 1
    ((sample,),) = subject.run(ask(ids, max_new=12, temperature=0, stop_ids=(90, stop)))
    assert sample.ids == free[:upto] and sample.finish_reason == "stop"
    assert len(sample.logprobs) == upto


def test_finished_rows_make_room(subject, ask, text):
  """More samples than can run at once, of very different lengths."""
  requests = [ask(text(i, 4 + i), max_new=1 + 5 * (i % 4), temperature=0) for i in range(23)]
  for request, (sample,) in zip(requests, subject.run(*requests), strict=True):
    assert sample.ids == subject.reference.greedy(request.ids, (), request.params.max_new_tokens)


def test_banned_ids_are_never_drawn(subject, ask, text):
  ids = text(0, 10)
  banned = tuple(set(subject.reference.greedy(ids, (), 8)))
  greedy, drawn = subject.run(
    ask(ids, temperature=0, banned_ids=banned), ask(ids, seeds=range(8), banned_ids=banned)
  )
  assert greedy[0].ids == subject.reference.greedy(ids, (), 8, banned=banned)
  assert not set(itertools.chain(*(s.ids for s in drawn))) & set(banned)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-4}], ids=str)
def test_narrow_filters_equal_greedy(subject, ask, text, narrow):
  ids = text(0, 10)
  ((sample,),) = subject.run(ask(ids, seeds=(5,), **narrow))
  assert sample.ids == subject.reference.greedy(ids, (), 8)


def test_presence_penalty_counts_generated_ids_only(subject, ask, text):
  ids = text(0, 10)
  ((sample,),) = subject.run(ask(ids, max_new=20, temperature=0, presence_penalty=1.5))
  assert sample.ids == subject.reference.greedy(ids, (), 20, presence=1.5)
  ((strong,),) = subject.run(ask(ids, max_new=20, temperature=0, presence_penalty=2.0))
  assert len(set(strong.ids)) == 20


def test_prompts_that_cannot_be_served_are_refused(subject, ask, text, image):
  too_long = ask(text(0, 80) + subject.picture + text(1, 4), (image(0, 8, 8),))
  with pytest.raises(PromptTooLong, match=rf"102 tokens.*{subject.length}"):
    subject.run(too_long)
  with pytest.raises(RequestError, match=r"1 image pads .* 0 images"):
    subject.run(ask(text(0, 3) + subject.picture + text(1, 1)))
  with pytest.raises(RequestError, match="ends with an image pad"):
    subject.run(ask(text(0, 3) + subject.picture[:2], (image(0),)))
  with pytest.raises(RequestError, match="ids is empty"):
    ask(())
  with pytest.raises(RequestError, match="seeds is empty"):
    ask((5,), seeds=())
  # JAX would read the last embedding for an id beyond the table, and draw NaN where nothing is left.
  beyond = {"outside the vocabulary of 92": (ask((5, 92)), ask((5, -1)), ask((5, 6), banned_ids=(92,)),
                                             ask((5,), stop_ids=(99,))),
            "banned_ids are all 92 ids": (ask((5, 6), banned_ids=tuple(range(92))),)}
  for reason, requests in beyond.items():
    for request in requests:
      with pytest.raises(RequestError, match=reason):
        subject.run(request)
  assert subject.engine.stats().requests == 0


def test_generation_stops_at_the_longest_sequence(subject, ask, text):
  ids = text(0, subject.length - 6)
  full, last = subject.run(
    ask(ids, max_new=50, temperature=0), ask(text(1, subject.length - 1), max_new=50)
  )
  assert full[0].ids == subject.reference.greedy(ids, (), 6)
  assert full[0].finish_reason == last[0].finish_reason == "length" and len(last[0].ids) == 1


def test_new_weights_are_used_and_the_old_cache_is_not(subject, ask, text, image, other_params):
  request = ask(text(0, 9) + subject.picture + text(1, 9), (image(0),), temperature=0)
  ((before,),) = subject.run(request)
  asyncio.run(subject.engine.update_weights(other_params, 7))
  ((after,),) = subject.run(request)
  assert after.ids != before.ids and after.cached_tokens == 0
  assert (before.weight_version, after.weight_version) == (0, 7)
  subject.reset()
  ((again,),) = subject.run(request)
  assert again == before


def test_an_update_waits_for_running_samples(subject, ask, text, other_params):
  """What runs ends on its weights; what comes meanwhile is of one version, and says of which. An engine that
  interrupts it hands back what it has."""
  request, late = ask(text(0, 9), max_new=60, temperature=0), ask(text(1, 9), temperature=0)

  async def scenario():
    running = asyncio.create_task(subject.engine.generate(request))
    while not subject.engine.stats().decode_tokens:
      await asyncio.sleep(0)
    update = asyncio.create_task(subject.engine.update_weights(other_params, 1))
    await asyncio.sleep(0)
    meanwhile = asyncio.create_task(subject.engine.generate(late))
    await update
    return await running, await meanwhile, await subject.engine.generate(late)

  (old,), (either,), (new,) = asyncio.run(scenario())
  by_old_weights = subject.reference.greedy(late.ids, (), 8)
  assert old.ids == subject.reference.greedy(request.ids, (), 60) and old.weight_version == 0
  assert new.ids != by_old_weights and new.weight_version == 1
  expected = {0: by_old_weights, 1: new.ids}[either.weight_version]
  assert either.ids == (expected[:len(either.ids)] if either.finish_reason == "abort" else expected)


def test_a_cancelled_request_leaves_the_engine_working(subject, ask, text):
  request = ask(text(0, 9), max_new=60, seeds=range(12))

  async def scenario():
    task = asyncio.create_task(subject.engine.generate(request))
    while not subject.engine.stats().decode_tokens:
      await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    return await subject.engine.generate(ask(text(1, 9), temperature=0))

  (sample,) = asyncio.run(scenario())
  assert sample.ids == subject.reference.greedy(text(1, 9), (), 8)
