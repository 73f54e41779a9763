"""Files of traces, whatever their format: detected by their first readable record, or forced.

In: files and folders. Out: Traces, and for everything that could not be read a Problem with its
file, line and reason.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from axpo_jax.eval.diagnose import dumps
from axpo_jax.eval.diagnose.chat_logs import read_chat
from axpo_jax.eval.diagnose.text_logs import conversations, is_text, read_text
from axpo_jax.eval.diagnose.traces import Fields, Trace, TraceError

FORMATS = ("axpo", "openai", "text")
_RECORDS, _PLAIN = (".jsonl", ".json"), (".txt", ".log")
# Files and folders of a run that hold no rollouts.
_OTHERS = frozenset({"metrics.jsonl", "audit.jsonl", "config.json", "done.json", "filter.json",
                     "results.json", "checkpoints", "policy", "tensorboard"})


@dataclasses.dataclass(frozen=True)
class Problem:
  """What could not be read, and why; line 0 is the whole file."""

  file: str
  line: int
  reason: str


@dataclasses.dataclass
class Reading:
  """Everything that was read.

  Attributes:
    traces: the rollouts.
    problems: records that could not be read.
    formats: how many records of each format.
    left_out: continuations and rollouts that the machine ended: read, but not counted.
  """

  traces: list[Trace] = dataclasses.field(default_factory=list)
  problems: list[Problem] = dataclasses.field(default_factory=list)
  formats: dict[str, int] = dataclasses.field(default_factory=dict)
  left_out: int = 0


def read(paths: Iterable[str | pathlib.Path], *, form: str | None = None,
         fields: Fields | None = None, tokenizer: str | None = None) -> Reading:
  """Reads files, and folders recursively.

  Args:
    paths: .jsonl, .json, .txt and .log files, or folders of them.
    form: one of FORMATS; None detects it file by file.
    fields: where foreign records keep reward, question and time.
    tokenizer: a tokenizer.json, for dumps without the text of their tokens.

  Raises:
    TraceError: a path that is not there, or an unknown format.
  """
  if form not in (None, *FORMATS):
    raise TraceError(f"format {form!r}; choose one of {FORMATS}")
  out, reader = Reading(), _Reader(form, fields or Fields(), tokenizer)
  for path in _files(paths):
    reader.read(path, out)
  return out


class _Reader:

  def __init__(self, form: str | None, fields: Fields, tokenizer: str | None):
    self._form, self._fields = form, fields
    self._decode = dumps.load_decode(pathlib.Path(tokenizer)) if tokenizer else None
    self._known: dict[int, str] = {}

  def read(self, path: pathlib.Path, out: Reading) -> None:
    form = self._form
    for line, record in _records(path):
      try:
        if isinstance(record, Exception):
          raise TraceError(f"not JSON: {record}")
        if not isinstance(record, Mapping):
          raise TraceError("not a JSON object")
        form = form or _detect(record)
        trace = self._trace(form, record, path, line)
      except (TraceError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, TraceError) else (
          f"damaged {form} record: {type(error).__name__}: {error}")
        out.problems.append(Problem(str(path), line, reason))
        continue
      out.formats[form] = out.formats.get(form, 0) + 1
      if trace is None:
        out.left_out += 1
      else:
        out.traces.append(trace)

  def _trace(self, form: str, record: Mapping[str, Any], path: pathlib.Path, line: int
             ) -> Trace | None:
    place, step = f"{path}:{line}", dumps.step_in_name(path)
    if form == "axpo":
      if "pieces" not in record["transcript"] and self._decode is None:
        self._decode = dumps.find_decode(path)
      pieces = dumps.pieces_of(record, self._decode, self._known)
      return dumps.read_dump(record, place, step, pieces)
    trace = (read_chat if form == "openai" else read_text)(record, place, self._fields)
    return dataclasses.replace(trace, when=step) if trace.when is None else trace


def _detect(record: Mapping[str, Any]) -> str:
  if isinstance(record.get("transcript"), Mapping):
    return "axpo"
  if isinstance(record.get("messages"), list):
    return "openai"
  if is_text(record):
    return "text"
  raise TraceError(f"no format fits a record with the fields {sorted(record)[:8]}; "
                   f"--format forces one of {', '.join(FORMATS)}")


def _files(paths: Iterable[str | pathlib.Path]) -> Iterator[pathlib.Path]:
  """Every file once, in order."""
  seen = set()
  for path in map(pathlib.Path, paths):
    if not path.exists():
      raise TraceError(f"{path} is not there")
    for file in _inside(path) if path.is_dir() else [path]:
      if file.resolve() not in seen:
        seen.add(file.resolve())
        yield file


def _inside(folder: pathlib.Path) -> list[pathlib.Path]:
  files = sorted(file for file in folder.rglob("*")
                 if _OTHERS.isdisjoint(file.relative_to(folder).parts)
                 and not file.name.startswith("records_"))  # counts beside the rollouts
  records = [file for file in files if file.suffix in _RECORDS]
  stems = {file.with_suffix("") for file in records}
  # A text beside records of the same name is a copy of them for people.
  return records + [file for file in files
                    if file.suffix in _PLAIN and file.with_suffix("") not in stems]


def _records(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """(line, record) of a file; in place of a record that is not JSON, the error."""
  if path.suffix in _PLAIN:
    yield from conversations(path.read_text(encoding="utf-8", errors="replace"))
  elif path.suffix == ".json":
    try:
      value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      value = [error]
    yield from enumerate(value if isinstance(value, list) else [value], 1)
  else:
    with path.open(encoding="utf-8", errors="replace") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          try:
            yield number, json.loads(line)
          except (ValueError, RecursionError) as error:
            yield number, error
