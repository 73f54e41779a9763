"""The metrics of a run: JSON lines that survive kill and resume, and TensorBoard.

One JSON object a line: `step` first, then metrics by name. A line is on the disk before `write` returns. A
resumed run first removes the lines after its restored step, so the file equals that of an uninterrupted run
except for times.

An object store cannot append. There every `write` uploads the whole file, a few kilobytes for each step so
far, and returns when the store has it, so a kill loses no line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from axpo_jax import paths

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
  """Receives a run's metrics; see `stages.trackers`."""

  def log(self, step: int, numbers: Mapping[str, float | None]) -> None: ...


class MetricsWriter:
  """Writes to `folder`/metrics.jsonl and, if wanted, TensorBoard events in `folder`/tensorboard.

  Args:
    resume_step: the step of the restored checkpoint. Lines of later steps and an incomplete last line are
      removed. None starts a new file, without the lines of an earlier run.
    tensorboard: also write event files (tensorboardX).
    trackers: also get every line.
  """

  def __init__(self, folder: str | os.PathLike, *, resume_step: int | None = None,
               tensorboard: bool = True, trackers: Sequence[Tracker] = ()):
    self.path = epath.Path(folder) / METRICS_FILE
    paths.make(self.path.parent)
    kept = _truncate(self.path, resume_step)
    self._file = _Remote(self.path, kept) if paths.is_remote(self.path) else _Local(self.path)
    self._board, self._trackers = None, trackers
    if tensorboard:
      from tensorboardX import SummaryWriter  # here: a run without it need not have it
      # TensorBoard hides events from `purge_step` on.
      self._board = SummaryWriter(str(self.path.parent / "tensorboard"),
                                  purge_step=None if resume_step is None else resume_step + 1)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends a line. Values are numbers (any scalar that `float` takes); NaN and infinity become
    null, since JSON has neither.

    Raises:
      ValueError: a value that is not a number, or one called "step".
    """
    if "step" in values:
      raise ValueError("a metric may not be called 'step': pass the step as the first argument")
    numbers = {name: _number(name, value) for name, value in values.items()}
    self._file.append(json.dumps({"step": int(step), **numbers}, allow_nan=False) + "\n")
    if self._board is not None:
      for name, value in numbers.items():
        if value is not None:
          self._board.add_scalar(name, value, int(step))
      self._board.flush()
    for tracker in self._trackers:
      tracker.log(int(step), numbers)

  def close(self) -> None:
    self._file.close()
    if self._board is not None:
      self._board.close()


class _Local:
  """A file that is appended to."""

  def __init__(self, path: epath.Path):
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)

  def append(self, line: str) -> None:
    self._file.write(line)
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class _Remote:
  """An object that is replaced by a longer one."""

  def __init__(self, path: epath.Path, text: str):
    self._path, self._text = path, text

  def append(self, line: str) -> None:
    self._text += line
    paths.write_text(self._path, self._text)

  def close(self) -> None:
    pass


class NoMetrics:
  """Replaces the writer in all processes but the main one."""

  def __init__(self, folder: str | os.PathLike):
    self.path = epath.Path(folder) / METRICS_FILE

  def __enter__(self) -> NoMetrics:
    return self

  def __exit__(self, *_: Any) -> None:
    pass

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    pass


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics file (or of the one in a folder); none if there is no file yet. An incomplete last
  line is left out.

  Raises:
    ValueError: another line is not JSON.
  """
  path = epath.Path(path)
  path = path / METRICS_FILE if path.is_dir() else path
  return _whole_lines(path) if path.exists() else []


def _truncate(path: epath.Path, resume_step: int | None) -> str:
  """Removes lines after `resume_step`, if there is a file; returns what is left."""
  if not path.exists():
    return ""
  kept = [] if resume_step is None else [
    line for line in _whole_lines(path) if line["step"] <= resume_step]
  text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
  paths.write_text(path, text)
  return text


def _whole_lines(path: epath.Path) -> list[dict[str, Any]]:
  """The complete lines. Raises ValueError for one that is not JSON: an interrupted write affects only the last."""
  # Bytes, since an incomplete line may end inside a character.
  parts = path.read_bytes().split(b"\n")
  out = []
  for number, part in enumerate(parts[:-1], 1):  # what follows the last newline is empty or incomplete
    try:
      out.append(json.loads(part))
    except ValueError as error:
      raise ValueError(f"{path}, line {number} is not JSON: {part[:80]!r}; repair or delete it") from error
  return out


def _number(name: str, value: Any) -> int | float | None:
  if isinstance(value, (bool, int)):
    return int(value)
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"metric {name!r} is {value!r}; metrics are numbers") from error
  return number if math.isfinite(number) else None
