"""What collecting ahead saves when tools are slow: staleness 1 against staleness 0, in one run.

  python benchmarks/overlap.py --policy runs/axpo_tiny/sft/policy [--steps 6]

Every zoom takes two more seconds, as a search would. The number of questions a step is chosen so that
an update takes as long as the rollouts do; then the same steps run strictly in turn and one step
ahead, after a round that compiles. The learning rate is 0, so that all rounds do the same work, and
trajectories are trained as plain rows, so that few rollouts (whose sampling needs the same cores) make
a long update. The policy must be one that calls tools: what SFT leaves behind does.

Prints seconds a step (median, smallest and largest) and the ratio of the medians. Aim: at most 0.65.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import pathlib
import platform
import statistics
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from axpo_jax.agent.tools.base import EpisodeState, Observation, ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.train import build
from axpo_jax.train.ahead import Ahead
from axpo_jax.train.rl import Loop
from configs import axpo_tiny

TOOL_SECONDS = 2.0
FIRST_QUESTIONS, MOST_QUESTIONS = 4, 64


class SlowZoom(ImageZoomIn):
  """The zoom tool behind a slow line."""

  waits = True
  max_concurrent = 4096

  async def run(self, arguments: dict, episode: EpisodeState) -> Observation:
    await asyncio.sleep(TOOL_SECONDS)
    return await super().run(arguments, episode)


def main() -> None:
  args = _arguments()
  config = axpo_tiny.get_config()
  config.model.checkpoint = args.policy
  config.optimizer.learning_rate = 0.0
  config.batch.share_prefixes = False
  print(f"machine   {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start")
  print(f"sizes     a tool call takes {TOOL_SECONDS:g} s; {args.steps} steps of each\n", flush=True)
  with asyncio.Runner() as runner:
    config.rl.questions = args.questions or _balanced(runner, config)
    loop = _loop(config)
    runner.run(_steps(loop, args.steps, staleness=0))
    seconds = {}
    for staleness in (0, 1):
      lines = runner.run(_steps(loop, args.steps, staleness=staleness))
      _print_phases(staleness, config, lines)
      seconds[staleness] = statistics.median(line["time/step_s"] for line in lines)
    runner.run(loop.engine.close())
  print(f"staleness 1 / staleness 0: {seconds[1] / seconds[0]:.2f}   aim <= 0.65")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--policy", required=True, help=(
    "folder in Hugging Face layout of a policy that calls tools, such as a run's sft/policy"))
  parser.add_argument("--steps", type=int, default=6)
  parser.add_argument("--questions", type=int, default=0, help=(
    "questions a step; 0 chooses them so that rollouts and update take equally long"))
  args = parser.parse_args()
  if not (pathlib.Path(args.policy) / "config.json").exists():
    parser.error(f"--policy={args.policy} is not a checkpoint folder")
  return args


def _balanced(runner: asyncio.Runner, config: ConfigDict) -> int:
  """Questions at which the update lasts as long as the rollouts.

  The rollouts' time is mostly the tool's, the update's grows with the questions: two looks, the
  second where the first one's proportion points to, each after a round that compiles.
  """
  questions = FIRST_QUESTIONS
  for _ in range(2):
    config.rl.questions = questions
    loop = _loop(config)
    for _ in range(2):
      lines = runner.run(_steps(loop, 2, staleness=0))
    runner.run(loop.engine.close())
    waited, updated = (sum(line[f"time/{phase}_s"] for line in lines) for phase in
                       ("wait", "update"))
    questions = min(max(round(questions * waited / updated), 2), MOST_QUESTIONS)
  return questions


def _loop(config: ConfigDict) -> Loop:
  bench = build.workbench(config)
  loop = Loop(config, bench, config.model.checkpoint, pathlib.Path(tempfile.gettempdir()))
  loop.actor = dataclasses.replace(loop.actor, toolbox=_slow(bench, config))
  return loop


async def _steps(loop: Loop, steps: int, *, staleness: int) -> list[dict[str, float]]:
  """The metrics of the loop's first steps, with the same questions at every call."""
  loop.questions, loop.steps_done = build.question_batches(loop.config), 0
  ahead = Ahead(loop.collect, 0, steps)

  def collected():
    ahead.allow(loop.steps_done + staleness)
    return ahead.next()

  lines = [(await loop.step(collected))[1] for _ in range(steps)]
  await ahead.close()
  return lines


def _slow(bench: build.Workbench, config: ConfigDict) -> ToolBox:
  limits = build.ImageLimits(config.images.zoom_min_pixels, config.images.zoom_max_pixels)
  return ToolBox([SlowZoom(limits, factor=bench.processor.factor)],
                 frozenset(config.agent.scopes), describe=config.agent.describe_tools)


def _print_phases(staleness: int, config: ConfigDict, lines: list[dict[str, float]]) -> None:
  def spread(name):
    values = [line[name] for line in lines]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

  print(f"staleness {staleness}, {config.rl.questions} questions x {config.rl.num_rollouts} "
        f"rollouts: step {spread('time/step_s')} s; rollouts {spread('time/rollout_s')}, "
        f"continuations {spread('time/resample_s')}, update {spread('time/update_s')}, waited "
        f"{spread('time/wait_s')}; tools in {spread('rollout/tool_attempt_rate')} of the rollouts; "
        f"lag {spread('rollout/lag_mean')}", flush=True)


if __name__ == "__main__":
  main()
