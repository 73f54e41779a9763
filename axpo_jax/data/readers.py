"""Readers of one's own questions: JSON lines and parquet.

In: a file (or several) and a `ReaderConfig` that says which column is what. Out: a stream of
`Question`s, row by row, so that a file larger than memory is no problem. A bad record is reported
with its place (file, row, reason) and skipped; more bad records than a share end the reading.

An image is a path relative to the file, encoded bytes, `{"bytes": ...}` as in Hugging Face data
sets, or base64 text.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import PIL.Image

from axpo_jax.data.question import ImageError, ImageSource, Question, check_header, load_image

_LOG = logging.getLogger(__name__)
_BOXED = re.compile(r"\s*\\boxed\{(.*)\}\s*", re.DOTALL)
# How base64 text of PNG, JPEG, WebP, GIF, BMP and TIFF files begins. Paths do not.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk0", "SUkq", "TU0AK")


class ReaderError(ValueError):
  """A file that cannot be read at all, or a config that does not fit it."""


class TooManyBadRecords(ReaderError):
  """More records were bad than the config allows."""


class RecordError(ValueError):
  """One bad record; the message is the reason."""


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
    image_folder: where image paths start; by default the folder of the file.
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
class BadRecord:
  """Where a bad record stands and what is wrong. Rows count from 1, as editors count lines."""

  file: str
  row: int
  reason: str

  def __str__(self) -> str:
    return f"{self.file}, row {self.row}: {self.reason}"


@dataclasses.dataclass
class ReadReport:
  """Counts of one reading, filled as it goes; `examples` keeps the first few bad records."""

  records: int = 0
  bad: int = 0
  examples: list[BadRecord] = dataclasses.field(default_factory=list)

  _KEPT = 20

  def add_bad(self, record: BadRecord) -> None:
    self.bad += 1
    if len(self.examples) < self._KEPT:
      self.examples.append(record)
      _LOG.warning("skipped a bad record: %s", record)

  def check(self, max_bad_share: float) -> None:
    """Raises TooManyBadRecords, with the counts and the first few places."""
    if self.bad > max_bad_share * self.records:
      places = "\n  ".join(str(record) for record in self.examples[:5])
      raise TooManyBadRecords(
          f"{self.bad} of {self.records} records are bad ({self.bad / self.records:.1%}; "
          f"max_bad_share allows {max_bad_share:.1%}). Mend them or raise max_bad_share. "
          f"The first:\n  {places}")


def read_questions(
    paths: str | pathlib.Path | Iterable[str | pathlib.Path], config: ReaderConfig | None = None,
    report: ReadReport | None = None) -> Iterator[Question]:
  """Streams the questions of one or more files.

  Args:
    paths: `.jsonl` (one object a line) and `.parquet` files, read in the order given.
    config: columns and limits.
    report: filled with the counts while the stream is consumed.

  Yields:
    Questions in file order. Their ids are unique: a record that repeats an id is bad, and one
    without an id gets `<file's stem>-<row>`.

  Raises:
    ReaderError: a file is missing, of unknown type, unreadable, or lacks a required column.
    TooManyBadRecords: see `ReaderConfig.max_bad_share`.
  """
  config = config or ReaderConfig()
  report = ReadReport() if report is None else report
  paths = [paths] if isinstance(paths, (str, pathlib.Path)) else list(paths)
  ids: dict[str, str] = {}
  for path in map(pathlib.Path, paths):
    for row, record in _records(path, config):
      report.records += 1
      try:
        question = _question(record, path, row, config)
        _check_id(question.id, f"{path}, row {row}", ids)
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


def _check_id(question_id: str, place: str, ids: dict[str, str]) -> None:
  if question_id in ids:
    raise RecordError(f"id {question_id!r} was already used at {ids[question_id]}")
  ids[question_id] = place


# ---- files to records ----


def _records(path: pathlib.Path, config: ReaderConfig) -> Iterator[tuple[int, Any]]:
  """Rows from 1 with their record, or with a RecordError where the row could not be read."""
  if not path.is_file():
    raise ReaderError(f"{path} is not a file")
  if path.suffix == ".jsonl":
    return _json_lines(path)
  if path.suffix == ".parquet":
    return _parquet(path, config)
  raise ReaderError(f"{path}: unknown type {path.suffix!r}; use .jsonl or .parquet")


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  with path.open("rb") as file:  # bytes: one line that is not UTF-8 must not spoil the others
    for row, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        yield row, json.loads(line.decode("utf-8"))
      except UnicodeDecodeError as error:
        yield row, RecordError(f"not UTF-8: {error.reason} at byte {error.start}")
      except ValueError as error:
        yield row, RecordError(f"not JSON: {error}")


def _parquet(path: pathlib.Path, config: ReaderConfig) -> Iterator[tuple[int, Any]]:
  import pyarrow as pa  # only who reads parquet needs it
  import pyarrow.parquet as pq

  try:
    with pq.ParquetFile(path) as file:
      columns = _parquet_columns(path, file.schema_arrow.names, config)
      row = 0
      for batch in file.iter_batches(batch_size=64, columns=columns):
        for record in batch.to_pylist():
          row += 1
          yield row, record
  except (pa.ArrowException, OSError) as error:
    raise ReaderError(f"{path} cannot be read as parquet: {error}") from error


def _parquet_columns(
    path: pathlib.Path, names: Sequence[str], config: ReaderConfig) -> list[str]:
  """The columns to read: those the config names and the file has, top level only."""
  for column in (config.columns.text, config.columns.answers):
    if column not in names and column.split(".")[0] not in names:
      raise ReaderError(f"{path} has no column {column!r}; it has {list(names)}. Map the columns in "
                        f"ReaderConfig.columns")
  wanted = [*dataclasses.astuple(config.columns), *config.meta]
  wanted = {name for column in wanted for name in (column, column.split(".")[0])}
  return [name for name in names if name in wanted]


# ---- records to questions ----


def _question(record: Any, path: pathlib.Path, row: int, config: ReaderConfig) -> Question:
  if isinstance(record, RecordError):
    raise record
  if not isinstance(record, Mapping):
    raise RecordError(f"a record must be an object, not {type(record).__name__}")
  columns = config.columns
  text = _field(record, columns.text)
  if not isinstance(text, str) or not text.strip():
    raise RecordError(f"{columns.text!r} (the question's text) is missing or empty")
  try:
    return Question(
        id=_optional_text(record, columns.id) or f"{path.stem}-{row}", text=text,
        images=_images(record, path, config), answers=_answers(record, config),
        kind=_optional_text(record, columns.kind) or "auto",
        options=tuple(str(option) for option in _as_list(_field(record, columns.options))),
        category=_optional_text(record, columns.category),
        acting=_optional_text(record, columns.acting) or "either",
        source=_optional_text(record, columns.source) or path.stem,
        meta={name: _field(record, name) for name in config.meta})
  except RecordError:
    raise
  except ValueError as error:  # what Question itself does not accept
    raise RecordError(str(error)) from error


def _field(record: Mapping[str, Any], column: str) -> Any:
  """A column's value; None where it is absent. A column named with its dots goes before a path."""
  if not column or column in record:
    return record.get(column) if column else None
  value: Any = record
  for name in column.split("."):
    value = value.get(name) if isinstance(value, Mapping) else None
  return value


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


def _images(
    record: Mapping[str, Any], path: pathlib.Path, config: ReaderConfig) -> tuple[ImageSource, ...]:
  folder = pathlib.Path(config.image_folder) if config.image_folder else path.parent
  sources = []
  for number, value in enumerate(_as_list(_field(record, config.columns.images))):
    try:
      source = _image_source(value, folder)
      _check_image(source, config.image_check)
    except ImageError as error:
      raise RecordError(f"image {number}: {error}") from error
    sources.append(source)
  return tuple(sources)


def _image_source(value: Any, folder: pathlib.Path) -> ImageSource:
  if isinstance(value, Mapping):  # Hugging Face: {"bytes": ..., "path": ...}
    value = value.get("bytes") or value.get("path")
  if isinstance(value, (bytes, PIL.Image.Image)):
    return value
  if not isinstance(value, str) or not value:
    raise ImageError(f"expected a path, bytes, {{bytes}} or base64 text, got {type(value).__name__}")
  if value.startswith("data:"):
    return _from_base64(value.partition(",")[2])
  if value.startswith(_BASE64_STARTS) and len(value) >= 64:
    return _from_base64(value)
  return folder / value


def _from_base64(text: str) -> bytes:
  try:
    return base64.b64decode("".join(text.split()), validate=True)
  except binascii.Error as error:
    raise ImageError(f"not base64: {error}") from error


def _check_image(source: ImageSource, check: str) -> None:
  if check == "decode":
    load_image(source)
  elif check == "header":
    check_header(source)
