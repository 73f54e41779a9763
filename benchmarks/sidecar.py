"""What a real SGLang server gives: agreement, cached prefixes, speed, and what pushes cost.

  python benchmarks/sidecar.py [--policy runs/axpo_tiny/sft/policy] [--urls http://...] [--steps 2]
                               [--push_dtype bfloat16 --learning_rate 1e-6]

Starts a CPU server unless `--urls` names servers that run, then makes a few steps of the miniature's
AXPO job with them. Prints

  gap      |log-prob of the server - log-prob of the trainer|, mean and max over the step's sampled tokens.
           Aim: mean below 2e-3 in float32
  prefix   share of frozen prefixes' tokens, images included, that came from the server's cache: of
           prefixes cut here in half a turn, and of those that AXPO chose, if it chose any. Aim: 95 %
  speed    sampled tokens a second over rollouts and continuations, tools and waiting included
  push     seconds from `update_weights` to the first server in; what was written, and its share of a whole
           push. Aim: 3 % in bfloat16 at RL's learning rate

The server's speed on a CPU says nothing about GPUs, and on a busy machine little about CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import platform
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax import seeds
from axpo_jax.rollouts import collect
from axpo_jax.stages import engines
from axpo_jax.stages.context import run_context
from axpo_jax.stages.rl import Loop
from configs import axpo_tiny

CONTINUATIONS = 4


def main() -> None:
  args = _arguments()
  config = axpo_tiny.get_config()
  config.rollout.engine = "sglang"
  config.rollout.urls = tuple(args.urls)
  config.rollout.sglang.push_dtype = args.push_dtype
  config.optimizer.learning_rate = args.learning_rate or config.optimizer.learning_rate
  config.model.checkpoint = args.policy or config.model.checkpoint
  print(f"machine   {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; policy {config.model.checkpoint}")
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    context = run_context(config)
    begin = time.perf_counter()
    with engines.servers(config, config.model.checkpoint, folder) as urls:
      print(f"servers   {' '.join(urls)}, up after {time.perf_counter() - begin:.0f} s")
      loop = Loop(config, context, config.model.checkpoint, folder, urls)
      with asyncio.Runner() as runner:
        try:
          runner.run(_measure(loop, args.steps))
        finally:
          runner.run(loop.engine.close())


async def _measure(loop: Loop, steps: int) -> None:
  await _push(loop, "first")
  await _push(loop, "same again")
  await _prefixes(loop)
  for step in range(steps):
    _, metrics = await loop.step(lambda step=step: loop.collect(step))
    # The first step's rollouts are drawn from the weights of the checkpoint: no update in between.
    print(f"gap       step {step}: mean {metrics['train/logp_gap_abs_mean']:.2e}, max "
          f"{metrics['train/logp_gap_abs_max']:.2e}")
    print(f"speed     step {step}: {metrics['time/sampled_tokens_per_s']:.0f} tokens/s, "
          f"{metrics['engine/cached_tokens'] / metrics['engine/prompt_tokens']:.1%} of all prompt "
          f"tokens cached, {metrics['rollout/failed']:.0f} rollouts failed")
    if metrics["axpo/prefixes"]:
      print(f"prefix    step {step}: {metrics['axpo/prefix_cached_share']:.1%} of "
            f"{metrics['axpo/prefixes']:.0f} prefixes that AXPO chose")
    await _push(loop, f"after step {step}")
  print(f"fleet     {loop.engine.gauges()}")


async def _push(loop: Loop, what: str) -> None:
  begin = time.perf_counter()
  await loop.sync()
  seconds, push = time.perf_counter() - begin, loop.engine.last_push
  whole = push.after(None)[0].bytes_written
  print(f"push      {what}: {seconds:.2f} s, of which {push.seconds:.2f} s writing {push.bytes_written / 1e6:.3f} MB, "
        f"{push.bytes_written / whole:.2%} of a whole push; {len(push.changed or ())} tensors changed")


async def _prefixes(loop: Loop) -> None:
  """Freezes half of a turn of some rollouts, and samples how they go on."""
  actor, questions = loop.actor, next(loop.questions)
  groups = await collect.sample_groups(actor, questions, 1, seeds.derive(0, "prefixes"))
  episodes = []
  for number, group in enumerate(groups):
    for source in group.rollouts:
      start, stop = source.transcript.turns[-1]
      if stop - start < 2:
        continue
      cut = source.transcript.cut((start + stop) // 2)
      episodes += [actor.roll(cut, group.question, seeds.derive(number, "k", k))
                   for k in range(CONTINUATIONS)]
  done = [rollout for rollout in await asyncio.gather(*episodes) if not rollout.failed]
  prompt = sum(rollout.first_prompt_tokens for rollout in done)
  cached = sum(rollout.first_cached_tokens for rollout in done)
  print(f"prefix    {cached / prompt:.1%} of {len(done)} x {prompt / len(done):.0f} tokens, images "
        "included")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--policy", default="", help="checkpoint folder; default: the warm start")
  parser.add_argument("--urls", nargs="*", default=[], help="servers that run already")
  parser.add_argument("--push_dtype", default="float32", help="or bfloat16, as GPUs would get it")
  parser.add_argument("--learning_rate", type=float, help="default: that of axpo_tiny")
  parser.add_argument("--steps", type=int, default=2)
  return parser.parse_args()


if __name__ == "__main__":
  main()
