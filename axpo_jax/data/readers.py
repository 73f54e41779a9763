"""Readers of questions: one's own files, and by a `Layout` those of public data sets.

In: a file (or several) and a `ReaderConfig` that says which column is what. Out: a stream of
`Question`s, row by row, so that a file larger than memory is no problem. A bad record is reported
with its file, row and reason, and skipped; more bad records than a share end the reading. Images may be
written in the ways of `image_sources`.
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
    columns: which column is what.
    meta: further columns to keep in `Question.meta`, by name.
    image_folder: where image paths start; by default the folder of the file. A record cannot name an
      image outside of it.
    image_anywhere: it can: any file that this process may read. For files that one has written oneself.
    image_cache: folder to which images that come as bytes are written, by content, so that a list
      of questions holds paths and not the images of a whole data set; "" keeps the bytes.
    image_check: what is tried of every image when its record is read: "header" opens it (finds
      missing files and files that are no image), "decode" reads all pixels (finds cut files too,
      at the price of decoding everything once), "none" leaves it to the episode.
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
    columns: which column is what. A config may name others, unless there is `adapt`.
    meta: further columns to keep in `Question.meta`.
    adapt: makes a record of the default `Columns` (and `meta`) from one of the data set and the
      path of its file; raises RecordError. None where naming the columns is enough.
    needed: with `adapt`, columns of a parquet file that must be there.
    optional: with `adapt`, further columns to read.
    relocate: image paths begin with folders of another machine or of the data set's own name; the
      longest end of a path that exists is taken.
    ids_within_source: an id is unique only among the records of one `source`, whose name is put
      before it.
  """

  columns: Columns = Columns()
  meta: tuple[str, ...] = ()
  adapt: Callable[[Mapping[str, Any], epath.Path], Mapping[str, Any]] | None = None
  needed: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  relocate: bool = False
  ids_within_source: bool = False


# One's own files: the columns are the config's.
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
  """Counts of one reading, filled as it goes; `examples` keeps the first few bad records, which are
  also logged unless it is `quiet`."""

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
  """The config with the layout's columns, except where it names others."""
  default = dataclasses.asdict(Columns())
  chosen = {name: column for name, column in dataclasses.asdict(config.columns).items()
            if column != default[name]}
  if chosen and layout.adapt is not None:
    raise ReaderError(f"columns={chosen}: this data set's columns are known; leave them as they are")
  return dataclasses.replace(config, columns=dataclasses.replace(layout.columns, **chosen),
                             meta=(*config.meta, *layout.meta))


def _columns(path: epath.Path, config: ReaderConfig,
             layout: Layout) -> Callable[[Sequence[str]], list[str]]:
  """Chooses a parquet file's columns: those that are named and there, top level only."""
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
  """What a tokenizer or a dump could not take would end the run hours later."""
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
