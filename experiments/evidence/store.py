"""Finished runs as small files: what tables and figures need of them, and nothing of the machine's.

In: folders of runs, named as the sweep names them: `<recipe>-sft<n>-seed<m>`, and `sft-<n>` for what
they begin with; a run's last evaluation is in its own folder or in `<run>-full` beside it. Out: one .json.gz a run; the same run gives the same bytes. Every run that was evaluated is
packed, however it went.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from axpo_jax.rollouts import shards
from axpo_jax.stages.metrics import read_metrics
from experiments.evidence import counts
from experiments.evidence.counts import Counts

SFT = "sft"
_NAME = re.compile(r"(?P<recipe>\w+)-sft(?P<sft>\d+)-seed(?P<seed>\d+)|sft-(?P<alone>\d+)")
FULL = "-full"  # ends the name of a folder that evaluates the run beside it
_DIGITS = 5  # that metrics keep


class StoreError(ValueError):
  """A folder or a file that no run can be read from."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: of its folder.
    recipe: "sft" for a policy that others begin with.
    sft, seed: which such policy it began with, and its own seed.
    began_with, made: digests of the weights; "" where they were not there when it was packed.
    commit, machine: which code ran it and on what, as the sweep noted; "" if it did not.
    config: without the paths.
    metrics: name -> a value a line of metrics.jsonl, None where the line has none; "step" among them.
    questions: the evaluation's counts.
  """

  name: str
  recipe: str
  sft: int
  seed: int
  began_with: str
  made: str
  commit: str
  machine: str
  config: Mapping[str, Any]
  metrics: Mapping[str, Sequence[float | None]]
  questions: Sequence[Counts]

  def series(self, metric: str) -> list[float]:
    """A metric's values at the steps that have it."""
    return [value for value in self.metrics.get(metric, ()) if value is not None]

  def training(self, metric: str) -> list[float | None]:
    """A metric at every RL step."""
    column = self.metrics.get(metric)
    steps = self.metrics.get("rollout/rollouts", ())
    return [column[i] if column else None for i, n in enumerate(steps) if n is not None]


def pack(folder: pathlib.Path) -> Run | None:
  """Reads a run; None if it was not evaluated yet.

  Raises:
    StoreError: the folder's name is not one of the sweep's.
  """
  found = _NAME.fullmatch(folder.name)
  if not found:
    raise StoreError(f"{folder} is not named <recipe>-sft<n>-seed<m> or sft-<n>")
  full = folder.with_name(folder.name + FULL)
  held_out = (full if full.exists() else folder) / "eval" / shards.HELD_OUT
  if not (shards.done(held_out) and (folder / "config.json").exists()):
    return None
  forced = held_out / shards.FORCED
  alone, noted = found["alone"], folder / "made_by.json"
  made_by = json.loads(noted.read_text()) if noted.exists() else {}
  config = json.loads((folder / "config.json").read_text())
  began_with = config["model"].pop("checkpoint")
  stage = "rl" if alone is None else "sft"
  return Run(
    folder.name, found["recipe"] or SFT, int(alone or found["sft"]), int(alone or found["seed"]),
    _digest(pathlib.Path(began_with)), _digest(folder / stage / "policy"),
    made_by.get("commit", ""), made_by.get("machine", ""), config, _columns(read_metrics(folder)),
    counts.from_records(shards.records(held_out),
                        shards.records(forced) if shards.done(forced) else ()))


def write(run: Run, folder: pathlib.Path) -> pathlib.Path:
  """Writes `folder`/<name>.json.gz whole, and nothing if it holds the same already."""
  record = dataclasses.asdict(run) | {"questions": [list(question) for question in run.questions]}
  # No time and no file name in the header: equal runs are equal files.
  packed = gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0)
  path = folder / f"{run.name}.json.gz"
  if not path.exists() or path.read_bytes() != packed:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(packed)
    os.replace(temporary, path)
  return path


def load(folder: pathlib.Path) -> list[Run]:
  """All runs of a folder, by name.

  Raises:
    StoreError: there is none, or a file is damaged.
  """
  paths = sorted(folder.glob("*.json.gz"))
  if not paths:
    raise StoreError(f"{folder} holds no packed runs (*.json.gz)")
  return [_load(path) for path in paths]


def _load(path: pathlib.Path) -> Run:
  try:
    record = json.loads(gzip.decompress(path.read_bytes()))
    return Run(**record | {"questions": [Counts(*question) for question in record["questions"]]})
  except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
    raise StoreError(f"{path} is damaged: {error}") from error


def _columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[float | None]]:
  lines = list(lines)
  names = sorted({name for line in lines for name in line})
  return {name: [_rounded(line.get(name)) for line in lines] for name in names}


def _rounded(value: float | None) -> float | None:
  """Few digits; whole numbers as such."""
  if value is None:
    return None
  short = float(f"{value:.{_DIGITS}g}")
  return int(value) if value == int(value) else short


def _digest(policy: pathlib.Path) -> str:
  file = policy / "model.safetensors"
  return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else ""

