"""The tables of the results page.

In: runs. Out: Markdown by name; `TABLES` lists them. A cell is a mean over seeds and, from two seeds on,
half the width of its 95 % interval (Student); a difference has its whole interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from axpo_jax.eval import statistics
from axpo_jax.eval.statistics import Estimate
from experiments.evidence import counts, paper
from experiments.evidence.measures import cost, families, family, measures
from experiments.evidence.store import SFT, Run

# Recipe -> its name in tables, in their order.
LABELS = {
  "sft": "SFT, where all begin", "grpo": "GRPO", "grpo_x125": "GRPO, 1.25× rollouts",
  "grpo_x2": "GRPO, 2× rollouts", "tool_bonus": "tool bonus", "tool_penalty": "tool penalty (OTC)",
  "cispo": "CISPO", "axpo": "AXPO", "no_prefix_fix": "… no prefix fix",
  "resample_no_tool": "… resamples no-tool rollouts", "random_prefix": "… random prefix",
  "no_prefix_credit": "… no prefix credit", "merged_group": "… merged advantage group",
  "mean_credit": "… prefix credit `mean`", "excess_credit": "… prefix credit `excess`",
  "no_kl": "… without KL",
}
# What recipes are compared by.
_COMPARED = {"Pass@1": "pass_at_1", "Pass@4": "pass_at_4", "tool rate": "tool_rate",
             "forced success": "forced_success"}
_PERCENT = 100.0
_NONE = "–"


class Comparison:
  """The runs by recipe and seed, with their numbers.

  Attributes:
    runs: all of them.
    sft: which SFT policy's runs the tables are of; the others have a table of their own.
    again: the same points, or some of them, run once more by somebody else.
  """

  def __init__(self, runs: Sequence[Run], sft: int = 0, again: Comparison | None = None):
    self.runs, self.sft, self.again = runs, sft, again
    self._starts = {run.sft: run for run in runs if run.recipe == SFT}
    self._numbers = {run.name: measures(run, self._starts.get(run.sft)
                                        if run.recipe != SFT else None) for run in runs}

  @property
  def starts(self) -> list[Run]:
    """The SFT policies that there are."""
    return [run for _, run in sorted(self._starts.items())]

  @property
  def recipes(self) -> list[str]:
    """Those of which there is a run, in the order of LABELS."""
    there = {run.recipe for run in self.runs if run.sft == self.sft}
    return [name for name in LABELS if name in there]

  def of(self, recipe: str, sft: int | None = None) -> list[Run]:
    sft = self.sft if sft is None else sft
    return sorted((run for run in self.runs if run.recipe == recipe and run.sft == sft),
                  key=lambda run: run.seed)

  def values(self, recipe: str, name: str, sft: int | None = None) -> dict[int, float]:
    """A number by seed, of the runs that have it."""
    found = {run.seed: self._numbers[run.name].get(name) for run in self.of(recipe, sft)}
    return {seed: value for seed, value in found.items() if value is not None}

  def mean(self, recipe: str, name: str, sft: int | None = None) -> Estimate | None:
    return statistics.over_seeds(list(self.values(recipe, name, sft).values()))

  def difference(self, base: str, other: str, name: str, sft: int | None = None) -> Estimate | None:
    return statistics.paired(self.values(base, name, sft), self.values(other, name, sft))


def _main(c: Comparison) -> str:
  columns = {"Pass@1": "pass_at_1", "Pass@4": "pass_at_4", "tool rate": "tool_rate",
             "tool success": "tool_success", "success without": "direct_success",
             "all wrong": "train_all_wrong", "… after resampling": "train_all_wrong_after",
             "recovered": "recovered"}
  return _by_recipe(c, columns)


def _habits(c: Comparison) -> str:
  columns = {"forced success": "forced_success", "forced, 4 all wrong": "forced_all_wrong_at_4",
             "2 tool rollouts all wrong": "all_wrong_at_2", "tool rate": "tool_rate",
             "called more often": "part_more_often", "calls got better": "part_better",
             "chosen better": "part_chosen", "without calls": "part_direct"}
  return _by_recipe(c, columns)


def _credit(c: Comparison) -> str:
  """What resampling finds and what is made of it, in the recipes that resample."""
  columns = {"budget used": "budget_used", "prefix from the cache": "prefix_cached",
             "continuations right": "continuation_success", "prefixes recovered": "prefix_recovered",
             "prefixes pushed up": "credited", "right without tools": "train_direct_success"}
  return _by_recipe(c, columns, [recipe for recipe in c.recipes if c.values(recipe, "budget_used")])


def _by_recipe(c: Comparison, columns: Mapping[str, str],
               recipes: Sequence[str] | None = None) -> str:
  rows = [["%", "seeds", *columns]]
  for recipe in c.recipes if recipes is None else recipes:
    rows.append([LABELS[recipe], str(len(c.of(recipe))),
                 *(_cell(c.mean(recipe, name)) for name in columns.values())])
  return markdown(rows)


def _pairs(c: Comparison) -> str:
  """Every recipe against GRPO, and against AXPO, paired by seed."""
  rows = [["points", "pairs", *_COMPARED, "p (Pass@1)"]]
  others = [recipe for recipe in c.recipes if recipe not in (SFT, "grpo")]
  for base in ("grpo", "axpo"):
    for other in others:
      found = {name: c.difference(base, other, name) for name in _COMPARED.values()}
      if other == base or found["pass_at_1"] is None:
        continue
      rows.append([f"{_plain(other)} − {_plain(base)}", str(found["pass_at_1"].n),
                   *(_interval(one) for one in found.values()), _p(found["pass_at_1"])])
  return markdown(rows)


def _questions(c: Comparison) -> str:
  """AXPO - GRPO by question: each question's mean over the seeds that both have."""
  rows = [["points", "seeds", "questions", "Pass@1", "tool rate", "forced success"]]
  pairs = [(a, b) for a in c.of("grpo") for b in c.of("axpo") if a.seed == b.seed]
  for name in ("", *families(c.runs)):
    found = [statistics.bootstrapped(_by_question(pairs, name, rate)) for rate in _RATES]
    if pairs and found[0]:
      rows.append([name or "all", str(len(pairs)), str(found[0].n), *map(_interval, found)])
  return markdown(rows)


_RATES: tuple[Callable[[counts.Counts], float], ...] = (
  lambda q: q.right / q.rollouts, lambda q: q.tool / q.rollouts,
  lambda q: q.forced_right / q.forced if q.forced else math.nan)


def _by_question(pairs: Sequence[tuple[Run, Run]], name: str,
                 rate: Callable[[counts.Counts], float]) -> list[float]:
  found: dict[str, list[float]] = {}
  for base, other in pairs:
    before = {q.id: q for q in base.questions if q.rollouts}
    for q in other.questions:
      if q.id in before and q.rollouts and name in ("", q.family):
        found.setdefault(q.id, []).append(rate(q) - rate(before[q.id]))
  means = (counts.mean(values) for values in found.values())
  return [value for value in means if not math.isnan(value)]


def _families(c: Comparison) -> str:
  columns = {"Pass@1": "pass_at_1", "Pass@4": "pass_at_4", "tool rate": "tool_rate",
             "tool success": "tool_success", "success without": "direct_success",
             "forced success": "forced_success", "2 all wrong": "all_wrong_at_2"}
  rows = [["%", "", "seeds", *columns]]
  for name in families(c.runs):
    for recipe in c.recipes:
      found = [family(run, name) for run in c.of(recipe)]
      if found:
        rows.append([name, LABELS[recipe], str(len(found)),
                     *(_cell(statistics.over_seeds([one[key] for one in found if key in one]))
                       for key in columns.values())])
  return markdown(rows)


def _policies(c: Comparison) -> str:
  """The SFT policies that runs begin with."""
  columns = {"Pass@1": "pass_at_1", "Pass@4": "pass_at_4", "tool rate": "tool_rate",
             "2 tool rollouts all wrong": "all_wrong_at_2", "forced success": "forced_success"}
  rows = [["SFT policy", "weights", *columns]]
  for run in c.starts:
    rows.append([f"{run.sft}", f"`{run.made[:8]}`",
                 *(_cell(c.mean(SFT, name, run.sft)) for name in columns.values())])
  return markdown(rows)


def _across(c: Comparison) -> str:
  """What was run from every SFT policy, from each and from all: a pair shares policy and seed."""
  rows = [["points", "SFT policy", "pairs", *_COMPARED, "p (Pass@1)"]]
  policies = [run.sft for run in c.starts]
  for base, other in (("grpo", "axpo"), ("grpo", "random_prefix"), ("axpo", "random_prefix")):
    for name, those in [*((str(sft), [sft]) for sft in policies), ("all", policies)]:
      found = [statistics.paired(*({(sft, seed): value for sft in those
                                    for seed, value in c.values(recipe, key, sft).items()}
                                   for recipe in (base, other))) for key in _COMPARED.values()]
      if found[0]:
        rows.append([f"{_plain(other)} − {_plain(base)}", name, str(found[0].n),
                     *map(_interval, found), _p(found[0])])
  return markdown(rows)


def _repeat(c: Comparison) -> str:
  """Means, and differences from GRPO, of the first time and of the second; and which of the second's
  lie outside of the first's intervals."""
  twice = [f"{name}{when}" for name in _COMPARED for when in ("", ", again")]
  rows = [["% and points", "seeds, again", *twice, "outside"]]
  again = c.again or Comparison([])
  both = [recipe for recipe in c.recipes if recipe in again.recipes]

  def row(label: str, recipe: str, cell: Callable[[Estimate | None], str],
          of: Callable[[Comparison, str, str], Estimate | None]) -> None:
    found = {name: (of(c, recipe, key), of(again, recipe, key)) for name, key in _COMPARED.items()}
    outside = [name for name, (first, second) in found.items()
               if first and second and not first.low <= second.mean <= first.high
               and not math.isnan(first.low)]
    seeds = next((second.n for _, second in found.values() if second), 0)
    rows.append([label, str(seeds), *(cell(one) for pair in found.values() for one in pair),
                 ", ".join(outside) or _NONE])

  for recipe in both:
    row(LABELS[recipe], recipe, _cell, Comparison.mean)
  for recipe in both:
    if recipe not in (SFT, "grpo"):
      row(f"{_plain(recipe)} − GRPO", recipe, _interval,
          lambda which, other, key: which.difference("grpo", other, key))
  return markdown(rows)


def _cost(c: Comparison) -> str:
  """What a recipe's run took, as multiples of GRPO's of the same seed, in all and in the first step."""
  columns = {"rollouts": "sampled", "tokens decoded": "decoded", "prefilled": "prefilled",
             "trained on": "trained", "computed, together": "tokens", "seconds of a step": "step_seconds"}
  rows = [["× GRPO", "steps", "pairs", *columns]]
  base = {run.seed: run for run in c.of("grpo")}
  for recipe in c.recipes:
    pairs = [(base[run.seed], run) for run in c.of(recipe) if run.seed in base]
    if recipe in (SFT, "grpo") or not pairs:
      continue
    for first in (True, False):
      ratios = [_ratios(*pair, first) for pair in pairs]
      rows.append([_plain(recipe), "first" if first else "all", str(len(pairs)),
                   *("" if first and name == "step_seconds" else
                     _cell(statistics.over_seeds([ratio[name] for ratio in ratios]), 1.0, 2)
                     for name in columns.values())])
  return markdown(rows)


def _ratios(base: Run, other: Run, first: bool) -> dict[str, float]:
  before, after = cost(base, first=first), cost(other, first=first)
  return {name: after[name] / before[name] for name in after if before.get(name)}


def _health(c: Comparison) -> str:
  """The worst of all runs of a recipe, from every SFT policy."""
  columns = {"KL at the end": ("kl_end", 1.0), "KL, most": ("kl_max", 1.0),
             "entropy, first": ("entropy_first", 1.0), "at the end, least": ("entropy_end", -1.0),
             "log-prob gap, most": ("gap_max", 1.0), "gradient norm, most": ("grad_max", 1.0),
             "clipped, most": ("clipped_max", 1.0), "steps not finite": ("not_finite", 1.0)}
  rows = [["worst run", "runs", *columns]]
  for recipe in [recipe for recipe in LABELS if recipe != SFT]:
    runs = [run for run in c.runs if run.recipe == recipe]
    found = {name: [value for sft in {run.sft for run in runs}
                    for value in c.values(recipe, name, sft).values()] for name, _ in columns.values()}
    if runs:
      rows.append([LABELS[recipe], str(len(runs)), *(
        f"{sign * max(sign * value for value in found[name]):.3g}" if found[name] else _NONE
        for name, sign in columns.values())])
  return markdown(rows)


def _paper(c: Comparison) -> str:
  """The paper's differences, and the miniature's."""
  rows = [["points", "paper, 8B", "miniature", "pairs"]]

  def row(label: str, reported: float, found: Estimate | None):
    rows.append([label, _signed(reported), _interval(found), str(found.n if found else 0)])

  for k, place in (("1", 0), ("4", 1)):
    for other, base in (("grpo", "sft"), ("axpo", "grpo")):
      found = (_from_start(c, other, f"pass_at_{k}") if base == "sft"
               else c.difference(base, other, f"pass_at_{k}"))
      row(f"Pass@{k}: {_plain(other)} − {_plain(base)} (Table 1)",
          paper.TABLE_1[other][place] - paper.TABLE_1[base][place], found)
  row("tool rate: AXPO − GRPO", paper.TOOL_RATE["axpo"] - paper.TOOL_RATE["grpo"],
      c.difference("grpo", "axpo", "tool_rate"))
  row("all wrong after resampling, in training: AXPO − GRPO", paper.ALL_WRONG_AFTER,
      c.difference("grpo", "axpo", "train_all_wrong_after"))
  recovered = c.mean("axpo", "recovered")
  rows.append(["recovered share of all-wrong subgroups", f"{paper.RECOVERED:.0f}", _cell(recovered),
               str(recovered.n if recovered else 0)])
  for k, place in (("1", 0), ("4", 1)):
    for other, reported in paper.ABLATIONS.items():
      if other != "axpo":
        row(f"Pass@{k}: {_plain(other)} − AXPO (ablations)",
            reported[place] - paper.ABLATIONS["axpo"][place],
            c.difference("axpo", other, f"pass_at_{k}"))
  return markdown(rows)


def _from_start(c: Comparison, recipe: str, name: str) -> Estimate | None:
  """What a recipe gained over the policy that it began with; it pairs every seed with that one."""
  start = next(iter(c.values(SFT, name).values()), None)
  found = c.values(recipe, name)
  return None if start is None else statistics.paired(dict.fromkeys(found, start), found)


TABLES: Mapping[str, Callable[[Comparison], str]] = {
  "main": _main, "pairs": _pairs, "questions": _questions, "families": _families,
  "habits": _habits, "credit": _credit, "policies": _policies, "across": _across,
  "repeat": _repeat, "cost": _cost, "health": _health, "paper": _paper}


def _plain(recipe: str) -> str:
  return "SFT" if recipe == SFT else LABELS[recipe].removeprefix("… ")


def _cell(one: Estimate | None, scale: float = _PERCENT, digits: int = 1) -> str:
  if one is None:
    return _NONE
  text = f"{scale * one.mean:.{digits}f}".replace("-", "−")
  return text if math.isnan(one.low) else f"{text} ± {scale * (one.mean - one.low):.{digits}f}"


def _interval(one: Estimate | None) -> str:
  """A difference in points and its interval."""
  if one is None:
    return _NONE
  text = _signed(_PERCENT * one.mean)
  return text if math.isnan(one.low) else (
    f"{text} ({_signed(_PERCENT * one.low)} … {_signed(_PERCENT * one.high)})")


def _signed(value: float) -> str:
  return f"{value:+.1f}".replace("-", "−")


def _p(one: Estimate) -> str:
  return _NONE if math.isnan(one.p) else f"{one.p:.3f}"


def markdown(rows: Iterable[Sequence[str]]) -> str:
  head, *rest = rows
  lines = [head, ["---"] * len(head), *rest]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
