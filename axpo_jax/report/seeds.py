"""Runs of one method with several seeds: put together, averaged, and compared in pairs.

In: Runs. Out: Methods, and rows of tables over seeds. Intervals are Student's at 95 %: they say how sure
a mean over seeds is. A difference pairs the runs that share a seed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from axpo_jax.eval import statistics
from axpo_jax.eval.statistics import Estimate
from axpo_jax.report import tables
from axpo_jax.report.runs import Run
from axpo_jax.stages import summary

# What a name says of the seed: "grpo-seed3", "seed=3,rl.recipe=grpo", "grpo/seed_3".
_SEED = re.compile(r"[^A-Za-z0-9]?seed[^A-Za-z0-9]?\d+")
_SEPARATORS = "-_,./ "
_LESS_IS_BETTER = ("rollout/tool_all_wrong_rate", "rollout/tool_all_wrong_rate_after")


@dataclasses.dataclass(frozen=True)
class Method:
  """Runs whose configs differ in the seed alone.

  Attributes:
    name: shown on the page.
    runs: by seed; a run without a config is alone, under its own name.
  """

  name: str
  runs: Mapping[int | str, Run]

  @functools.cached_property
  def metrics(self) -> Sequence[Mapping[str, float]]:
    """One line a step, with the mean of what the runs have there; up to where all of them are."""
    if len(self.runs) == 1:
      return next(iter(self.runs.values())).metrics
    together = min((run.metrics[-1]["step"] if run.metrics else -1) for run in self.runs.values())
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in self.runs.values():
      for line in run.metrics:
        for name, value in line.items():
          if value is not None and name != "step" and line["step"] <= together:
            values[line["step"]][name].append(value)
    return [{"step": step, **{name: math.fsum(found) / len(found) for name, found in at.items()}}
            for step, at in sorted(values.items())]

  def over_seeds(self, number: Callable[[Run], float | None]) -> dict[int | str, float]:
    """A number of every run that has it."""
    found = {seed: number(run) for seed, run in self.runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def methods(runs: Iterable[Run]) -> list[Method]:
  """Runs by method, in the order in which the methods come first."""
  found: dict[str, dict[int | str, Run]] = {}
  for run in runs:
    config = dict(run.config)
    seed = config.pop("seed", run.name)
    kind = json.dumps(config, sort_keys=True) if run.config else run.name
    if seed in found.get(kind, {}):  # the same thing twice is no second seed
      kind, seed = run.name, run.name
    found.setdefault(kind, {})[seed] = run
  names = [_name([run.name for run in group.values()]) for group in found.values()]
  return [Method(name if name and names.count(name) == 1 else _listed(group), group)
          for name, group in zip(names, found.values())]


def _name(names: Sequence[str]) -> str:
  """What the names of a method's runs have in common but for the seed; "" if nothing."""
  if len(names) == 1:
    return names[0]
  shared = {_SEED.sub("", name).strip(_SEPARATORS) for name in names}
  return shared.pop() if len(shared) == 1 else ""


def _listed(group: Mapping[int | str, Run]) -> str:
  return " + ".join(run.name for run in group.values())


def glance(found: Sequence[Method]) -> list[tuple[str, list[tuple[str, str]], list[list[dict]]]]:
  """(label, [(start, end) of every method], [difference of every further one's end from the first's])."""
  rows = []
  for label, name in (*summary.EVALUATED, *summary.TRAINED):
    starts, ends = ([_end(method, name, place) for method in found] for place in (0, 1))
    if any((*starts, *ends)):
      rows.append((label, [(_mean(start), _mean(end)) for start, end in zip(starts, ends)],
                   [_delta(ends[0], end, better=-1 if name in _LESS_IS_BETTER else 1)
                    for end in ends[1:]]))
  return rows


def _end(method: Method, name: str, place: int) -> dict[int | str, float]:
  return method.over_seeds(lambda run: summary.ends(run.metrics, name)[place])


def benchmark_table(found: Sequence[Method]) -> dict | None:
  """As `tables.benchmark_table`, over seeds; None if nothing was evaluated."""
  results = [_results(method) for method in found]
  names = sorted({name for group in results for result in group.values() for name in result.scores})
  if not names:
    return None
  if len(names) > 1:
    results = [{seed: tables.with_average(result) for seed, result in group.items()}
               for group in results]
    names.append(tables.AVERAGE)
  (first, base), *others = both = [(method.name, group) for method, group in zip(found, results)]
  rows = [{"label": label, "kind": "result", "cells": [_score_cell(group, name) for name in names]}
          for label, group in both]
  rows += [{"label": f"{label} − {first}", "kind": "difference",
            "cells": [_difference_cell(base, group, name) for name in names]}
           for label, group in others]
  rows += [{"label": label, "kind": "tools", "cells": [_mean(_tools(group, name)) for name in names]}
           for label, group in both]
  return {"benchmarks": names, "rows": rows, "compared": bool(others)}


def _results(method: Method) -> dict[int | str, tables.Result]:
  """By seed; of a run with several evaluations the last."""
  found = {seed: tables.results_of(run, alone=False) for seed, run in method.runs.items()}
  return {seed: results[-1] for seed, results in found.items() if results}


def _scores(group: Mapping[int | str, tables.Result], name: str, k: int) -> dict[int | str, float]:
  return {seed: result.scores[name][k].mean for seed, result in group.items()
          if k in result.scores.get(name, {})}


def _tools(group: Mapping[int | str, tables.Result], name: str) -> dict[int | str, float]:
  return {seed: result.tools[name] for seed, result in group.items() if name in result.tools}


def _score_cell(group: Mapping[int | str, tables.Result], name: str) -> dict | None:
  found = [statistics.over_seeds(list(_scores(group, name, k).values())) for k in tables.K]
  if found[0] is None:
    return None
  return {"text": " / ".join(tables.percent(one and one.mean) for one in found),
          "error": " / ".join(tables.percent(_half(one)) for one in found)}


def _difference_cell(base: Mapping, other: Mapping, name: str) -> list[dict]:
  return [one | {"k": k} for k in tables.K
          for one in _delta(_scores(base, name, k), _scores(other, name, k))]


def _mean(values: Mapping[int | str, float]) -> str:
  one = statistics.over_seeds(list(values.values()))
  half = _half(one)
  return tables.percent(one and one.mean) + (f" ± {tables.percent(half)}" if half is not None else "")


def _half(one: Estimate | None) -> float | None:
  """Half of the interval's width; None if there is none."""
  return None if one is None or math.isnan(one.low) else one.mean - one.low


def _delta(base: Mapping, other: Mapping, better: int = 1) -> list[dict]:
  """What the page shows of a difference: nothing, or one entry."""
  found = statistics.paired(base, other)
  return [tables.delta(found.mean, found.low, found.high, better)] if found else []
