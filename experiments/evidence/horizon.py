"""The outcomes that plan.md fixed before the first run, their tests, and the figure of the results page.

In: runs of configs/sweeps/horizon.py. Out: Markdown and a figure by name. Every comparison is with GRPO,
paired by SFT policy and seed; a pair that one recipe has not finished counts for no recipe's test.
"""

from __future__ import annotations

import dataclasses
import math
import statistics as plain
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from axpo_jax.eval import statistics
from experiments.evidence import counts, figures
from experiments.evidence.measures import COSTS
from experiments.evidence.store import SFT, Run
from experiments.evidence.tables import Comparison, markdown

# Recipe -> its name in tables, in the plan's order.
LABELS = {
  "grpo": "GRPO", "axpo": "AXPO, one mean", "axpo_added": "AXPO, λ = 1",
  "axpo_added_1n": "AXPO, λ = 1/N", "grpo_x125": "GRPO, 1.25× rollouts",
  "axpo_added_random": "AXPO, λ = 1, random prefix",
  "axpo_added_no_credit": "AXPO, λ = 1, no prefix credit",
}
PAIRS = 9  # (SFT policy, seed) of the plan
THRESHOLD = 0.60  # of held-out Pass@1
DRAWS = 10_000
_COLOURS = ("#4878a8", "#e6ab02", "#d95f02", "#7570b3", "#74a9cf", "#1b9e77", "#999999")
_SHOWN = {"Pass@1, all questions": "eval/pass_at_1", "tool rate": "eval/tool_attempt_rate",
          "Pass@1, search": "eval/search/pass_at_1"}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One number of a run.

  Attributes:
    name: in tables, with its unit.
    of: the number.
    digits: behind the point.
    scale: what it is multiplied by in tables.
    primary: whether it is tested and counts in Holm's correction.
  """

  name: str
  of: Callable[[Run], float]
  digits: int = 1
  scale: float = 1.0
  primary: bool = True


def curve(run: Run, metric: str = "eval/pass_at_1") -> list[tuple[int, float]]:
  """(RL steps done, value) of the evaluations during training."""
  return [(int(step), value) for step, value in zip(run.metrics["step"], run.metrics[metric])
          if value is not None]


def reached(run: Run) -> int | None:
  """Steps until the first evaluation whose mean with the next one is at least THRESHOLD; the last
  one stands alone. None if there is none: the run is censored."""
  points = curve(run)
  for i, (step, value) in enumerate(points):
    following = points[min(i + 1, len(points) - 1)][1]
    if (value + following) / 2 >= THRESHOLD:
      return step
  return None


def steps_to(run: Run) -> int:
  """The same, with a censored run at its last step."""
  found = reached(run)
  return curve(run)[-1][0] if found is None else found


def tokens_to(run: Run) -> float:
  """Millions of tokens computed until then: decoded, prefilled and trained on."""
  return 1e-6 * sum(value or 0.0 for metric in COSTS.values()
                    for value in run.training(metric)[:steps_to(run)])


def seconds_to(run: Run) -> float:
  """Seconds of training until then: steps times the median step, see measures.cost."""
  return steps_to(run) * plain.median(filter(None, run.training("time/step_s")))


def area(run: Run) -> float:
  """Mean height of the held-out Pass@1 curve, by trapezoids."""
  steps, values = zip(*curve(run))
  return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def _final(name: str) -> Callable[[Run], float]:
  return lambda run: counts.measures(run.questions)[name]


OUTCOMES = (
  Outcome(f"steps to {THRESHOLD:.2f}", steps_to, 0),
  Outcome("M tokens to it", tokens_to, 2, primary=False),
  Outcome("seconds to it", seconds_to, 0, primary=False),
  Outcome("area", area, 1, 100),
  Outcome("Pass@1", _final("pass_at_1"), 1, 100),
  Outcome("Pass@4", _final("pass_at_4"), 1, 100),
  Outcome("forced success", _final("forced_success"), 1, 100),
)


def of_recipe(runs: Sequence[Run], recipe: str) -> dict[tuple[int, int], Run]:
  """Its runs by (SFT policy, seed)."""
  return {(run.sft, run.seed): run for run in runs if run.recipe == recipe}


@dataclasses.dataclass(frozen=True)
class Test:
  """A recipe against GRPO in one outcome: the mean difference with its interval, and p by flips of
  signs, as it is and after Holm's correction."""

  recipe: str
  outcome: Outcome
  difference: statistics.Estimate
  corrected: float


def tests(runs: Sequence[Run]) -> list[Test]:
  """Every recipe that has pairs with GRPO, in every outcome; secondary ones are not tested."""
  base, found = of_recipe(runs, "grpo"), []
  for recipe in LABELS:
    pairs = [(base[key], run) for key, run in sorted(of_recipe(runs, recipe).items()) if key in base]
    if recipe == "grpo" or len(pairs) < 2:
      continue
    for outcome in OUTCOMES:
      differences = [outcome.of(run) - outcome.of(before) for before, run in pairs]
      p = statistics.sign_flip(differences) if outcome.primary else math.nan
      found.append((recipe, outcome, statistics.bootstrapped(differences, DRAWS)._replace(p=p)))
  corrected = statistics.holm([difference.p for _, _, difference in found])
  return [Test(*one, p) for one, p in zip(found, corrected, strict=True)]


def _state(c: Comparison) -> str:
  """How many of the plan's runs are in."""
  found = {label: len(of_recipe(c.runs, recipe)) for recipe, label in LABELS.items()}
  return (f"**{sum(found.values())} of the plan's {PAIRS * len(LABELS)} runs are in**, of {PAIRS} each: "
          + "; ".join(f"{label}: {count}" for label, count in found.items()) + ".")


def _levels(c: Comparison) -> str:
  """Means of every recipe, and how many runs reached the threshold."""
  rows = [["", "runs", f"reached {THRESHOLD:.2f}", *(outcome.name for outcome in OUTCOMES)]]
  start = [run for run in c.runs if run.recipe == SFT]
  if start:
    cells = ["" if outcome.of not in _FINALS else _mean(outcome, start) for outcome in OUTCOMES]
    rows.append(["SFT, where all begin", str(len(start)), "", *cells])
  for recipe, label in LABELS.items():
    runs = list(of_recipe(c.runs, recipe).values())
    if runs:
      rows.append([label, str(len(runs)), str(sum(reached(run) is not None for run in runs)),
                   *(_mean(outcome, runs) for outcome in OUTCOMES)])
  return markdown(rows)


_FINALS = {outcome.of for outcome in OUTCOMES[-3:]}


def _mean(outcome: Outcome, runs: Sequence[Run]) -> str:
  return _number(plain.fmean(map(outcome.of, runs)), outcome)


def _number(value: float, outcome: Outcome, sign: str = "") -> str:
  return f"{outcome.scale * value:{sign}.{outcome.digits}f}".replace("-", "−")


def _tested(c: Comparison) -> str:
  """Differences from GRPO; in brackets the interval, then p after Holm's correction."""
  found = tests(c.runs)
  rows = [["− GRPO", "pairs", *(outcome.name for outcome in OUTCOMES)]]
  for recipe in dict.fromkeys(test.recipe for test in found):
    own = [test for test in found if test.recipe == recipe]
    rows.append([LABELS[recipe], str(own[0].difference.n), *map(_difference, own)])
  return markdown(rows)


def _difference(test: Test) -> str:
  one, outcome = test.difference, test.outcome
  text = (f"{_number(one.mean, outcome, '+')} ({_number(one.low, outcome, '+')} … "
          f"{_number(one.high, outcome, '+')})")
  return text if math.isnan(one.p) else f"{text} p {test.corrected:.3f}"


def _pairs(c: Comparison) -> str:
  """Every run: steps to the threshold, and final Pass@1."""
  keys = sorted({(run.sft, run.seed) for run in c.runs if run.recipe != SFT})
  recipes = [recipe for recipe in LABELS if of_recipe(c.runs, recipe)]
  rows = [["SFT policy", "seed", *(LABELS[recipe] for recipe in recipes)]]
  for key in keys:
    rows.append([*map(str, key), *(_run_cell(of_recipe(c.runs, recipe).get(key)) for recipe in recipes)])
  return markdown(rows)


def _run_cell(run: Run | None) -> str:
  if run is None:
    return "–"
  steps = reached(run)
  return f"{'> ' if steps is None else ''}{steps_to(run)}; {100 * _final('pass_at_1')(run):.1f}"


def _looks(c: Comparison) -> str:
  """Looks, not tests: what training was like."""
  columns = {
    "tool rate, step 50": lambda run: _near(run, "rollout/tool_attempt_rate", 50),
    "step 120": lambda run: _near(run, "rollout/tool_attempt_rate", 120),
    "advantage mass of prefixes": lambda run: _average(run, "axpo/advantage_share_prefixes"),
    "of continuations": lambda run: _average(run, "axpo/advantage_share_continuations"),
    "gradient norm": lambda run: _average(run, "train/grad_norm"),
    "recovered": lambda run: _average(run, "axpo/recovered_share"),
  }
  rows = [["", "runs", *columns]]
  for recipe, label in LABELS.items():
    runs = list(of_recipe(c.runs, recipe).values())
    if not runs:
      continue
    cells = [[value for value in map(number, runs) if value is not None] for number in columns.values()]
    rows.append([label, str(len(runs)), *(f"{plain.fmean(cell):.2f}" if cell else "–" for cell in cells)])
  return markdown(rows)


def _near(run: Run, metric: str, step: int) -> float | None:
  """Mean of the ten training steps that end there."""
  return counts.mean(value for value in run.training(metric)[step - 10:step] if value is not None)


def _average(run: Run, metric: str) -> float | None:
  return counts.mean(value for value in run.training(metric) if value is not None)


def _figure(c: Comparison):
  """Held-out curves: mean over runs and Student's 95 % interval."""
  figure, axes = figures.axes_of(1, len(_SHOWN), (13, 4))
  for axis, (title, metric) in zip(axes.flat, _SHOWN.items()):
    for (recipe, label), colour in zip(LABELS.items(), _COLOURS):
      curves = [dict(curve(run, metric)) for run in of_recipe(c.runs, recipe).values()]
      if not curves:
        continue
      steps = sorted(set.intersection(*map(set, curves)))
      found = [statistics.over_seeds([one[step] for one in curves]) for step in steps]
      axis.plot(steps, [one.mean for one in found], color=colour, label=f"{label} (n = {len(curves)})")
      if len(curves) > 2:  # of two runs it would be wider than the figure
        axis.fill_between(steps, [one.low for one in found], [one.high for one in found],
                          color=colour, alpha=0.12, linewidth=0)
    axis.set(title=title, xlabel="step", ylim=(0, 1))
  axes.flat[0].axhline(THRESHOLD, color="#666666", linewidth=0.8, linestyle=":")
  axes.flat[0].legend(frameon=False, fontsize=8)
  return figure


TABLES: Mapping[str, Callable[[Comparison], str]] = {
  "horizon_state": _state, "horizon_levels": _levels, "horizon_tests": _tested, "horizon_pairs": _pairs,
  "horizon_looks": _looks}
FIGURES = {"horizon": ("Held-out Pass@1, tool rate and search over steps", _figure)}
