"""The figures of the page, as Plotly's own JSON. Colours are left to the page, which has two themes.

In: Methods, of one run or of several seeds. Out: for every figure its title, what it shows in words (for
those who cannot see it), and traces and layout. A trace names its place in the page's palette in `meta`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from axpo_jax.report.seeds import Method
from axpo_jax.rollouts.census import STATES, SUBGROUPS
from axpo_jax.stages import summary

_QUARTERS = [0, 25, 50, 75, 100]
_POWERS = range(-9, 4)  # of ten, on logarithmic axes; Plotly's own exponents are outsized
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DASHES = ("solid", "dot", "dash")
_COLOURS = 6  # of assets/charts.js

# (title, what it means, unit, ((label, metric), ...)); the first of the lines is the solid one.
PANELS = (
  ("Tool-attempt rate", "Share of rollouts that call a tool. Falling to zero is the collapse.", "%",
   (("training", "rollout/tool_attempt_rate"), ("held-out", "eval/tool_attempt_rate"))),
  ("Tool subgroups that are all wrong",
   "Of the questions where a tool was tried: every rollout that tried one is wrong.", "%",
   (("after resampling", "rollout/tool_all_wrong_rate_after"),
    ("before", "rollout/tool_all_wrong_rate"))),
  ("Recovered", "Of the triggered questions: a continuation of a frozen prefix got it right.", "%",
   (("recovered", "axpo/recovered_share"),)),
  ("Right by subgroup", "Of the rollouts with a tool, and of those without: how many are right.", "%",
   (("with a tool", "rollout/tool_success_rate"), ("without", "rollout/no_tool_success_rate"))),
  ("Held-out questions", "Right once, and right in at least one of four.", "%",
   (("Pass@1", "eval/pass_at_1"), ("Pass@4", "eval/pass_at_4"))),
  ("Sampler against trainer",
   "Log-probability gap of the same tokens: mean and worst. It should stay flat.", "nats",
   (("mean", "train/logp_gap_abs_mean"), ("worst", "train/logp_gap_abs_max"))),
  ("Entropy, and distance from the reference",
   "Per token. Entropy that vanishes means that nothing is tried any more; KL that runs away, that "
   "what the policy knew is being lost.", "nats",
   (("entropy", "train/entropy"), ("KL", "train/kl"))),
  ("Gradient norm", "Before clipping. A run that diverges shows here first.", "norm",
   (("gradient norm", "train/grad_norm"),)),
)


@dataclasses.dataclass(frozen=True)
class Chart:
  """One figure: `figure` is {"data", "layout"} for Plotly."""

  title: str
  about: str
  figure: Mapping[str, Any]
  wide: bool = False


def charts(methods: Sequence[Method]) -> list[Chart]:
  """Every figure that some run has data for."""
  found = [_panel(methods, "Reward", "Mean over the rollouts; where it is a sum, of each part too.", "reward",
                  _rewards(methods))]
  found += [_panel(methods, *panel) for panel in PANELS]
  found += [_census(method, len(methods) > 1) for method in methods]
  return [chart for chart in found if chart is not None]


def _panel(methods: Sequence[Method], title: str, about: str, unit: str, lines) -> Chart | None:
  figure = go.Figure()
  alone, scale = len(methods) == 1, 100 if unit == "%" else 1
  for m, method in enumerate(methods):
    for number, (label, metric) in enumerate(lines):
      steps, values = _scaled(method.metrics, metric, scale)
      if steps:
        name = label if alone else method.name if len(lines) == 1 else f"{method.name}, {label}"
        # One method: a colour a line. Several: a colour a method, a dash a line.
        style = {"name": name, "meta": {"colour": number if alone else m}}
        dash = "solid" if alone else _DASHES[number]
        parts = [_scaled(run.metrics, metric, scale) for run in method.runs.values()]
        _add(figure, steps, values, parts, style, dash, unit, smooth=not metric.startswith("eval/"))
  if not figure.data:
    return None
  figure.update_xaxes(title_text="step")
  if unit == "%":
    figure.update_yaxes(range=[-2, 102], tickvals=_QUARTERS, ticktext=_percent(_QUARTERS))
  elif unit == "reward":
    figure.update_yaxes(title_text=unit)
  else:
    figure.update_yaxes(type="log", title_text=unit, tickvals=[10.0**k for k in _POWERS],
                        ticktext=[f"10{str(k).translate(_RAISED)}" for k in _POWERS])
  return Chart(title, about, _json(figure))


def _rewards(methods: Sequence[Method]) -> list[tuple[str, str]]:
  """The lines of a reward, which may be any number and have parts of any name. Several methods: the mean alone."""
  lines, part = [("mean", "rollout/reward_mean")], "rollout/reward/"
  if len(methods) == 1:
    parts = sorted({name for line in methods[0].metrics for name in line if name.startswith(part)})
    lines += [(name.removeprefix(part), name) for name in parts if len(parts) > 1][:_COLOURS - 1]
  return lines


def _scaled(lines: Sequence[Mapping], metric: str, scale: float) -> tuple[list[int], list[float]]:
  steps, values = summary.series(lines, metric)
  return steps, [scale * value for value in values]


def _add(figure: go.Figure, steps, values, parts, style: Mapping[str, Any], dash: str, unit: str,
         smooth: bool) -> None:
  """A thick line, and thin ones behind it: each step of the run, or each of the seeds."""
  if not smooth or len(steps) < 2 * summary.WINDOW:
    figure.add_scatter(x=steps, y=values, mode="lines+markers", line={"dash": dash, "width": 2},
                       marker={"size": 7}, hovertemplate=_hover(unit), **style)
    return
  for x, y in parts:
    figure.add_scatter(x=x, y=y if len(parts) == 1 else summary.running_mean(y), mode="lines",
                       legendgroup=style["name"], showlegend=False, opacity=0.28,
                       line={"dash": dash, "width": 1}, hoverinfo="skip", **style)
  figure.add_scatter(x=steps, y=summary.running_mean(values), mode="lines", legendgroup=style["name"],
                     line={"dash": dash, "width": 2.5}, hovertemplate=_hover(unit), **style)


def _census(method: Method, named: bool) -> Chart | None:
  """Shares of the questions over steps, by subgroup and state."""
  rows, labels = [], []
  lines = [line for line in method.metrics if "rollout/census_tool_absent" in line]
  for subgroup in reversed(SUBGROUPS):
    for state in reversed(STATES):
      rows.append([None if (value := line.get(f"rollout/census_{subgroup}_{state}")) is None
                   else 100 * value for line in lines])
      labels.append(f"{'tool' if subgroup == 'tool' else 'no tool'} · {state.replace('_', ' ')}")
  if not lines:
    return None
  figure = go.Figure(go.Heatmap(
    z=rows, x=[line["step"] for line in lines], y=labels, zmin=0, zmax=100, xgap=1, ygap=1,
    colorbar={"thickness": 10, "outlinewidth": 0, "tickvals": _QUARTERS,
              "ticktext": _percent(_QUARTERS)},
    hovertemplate="step %{x}<br>%{y}: %{z:.0f} % of questions<extra></extra>"))
  figure.update_xaxes(title_text="step")
  figure.update_layout(shapes=[{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y",
                                "y0": 3.5, "y1": 3.5, "line": {"width": 3}}])
  return Chart("Census" + (f" · {method.name}" if named else ""),
               "Share of the questions whose tool rollouts, and whose other rollouts, are absent, all "
               "wrong, mixed or all right. Each half of a column adds up to 100 %.",
               _json(figure), wide=True)


def _percent(values: Sequence[float]) -> list[str]:
  return [f"{value} %" for value in values]


def _hover(unit: str) -> str:
  value = {"%": "%{y:.1f} %", "reward": "%{y:.3f}"}.get(unit, "%{y:.2e} " + unit)
  return f"step %{{x}}: {value}<extra>%{{fullData.name}}</extra>"


def _json(figure: go.Figure) -> dict[str, Any]:
  figure.layout.template = None  # Plotly's own is 7 kB a figure; the page has its theme
  return json.loads(figure.to_json())
