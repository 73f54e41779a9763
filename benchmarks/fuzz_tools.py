"""Fuzzes the call parser and every tool's arguments, guided by coverage; no exception may get out.

    pip install atheris
    python benchmarks/fuzz_tools.py --count 1000000

An exception ends the run with its input. The python tool runs real kernels: what libFuzzer invents is
run as code. Use `--isolation rlimits` only on a machine that may be harmed.
"""

import argparse
import asyncio
import contextlib
import sys
import time

import atheris

with atheris.instrument_imports(include=["axpo_jax.agent"]):
  from axpo_jax.agent import parse
  from axpo_jax.agent.tools import arguments, search, zoom
  from axpo_jax.agent.tools.base import EpisodeState, Observation, ToolBox

import PIL.Image

from axpo_jax.agent.tools.corpus import Document, LocalSearch
from axpo_jax.agent.tools.kernels import KernelConfig
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.model.images import ImageLimits

SPECIAL = parse.SpecialIds(image_pad=1, video_pad=2, im_start=3, im_end=4, endoftext=5, think_end=6,
                           tool_call=7, tool_call_end=8)
NAMES = ("image_zoom_in", "image_zoom_in_tool", "tavily-search", "python", "nothing")
KEYS = ("bbox_2d", "bbox", "label", "img_idx", "query", "max_results", "code", "timeout")


class Fuzzer:
  """Turns bytes into calls and makes them."""

  def __init__(self, isolation: str, python_share: float):
    self.loop = asyncio.new_event_loop()
    self.python = PythonTool(KernelConfig(isolation=isolation, memory_mb=1024))
    self.box = ToolBox(
      [zoom.ImageZoomIn(ImageLimits(32 * 32, 64 * 64), factor=16), self.python,
       search.SearchTool(LocalSearch([Document("Kites", "A kite is a bird.")]))],
      ("read_image", "network", "execute"))
    self.state = EpisodeState("q", [PIL.Image.new("RGB", (80, 60), (9, 9, 9))])
    self.python_every = round(1 / python_share) if python_share else 0
    self.inputs, self.python_calls, self.outcomes = 0, 0, {}

  def __call__(self, data: bytes) -> None:
    self.inputs += 1
    given = atheris.FuzzedDataProvider(data)
    kind = given.ConsumeIntInRange(0, 3)
    if kind == 0:
      self.text(given.ConsumeUnicode(200))
    elif kind == 1:
      ids = [given.ConsumeIntInRange(0, 12) for _ in range(given.ConsumeIntInRange(0, 60))]
      parse.parse_turn(ids, SPECIAL, lambda ids: "".join(chr(60 + i) for i in ids))
    else:
      count = given.ConsumeIntInRange(0, 4)
      self.call(given.PickValueInList(list(NAMES)),
                {given.PickValueInList(list(KEYS)): value(given, 3) for _ in range(count)})

  def text(self, text: str) -> None:
    call = parse.parse_call(text)
    if isinstance(call, parse.ToolCall):
      self.call(call.name, call.arguments)
    else:
      self.seen(self.box.reject(call, self.state))

  def call(self, name: str, given: dict) -> None:
    if name == "python":
      self.python_calls += 1
      if not self.python_every or self.python_calls % self.python_every:
        with contextlib.suppress(arguments.ArgumentError):
          self.python.check(given)  # the arguments alone: a kernel takes a thousand times as long
        return
      given.setdefault("timeout", 1)
    self.seen(self.loop.run_until_complete(self.box.call(name, given, self.state)))

  def seen(self, observation: Observation) -> None:
    observation.text.encode()
    self.outcomes[observation.error] = self.outcomes.get(observation.error, 0) + 1


def value(given: atheris.FuzzedDataProvider, depth: int):
  """Any JSON value."""
  kind = given.ConsumeIntInRange(0, 7 if depth else 5)
  if kind == 6:
    return [value(given, depth - 1) for _ in range(given.ConsumeIntInRange(0, 5))]
  if kind == 7:
    return {given.ConsumeUnicode(5): value(given, depth - 1)
            for _ in range(given.ConsumeIntInRange(0, 3))}
  return (None, given.ConsumeBool(), given.ConsumeInt(9), given.ConsumeFloat(),
          given.ConsumeUnicode(30), given.ConsumeIntInRange(-2000, 2000))[kind]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--count", type=int, default=1_000_000, help="inputs")
  parser.add_argument("--isolation", default="namespaces", choices=["namespaces", "rlimits"])
  parser.add_argument("--python_share", type=float, default=0.01,
                      help="of the python calls that really run")
  options = parser.parse_args()
  fuzzer, begin = Fuzzer(options.isolation, options.python_share), time.perf_counter()

  def one_input(data: bytes) -> None:
    fuzzer(data)
    if fuzzer.inputs == options.count:  # libFuzzer ends the process without returning here
      seconds = time.perf_counter() - begin
      print(f"{fuzzer.inputs:,} inputs in {seconds:.0f} s, no exception. Observations by kind:")
      for kind, count in sorted(fuzzer.outcomes.items(), key=lambda item: -item[1]):
        print(f"  {kind or 'ok':15} {count:,}")
      sys.stdout.flush()

  atheris.Setup([sys.argv[0], f"-runs={options.count}", "-verbosity=0", "-timeout=60",
                 "-max_len=400"], one_input)
  atheris.Fuzz()


if __name__ == "__main__":
  main()
