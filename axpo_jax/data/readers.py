"""Readers of questions: a user's own files, and public data sets by their `Layout`.

In: one or more files, and a `ReaderConfig` that assigns columns. Out: a stream of `Question`s, row by row, so
that a file may be larger than memory. A bad record is reported with its file, row and reason, and skipped; if
the share of bad records is too large, reading stops. `image_sources` describes how a record names its images.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from axpo_jax import paths as paths_lib
from axpo_jax.data import files, image_sources
from axpo_jax.data.files import ReaderError, RecordError
from axpo_jax.data.question import ImageError, ImageSource, Question
from axpo_jax.records import value_at

_LOG = logging.getLogger(__name__)
_BOXED = re.compile(r"\s*\\boxed\{(.*)\}\s*", re.DOTALL)
_DEEPEST = 64  # lists and objects within each other, in a column of `meta`


class TooManyBadRecords(ReaderError):
  """More records were bad than the config allows."""


@dataclasses.dataclass(frozen=True)
class Columns:
  """Column of every field of a question; "" where the file has none.

  A dot goes into a nested object: `reward_model.ground_truth`. `text` and `answers` must be there
  in every record. `answers` may hold a text, a number or a list of them; `images` one or a list.
  """

  id: str = "id"
  text: str = "question"
  images: str = "images"
  answers: str = "answer"
  kind: str = "kind"
  options: str = "options"
  category: str = "category"
  source: str = "source"
  acting: str = "acting"


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
  """How to read a file of questions.

  Attributes:
    columns: the column of each field.
    meta: further columns to keep in `Question.meta`, by name.
    image_folder: image paths are relative to it and must stay in it; by default the folder of the file.
    image_anywhere: image paths may name any file that this process can read. For trusted files only.
    image_cache: folder to which images that come as bytes are written, by content, so that a list of questions
      holds paths and not the images of a whole data set; "" keeps the bytes.
    image_check: how an image is checked when its record is read. "header" opens it (finds missing files and
      files that are not images); "decode" reads all pixels (also finds truncated files, but decodes everything
      once); "none" leaves it to the episode.
    unbox: take `\\boxed{...}` off answers that are wrapped in it.
    max_bad_share: greatest share of bad records, in [0, 1].
    min_records: from this many records on the share is checked on the way; always at the end.
  """

  columns: Columns = Columns()
  meta: tuple[str, ...] = ()
  image_folder: str = ""
  image_anywhere: bool = False
  image_cache: str = ""
  image_check: Literal["none", "header", "decode"] = "header"
  unbox: bool = True
  max_bad_share: float = 0.01
  min_records: int = 200

  def __post_init__(self):
    if self.image_check not in ("none", "header", "decode"):
      raise ReaderError(f"image_check={self.image_check!r} is not one of none, header, decode")
    if not 0 <= self.max_bad_share <= 1:
      raise ReaderError(f"max_bad_share={self.max_bad_share} is a share: give 0 to 1")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a public data set lays out its records.

  Attributes:
    columns: the column of each field. A config may name others, unless there is `adapt`.
    meta: further columns to keep in `Question.meta`.
    adapt: makes a record with the default `Columns` (and `meta`) from one of the data set and the path of its
      file; raises RecordError. None if naming the columns is enough.
    needed: with `adapt`, columns of a parquet file that must be there.
    optional: with `adapt`, further columns to read.
    relocate: image paths begin with folders of another machine or of the data set's own name; the longest
      suffix of a path that exists is used.
    ids_within_source: an id is unique only among the records of one `source`, whose name is prepended.
  """

  columns: Columns = Columns()
  meta: tuple[str, ...] = ()
  adapt: Callable[[Mapping[str, Any], epath.Path], Mapping[str, Any]] | None = None
  needed: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  relocate: bool = False
  ids_within_source: bool = False


# A user's own files: the config names the columns.
OWN = Layout()


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """Where a bad record is and what is wrong with it. Rows count from 1, as editors count lines."""

  file: str
  row: int
  reason: str

  def __str__(self) -> str:
    return f"{self.file}, row {self.row}: {self.reason}"


@dataclasses.dataclass
class ReadReport:
  """Counts of one reading, updated while it runs; `examples` keeps the first few bad records, which are also logged
  unless it is `quiet`."""

  records: int = 0
  bad: int = 0
  quiet: bool = False
  examples: list[BadRecord] = dataclasses.field(default_factory=list)

  _KEPT = 20

  def add_bad(self, record: BadRecord) -> None:
    self.bad += 1
    if len(self.examples) < self._KEPT:
      self.examples.append(record)
      if not self.quiet:
        _LOG.warning("skipped a bad record: %s", record)

  def check(self, max_bad_share: float) -> None:
    """Raises TooManyBadRecords, with the counts and the first few places."""
    if self.bad > max_bad_share * self.records:
      places = "; ".join(str(record) for record in self.examples[:3])
      raise TooManyBadRecords(
          f"{self.bad} of {self.records} records are bad ({self.bad / self.records:.1%}; "
          f"max_bad_share allows {max_bad_share:.1%}). Repair them or raise max_bad_share. "
          f"The first: {places}")


def read_questions(
    paths: str | os.PathLike | Iterable[str | os.PathLike], config: ReaderConfig | None = None,
    report: ReadReport | None = None, layout: Layout = OWN,
    types: Sequence[str] = (".jsonl", ".parquet", ".arrow")) -> Iterator[Question]:
  """Streams the questions of one or more files.

  Args:
    paths: files, read in the order given, or folders of them (see `files.expand`).
    config: columns and limits.
    report: filled with the counts while the stream is consumed.
    layout: of the records; see `data.adapters` for those of public data sets.
    types: suffixes of files that may be read.

  Yields:
    Questions in file order. Their ids are unique: a record that repeats an id is bad, and one
    without an id gets `<file's stem>-<row>`.

  Raises:
    ReaderError: a file is missing, of unknown type, unreadable, or lacks a required column.
    TooManyBadRecords: see `ReaderConfig.max_bad_share`.
  """
  config = _resolve(config or ReaderConfig(), layout)
  report = ReadReport() if report is None else report
  paths = files.expand(paths)
  ids: dict[int, tuple[int, int]] = {}  # hash -> (file, row); texts of millions of ids would be large
  for number, path in enumerate(paths):
    for row, record in files.records(path, _columns(path, config, layout), types):
      report.records += 1
      try:
        question = _question(record, path, row, config, layout)
        first, first_row = ids.setdefault(hash(question.id), (number, row))
        if (first, first_row) != (number, row):
          raise RecordError(
              f"id {question.id!r} was already used at {paths[first]}, row {first_row}")
      except (RecordError, ImageError) as error:
        report.add_bad(BadRecord(str(path), row, str(error)))
        if report.records >= config.min_records:
          report.check(config.max_bad_share)
        continue
      yield question
  if report.records:
    report.check(config.max_bad_share)
  if report.bad:
    _LOG.warning("skipped %d bad records of %d", report.bad, report.records)


def _resolve(config: ReaderConfig, layout: Layout) -> ReaderConfig:
  """The config with the layout's columns, except for those that the config names itself."""
  default = dataclasses.asdict(Columns())
  chosen = {name: column for name, column in dataclasses.asdict(config.columns).items()
            if column != default[name]}
  if chosen and layout.adapt is not None:
    raise ReaderError(f"columns={chosen}: this data set's columns are known; leave them as they are")
  return dataclasses.replace(config, columns=dataclasses.replace(layout.columns, **chosen),
                             meta=(*config.meta, *layout.meta))


def _columns(path: epath.Path, config: ReaderConfig,
             layout: Layout) -> Callable[[Sequence[str]], list[str]]:
  """A function that selects the columns of a parquet file: those that are needed and exist, top level only."""
  if layout.adapt is None:
    needed = (config.columns.text, config.columns.answers)
    wanted = (*dataclasses.astuple(config.columns), *config.meta)
    hint = "Map the columns in ReaderConfig.columns (config.data.columns)"
  else:
    needed, wanted = layout.needed, (*layout.needed, *layout.optional, *config.meta)
    hint = "Is it another data set, or another version of this one?"
  top_level = {name for column in wanted for name in (column, column.split(".")[0])}

  def choose(names: Sequence[str]) -> list[str]:
    for column in needed:
      if column not in names and column.split(".")[0] not in names:
        raise ReaderError(f"{path} has no column {column!r}; it has {list(names)}. {hint}")
    return [name for name in names if name in top_level]
  return choose


# ---- records to questions ----


def _question(record: Any, path: epath.Path, row: int, config: ReaderConfig,
              layout: Layout) -> Question:
  if isinstance(record, RecordError):
    raise record
  if not isinstance(record, Mapping):
    raise RecordError(f"a record must be an object, not {type(record).__name__}")
  if layout.adapt is not None:
    try:
      record = layout.adapt(record, path)
    except RecursionError as error:  # JSON within a column
      raise RecordError("a column is nested too deep") from error
  columns = config.columns
  text = _field(record, columns.text)
  if text is not None and not isinstance(text, str):
    raise RecordError(f"{columns.text!r} (the question's text) must be a text, not {type(text).__name__}")
  if not text or not text.strip():
    raise RecordError(f"{columns.text!r} (the question's text) is missing or empty")
  name, source = _optional_text(record, columns.id), _optional_text(record, columns.source)
  if layout.ids_within_source and name and source:
    name = f"{source}-{name}"
  try:
    question = Question(
        id=name or f"{path.stem}-{row}", text=text,
        images=_images(record, path, config, layout.relocate), answers=_answers(record, config),
        kind=_optional_text(record, columns.kind) or "auto",
        options=tuple(str(option) for option in _as_list(_field(record, columns.options))),
        category=_optional_text(record, columns.category),
        acting=_optional_text(record, columns.acting) or "either",
        source=source or path.stem,
        meta={name: _field(record, name) for name in config.meta})
  except RecordError:
    raise
  except ValueError as error:  # what Question itself does not accept
    raise RecordError(str(error)) from error
  _check_texts(question)
  return question


def _check_texts(question: Question) -> None:
  """Raises RecordError for text that a tokenizer or a dump cannot take: that would end the run hours later."""
  if _deeper(question.meta, _DEEPEST):
    raise RecordError(f"a column of meta is nested more than {_DEEPEST} deep")
  texts = [question.id, question.text, *question.answers, *question.options, question.category,
           question.source, question.meta]
  try:
    json.dumps(texts, ensure_ascii=False, default=lambda value: "").encode()
  except UnicodeEncodeError as error:
    half = f"\\u{ord(error.object[error.start]):04x}"
    raise RecordError(f"half of a character ({half}), which no file or tokenizer takes") from error


def _deeper(value: Any, most: int) -> bool:
  parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
  return most < 0 or any(_deeper(part, most - 1) for part in parts)


def _field(record: Mapping[str, Any], column: str) -> Any:
  """A column's value; None where it is absent or has no name."""
  return value_at(record, column) if column else None


def _optional_text(record: Mapping[str, Any], column: str) -> str:
  value = _field(record, column)
  if isinstance(value, (Mapping, list)):
    raise RecordError(f"{column!r} must be a text or a number, not {type(value).__name__}")
  return "" if value is None else str(value)


def _as_list(value: Any) -> list[Any]:
  if value is None:
    return []
  return list(value) if isinstance(value, (list, tuple)) else [value]


def _answers(record: Mapping[str, Any], config: ReaderConfig) -> tuple[str, ...]:
  column = config.columns.answers
  answers = []
  for value in _as_list(_field(record, column)):
    if isinstance(value, (Mapping, list)):
      raise RecordError(f"{column!r} must hold texts or numbers, not {type(value).__name__}")
    text = "" if value is None else str(value).strip()
    boxed = _BOXED.fullmatch(text) if config.unbox else None
    text = boxed[1].strip() if boxed else text
    if text:
      answers.append(text)
  if not answers:
    raise RecordError(f"{column!r} (the gold answer) is missing or empty")
  return tuple(answers)


def _images(record: Mapping[str, Any], path: epath.Path, config: ReaderConfig,
            relocate: bool) -> tuple[ImageSource, ...]:
  folder = paths_lib.parse(config.image_folder, "image_folder") if config.image_folder else path.parent
  sources = []
  for number, value in enumerate(_as_list(_field(record, config.columns.images))):
    try:
      source = image_sources.named(value, folder, relocate=relocate, anywhere=config.image_anywhere)
      image_sources.check(source, config.image_check)
    except ImageError as error:
      raise RecordError(f"image {number}: {error}") from error
    if config.image_cache and isinstance(source, bytes):
      source = image_sources.kept(source, paths_lib.parse(config.image_cache, "image_cache"))
    sources.append(source)
  return tuple(sources)
