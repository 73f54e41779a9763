"""Where the embedded engine's time goes: CPU milliseconds of each device function, of the host, of planning.

  taskset -c 1 python benchmarks/embedded.py [--repetitions 5]

`main_job.py` compares the same calls with PyTorch. CPU time of one core (`taskset`) can be compared between two
revisions even on a machine that is busy otherwise; let them take turns.

  32 x 1    32 different prompts with an image each, 64 new tokens
  4 x 8     4 prompts, 8 samples each
  top-p     as 32 x 1, drawn with top_p = 0.8
  planning  992 sequences wait for one of 256 rows, of which 128 run
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from ml_collections import ConfigDict

from axpo_jax.config import ASSETS
from axpo_jax.engine.embedded.prefix_pool import PrefixPool, Waiting, plan_wave
from axpo_jax.engine.protocol import SampleRequest
from axpo_jax.stages import actors, policies
from axpo_jax.stages.context import run_context
from axpo_jax.stages.questions import eval_questions
from benchmarks import main_job
from configs import axpo_tiny

CASES = {"32 x 1": (32, {}), "4 x 8": (4, {}), "top-p": (32, {"top_p": 0.8, "top_k": 0})}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--repetitions", type=int, default=5)
  repetitions = parser.parse_args().repetitions
  with tempfile.TemporaryDirectory() as scratch:
    config = main_job.perception(axpo_tiny.get_config())
    policy = main_job.checkpoint(config, str(ASSETS / "warm_start"), pathlib.Path(scratch))
    context = run_context(config)
    params = policies.load_params(context, policy, config.seed)
    for name, (questions, drawn) in CASES.items():
      _print(name, _phases(config, context, params, questions, drawn, repetitions))
  _print("planning", _planning(repetitions))


def _phases(config, context, params, questions, drawn, repetitions) -> dict[str, list[float]]:
  """CPU seconds by function, of every repetition; what is left over is the host's."""
  config = ConfigDict(config)
  config.eval.questions = questions
  with main_job.running_engine(config, context, params) as (engine, runner):
    actor = actors.make_actor(config, context, engine)
    starts = [actor.start(question) for question in eval_questions(config)]
    starts = [start for start in starts for _ in range(main_job.PROMPTS // questions)]
    shape = dataclasses.replace(
      actor.sampling, max_new_tokens=main_job.NEW_TOKENS, stop_ids=(), **drawn)
    requests = [
      SampleRequest(tuple(start.ids), tuple(image.shown for image in start.images), shape, (seed,))
      for seed, start in enumerate(starts)]
    spent, call = collections.Counter(), engine._device._call

    def timed(name, *args, **kwargs):
      begin = time.process_time()
      out = jax.block_until_ready(call(name, *args, **kwargs))
      spent[name] += time.process_time() - begin
      return out

    engine._device._call = timed

    async def sample():
      await asyncio.gather(*map(engine.generate, requests))

    rows = []
    for _ in range(repetitions + 2):  # the first two compile
      runner.run(engine.update_weights(params, 0))  # drops the cached prompts
      spent.clear()
      begin = time.process_time()
      runner.run(sample())
      whole = time.process_time() - begin
      rows.append({"all": whole, **spent, "host": whole - spent.total()})
  return {name: [row[name] for row in rows[2:]] for name in rows[-1]}


def _planning(repetitions: int) -> dict[str, list[float]]:
  """One row is free, in groups of 8 and without groups."""
  found = {}
  for each in (8, 1):
    rng, pool = np.random.default_rng(0), PrefixPool(256, 1024)
    prompts = [np.concatenate([np.arange(60), rng.integers(0, 1000, 140)]) for _ in range(1120 // each)]
    queue = [Waiting(prompts[i // each], i // each) for i in range(1120)]
    for one in queue[:128]:
      move = pool.acquire(one.keys_T, pool.match(one.keys_T[:-1]))
      pool.commit([(move, len(one.keys_T) - 1)])
    times = found[f"groups of {each}"] = []
    for _ in range(repetitions):
      begin = time.process_time()
      wave = plan_wave(queue[128:], pool, capacity=1, defer_gain=32)
      times.append(time.process_time() - begin)
      pool.abandon(move for _, move in wave)
  return found


def _print(name: str, spent: dict[str, list[float]]) -> None:
  cells = [f"{part} {1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f}-{1e3 * max(times):.1f})"
           for part, times in spent.items()]
  print(f"{name:9} CPU ms: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
  main()
