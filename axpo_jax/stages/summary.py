"""The summary of a run: a table of start against end, overall and by family, and a figure of its curves.

Both need only metrics.jsonl: `python -m axpo_jax.stages.summary RUN` makes them again.
"""

import argparse
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from axpo_jax import markdown, paths
from axpo_jax.stages.metrics import read_metrics

# Rows of the table: label, metric. The first block comes from the evaluations on held-out questions; the
# second from training rollouts, because only training resamples.
EVALUATED = (
  ("Pass@1", "eval/pass_at_1"),
  ("Pass@4", "eval/pass_at_4"),
  ("tool-attempt rate", "eval/tool_attempt_rate"),
  ("tool-success rate", "eval/tool_success_rate"),
)
TRAINED = (
  ("all-wrong rate of the tool subgroup", "rollout/tool_all_wrong_rate"),
  ("… after resampling", "rollout/tool_all_wrong_rate_after"),
  ("recovered share of triggered questions", "axpo/recovered_share"),
)
# Columns of the table by family, which has a row per family; the last is of training rollouts.
BY_FAMILY = (
  ("Pass@1", "eval/{}/pass_at_1"),
  ("Pass@4", "eval/{}/pass_at_4"),
  ("tool attempts", "eval/{}/tool_attempt_rate"),
  ("tool success", "eval/{}/tool_success_rate"),
  ("tool subgroup all wrong", "rollout/{}/tool_all_wrong_rate"),
)
_FAMILY = re.compile(r"eval/(\w+)/pass_at_1")
WINDOW = 5  # training steps averaged at each end


def series(lines: Iterable[Mapping], name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one metric; steps at which it was not defined are absent."""
  found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
  return [step for step, _ in found], [value for _, value in found]


def ends(lines: Sequence[Mapping], name: str) -> tuple[float | None, float | None]:
  """A metric, in its own unit, at the start and at the end of RL; None if it was not measured.

  An evaluation metric: the first value before RL and the last one after a step of RL; a run that is evaluated
  only at its end has no start. A training metric: means over the first and over the last steps.
  """
  steps, values = series(lines, name)
  if not name.startswith("eval/"):
    return _mean(values[:WINDOW]), _mean(values[-WINDOW:])
  trained, _ = series(lines, "rollout/reward_mean")
  before = sum(step < trained[0] for step in steps) if trained else len(values)
  return _mean(values[:before][:1]), _mean(values[before:][-1:])


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None


def duration(seconds: float) -> str:
  """A time for people: 0.4 s, 12 s, 3 min, 2 h 05 min, 3 d 4 h."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 90:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  if minutes < 90:
    return f"{minutes} min"
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def table(lines: Sequence[Mapping]) -> str:
  """Start against end, as text that is also Markdown; then the same by family, if there are any."""
  rows = [("", "start", "end")]
  for label, name in (*EVALUATED, *TRAINED):
    rows.append((label, *_start_and_end(lines, name)))
  parts = [markdown.table(rows), "", f"Pass@k and tool use: held-out questions before and after RL. The "
           f"last three rows: mean of the first and of the last {WINDOW} training steps at which "
           "they are defined."]
  if names := families(lines):
    rows = [("start → end, %", *(label for label, _ in BY_FAMILY))]
    for family in names:
      cells = (_start_and_end(lines, name.format(family)) for _, name in BY_FAMILY)
      rows.append((family, *(" → ".join(cell.removesuffix(" %") for cell in pair)
                             for pair in cells)))
    parts += ["", markdown.table(rows)]
  return "\n".join(parts)


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
  """One evaluation in the form of the paper's tables: a row per benchmark, and their mean.

  Args:
    results: what `evaluate.result` gives, by benchmark.
  """
  most = max((int(name.removeprefix("pass_at_")) for result in results.values() for name in result
              if re.fullmatch(r"pass_at_\d+", name)), default=1)
  ks = [k for k in dict.fromkeys((1, 4, most)) if any(f"pass_at_{k}" in r for r in results.values())]
  rows = [("%", *(f"Pass@{k}" for k in ks), "tool use", "questions", "failed rollouts")]
  for name, result in results.items():
    rows.append((name, *(_with_error(result, f"pass_at_{k}") for k in ks),
                 _number(result.get("tool_attempt_rate")), f"{result['questions']:.0f}",
                 f"{result['failed']:.0f} of {result['rollouts']:.0f}"))
  if len(results) > 1:
    mean = _mean_of(results.values(), [*(f"pass_at_{k}" for k in ks), "tool_attempt_rate"])
    rows.append(("mean", *(_with_error(mean, f"pass_at_{k}") for k in ks),
                 _number(mean.get("tool_attempt_rate")), "", ""))
  return markdown.table(rows) + "\n\nPass@k with its standard error; tool use: rollouts that call a tool."


def _mean_of(results: Iterable[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
  """Means over the benchmarks, and standard errors of the means of Pass@k, taken as independent. A metric that one
  benchmark lacks is left out: a mean over the others would not be the mean of the table."""
  results, out = list(results), {}
  for name in names:
    values, errors = ([result.get(key) for result in results] for key in (name, f"{name}_se"))
    if None not in values:
      out[name] = sum(values) / len(values)
    if None not in errors:
      out[f"{name}_se"] = sum(error**2 for error in errors) ** 0.5 / len(errors)
  return out


def _with_error(result: Mapping[str, float], name: str) -> str:
  error = result.get(f"{name}_se")
  return _number(result.get(name)) + (f" ± {100 * error:.1f}" if error is not None else "")


def _number(share: float | None) -> str:
  return "–" if share is None else f"{100 * share:.1f}"


def families(lines: Iterable[Mapping]) -> list[str]:
  """Names of the families that were evaluated."""
  names = (_FAMILY.fullmatch(name) for line in lines for name in line)
  return sorted({found[1] for found in names if found})


def _start_and_end(lines: Sequence[Mapping], name: str) -> tuple[str, str]:
  return tuple(f"{100 * value:.1f} %" if value is not None else "–" for value in ends(lines, name))


_PANELS = (
  ("Reward", (("all rollouts", "rollout/reward_mean"), ("with tools", "rollout/tool_success_rate"),
              ("without tools", "rollout/no_tool_success_rate"))),
  ("Tool-attempt rate", (("rollouts that call a tool", "rollout/tool_attempt_rate"),)),
  ("Tool subgroups that are all wrong", (("before resampling", "rollout/tool_all_wrong_rate"),
                                         ("after", "rollout/tool_all_wrong_rate_after"))),
  ("Resampling", (("triggered questions recovered", "axpo/recovered_share"),
                          ("prefix tokens from the cache", "axpo/prefix_cached_share"))),
)


def plot(lines: Sequence[Mapping], path: epath.Path, title: str = "") -> None:
  """Four panels over training steps, as PNG: the thin line is each step, the thick one a running mean."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import MaxNLocator

  figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
  for axis, (name, curves) in zip(axes.flat, _PANELS):
    for label, metric in curves:
      steps, values = series(lines, metric)
      if not steps:
        continue
      (thin,) = axis.plot(steps, values, alpha=0.25, linewidth=1)
      axis.plot(steps, running_mean(values), color=thin.get_color(), label=label, linewidth=2)
    axis.set(title=name, ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    if axis.has_data():
      axis.legend(fontsize=8)
  for axis in axes[1]:
    axis.set_xlabel("step (SFT steps counted)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  figure.suptitle(title)
  drawn = io.BytesIO()
  figure.savefig(drawn, format="png", dpi=120)
  plt.close(figure)
  paths.write_bytes(path, drawn.getvalue())


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
  """Mean of up to `window` values up to each step."""
  return [sum(values[max(0, i + 1 - window):i + 1]) / len(values[max(0, i + 1 - window):i + 1])
          for i in range(len(values))]


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m axpo_jax.stages.summary",
                                   description="Prints a run's table and draws its curves.")
  parser.add_argument("run", type=paths.parse, help="a run's --workdir, with metrics.jsonl in it")
  run = parser.parse_args(argv[1:]).run
  lines = read_metrics(run)
  if not lines:
    parser.error(f"{run} has no metrics.jsonl, or an empty one")
  plot(lines, run / "curves.png", title=run.name)
  print(table(lines))
  print(f"figure: {run / 'curves.png'}")


if __name__ == "__main__":
  main(sys.argv)
