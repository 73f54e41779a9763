"""The grain pipelines: order, epochs, and exact restoring of their state."""

import itertools
import json

import pytest

from axpo_jax.data import pipeline
from axpo_jax.data.question import Question
from axpo_jax.miniworld.world import MiniWorldSource


def questions(n):
  return [Question(str(i), f"question {i}", (), ("1",)) for i in range(n)]


def ids(batches):
  return [tuple(question.id for question in batch) for batch in batches]


def test_an_epoch_has_whole_batches_without_repeats():
  batches = ids(pipeline.question_batches(questions(10), 3, seed=0, epochs=1))
  assert [len(batch) for batch in batches] == [3, 3, 3]
  assert len(set(itertools.chain(*batches))) == 9


def test_epochs_are_shuffled_differently_and_batches_never_cross_them():
  batches = ids(pipeline.question_batches(questions(12), 4, seed=0, epochs=3))
  epochs = [sum(batches[i:i + 3], ()) for i in range(0, 9, 3)]
  assert all(sorted(epoch, key=int) == [str(i) for i in range(12)] for epoch in epochs)
  assert len(set(epochs)) == 3


def test_seeds_give_different_orders_and_one_seed_the_same():
  first, same, other = (
      ids(pipeline.question_batches(questions(64), 8, seed=seed, epochs=1)) for seed in (1, 1, 2))
  assert first == same
  assert first != other


def test_repeats_for_ever_without_epochs():
  stream = pipeline.question_batches(questions(4), 2, seed=0)
  assert len(list(itertools.islice(stream, 50))) == 50


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7])  # 3 batches an epoch: 2 and 3 are its edges
def test_batches_restore_exactly(taken, threads):
  stream = pipeline.question_batches(questions(10), 3, seed=5, threads=threads)
  for _ in range(taken):
    next(stream)
  state = json.loads(json.dumps(stream.get_state()))  # what a checkpoint does to it
  expected = ids(itertools.islice(stream, 8))
  fresh = pipeline.question_batches(questions(10), 3, seed=5, threads=threads)
  fresh.set_state(state)
  assert ids(itertools.islice(fresh, 8)) == expected
  stream.set_state(state)  # also backwards, in place
  assert ids(itertools.islice(stream, 8)) == expected


def test_examples_restore_exactly_over_an_epoch_boundary():
  def make():
    return pipeline.example_stream(list(range(5)), seed=3, transform=lambda x: 10 * x)
  stream = make()
  head = list(itertools.islice(stream, 4))
  state = stream.get_state()
  tail = list(itertools.islice(stream, 11))
  fresh = make()
  fresh.set_state(state)
  assert list(itertools.islice(fresh, 11)) == tail
  assert sorted(head + tail[:1]) == sorted(tail[1:6]) == [0, 10, 20, 30, 40]


def test_miniworld_source_streams_its_split():
  source = MiniWorldSource(6, seed=1, split="rl")
  seen = sum(ids(pipeline.question_batches(source, 2, seed=0, epochs=1)), ())
  assert sorted(seen) == [f"perception-rl-1-{i}" for i in range(6)]
  with pytest.raises(IndexError):
    source[6]


def test_too_small_sources_are_errors():
  with pytest.raises(pipeline.PipelineError, match="has 3 questions, fewer than one batch of 4"):
    pipeline.question_batches(questions(3), 4, seed=0)
  with pytest.raises(pipeline.PipelineError, match="empty"):
    pipeline.example_stream([], seed=0)
