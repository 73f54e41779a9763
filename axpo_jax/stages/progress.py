"""What a run prints while it works: a line per step, and an estimate of the time left.

In: the metrics of a step. Out: text, in colour if stdout is a terminal (rich), plain lines if it is a file; and the
seconds that the stage has left.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from axpo_jax.stages.summary import duration

_PACE = 20  # steps behind the estimate of the time left
_EVERY = 5.0  # least seconds between two lines; the first and the last step always print one

# What a step's line shows: label, metric, form. "%" is a share, "s" seconds; else a format.
RESULTS = (
  ("reward", "rollout/reward_mean", ".3f"), ("tools", "rollout/tool_attempt_rate", "%"),
  ("right with", "rollout/tool_success_rate", "%"), ("all wrong", "rollout/tool_all_wrong_rate", "%"),
  ("after resampling", "rollout/tool_all_wrong_rate_after", "%"), ("nll", "sft/nll", ".3f"),
  ("kept", "data/kept_share", "%"), ("Pass@1", "eval/pass_at_1", "%"), ("Pass@4", "eval/pass_at_4", "%"))
COSTS = (
  ("step", "time/step_s", "s"), ("rollouts", "time/rollout_s", "s"), ("resampling", "time/resample_s", "s"),
  ("update", "time/update_s", "s"), ("compiling", "time/compile_s", "s"),
  ("trained tokens/s", "time/trained_tokens_per_s", ",.0f"), ("MFU", "time/mfu", "%"),
  ("device GB", "memory/device_gb", ".1f"), ("host GB", "memory/host_gb", ".1f"))
# Metric -> whether its value is shown as an alarm.
ALARMS: Mapping[str, Callable[[float], bool]] = {
  "rollout/tool_all_wrong_rate": lambda share: share > 0.5, "rollout/tool_attempt_rate": lambda share: share < 0.02,
  "rollout/reward_mean": lambda reward: reward <= 0}


class Progress:
  """One stage's steps.

  Args:
    stage: its name on the lines.
    total: steps of the stage.
    done: of them, before this process began.
    shown: False shows nothing: all processes but the main one.
  """

  def __init__(self, stage: str, total: int, done: int = 0, *, shown: bool = True,
               clock: Callable[[], float] = time.monotonic):
    self._stage, self._total, self._shown, self._clock = stage, total, shown, clock
    self._done = done
    self._ends: collections.deque[float] = collections.deque([clock()], maxlen=_PACE + 1)
    self._last_line = -math.inf
    self._console = Console(file=sys.stdout)

  def step(self, number: int) -> dict[str, float]:
    """Call it when step `number` is over; returns the metric time/left_s, from the pace of the last steps, evaluations
    and checkpoints between them included."""
    self._done = number
    self._ends.append(self._clock())
    return {"time/left_s": self.left}

  @property
  def left(self) -> float:
    """Seconds that the stage has left."""
    pace = (self._ends[-1] - self._ends[0]) / max(len(self._ends) - 1, 1)
    return pace * (self._total - self._done)

  def show(self, metrics: Mapping[str, Any]) -> None:
    """Prints a line (on a terminal two) about the last step."""
    now = self._clock()
    if not self._shown or (now - self._last_line < _EVERY and self._done < self._total):
      return
    self._last_line = now
    head = f"{self._stage} {self._done}/{self._total}"
    results, costs = _parts(RESULTS, metrics), _parts(COSTS, metrics)
    left = f"{duration(self.left)} left" if self._done < self._total else "done"
    if not self._console.is_terminal:
      line = " | ".join([head, *(f"{label} {text}" for label, text, _ in results + costs), left])
      tqdm.write(line, file=sys.stdout)
      sys.stdout.flush()
      return
    with self._console.capture() as captured:
      self._console.print(_line((head, "bold cyan"), results), _line(("   " + left, "magenta"), costs, dim=True),
                          sep="\n", soft_wrap=True)
    tqdm.write(captured.get().rstrip("\n"), file=sys.stdout)  # which moves the bar out of the way


def _parts(rows: Sequence[tuple[str, str, str]], metrics: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
  """(label, value, alarm) of the metrics that this step has."""
  out = []
  for label, name, form in rows:
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
      continue
    text = (f"{100 * value:.0f} %" if form == "%" else duration(value) if form == "s" else format(float(value), form))
    out.append((label, text, name in ALARMS and ALARMS[name](value)))
  return out


def _line(head: tuple[str, str], parts: Sequence[tuple[str, str, bool]], dim: bool = False) -> Text:
  line = Text.assemble(head)
  for label, text, alarm in parts:
    line.append(f"  {label} ", style="dim")
    line.append(text, style="bold red" if alarm else "dim" if dim else "bold green")
  return line


@contextlib.contextmanager
def profiled(step: int, steps: Sequence[int], folder: epath.Path) -> Iterator[None]:
  """Traces a step with jax.profiler if it is one of `steps`, into folder/profile/step_NNNNNN (TensorBoard's profile
  plugin and Perfetto read it). Host and devices are traced, each process by itself."""
  if step not in steps:
    yield
    return
  with jax.profiler.trace(str(folder / "profile" / f"step_{step:06d}")):
    yield
