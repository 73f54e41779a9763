"""The figures of the results page, as PNG.

In: runs. Out: learning curves over steps, tokens and seconds, a line a recipe with the 95 % interval over
its seeds; and the health of every single run, a thin line each.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from axpo_jax.eval import statistics
from experiments.evidence.store import Run
from experiments.evidence.tables import LABELS, Comparison

_SMOOTH = 5  # steps of the running mean
_COLOURS = {"grpo": "#4878a8", "grpo_x125": "#74a9cf", "grpo_x2": "#8c96c6", "axpo": "#d95f02"}
_OTHER = "#999999"
_CURVES = {
  "reward": "rollout/reward_mean",
  "tool-attempt rate": "rollout/tool_attempt_rate",
  "success of tool rollouts": "rollout/tool_success_rate",
  "tool subgroup all wrong": "rollout/tool_all_wrong_rate",
}
_HEALTH = {
  "KL to the start (nats a token)": "train/kl",
  "entropy (nats a token)": "train/entropy",
  "gap of sampler and trainer (nats)": "train/logp_gap_abs_mean",
  "gradient norm": "train/grad_norm",
}
_SECONDS = "seconds, of usual steps"
# What a step adds to the axis: label -> metrics. Seconds are those of the median step, see measures.cost.
_AXES = {
  "step": (),
  "tokens computed, millions": ("engine/decode_tokens", "engine/prefill_tokens_computed",
                                "pack/tokens"),
  _SECONDS: ("time/step_s",),
}


def _curves(c: Comparison):
  figure, axes = axes_of(2, 2, (10, 6.4))
  for axis, (title, metric) in zip(axes.flat, _CURVES.items()):
    for recipe in _shown(c):
      _line(axis, c.of(recipe), metric, "step", recipe)
    axis.set(title=title, xlabel="step")
  axes[0, 0].legend(frameon=False, fontsize=8)
  return figure


def _cost(c: Comparison):
  figure, axes = axes_of(1, len(_AXES), (12, 3.8))
  for axis, label in zip(axes.flat, _AXES):
    for recipe in _shown(c):
      _line(axis, c.of(recipe), _CURVES["reward"], label, recipe)
    axis.set(title="reward", xlabel=label)
  axes.flat[0].legend(frameon=False, fontsize=8)
  return figure


def _health(c: Comparison):
  """Every run, of every recipe and SFT policy: none is left out."""
  figure, axes = axes_of(2, 2, (10, 6.4))
  runs = [run for run in c.runs if run.training("train/grad_norm")]
  for axis, (title, metric) in zip(axes.flat, _HEALTH.items()):
    for run in runs:
      values = [math.nan if value is None else value for value in run.training(metric)]
      axis.plot(range(1, len(values) + 1), values, linewidth=0.6, alpha=0.7,
                color=_COLOURS.get(run.recipe, _OTHER))
    axis.set(title=f"{title}, {len(runs)} runs", xlabel="step")
  return figure


# Name -> what it shows, and who draws it.
FIGURES = {"curves": ("Learning curves", _curves), "cost": ("Reward over what it cost", _cost),
           "health": ("Health of every run", _health)}


def _shown(c: Comparison) -> list[str]:
  return [recipe for recipe in _COLOURS if recipe in c.recipes]


def _line(axis, runs: Sequence[Run], metric: str, label: str, recipe: str) -> None:
  """Mean over seeds at each step, at the mean place on the axis."""
  length = min(len(run.training("rollout/rollouts")) for run in runs)
  if not length:
    return
  places = np.mean([_places(run, label)[:length] for run in runs], axis=0)
  values = np.array([_smoothed(run.training(metric))[:length] for run in runs])
  found = [statistics.over_seeds([v for v in column if not math.isnan(v)]) for column in values.T]
  colour = _COLOURS[recipe]
  middle = [one.mean if one else math.nan for one in found]
  axis.plot(places, middle, color=colour, label=f"{LABELS[recipe]} (n = {len(runs)})")
  if len(runs) > 1:
    axis.fill_between(places, [one.low if one else math.nan for one in found],
                      [one.high if one else math.nan for one in found], color=colour, alpha=0.15,
                      linewidth=0)


def _places(run: Run, label: str) -> np.ndarray:
  names = _AXES[label]
  steps = len(run.training("rollout/rollouts"))
  if not names:
    return np.arange(1, steps + 1)
  if label == _SECONDS:
    seconds = [value for value in run.training(names[0]) if value is not None]
    return np.median(seconds) * np.arange(1, steps + 1)
  return 1e-6 * np.cumsum([sum(values) for values in zip(
    *([value or 0.0 for value in run.training(name)] for name in names))])


def _smoothed(values: Sequence[float | None]) -> list[float]:
  """Mean of the last steps at which the metric is defined."""
  out = []
  for i in range(len(values)):
    window = [v for v in values[max(0, i + 1 - _SMOOTH):i + 1] if v is not None]
    out.append(sum(window) / len(window) if window else math.nan)
  return out


def axes_of(rows: int, columns: int, size: tuple[float, float]):
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
  for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes


def draw(figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a figure as PNG; returns its path."""
  from matplotlib import pyplot as plt

  path.parent.mkdir(parents=True, exist_ok=True)
  # No time and no version in the file: equal runs give equal figures.
  figure.savefig(path, dpi=110, metadata={"Software": None})
  plt.close(figure)
  return path
