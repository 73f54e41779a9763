"""Reads files of traces in any format, which is detected record by record or given.

In: files and folders. Out: Traces, and lists of what was not counted: records that could not be read (file, line,
reason), files without rollouts, and rollouts with words of calls of which no call could be read. No content of a
file stops the reading.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from axpo_jax.diagnose import dumps, envelopes
from axpo_jax.diagnose.events import Walk
from axpo_jax.diagnose.notations import CALL, SAY, SYSTEM, THINK, parsed
from axpo_jax.diagnose.traces import Call, Fields, Trace, TraceError

FORMATS = ("axpo", *envelopes.FORMATS)
_LINES, _WHOLE, _PLAIN = (".jsonl", ".ndjson"), (".json", ".traj"), (".txt", ".log")
# Folders of a run that hold weights and event files: large, and without rollouts.
_NO_ROLLOUTS = frozenset({"checkpoints", "policy", "tensorboard"})
_OFFERED = re.compile(r'"name":\s*"([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Problem:
  """A record or file that could not be read or counted, and why; line 0 is the whole file."""

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
    left_out: number of continuations and failed rollouts, which do not count.
    skipped: files, and parts of files, that seem to hold no rollouts.
    unread: rollouts with words of calls in an unknown notation.
    uncounted: the traces of `unread`, and others of the same files that may have unread calls too.
  """

  traces: list[Trace] = dataclasses.field(default_factory=list)
  problems: list[Problem] = dataclasses.field(default_factory=list)
  formats: dict[str, int] = dataclasses.field(default_factory=dict)
  left_out: int = 0
  skipped: list[Problem] = dataclasses.field(default_factory=list)
  unread: list[Problem] = dataclasses.field(default_factory=list)
  uncounted: list[Trace] = dataclasses.field(default_factory=list)


def read(paths: Iterable[str | pathlib.Path], *, form: str | None = None,
         fields: Fields | None = None, tokenizer: str | None = None, keep: bool = False,
         count_unread: bool = False) -> Reading:
  """Reads files, and folders recursively.

  Args:
    paths: .jsonl, .json, .traj, .txt and .log files, or folders of them.
    form: one of FORMATS; None detects it record by record.
    fields: where foreign records hold messages, reward, question and time.
    tokenizer: a tokenizer.json, for dumps without the text of their tokens.
    keep: foreign traces keep their events, to show them.
    count_unread: treat words of calls in an unknown notation as prose, and count their rollouts.

  Raises:
    TraceError: a path does not exist, or the format is unknown.
  """
  if form not in (None, *FORMATS):
    raise TraceError(f"format {form!r}; choose one of {FORMATS}")
  reader = _Reader(form, fields or Fields(), tokenizer, keep)
  for path, named in _files(paths, reader.out):
    reader.read(path, named)
  return reader.finish(count_unread)


@dataclasses.dataclass
class _Found:
  """A rollout before it is decided whether it counts; `unread` are its words of calls, if any."""

  trace: Trace
  form: str
  file: str
  line: int
  unread: str | None


class _Reader:

  def __init__(self, form: str | None, fields: Fields, tokenizer: str | None, keep: bool):
    self.out = Reading()
    self._form, self._fields, self._keep = form, fields, keep
    self._decode = dumps.load_decode(pathlib.Path(tokenizer)) if tokenizer else None
    self._known: dict[int, str] = {}
    self._found: list[_Found] = []

  def read(self, path: pathlib.Path, named: bool) -> None:
    """Reads a file. If it is not named itself, it is skipped when no record fits any format."""
    problems, strange, read = [], [], 0
    for line, record in _records(path, self._form):
      try:
        if isinstance(record, Exception):
          raise TraceError(f"not JSON: {record}")
        if not isinstance(record, Mapping):
          raise TraceError("not a JSON object")
        ours = self._form is None and isinstance(record.get("transcript"), Mapping)
        if ours or self._form == "axpo":
          self._dump(record, path, line)
        else:
          self._foreign(record, path, line)
        read += 1
      except envelopes.NoFormat as error:
        strange.append(Problem(str(path), line, str(error)))
        problems.append(strange[-1])
      except Exception as error:  # strangers' files: whatever one record does, the others are read
        reason = str(error) if isinstance(error, TraceError) else (
          f"damaged record: {type(error).__name__}: {error}")
        problems.append(Problem(str(path), line, reason[:500]))
        read += 1
    if not (problems or read):
      self.out.skipped.append(Problem(str(path), 0, "empty"))
    elif strange and not (named or read):
      more = f" (and {len(strange) - 1} more like it)" if len(strange) > 1 else ""
      self.out.skipped.append(Problem(str(path), 0, strange[0].reason.partition(";")[0] + more))
    else:
      self.out.problems += problems

  def finish(self, count_unread: bool) -> Reading:
    """Decides which rollouts count. If words of calls occur in a file and no call was read, its notation is unknown:
    rollouts that seem not to act may have acted."""
    scopes = collections.defaultdict(list)
    lines = collections.Counter((found.form, found.file) for found in self._found)
    for found in self._found:  # files of one rollout each are one scope
      file = found.file if lines[found.form, found.file] > 1 else ""
      scopes[found.form, file].append(found)
    blind = {id(found) for members in scopes.values()
             if any(found.unread for found in members)
             and not any(found.trace.calls for found in members) for found in members}
    for found in self._found:
      if found.unread:
        self.out.unread.append(Problem(found.file, found.line, found.unread))
      if not count_unread and (found.unread or id(found) in blind):
        self.out.uncounted.append(found.trace)
      else:
        self.out.traces.append(found.trace)
        self.out.formats[found.form] = self.out.formats.get(found.form, 0) + 1
    return self.out

  def _dump(self, record: Mapping[str, Any], path: pathlib.Path, line: int) -> None:
    if "pieces" not in record["transcript"] and self._decode is None:
      self._decode = dumps.find_decode(path)
    pieces = dumps.pieces_of(record, self._decode, self._known)
    trace = dumps.read_dump(record, f"{path}:{line}", dumps.step_in_name(path), pieces)
    if trace is None:
      self.out.left_out += 1
      self.out.formats["axpo"] = self.out.formats.get("axpo", 0) + 1
    else:
      self._found.append(_Found(trace, "axpo", str(path), line, None))

  def _foreign(self, record: Mapping[str, Any], path: pathlib.Path, line: int) -> None:
    form, found = envelopes.conversations(record, path, self._form, self._fields.messages)
    for number, conversation in enumerate(found):
      place = f"{path}:{line}" + (f"#{number}" if len(found) > 1 else "")
      if conversation.inside:
        self.out.skipped.append(Problem(str(path), line, conversation.inside))
      try:
        trace, unread = _trace(conversation, place, path, self._fields, self._keep)
      except Exception as error:  # one of many simulations in a record
        if len(found) == 1:
          raise
        self.out.problems.append(Problem(place, line, f"{type(error).__name__}: {error}"[:500]))
        continue
      self._found.append(_Found(trace, form, str(path), line, unread))


def _trace(conversation: envelopes.Conversation, place: str, path: pathlib.Path, fields: Fields,
           keep: bool) -> tuple[Trace, str | None]:
  """A rollout, and its words of calls if none of its calls could be read."""
  walk = Walk(conversation.messages)
  if not walk.spoke:
    raise TraceError("there is no turn of the agent in it")
  said = [event.text for event in walk.events if event.kind == SAY]
  thoughts = [event.text for event in walk.events if event.kind == THINK]
  # Without an id, equal texts are the same question. A rollout without a visible question has one of its own.
  facts = {"question": "asked " + " ".join(walk.asked) if walk.asked else place,
           **fields.common(conversation.record, conversation.facts)}
  if facts["when"] is None:
    facts["when"] = dumps.step_in_name(path)
  trace = Trace(**facts, place=place, thinking="\n".join(thoughts or said),
                calls=tuple(Call(event.name, event.error) for event in walk.calls),
                tools=_tool_names(conversation.tools, walk),
                events=tuple(walk.events) if keep else ())
  return trace, walk.unread()


def _tool_names(tools: Any, walk: Walk) -> tuple[str, ...]:
  """Names of the tools that were offered: in the request, or between <tools> in the system turn."""
  tools = parsed(tools) if isinstance(tools, str) else tools
  names = []
  for tool in tools if isinstance(tools, list) else ():
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
      names.append(inner["name"])
  for event in walk.events:
    if event.kind == SYSTEM:
      names += _OFFERED.findall(event.text.partition("<tools>")[2].partition("</tools>")[0])
    elif event.kind == CALL:
      break
  return tuple(names)


# ---- files ----


def _files(paths: Iterable[str | pathlib.Path], out: Reading) -> Iterator[tuple[pathlib.Path, bool]]:
  """Every file once, in order, and whether it was named itself and not found in a folder."""
  seen = set()
  for path in map(pathlib.Path, paths):
    if not path.exists():
      raise TraceError(f"{path} is not there")
    named = not path.is_dir()
    for file in [path] if named else _inside(path, out):
      if not file.is_file():
        out.problems.append(Problem(str(file), 0, "not a regular file"))
      elif file.resolve() not in seen:
        seen.add(file.resolve())
        yield file, named


def _inside(folder: pathlib.Path, out: Reading) -> list[pathlib.Path]:
  """Files of a folder that may hold rollouts; the others go to `out.skipped`."""
  records, texts, others = [], [], collections.Counter()

  def failed(error: OSError) -> None:
    out.problems.append(Problem(str(error.filename), 0, error.strerror or str(error)))

  for place, folders, names in os.walk(folder, onerror=failed):
    for name in sorted(_NO_ROLLOUTS.intersection(folders)):
      out.skipped.append(Problem(str(pathlib.Path(place) / name), 0, "a run's folder without rollouts"))
    folders[:] = sorted(set(folders) - _NO_ROLLOUTS)
    for file in (pathlib.Path(place) / name for name in sorted(names)):
      if file.suffix in (*_LINES, *_WHOLE):
        records.append(file)
      elif file.suffix in _PLAIN:
        texts.append(file)
      else:
        others[file.suffix or file.name] += 1
  stems = {file.with_suffix("") for file in records}
  copies = [file for file in texts if file.with_suffix("") in stems]
  out.skipped += [Problem(str(file), 0, "a copy for people of the records of the same name")
                  for file in copies]
  out.skipped += [Problem(str(folder), 0, f"{count} files of type {kind}")
                  for kind, count in sorted(others.items())]
  return sorted(records) + [file for file in texts if file not in set(copies)]


def _records(path: pathlib.Path, form: str | None) -> Iterator[tuple[int, Any]]:
  """(line, record) of a file; the error instead of a record that is not JSON."""
  try:
    if path.suffix in _PLAIN:
      text = path.read_text(encoding="utf-8-sig", errors="replace")
      if "<|im_start|>" not in text and form != "text":
        yield 0, {"no <|im_start|> in this text": True}
        return
      yield from envelopes.text_records(text)
    elif path.suffix in _WHOLE and (value := _whole(path)) is not None:
      yield from enumerate(value if isinstance(value, list) else [value], 1)
    else:
      with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
          if line.strip():
            yield number, _value(line)
  except OSError as error:
    yield 0, TraceError(error.strerror or str(error))


def _whole(path: pathlib.Path) -> Any:
  """The value of a JSON file; None if it holds JSON lines under the wrong suffix."""
  text = path.read_text(encoding="utf-8-sig", errors="replace")
  value = _value(text)
  first = text.lstrip().partition("\n")[0]
  if isinstance(value, Exception) and not isinstance(_value(first), Exception):
    return None
  return value


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    return error
