"""What collecting ahead saves when tools are slow: staleness 1 against staleness 0, in one run.

  python benchmarks/overlap.py --policy runs/axpo_tiny/sft/policy [--steps 6] [--passes 4]

Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `launch/main.py` does for itself: trainer and sampler share
one allocator.

Every tool call takes two more seconds. A step trains on its trajectories as many times as take as long
as its rollouts and continuations, within 10 %; then the same steps run strictly in turn and one step
ahead. The learning rate is 0, so that all rounds do the same work, and trajectories are trained as
plain rows. A step has few questions, so that collecting is mostly waiting, as it is for whoever
samples on other machines: here both sides share the cores. The policy must be one that calls tools: what
SFT leaves behind does.

A step is timed from the end of the one before; the first of each round, which nothing precedes, is left
out. Prints seconds a step (mean, smallest and largest), how they divide, and the ratio of the means. Aim:
at most 0.65.
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
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax.agent.tools.base import EpisodeState, Observation, Tool, ToolBox
from axpo_jax.rollouts.groups import Group
from axpo_jax.rollouts.prefetch import Prefetch
from axpo_jax.stages.context import run_context
from axpo_jax.stages.questions import question_batches
from axpo_jax.stages.rl import Collected, Loop
from configs import axpo_tiny

TOOL_SECONDS = 2.0
TOLERANCE, LOOKS = 0.1, 8
PHASES = ("weights", "wait", "update")

Update = Callable[[list[Group]], dict[str, float]]


def main() -> None:
  args = _arguments()
  print(f"machine   {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; a tool call takes {TOOL_SECONDS:g} s", flush=True)
  with asyncio.Runner() as runner:
    loop = _loop(args)
    collected = runner.run(_collect(loop, args.steps + 1))
    for batch in collected:  # compiles
      loop.update(batch.groups)
    passes = args.passes or _balance(loop, collected)
    loop.update = _repeated(loop.update, passes)
    seconds = {s: _round(runner, loop, args.steps, s) for s in (0, 1)}
    runner.run(loop.engine.close())
  print(f"staleness 1 / staleness 0: {seconds[1] / seconds[0]:.2f}   aim <= 0.65")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--policy", required=True, help=(
    "folder in Hugging Face layout of a policy that calls tools, such as a run's sft/policy"))
  parser.add_argument("--steps", type=int, default=6)
  parser.add_argument("--questions", type=int, default=4, help="questions a step")
  parser.add_argument("--passes", type=int, default=0, help=(
    "times that a step trains on its trajectories; 0 chooses them so that this takes as long as collecting"))
  args = parser.parse_args()
  if not (pathlib.Path(args.policy) / "config.json").exists():
    parser.error(f"--policy={args.policy} is not a checkpoint folder")
  return args


def _loop(args: argparse.Namespace) -> Loop:
  config = axpo_tiny.get_config()
  config.model.checkpoint = args.policy
  config.data.miniworld.families.update(reasoning=0.0)  # python calls would take the cores
  # A turn is one block, so that rollouts which waited alike go on together: in turns that end one by
  # one, sampling would take most of the cores. Few shapes, so that none is left to compile meanwhile.
  with config.unlocked():
    config.rollout.embedded.update(
      decode_block=config.agent.max_new_tokens, min_batch=32, min_tokens=128, min_slots=512)
  config.optimizer.learning_rate = 0.0
  config.batch.share_prefixes = False
  config.rl.questions = args.questions
  context = run_context(config)
  loop = Loop(config, context, config.model.checkpoint, pathlib.Path(tempfile.gettempdir()))
  slow = ToolBox(map(_slowed, loop.actor.toolbox.tools), config.agent.scopes,
                 describe=config.agent.describe_tools)
  loop.actor = dataclasses.replace(loop.actor, toolbox=slow)
  return loop


def _slowed(tool: Tool) -> Tool:
  """The tool behind a slow line."""
  run = tool.run

  async def late(arguments: dict, episode: EpisodeState) -> Observation:
    await asyncio.sleep(TOOL_SECONDS)
    return await run(arguments, episode)

  tool.run, tool.waits, tool.max_concurrent = late, True, 4096
  return tool


async def _collect(loop: Loop, steps: int) -> list[Collected]:
  """The rollouts of the first steps; then again, now that all is compiled, and timed."""
  for _ in range(2):
    _rewind(loop)
    cpu = time.process_time()
    collected = []
    for step in range(steps):
      await loop.sync()
      collected.append(await loop.collect(step))
  cpu = (time.process_time() - cpu) / steps
  print(f"collecting alone: {_spread(map(_collecting, collected))} s, of which {cpu:.2f} s of CPU; tools in "
        f"{_spread(batch.metrics['rollout/tool_attempt_rate'] for batch in collected)} of the rollouts",
        flush=True)
  return collected


def _balance(loop: Loop, collected: Sequence[Collected]) -> int:
  """How often to train on a step's trajectories, so that it lasts as long as collecting them."""
  wanted = statistics.mean(map(_collecting, collected))
  passes = 1
  for _ in range(LOOKS):
    update = _repeated(loop.update, passes)
    begin = time.perf_counter()
    for batch in collected:
      update(batch.groups)
    found = (time.perf_counter() - begin) / len(collected)
    print(f"updates of {passes} passes alone: {found:.2f} s", flush=True)
    if abs(found / wanted - 1) <= TOLERANCE:
      return passes
    before, passes = passes, max(round(passes * wanted / found), 1)
    if passes == before:
      break
  sys.exit(f"{passes} passes take {found:.2f} s, collecting {wanted:.2f} s: try other --questions")


def _repeated(update: Update, passes: int) -> Update:
  """An update that trains on the groups so many times, each time as a step does."""

  def repeated(groups: list[Group]) -> dict[str, float]:
    for _ in range(passes):
      metrics = update(groups)
    return metrics

  return repeated


def _collecting(batch: Collected) -> float:
  return batch.metrics["time/rollout_s"] + batch.metrics["time/resample_s"]


def _rewind(loop: Loop) -> None:
  """The next steps have the same questions and seeds again."""
  loop.questions, loop.steps_done = question_batches(loop.config), 0


def _round(runner: asyncio.Runner, loop: Loop, steps: int, staleness: int) -> float:
  """Mean seconds of a step, of so many behind the first; prints how they divide."""
  _rewind(loop)
  compiled = loop.engine.stats().compilations
  lines = runner.run(_steps(loop, steps + 1, staleness))[1:]
  compiled = loop.engine.stats().compilations - compiled
  seconds = [line["seconds"] for line in lines]

  def phase(name):
    return f"{name} {_spread(line[f'time/{name}_s'] for line in lines)}"

  print(f"staleness {staleness}, {loop.config.rl.questions} questions x {loop.config.rl.num_rollouts} "
        f"rollouts: step {_spread(seconds)} s; "
        f"{', '.join(map(phase, PHASES))}; collecting "
        f"{_spread(line['time/rollout_s'] + line['time/resample_s'] for line in lines)}, "
        f"{sum(line['axpo/prefixes'] for line in lines):.0f} prefixes; lag "
        f"{_spread(line['rollout/lag_mean'] for line in lines)}; {compiled} programs compiled",
        flush=True)
  return statistics.mean(seconds)


async def _steps(loop: Loop, steps: int, staleness: int) -> list[dict[str, float]]:
  """Metrics of the first steps, with the seconds since the step before. While the last one is
  trained, the next is collected as ever."""
  ahead = Prefetch(loop.collect, 0, steps + staleness)

  def collected():
    ahead.allow(loop.steps_done + staleness)
    return ahead.next()

  lines, last = [], time.perf_counter()
  for _ in range(steps):
    _, metrics = await loop.step(collected)
    now = time.perf_counter()
    lines.append(metrics | {"seconds": now - last})
    last = now
  await ahead.close()
  return lines


def _spread(values) -> str:
  values = list(values)
  return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
  main()
