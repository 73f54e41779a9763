"""The line a step, the time left, and the profiler."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from axpo_jax.stages import progress
from axpo_jax.stages.summary import duration

METRICS = {"rollout/reward_mean": 0.4321, "rollout/tool_attempt_rate": 0.61, "time/step_s": 34.2, "time/mfu": 0.38,
           "rollout/tool_success_rate": float("nan"), "train/other": 1.0}


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def stage(total, done=0, **options):
  clock = Clock()
  return progress.Progress("axpo", total, done, clock=clock, **options), clock


def test_time_left_is_the_pace_of_the_last_steps():
  shown, clock = stage(100)
  clock.now += 300  # the first step compiles
  assert shown.step(1) == {"time/left_s": 300 * 99}
  for number in range(2, 41):
    clock.now += 10
    left = shown.step(number)["time/left_s"]
  assert left == pytest.approx(10 * 60)  # the first is forgotten


def test_a_file_gets_plain_lines(capsys):
  shown, clock = stage(3)
  for number in (1, 2, 3):  # the second comes too soon after the first
    clock.now += 1
    shown.step(number)
    shown.show(METRICS)
  first, last = capsys.readouterr().out.splitlines()
  assert first == "axpo 1/3 | reward 0.432 | tools 61 % | step 34 s | MFU 38 % | 2.0 s left"
  assert last.startswith("axpo 3/3") and last.endswith("done")


def test_a_terminal_gets_colours_and_alarms(capsys):
  shown, clock = stage(3)
  shown._console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
  clock.now += 1
  shown.step(1)
  shown.show({**METRICS, "rollout/tool_all_wrong_rate": 0.9, "rollout/tool_attempt_rate": 0.2})
  results, costs = capsys.readouterr().out.splitlines()
  assert "\x1b[1;31m90 %" in results and "\x1b[1;32m20 %" in results
  assert "left" in costs and "34 s" in costs


def test_other_processes_show_nothing(capsys):
  shown, _ = stage(1, shown=False)
  shown.step(1)
  shown.show(METRICS)
  assert not capsys.readouterr().out


@pytest.mark.parametrize("seconds, text", [
  (0.44, "0.4 s"), (12.3, "12 s"), (89, "89 s"), (150, "2 min"), (7500, "2 h 05 min"), (86400 * 3 + 4 * 3600, "3 d 4 h")])
def test_durations(seconds, text):
  assert duration(seconds) == text


def test_named_steps_are_traced(tmp_path):
  for step in (1, 2):
    with progress.profiled(step, (2,), tmp_path):
      jax.block_until_ready(jnp.ones(4) * step)
  assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step_000002"]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
