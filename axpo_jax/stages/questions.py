"""The questions of a config: for training, filtered and endless; and the held-out ones."""

import itertools
from collections.abc import Iterator

import grain
from etils import epath
from ml_collections import ConfigDict

from axpo_jax.data import adapters, pipeline, readers
from axpo_jax.data.question import Question
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld.world import MiniWorldSource
from axpo_jax.stages import sections, selection


def question_batches(config: ConfigDict, folder: epath.Path | None = None
                     ) -> grain.DatasetIterator:
  """Endless, checkpointable batches of training questions, those that the filter keeps.

  Args:
    folder: of the run, whose stages "teach" and "screen" the filter reads.
  """
  source, (records, _) = _questions(config, "rl", config.data.path), selection.questions(config, folder)
  if records is not None:
    source = pipeline.Chosen(source, [record.place for record in records],
                             [record.id for record in records])
  # Dynamic sampling draws as many as it needs: from batches of one.
  size = 1 if config.rl.dynamic.rounds else config.rl.questions
  return pipeline.question_batches(source, size, seed=config.seed)


def training_questions(config: ConfigDict, most: int = 0) -> Iterator[Question]:
  """The training questions in their order, as a stream; the first `most` of them, if it is not 0."""
  if config.data.source == "miniworld":
    source = _questions(config, "rl", "")
    stream = (source[i] for i in range(len(source)))
  else:
    stream = _read(config, config.data.path)
  return itertools.islice(stream, most or None)


def eval_questions(config: ConfigDict) -> list[Question]:
  """The held-out questions, the same at every call."""
  source = _questions(config, "eval", config.data.eval_path)
  return [source[i] for i in range(min(config.eval.questions, len(source)))]


def _questions(config: ConfigDict, split: str, path: str) -> pipeline.Source[Question]:
  if config.data.source == "miniworld":
    size = config.eval.questions if split == "eval" else config.data.miniworld.train_size
    return MiniWorldSource(size, config.data.miniworld.seed, split, sections.world_config(
      config, config.data.miniworld.kinds))
  return list(_read(config, path, config.data.eval_source if split == "eval" else ""))


def _read(config: ConfigDict, path: str, source: str = "") -> Iterator[Question]:
  source = source or config.data.source
  how = sections.reader(config, source)
  try:
    yield from (adapters.read(source, path, how) if source in adapters.LAYOUTS
                else readers.read_questions(path, how))
  except readers.ReaderError as error:
    raise ConfigError(f"config.data: {error}") from error
