"""The transcript: kinds, spans, cuts, and the exact map between its two forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.agent.transcript import Kind, Transcript, TranscriptError

PAD, VIDEO, START, END, EOT, THINK, CALL, CALLED = 1, 2, 3, 4, 5, 6, 7, 8
OBSERVATION = [20, START, 30, 31, END, 20, START, 32]


def build(special, images=(), prompt=(40, 41)):
  transcript = Transcript(special)
  transcript.append_prompt([*prompt, *[PAD] * len(images)], images)
  return transcript


def sample(transcript, ids, version=0):
  transcript.append_sampled(ids, [-0.5] * len(ids), version)


def test_kinds_of_a_whole_episode(special, fake_image):
  t = build(special, [fake_image(3)])
  sample(t, [50, THINK, 20, CALL, 60, CALLED, END], version=4)
  t.append_observation([20, START, 30, PAD, END, 20, START, 32], [fake_image(2)])
  sample(t, [51, THINK, 61, END], version=5)
  k = Kind
  assert t.kinds == [
      k.PROMPT, k.PROMPT, k.PROMPT,
      k.THINK, k.THINK, k.ANSWER, k.CALL, k.CALL, k.CALL, k.ANSWER,
      k.INSERTED, k.OBSERVATION, k.OBSERVATION, k.OBSERVATION, k.OBSERVATION,
      k.INSERTED, k.INSERTED, k.INSERTED,
      k.THINK, k.THINK, k.ANSWER, k.ANSWER]
  assert t.versions == [-1] * 3 + [4] * 7 + [-1] * 8 + [5] * 4
  assert t.turns == [(3, 10), (18, 22)]
  assert t.prompt_length == 3
  assert t.expanded_length == 22 + 2 + 1
  mask = t.sampled
  assert [i for i, m in zip(t.ids, mask) if m] == [50, THINK, 20, CALL, 60, CALLED, END,
                                                   51, THINK, 61, END]
  # What the client inserted never has a log-probability; what was sampled always has.
  assert np.array_equal(np.isnan(t.logprobs), ~mask)


def test_thinking_that_never_ends_is_thinking(special):
  t = build(special)
  sample(t, [50, CALL, 51, CALLED, END])
  assert set(t.kinds[2:]) == {Kind.THINK}
  assert t.first_call_span() is None and t.prefix_end() is None


def test_a_call_quoted_in_the_thinking_is_not_a_call(special):
  t = build(special)
  sample(t, [CALL, 50, CALLED, THINK, CALL, 51, CALLED, END])
  assert t.first_call_span() == (6, 9)
  assert t.prefix_end() == 7
  assert t.ids[t.prefix_end() - 1] == CALL


def test_only_the_last_think_end_counts(special):
  t = build(special)
  sample(t, [50, THINK, CALL, 51, CALLED])
  assert t.first_call_span() == (4, 7)
  sample(t, [THINK, 52, END])
  assert t.first_call_span() is None
  assert t.kinds[2:] == [Kind.THINK] * 6 + [Kind.ANSWER] * 2


def test_first_call_is_looked_for_in_later_turns(special):
  t = build(special)
  sample(t, [THINK, 50, END])
  t.append_observation(OBSERVATION)
  sample(t, [THINK, CALL, 60, CALLED, CALL, 61, CALLED, END])
  start = 5 + len(OBSERVATION) + 1
  assert t.first_call_span() == (start, start + 3)


def test_unclosed_call_reaches_to_the_stop_token(special):
  t = build(special)
  sample(t, [THINK, CALL, 60, 61, END])
  assert t.first_call_span() == (3, 6)
  assert t.kinds[2:] == [Kind.THINK, Kind.CALL, Kind.CALL, Kind.CALL, Kind.ANSWER]


@pytest.mark.parametrize("pad", [PAD, VIDEO])
def test_sampled_pads_are_refused_and_nothing_is_appended(special, pad):
  t = build(special)
  with pytest.raises(TranscriptError, match="banned_ids"):
    sample(t, [50, pad])
  assert len(t) == 2


def test_pads_and_images_must_agree(special, fake_image):
  t = Transcript(special)
  with pytest.raises(TranscriptError, match="1 image pads but 0 images"):
    t.append_prompt([40, PAD])
  t.append_prompt([40])
  sample(t, [THINK, END])
  with pytest.raises(TranscriptError, match="0 image pads but 1 images"):
    t.append_observation(OBSERVATION, [fake_image(1)])
  assert len(t) == 3 and not t.images


def test_order_of_appends(special):
  t = Transcript(special)
  with pytest.raises(TranscriptError, match="prompt"):
    sample(t, [50])
  t.append_prompt([40])
  with pytest.raises(TranscriptError, match="im_end"):
    t.append_observation(OBSERVATION)
  sample(t, [50])
  with pytest.raises(TranscriptError, match="im_end"):  # cut by length: no next turn
    t.append_observation(OBSERVATION)
  sample(t, [END])
  with pytest.raises(TranscriptError, match="stop token"):
    sample(t, [50])
  with pytest.raises(TranscriptError, match="before anything else"):
    t.append_prompt([40])
  with pytest.raises(TranscriptError, match="user turn"):
    t.append_observation([20, 30])
  with pytest.raises(TranscriptError, match="2 sampled ids but 1"):
    t.append_sampled([1, 2], [0.0], 0)


def test_endoftext_takes_no_observation(special):
  t = build(special)
  sample(t, [THINK, CALL, 60, CALLED, EOT])
  assert t.turn_is_closed
  with pytest.raises(TranscriptError, match="im_end"):
    t.append_observation(OBSERVATION)


# Pieces of an episode: the sampled turns and the token counts of images that follow each.
TURN = st.lists(st.sampled_from([50, 51, THINK, CALL, CALLED]), max_size=8)
EPISODES = st.tuples(st.lists(st.integers(1, 9), max_size=3),
                     st.lists(st.tuples(TURN, st.lists(st.integers(1, 9), max_size=3)),
                              max_size=4))


def make_episode(special, fake_image, shape):
  """The transcript, and what the engine sampled, in order."""
  question, steps = shape
  t = build(special, [fake_image(n) for n in question])
  sampled = []
  for i, (ids, images) in enumerate(steps):
    logprobs = [-0.25 * (j + 1) for j in range(len(ids) + 1)]
    t.append_sampled([*ids, END], logprobs, i)
    sampled += [*ids, END]
    t.append_observation([20, START, 30, *[PAD] * len(images), END, 20, START, 32],
                         [fake_image(n) for n in images])
  return t, sampled


@settings(max_examples=60, deadline=None)
@given(shape=EPISODES)
def test_expand_and_its_map_are_exact(special, fake_image, shape):
  t, _ = make_episode(special, fake_image, shape)
  e = t.expand()
  # A second implementation: one plain loop.
  ids, source, image, offset, number = [], [], [], [], 0
  for c, token in enumerate(t.ids):
    n = t.images[number].shown.num_tokens if token == PAD else 1
    ids += [token] * n
    source += [c] * n
    image += [number if token == PAD else -1] * n
    offset += list(range(n))
    number += token == PAD
  assert e.ids_T.tolist() == ids and e.source_T.tolist() == source
  assert e.image_T.tolist() == image and e.image_offset_T.tolist() == offset
  assert e.collapse().tolist() == t.ids
  assert len(ids) == t.expanded_length == e.start_C1[-1]
  assert [source.index(c) for c in range(len(t))] == e.start_C1[:-1].tolist()


@settings(max_examples=60, deadline=None)
@given(shape=EPISODES)
def test_sampled_tokens_are_exactly_what_the_engine_returned(special, fake_image, shape):
  t, sampled = make_episode(special, fake_image, shape)
  mask = t.sampled
  assert [i for i, m in zip(t.ids, mask) if m] == sampled
  assert not np.isnan(np.asarray(t.logprobs)[mask]).any()
  assert all((v >= 0) == m for v, m in zip(t.versions, mask))


@settings(max_examples=60, deadline=None)
@given(shape=EPISODES, share=st.floats(0, 1))
def test_cut_carries_exactly_its_images_and_can_grow_back(special, fake_image, shape, share):
  t, _ = make_episode(special, fake_image, shape)
  n = round(share * len(t))
  cut = t.cut(n)
  assert cut.ids == t.ids[:n] and cut.kinds == t.kinds[:n]
  assert cut.images == t.images[:t.ids[:n].count(PAD)]
  assert all(a == b or (math.isnan(a) and math.isnan(b))
             for a, b in zip(cut.logprobs, t.logprobs))
  if cut.turn_is_open:
    stop = next(turn.stop for turn in t.turns if turn.stop > n)
    cut.append_sampled(t.ids[n:stop], t.logprobs[n:stop], t.versions[n])
    again = t.cut(stop)
    assert (cut.ids, cut.kinds, cut.versions) == (again.ids, again.kinds, again.versions)


def test_a_cut_is_a_copy(special):
  t = build(special)
  sample(t, [50, THINK])
  cut = t.cut(3)
  sample(cut, [60])
  assert t.ids == [40, 41, 50, THINK] and cut.ids == [40, 41, 50, 60]
  for length in (-1, 5):
    with pytest.raises(TranscriptError, match="cannot cut"):
      t.cut(length)


def test_a_cut_at_the_prefix_end_carries_the_images_before_it(special, fake_image):
  t = build(special, [fake_image(2)])
  sample(t, [THINK, 50, END])
  t.append_observation([20, START, PAD, END, 20], [fake_image(3)])
  sample(t, [THINK, CALL, 60, CALLED, END])
  t.append_observation([20, START, PAD, END, 20], [fake_image(4)])
  prefix = t.cut(t.prefix_end())
  assert [image.shown.num_tokens for image in prefix.images] == [2, 3]
  assert prefix.ids[-1] == CALL and prefix.turn_is_open
