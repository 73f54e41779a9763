"""What a run's folder holds that a report can show.

In: a folder, or a file of logs. Out: a Run: its metrics, the records of its evaluation, and the files of
rollouts in it; or the rollouts of somebody else's logs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from axpo_jax import paths
from axpo_jax.diagnose import reading
from axpo_jax.diagnose.reading import Reading
from axpo_jax.rollouts.shards import Record
from axpo_jax.stages.metrics import METRICS_FILE


class ReportError(ValueError):
  """A folder that no report can be made of."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: shown on the page, unique among its runs.
    folder: that holds it.
    metrics: lines of metrics.jsonl; none if there is no such file.
    benchmarks: by benchmark, a record of every question with a judged rollout; none if the run's
      evaluation is in the metrics alone.
    dumps: files of rollouts, in order.
    config: of the run; empty if it left none.
    logs: what was read of a folder or file that is no run of ours; else None.
  """

  name: str
  folder: pathlib.Path
  metrics: Sequence[Mapping[str, Any]]
  benchmarks: Mapping[str, Sequence[Record]]
  dumps: Sequence[pathlib.Path]
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  logs: Reading | None = None

  @property
  def training_dumps(self) -> list[pathlib.Path]:
    """The dumps of RL steps."""
    return [path for path in self.dumps if path.name.startswith("step_")]


def load_runs(folders: Iterable[str | pathlib.Path]) -> list[Run]:
  """Reads runs; their names are the shortest ends of their paths that differ.

  Raises:
    ReportError: a folder is not there or holds nothing to report.
  """
  folders = list(folders)
  if remote := [folder for folder in folders if paths.is_remote(folder)]:
    raise ReportError(f"{remote[0]}: the report reads local folders; copy the run to one, all of it but its "
                      "checkpoints")
  found = [pathlib.Path(folder) for folder in folders]
  if len({path.resolve() for path in found}) < len(found):
    raise ReportError("a run is named twice")
  return [_load(path, name) for path, name in zip(found, _names(found))]


def _load(path: pathlib.Path, name: str) -> Run:
  if not path.exists():
    raise ReportError(f"{path} is not there; give a run's --workdir, or a folder or file of logs")
  if not path.is_dir():
    return _logs(path, path.parent, name)
  dumps = sorted(file for pattern in ("step_*.jsonl", "rollouts_*.jsonl")
                 for file in path.rglob(pattern) if _is_dump(file))
  metrics = [line for line in map(_numbers, _lines(path / METRICS_FILE)) if "step" in line]
  benchmarks = _benchmarks(sorted(path.glob("eval/*/records_*.jsonl")))
  if not (metrics or dumps or benchmarks):
    return _logs(path, path, name)
  config = next(iter(_lines(path / "config.json", whole=True)), {})
  return Run(name, path, metrics, benchmarks, dumps, config)


def _logs(path: pathlib.Path, folder: pathlib.Path, name: str) -> Run:
  found = reading.read([path], keep=True)
  if not (found.traces or found.uncounted):
    raise ReportError(f"{path} has neither metrics.jsonl nor rollouts that can be read; give a run's "
                      "--workdir, or logs that axpo_jax.diagnose reads")
  return Run(name, folder, (), {}, (), logs=found)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
  """What can be drawn of a line of metrics: no text, NaN, infinity or integer of 400 digits."""
  return {name: value for name, value in line.items()
          if isinstance(value, int | float) and -1e300 < value < 1e300}


def _is_dump(path: pathlib.Path) -> bool:
  """Whether a file holds rollouts of ours: other makers call their files so, too."""
  return any(isinstance(record.get("transcript"), Mapping)
             for record in itertools.islice(_lines(path), 8))


def _lines(path: pathlib.Path, *, whole: bool = False) -> Iterator[dict[str, Any]]:
  """The objects of a file of JSON lines (or of one that is JSON as a `whole`). A damaged line costs
  itself and not the page; a file that is not there has none."""
  if not path.is_file():
    return
  with path.open(encoding="utf-8", errors="replace") as file:
    for line in [file.read()] if whole else file:
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(record, dict):
        yield record


def _benchmarks(paths: Iterable[pathlib.Path]) -> dict[str, list[Record]]:
  """Records of evaluation shards (rollouts/shards.py): a folder a benchmark. A damaged one costs itself."""
  found: dict[str, list[Record]] = {}
  for path in paths:
    for line in _lines(path):
      with contextlib.suppress(KeyError, TypeError, ValueError):
        record = Record.from_json(line)
        if record.judged:
          found.setdefault(path.parent.name, []).append(record)
  return dict(sorted(found.items()))


def _names(places: Sequence[pathlib.Path]) -> list[str]:
  parts = [path.resolve().parts for path in places]
  for count in range(1, max(map(len, parts)) + 1):
    names = ["/".join(part[-count:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  return names
