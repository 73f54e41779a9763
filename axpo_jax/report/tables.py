"""The tables of the page: a run at a glance, and the benchmarks in the form of the paper.

In: Runs. Out: rows of ready cells. Differences carry 95 % intervals: over the same questions where
results are kept by question (paired), else from the standard errors of both (which is wider).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from axpo_jax.diagnose.intervals import Z
from axpo_jax.eval import passk
from axpo_jax.eval.passk import Mean
from axpo_jax.report.runs import Run
from axpo_jax.rollouts.shards import Record
from axpo_jax.stages import summary

K = (1, 4)
AVERAGE = "average"


@dataclasses.dataclass(frozen=True)
class Result:
  """One row of the benchmark table: benchmark -> k -> mean and error, and the tool-attempt rates.

  Attributes:
    label: of the row.
    scores: by benchmark and k.
    tools: tool-attempt rate by benchmark.
    records: of the same benchmarks, by question; None where only totals are known.
  """

  label: str
  scores: Mapping[str, Mapping[int, Mean]]
  tools: Mapping[str, float]
  records: Mapping[str, Sequence[Record]] | None = None


def glance(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]], list]]:
  """(label, [(start, end) of every run], no differences) of the table that a run ends with."""
  rows = []
  for label, name in (*summary.EVALUATED, *summary.TRAINED):
    cells = [tuple(map(percent, summary.ends(run.metrics, name))) for run in runs]
    if any(cell != ("–", "–") for cell in cells):
      rows.append((label, cells, []))
  return rows


def benchmark_table(runs: Sequence[Run]) -> dict | None:
  """The table of the page; None if nothing was evaluated.

  Returns:
    {"benchmarks": names, "rows": [{"label", "kind": "result" | "difference" | "tools", "cells"}],
    "note": how the intervals came about}.
  """
  results = [result for run in runs for result in results_of(run, alone=len(runs) == 1)]
  if not results:
    return None
  names = sorted({name for result in results for name in result.scores})
  if len(names) > 1:
    results = [with_average(result) for result in results]
    names.append(AVERAGE)
  rows = [{"label": result.label, "kind": "result",
           "cells": [_score_cell(result.scores.get(name)) for name in names]}
          for result in results]
  base, *others = results
  for other in others:
    rows.append({"label": f"{other.label} − {base.label}", "kind": "difference",
                 "cells": [_difference_cell(base, other, name) for name in names]})
  rows += [{"label": result.label, "kind": "tools",
            "cells": [percent(result.tools.get(name)) for name in names]} for result in results]
  paired = all(result.records is not None for result in results)
  return {"benchmarks": names, "rows": rows, "paired": paired, "compared": bool(others)}


def results_of(run: Run, alone: bool) -> list[Result]:
  """A run's results; of a single run whose metrics hold several evaluations, first and last."""
  if run.benchmarks:
    return [Result(run.name, {name: _scores(found) for name, found in run.benchmarks.items()},
                   {name: _mean(record.stats[i].used_tool for record in found for i in record.judged)
                    for name, found in run.benchmarks.items()}, run.benchmarks)]
  lines = [line for line in run.metrics if "eval/pass_at_1" in line]
  if alone and len(lines) > 1:
    return [_logged(lines[0], f"start (step {lines[0]['step']})"),
            _logged(lines[-1], f"end (step {lines[-1]['step']})")]
  return [_logged(lines[-1], run.name)] if lines else []


def _logged(line: Mapping[str, float], label: str) -> Result:
  names = summary.families([line])
  places = {name: f"eval/{name}" for name in names} or {"held-out": "eval"}
  scores = {name: {k: Mean(line[f"{place}/pass_at_{k}"],
                               line.get(f"{place}/pass_at_{k}_se", math.nan))
                   for k in K if f"{place}/pass_at_{k}" in line}
            for name, place in places.items()}
  tools = {name: line[f"{place}/tool_attempt_rate"] for name, place in places.items()
           if f"{place}/tool_attempt_rate" in line}
  return Result(label, scores, tools)


def _scores(found: Sequence[Record]) -> dict[int, Mean]:
  values = {k: _values(found, k) for k in K}
  clusters = _clusters(found)
  return {k: passk.mean_and_error(list(of.values()), [clusters[question] for question in of])
          for k, of in values.items() if of}


def _values(found: Sequence[Record], k: int) -> dict[str, float]:
  """Pass@k of every question with enough rollouts."""
  rewards = {record.id: record.counts.rewards for record in found}
  return {question: passk.of_rewards(own, k) for question, own in rewards.items() if len(own) >= k}


def _clusters(found: Sequence[Record]) -> dict[str, str]:
  return {record.id: record.group or record.id for record in found}


def with_average(result: Result) -> Result:
  """With the mean over the benchmarks, each counted once, as in the paper."""
  average = {}
  for k in K:
    found = [scores[k] for scores in result.scores.values() if k in scores]
    if len(found) == len(result.scores):
      average[k] = Mean(_mean(one.mean for one in found),
                            math.hypot(*(one.error for one in found)) / len(found))
  return dataclasses.replace(
    result, scores={**result.scores, AVERAGE: average},
    tools={**result.tools, **({AVERAGE: _mean(result.tools.values())} if result.tools else {})})


def difference(base: Result, other: Result, name: str, k: int) -> Mean | None:
  """How much more `other` has than `base`, and the standard error of that."""
  first, second = (result.scores.get(name, {}).get(k) for result in (base, other))
  if first is None or second is None:
    return None
  if name == AVERAGE:
    parts = [difference(base, other, part, k) for part in base.scores if part != AVERAGE]
    if any(part is None for part in parts):
      return Mean(second.mean - first.mean)
    return Mean(_mean(part.mean for part in parts),
                    math.hypot(*(part.error for part in parts)) / len(parts))
  if base.records is None or other.records is None:
    return Mean(second.mean - first.mean, math.hypot(first.error, second.error))
  before, after = (_values(result.records[name], k) for result in (base, other))
  common = [question for question in before if question in after]
  if not common:
    return Mean(second.mean - first.mean, math.hypot(first.error, second.error))
  clusters = [_clusters(base.records[name])[question] for question in common]
  return passk.mean_and_error([after[q] - before[q] for q in common], clusters)


def _score_cell(scores: Mapping[int, Mean] | None) -> dict | None:
  """Pass@1 / Pass@4 as the paper writes them, in per cent, and the error of each."""
  if not scores:
    return None
  return {"text": " / ".join(_points(scores.get(k)) for k in K),
          "error": " / ".join(_points(scores.get(k), lambda one: one.error) for k in K)}


def _difference_cell(base: Result, other: Result, name: str) -> list[dict] | None:
  found = [difference(base, other, name, k) for k in K]
  if found[0] is None:
    return None
  out = []
  for k, one in zip(K, found):
    if one is None:
      continue
    out.append({"k": k} | delta(one.mean, one.mean - Z * one.error, one.mean + Z * one.error))
  return out


def delta(mean: float, low: float, high: float, better: int = 1) -> dict:
  """A difference, its interval (none if it is NaN), and, where that excludes zero, whether it is a gain.

  Args:
    better: 1 where more is better, -1 where less is.
  """
  sure = (low > 0) - (high < 0)
  return {"text": _signed(mean),
          "interval": "" if math.isnan(low) else f"{_signed(low)} … {_signed(high)}",
          "sure": {1: "gain", -1: "loss", 0: ""}[sure * better]}


def _points(one: Mean | None, value: Callable[[Mean], float] = lambda one: one.mean) -> str:
  if one is None or math.isnan(value(one)):
    return "–"
  return f"{100 * value(one):.1f}"


def _signed(share: float) -> str:
  return f"{100 * share:+.1f}".replace("-", "−")


def percent(share: float | None) -> str:
  return "–" if share is None else f"{100 * share:.1f}"


def _mean(values) -> float:
  values = list(values)
  return math.fsum(values) / len(values)
