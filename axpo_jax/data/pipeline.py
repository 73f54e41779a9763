"""Grain pipelines over questions and examples.

In: a random-access source (the miniature world, a list read from files). Out: grain iterators whose
`get_state` and `set_state` restore the stream exactly, over epoch boundaries too; a checkpoint
stores them as they are. Items are made in the order of the stream, and prefetched by threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import grain

from axpo_jax.data.question import Question

T = TypeVar("T")
U = TypeVar("U")


class PipelineError(ValueError):
  """The source does not have the items that are asked for."""


class Source(Protocol[T]):
  """What grain reads from: a length and items by index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> T: ...


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Some questions of a source, by index; `ids` are the ids that they must have."""

  source: Source[Question]
  places: Sequence[int]
  ids: Sequence[str]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> Question:
    place, wanted = self.places[index], self.ids[index]
    question = self.source[place] if place < len(self.source) else None
    if question is None or question.id != wanted:
      raise PipelineError(f"question {place} of the source is {question and question.id!r}, but the "
                          f"records were made for {wanted!r}: they belong to other data")
    return question


def question_batches(
    source: Source[Question], batch_size: int, *, seed: int, epochs: int | None = None,
    threads: int = 1, prefetch: int = 2) -> grain.DatasetIterator[Sequence[Question]]:
  """Batches of questions for RL.

  Every epoch is shuffled anew and cut into whole batches, so no batch holds a question twice; the
  few questions left over at an epoch's end are others each time.

  Args:
    source: the questions.
    batch_size: B, questions a batch.
    seed: of the shuffling.
    epochs: how often to go through the source; None for ever.
    threads: that prefetch batches; 0 makes each on demand.
    prefetch: how many batches.

  Returns:
    A checkpointable iterator of tuples of B questions.

  Raises:
    PipelineError: the source is smaller than one batch.
  """
  if len(source) < batch_size:
    raise PipelineError(f"the source has {len(source)} questions, fewer than one batch of "
                        f"{batch_size}; lower the batch size or add questions")
  shuffled = grain.MapDataset.source(source).seed(seed).shuffle()
  batches = shuffled.batch(batch_size, drop_remainder=True, batch_fn=tuple)
  return _iterator(batches, epochs, threads, prefetch)


def example_stream(
    source: Source[T], *, seed: int, epochs: int | None = None,
    transform: Callable[[T], U] | None = None, threads: int = 1,
    prefetch: int = 16) -> grain.DatasetIterator[U]:
  """Single examples for SFT, shuffled anew every epoch; each epoch holds every example once.

  Args:
    source: the examples, or what `transform` makes them of.
    seed: of the shuffling.
    epochs: how often to go through the source; None for ever.
    transform: applied to each item, in the reading threads.
    threads: that prefetch examples; 0 makes each on demand.
    prefetch: how many examples.

  Returns:
    A checkpointable iterator.

  Raises:
    PipelineError: the source is empty.
  """
  if not len(source):
    raise PipelineError("the source is empty; was every trajectory filtered out?")
  examples: Any = grain.MapDataset.source(source).seed(seed).shuffle()
  if transform is not None:
    examples = examples.map(transform)
  return _iterator(examples, epochs, threads, prefetch)


def _iterator(
    dataset: grain.MapDataset[T], epochs: int | None, threads: int,
    prefetch: int) -> grain.DatasetIterator[T]:
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
  return iter(dataset.repeat(epochs).to_iter_dataset(options))
