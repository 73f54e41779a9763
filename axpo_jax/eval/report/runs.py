"""What a run's folder holds that a report can show.

In: a folder. Out: a Run: its metrics, the rewards of its evaluation by question, and the files of
rollouts in it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axpo_jax import paths
from axpo_jax.agent.rollout import FAILED_STOPS
from axpo_jax.train.metrics import read_metrics


class ReportError(ValueError):
  """A folder that no report can be made of."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Evaluation results of one benchmark by question.

  Attributes:
    rewards: question id -> rewards of its rollouts.
    clusters: question id -> what variants of one question share.
    tools: question id -> whether each of the rollouts called a tool.
  """

  rewards: Mapping[str, Sequence[float]]
  clusters: Mapping[str, str]
  tools: Mapping[str, Sequence[bool]]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: shown on the page, unique among its runs.
    folder: where it lies.
    metrics: lines of metrics.jsonl; none if there is no such file.
    benchmarks: results kept by question, by benchmark; none if the run's evaluation is in the
      metrics alone.
    dumps: files of rollouts, in order.
    config: of the run; empty if it left none.
  """

  name: str
  folder: pathlib.Path
  metrics: Sequence[Mapping[str, Any]]
  benchmarks: Mapping[str, Benchmark]
  dumps: Sequence[pathlib.Path]
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def training_dumps(self) -> list[pathlib.Path]:
    """The dumps of RL steps."""
    return [path for path in self.dumps if path.name.startswith("step_")]


def load_runs(folders: Iterable[str | pathlib.Path]) -> list[Run]:
  """Reads runs; their names are the shortest ends of their paths that tell them apart.

  Raises:
    ReportError: a folder is not there or holds nothing to report.
  """
  folders = list(folders)
  if remote := [folder for folder in folders if paths.is_remote(folder)]:
    raise ReportError(f"{remote[0]}: the report reads local folders; copy the run to one, all of it but its "
                      "checkpoints")
  places = [pathlib.Path(folder) for folder in folders]
  if len({place.resolve() for place in places}) < len(places):
    raise ReportError("a run is named twice")
  return [_load(place, name) for place, name in zip(places, _names(places))]


def _load(folder: pathlib.Path, name: str) -> Run:
  if not folder.is_dir():
    raise ReportError(f"{folder} is not a folder; give a run's --workdir")
  dumps = sorted(path for pattern in ("step_*.jsonl", "rollouts_*.jsonl")
                 for path in folder.rglob(pattern))
  metrics = read_metrics(folder)
  benchmarks = _benchmarks(sorted(folder.glob("eval/*/records_*.jsonl")))
  if not (metrics or dumps or benchmarks):
    raise ReportError(f"{folder} has neither metrics.jsonl nor rollouts (step_*.jsonl, "
                      "rollouts_*.jsonl); give a run's --workdir")
  config = folder / "config.json"
  return Run(name, folder, metrics, benchmarks, dumps,
             json.loads(config.read_text(encoding="utf-8")) if config.exists() else {})


def _benchmarks(paths: Iterable[pathlib.Path]) -> dict[str, Benchmark]:
  """Records of evaluation shards (eval/shards.py): a folder a benchmark."""
  found = collections.defaultdict(lambda: Benchmark({}, {}, {}))
  for path in paths:
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
      kept = [stats for stats in record["stats"] if stats["stop"] not in FAILED_STOPS]
      if kept:
        into, question = found[path.parent.name], record["id"]
        into.rewards[question] = [stats["reward"] for stats in kept]
        into.clusters[question] = record.get("group") or question
        into.tools[question] = [stats["used_tool"] for stats in kept]
  return dict(sorted(found.items()))


def _names(places: Sequence[pathlib.Path]) -> list[str]:
  parts = [place.resolve().parts for place in places]
  for count in range(1, max(map(len, parts)) + 1):
    names = ["/".join(part[-count:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  return names
