"""Files of records: JSON lines, JSON, tab-separated values, parquet and Arrow, read piece by piece.

In: paths of files or folders. Out: rows, counted from 1, each with its record or, if it cannot be read, a
RecordError. Only JSON that is not in lines is held in memory as a whole. A folder of `datasets.save_to_disk`
counts as its Arrow files in order. The files may be on an object store.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from axpo_jax import paths as paths_lib

# Of a folder, only the files of the first type in this order are read: data sets hold previews and annotations
# in other types beside their records.
TYPES = (".parquet", ".arrow", ".jsonl", ".tsv", ".json")
# What `datasets.save_to_disk` leaves in the folder of a data set, and of several splits.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ROWS = 16  # of parquet at a time; few, since a row may hold an image of 20 MB
_BUFFER = 1 << 20  # bytes of a column to prefetch; without it a whole row group is read
LONGEST = 1 << 28  # bytes of a JSON line


class ReaderError(ValueError):
  """A file cannot be read at all, or the config does not fit it."""


class RecordError(ValueError):
  """One bad record; the message is the reason."""


def expand(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[epath.Path]:
  """The given files; for a folder, the files below it, by name.

  Raises:
    ReaderError: a path does not exist, or a folder holds no file of a known type.
  """
  files: list[epath.Path] = []
  for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
    path = paths_lib.parse(path)
    if not path.is_dir():
      files.append(path)
      continue
    if saved := _saved(path):
      files += saved
      continue
    below = paths_lib.files_below(path)
    found = [[file for file in below if file.suffix == suffix] for suffix in TYPES]
    if not any(found):
      raise ReaderError(f"{path} holds no file of type {', '.join(TYPES)}")
    files += next(group for group in found if group)
  return files


def _saved(folder: epath.Path) -> list[epath.Path]:
  """The Arrow files of a folder of `datasets.save_to_disk`, in order; none for any other folder.

  Raises:
    ReaderError: it holds several splits, or a selection by indices.
  """
  try:
    if (folder / _SPLITS).exists():
      splits = json.loads((folder / _SPLITS).read_text())["splits"]
      if len(splits) != 1:
        raise ReaderError(f"{folder} holds the splits {splits}: name the folder of one, {folder / str(splits[0])}")
      folder = paths_lib.within(folder, splits[0])
    if not (folder / _STATE).exists():
      return []
    state = json.loads((folder / _STATE).read_text())
    if state.get("_indices_data_files") or state.get("_indices_files"):
      raise ReaderError(f"{folder} is a selection of a data set: save it with flatten_indices() first")
    return [paths_lib.within(folder, part["filename"]) for part in state["_data_files"]]
  except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OSError) as error:
    if isinstance(error, ReaderError):
      raise
    raise ReaderError(f"{folder} is no data set that datasets.load_from_disk reads: {error!r}") from error


def line_starts(path: epath.Path) -> list[int]:
  """The bytes at which the lines of a file begin, without the blank ones."""
  starts, at, begins = [], 0, True
  with paths_lib.local(path).open("rb") as file:
    while part := file.readline(LONGEST):
      if begins and part.strip():
        starts.append(at)
      at += len(part)
      begins = part.endswith(b"\n")
  return starts


def line_at(path: epath.Path, start: int) -> bytes:
  """The line that begins at a byte.

  Raises:
    RecordError: it is longer than LONGEST.
  """
  with paths_lib.local(path).open("rb") as file:
    file.seek(start)
    line = file.readline(LONGEST)
  if len(line) == LONGEST and not line.endswith(b"\n"):
    raise RecordError(f"a line of more than {LONGEST >> 20} MB")
  return line


def records(path: epath.Path, choose_columns: Callable[[Sequence[str]], Sequence[str]],
            types: Sequence[str] = TYPES) -> Iterator[tuple[int, Any]]:
  """Rows of a file.

  Args:
    path: the file.
    choose_columns: selects the columns of a parquet file to read; may raise ReaderError.
    types: suffixes that the caller accepts.

  Raises:
    ReaderError: there is no such file, its type is unknown, or it is broken as a whole.
  """
  if not paths_lib.is_file(path):
    raise ReaderError(f"{path} is not a file")
  if path.suffix not in types:
    raise ReaderError(f"{path}: unknown type {path.suffix!r}; use {' or '.join(types)}")
  if path.suffix in (".parquet", ".arrow"):
    return (_parquet if path.suffix == ".parquet" else _arrow)(path, choose_columns)
  return {".jsonl": _json_lines, ".json": _json, ".tsv": _tab_separated}[path.suffix](path)


def _json_lines(path: epath.Path) -> Iterator[tuple[int, Any]]:
  # Bytes, since one line that is not UTF-8 must not affect the others. Buffered again, since readline of
  # fsspec's files takes no limit.
  with path.open("rb") as opened, io.BufferedReader(opened) as file:
    row = 0
    while line := file.readline(LONGEST):
      row += 1
      if row == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
      if len(line) == LONGEST and not line.endswith(b"\n"):
        while len(line) == LONGEST and not line.endswith(b"\n"):
          line = file.readline(LONGEST)
        yield row, RecordError(f"a line of more than {LONGEST >> 20} MB")
      elif line.strip():
        yield row, _parsed(line)


def _parsed(line: bytes) -> Any:
  try:
    return json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    return RecordError(f"not UTF-8: {error.reason} at byte {error.start}")
  except RecursionError:
    return RecordError("not JSON that can be read: nested too deep")
  except ValueError as error:
    return RecordError(f"not JSON: {error}")


def _json(path: epath.Path) -> Iterator[tuple[int, Any]]:
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ReaderError(f"{path} is not JSON: {error}") from error
  yield from enumerate(content if isinstance(content, list) else [content], 1)


def _tab_separated(path: epath.Path) -> Iterator[tuple[int, Any]]:
  csv.field_size_limit(2**31 - 1)  # cells may hold images, as base64
  with io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", errors="replace", newline="") as file:
    reader = csv.DictReader(file, delimiter="\t", restkey=None)
    try:
      for row, record in enumerate(reader, 1):
        if None in record or None in record.values():
          yield row, RecordError(f"has not the {len(reader.fieldnames or ())} cells of the header")
        else:
          yield row, record
    except csv.Error as error:
      raise ReaderError(f"{path} cannot be read as tab-separated values: {error}") from error


def _parquet(path: epath.Path,
             choose_columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[int, Any]]:
  import pyarrow as pa  # only who reads parquet needs it
  import pyarrow.parquet as pq

  try:
    with (path.open("rb") as opened,
          pq.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False) as file):
      columns = choose_columns(file.schema_arrow.names)
      row = 0
      for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
        for record in _rows(batch):
          row += 1
          yield row, record
  except (pa.ArrowException, OSError) as error:
    raise ReaderError(f"{path} cannot be read as parquet: {error}") from error


def _arrow(path: epath.Path,
           choose_columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[int, Any]]:
  import pyarrow as pa

  try:
    with path.open("rb") as opened, pa.ipc.open_stream(opened) as stream:
      columns = list(choose_columns(stream.schema.names))
      row = 0
      for batch in stream:
        batch.validate(full=True)  # a damaged file may have offsets outside of it
        chosen = batch.select(columns)
        for at in range(0, chosen.num_rows, _ROWS):
          for record in _rows(chosen.slice(at, _ROWS)):
            row += 1
            yield row, record
  except (pa.ArrowException, OSError) as error:
    raise ReaderError(f"{path} cannot be read as an Arrow stream: {error}") from error


def _rows(batch) -> list[Any]:
  """The records of a batch; a RecordError for each with an invalid text or date."""
  try:
    return batch.to_pylist()
  except (ValueError, OverflowError) as error:
    if batch.num_rows == 1:
      return [RecordError(f"a value cannot be read: {error}")]
    return [record for at in range(batch.num_rows) for record in _rows(batch.slice(at, 1))]
