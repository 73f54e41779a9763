"""Speed of the python tool under load: many episodes at once, against a fresh interpreter a call.

    python benchmarks/tools.py --episodes 64 --calls 5

Every episode makes its calls one after the other, all episodes at once, as in a rollout. Sides, all
with the same cells, one after the other, `--rounds` times; the median round is reported:
  ours       one kernel an episode, from the warm pool; the first call includes getting it
  steady     ours, as many episodes as there are cores, 100 calls each: nobody waits for a core
  fresh      `python -c` a call that imports what the kernels have loaded (numpy, scipy, sympy, PIL,
             matplotlib) and runs the cell: the same facilities, but no state and no sandbox
  bare       `python -c` a call with no import at all: the least a fresh interpreter can take
At most as many calls of a side run at once as there are cores. Ours wait for their turn within the
time that is reported, as episodes do. The last two make `--fresh_calls` calls, two at a time on two
cores and nobody waiting, which is the best that they can look.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import time

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig
from axpo_jax.agent.tools.python import PythonTool

IMPORTS = ("import numpy, scipy, sympy, PIL.Image, matplotlib; matplotlib.use('Agg'); "
           "import matplotlib.pyplot")
CELL = "total = sum(i * i for i in range(1000)); print(total)"
EXPECTED = str(sum(i * i for i in range(1000)))


class Ours:
  """Calls through the tool box, as the loop makes them."""

  def __init__(self, box: ToolBox):
    self.box = box

  async def episode(self, calls: int, seconds: list[float]) -> None:
    state = EpisodeState("q", [])
    try:
      for _ in range(calls):
        begin = time.perf_counter()
        seen = await self.box.call("python", {"code": CELL}, state)
        seconds.append(time.perf_counter() - begin)
        assert seen.text == EXPECTED, seen
    finally:
      self.box.end_episode(state)


class Interpreter:
  """A new process a call."""

  def __init__(self, setup: str):
    self.code = f"{setup}\n{CELL}"

  async def episode(self, calls: int, seconds: list[float]) -> None:
    for _ in range(calls):
      begin = time.perf_counter()
      process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", self.code, stdout=asyncio.subprocess.PIPE)
      out, _ = await process.communicate()
      seconds.append(time.perf_counter() - begin)
      assert out.decode().strip() == EXPECTED, out


def cores() -> int:
  return len(os.sched_getaffinity(0))


def measure(side, episodes: int, calls: int) -> tuple[float, float, float]:
  """(median seconds of a call, its 95th percentile, calls a second)."""
  seconds: list[float] = []

  async def main():
    await asyncio.gather(*(side.episode(calls, seconds) for _ in range(episodes)))

  begin = time.perf_counter()
  asyncio.run(main())
  rate = len(seconds) / (time.perf_counter() - begin)
  return statistics.median(seconds), sorted(seconds)[int(0.95 * len(seconds))], rate


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--episodes", type=int, default=64, help="at once")
  parser.add_argument("--calls", type=int, default=5, help="of an episode")
  parser.add_argument("--fresh_calls", type=int, default=16, help="of fresh interpreters, in all")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--isolation", default="namespaces", choices=["namespaces", "rlimits"])
  options = parser.parse_args()
  tool = PythonTool(KernelConfig(isolation=options.isolation, warm=8))
  begin = time.perf_counter()
  tool.start()
  print(f"{cores()} cores, load {os.getloadavg()[0]:.1f}; the sandbox started in "
        f"{time.perf_counter() - begin:.1f} s, once a run")
  ours, few = Ours(ToolBox([tool], ["execute"])), -(-options.fresh_calls // cores())
  sides = {"ours": (ours, options.episodes, options.calls), "steady": (ours, cores(), 100),
           "fresh": (Interpreter(IMPORTS), cores(), few), "bare": (Interpreter(""), cores(), few)}
  measured = {name: [] for name in sides}
  with contextlib.closing(tool):
    for _ in range(options.rounds):
      for name, side in sides.items():
        measured[name].append(measure(*side))
        median, _, rate = measured[name][-1]
        print(f"  {name}: median {1e3 * median:.1f} ms, {rate:.1f} calls/s", flush=True)
  print(f"{options.episodes} episodes at once, median of {options.rounds} rounds; load now "
        f"{os.getloadavg()[0]:.1f}")
  middle = {name: [statistics.median(column) for column in zip(*rounds)]
            for name, rounds in measured.items()}
  for name, (median, tail, rate) in middle.items():
    print(f"{name:6} call: median {1e3 * median:7.1f} ms, 95 % {1e3 * tail:7.1f} ms; {rate:7.1f} "
          f"calls/s; ours make {middle['ours'][2] / rate:.1f}, steady {middle['steady'][2] / rate:.1f} "
          "times as many")


if __name__ == "__main__":
  main()
