"""The numbers of one run, by name: of its answers, of its training, and of what it cost.

In: a Run, and the run that made the policy it began with. Out: name -> float. A table is a choice of
names and of runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from experiments.evidence import counts
from experiments.evidence.store import Run

_WINDOW = 10  # training steps averaged at the end of a run
# Means over the last steps of a run: name -> metric.
_ENDS = {
  "train_all_wrong": "rollout/tool_all_wrong_rate",
  "train_all_wrong_after": "rollout/tool_all_wrong_rate_after",
  "train_tool_rate": "rollout/tool_attempt_rate",
}
# Means over all steps.
_MEANS = {
  "recovered": "axpo/recovered_share",
  "prefix_recovered": "axpo/prefix_recovered_share",
  "continuation_success": "axpo/continuation_success_rate",
  "credited": "axpo/prefix_advantage_positive_share",
  "train_direct_success": "rollout/no_tool_success_rate",
  "budget_used": "axpo/budget_used",
  "prefix_cached": "axpo/prefix_cached_share",
}
COSTS = {
  "decoded": "engine/decode_tokens",
  "prefilled": "engine/prefill_tokens_computed",
  "trained": "pack/tokens",
}


def measures(run: Run, start: Run | None = None) -> dict[str, float]:
  """Every number of a run; those that compare with `start` only where it is given."""
  out = counts.measures(run.questions) | health(run)
  out |= _named({name: _end(run.training(metric)) for name, metric in _ENDS.items()})
  out |= _named({name: counts.mean(run.series(metric)) for name, metric in _MEANS.items()})
  out |= cost(run)
  if start is not None:
    before, after = counts.shares(start.questions), counts.shares(run.questions)
    if before and after:
      out |= counts.parts(before, after)
  return out


def family(run: Run, name: str) -> dict[str, float]:
  """The rates of one family's questions."""
  return counts.measures([question for question in run.questions if question.family == name])


def families(runs: Iterable[Run]) -> list[str]:
  return sorted({question.family for run in runs for question in run.questions if question.family})


def cost(run: Run, *, first: bool = False) -> dict[str, float]:
  """What training took: rollouts, tokens computed by kind and together, seconds of a usual step.

  Args:
    first: of the first step alone, at which runs of one seed have the same weights and rollouts.
  """
  def total(metric: str) -> float:
    values = [value or 0.0 for value in run.training(metric)]
    return sum(values[:1] if first else values)

  rollouts = total("rollout/rollouts")
  if not rollouts:
    return {}
  out = {"rollouts": rollouts, "continuations": total("axpo/continuations")}
  out |= {name: total(metric) for name, metric in COSTS.items()}
  out["sampled"] = out["rollouts"] + out["continuations"]
  out["tokens"] = out["decoded"] + out["prefilled"] + out["trained"]
  # The median: a step that compiles a program takes ten times as long, one in a paused run any time.
  seconds = [value for value in run.training("time/step_s") if value is not None]
  out["step_seconds"] = statistics.median(seconds)
  return out


def health(run: Run) -> dict[str, float]:
  """Signs of a run that went wrong: the worst gap, gradient and KL, and the entropy at the end."""
  out = {
    "kl_end": _end(run.training("train/kl")), "kl_max": _most(run.training("train/kl")),
    "entropy_first": next(iter(run.series("train/entropy")), None),
    "entropy_end": _end(run.training("train/entropy")),
    "gap_max": _most(run.training("train/logp_gap_abs_mean")),
    "grad_max": _most(run.training("train/grad_norm")),
    "clipped_max": _most(run.training("train/clip_fraction_high")),
  }
  gradients = run.training("train/grad_norm")
  # A value that is no number was written as null.
  out["not_finite"] = float(sum(value is None for value in gradients)) if gradients else None
  return _named(out)


def _named(values: dict[str, float | None]) -> dict[str, float]:
  return {name: value for name, value in values.items() if value is not None}


def _end(values: Sequence[float | None]) -> float | None:
  return counts.mean(value for value in values[-_WINDOW:] if value is not None)


def _most(values: Sequence[float | None]) -> float | None:
  return max((value for value in values if value is not None), default=None)
