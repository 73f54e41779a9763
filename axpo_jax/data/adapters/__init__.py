"""Public data sets by name: each one's files, as they are published, to `Question`s.

In: a data set's name and its files or folder. Out: the same stream of questions that one's own files
give, with the same report of bad records. A module a kind of set: `training` (the six training
sets), `reasoning`, `perception` and `search` (the nine benchmarks); docs/data.md has the table.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

from axpo_jax.data import files, readers
from axpo_jax.data.adapters import perception, reasoning, search, training
from axpo_jax.data.question import Question

LAYOUTS: dict[str, readers.Layout] = {
    **training.LAYOUTS, **reasoning.LAYOUTS, **perception.LAYOUTS, **search.LAYOUTS}


def read(name: str, paths: str | pathlib.Path | Iterable[str | pathlib.Path],
         config: readers.ReaderConfig | None = None,
         report: readers.ReadReport | None = None) -> Iterator[Question]:
  """Streams the questions of a public data set.

  Args:
    name: a key of LAYOUTS.
    paths: its files, or the folder it was downloaded to.
    config: limits; columns only of sets that let them be mapped.
    report: filled with the counts while the stream is consumed.

  Raises:
    ReaderError: there is no such data set, or see `readers.read_questions`.
    TooManyBadRecords: see `readers.ReaderConfig.max_bad_share`.
  """
  if name not in LAYOUTS:
    raise readers.ReaderError(f"unknown data set {name!r}; choose one of {sorted(LAYOUTS)}")
  return readers.read_questions(paths, config, report, LAYOUTS[name], files.TYPES)
