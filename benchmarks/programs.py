"""How many programs a run compiles: realistic steps are packed, and their batches' shapes counted.

  python benchmarks/programs.py

60 steps of 128 questions x 8 rollouts with continuations of a budget of r = 0.25 and K = 4, as
`configs/axpo_8b.py` has them on 8 GPUs, and of 16 x 8 as `configs/axpo_tiny.py` has them on one CPU.
Lengths are log-normal, images and crops vary in size (a twentieth of the 8B questions shows a 4K
picture), and how many rollouts call a tool varies from step to step. Nothing is compiled: a program is
compiled once for every shape of a batch (`accumulate`, and `score` for the reference), so the shapes
are what counts. "fill" is the share of computed places that hold something; the rest is padding.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from ml_collections import ConfigDict

from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.images import PatchFormat, ProcessedImage
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.vision_inputs import mrope_positions
from axpo_jax.stages import learners
from axpo_jax.train.batch import Batch, packing_metrics, shape_of
from axpo_jax.train.packing import Example, pack
from configs import axpo_8b, axpo_tiny

N, K, RATIO = 8, 4, 0.25
Draw = Callable[[np.random.Generator], float]


@dataclasses.dataclass(frozen=True)
class Workload:
  """What the trajectories of a config are like. Tokens, and pixels before they are resized.

  Attributes:
    tool_rate: share of rollouts with a call, drawn anew for every step.
    crop: part of an image's pixels that a call shows.
  """

  prompt: Draw
  image: Draw
  think: Draw
  answer: Draw
  observed: int
  tool_rate: Draw
  crop: Draw
  turns: int


def _log_normal(median: float, sigma: float) -> Draw:
  return lambda rng: median * np.exp(sigma * rng.normal())


WORKLOADS = {
  "8b": Workload(
    prompt=_log_normal(250, 0.4), think=_log_normal(700, 0.7), answer=_log_normal(250, 0.5),
    image=lambda rng: 8.3e6 if rng.random() < 0.05 else 6e5 * np.exp(0.8 * rng.normal()),
    observed=60, tool_rate=lambda rng: rng.uniform(0.3, 0.8), crop=lambda rng: rng.uniform(0.02, 0.5),
    turns=3),
  "tiny": Workload(
    prompt=_log_normal(60, 0.2), think=_log_normal(25, 0.4), answer=_log_normal(12, 0.3),
    image=lambda rng: 6400, observed=20, tool_rate=lambda rng: rng.uniform(0.2, 0.8),
    crop=lambda rng: rng.uniform(0.1, 0.3), turns=2),
}


def main() -> None:
  args = _arguments()
  print(f"{args.steps} steps\n\n"
        "| config | attention | programs | shapes (steps) | fill: rows | targets | patches |\n"
        "|---|---|---|---|---|---|---|")
  for name, module, preset, shape, backends in (
      ("tiny", axpo_tiny, "tiny", {"data": 1}, ("xla",)),
      ("8b", axpo_8b, "8b", {"fsdp": 8}, ("xla", "gpu"))):
    config = module.get_config()
    mesh = sharding.make_mesh(shape, jax.devices()[:np.prod(list(shape.values()))])
    found = {backend: Counted() for backend in backends}
    start = time.perf_counter()
    for examples in steps(args.steps, WORKLOADS[name], config, PRESETS[preset]):
      for backend, counted in found.items():
        model = dataclasses.replace(PRESETS[preset], attention=backend)
        counted.add(packed(examples, config, model, mesh), examples)
    for backend, counted in found.items():
      print(f"| {name} | {backend} | {counted.row()} |", flush=True)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=60)
  args = parser.parse_args()
  if args.steps < 1:
    parser.error(f"--steps={args.steps} must be positive")
  return args


class Counted:
  """Shapes and fill of the batches of many steps."""

  def __init__(self):
    self.shapes, self.fill = collections.Counter(), collections.defaultdict(list)

  def add(self, batches: Sequence[Batch], examples: Sequence[Example]) -> None:
    self.shapes[shape_of(batches[0])] += 1
    metrics = packing_metrics(batches, examples)
    for name in ("pack/fill", "pack/target_fill", "pack/vision_fill"):
      self.fill[name].append(metrics[name])

  def row(self) -> str:
    shapes = "; ".join(f"{shape} ({count})" for shape, count in self.shapes.most_common())
    means = " | ".join(f"{np.mean(values):.2f}" for values in self.fill.values())
    return f"{len(self.shapes)} | {shapes} | {means}"


def packed(examples: Sequence[Example], config: ConfigDict, model: ModelConfig,
           mesh: jax.sharding.Mesh) -> list[Batch]:
  """The micro-batches of a step, with patches of one pixel in the place of the model's."""
  options = learners.pack_options(config, model, mesh)
  return pack(examples, **options | {"vision_config": dataclasses.replace(model.vision, patch_size=1)})


# The steps' trajectories -----------------------------------------------------------------------


def steps(count: int, work: Workload, config: ConfigDict, model: ModelConfig
          ) -> Iterator[list[Example]]:
  """The trajectories of `count` steps, with continuations of their first prefixes."""
  questions = config.rl.questions
  for step in range(count):
    rng = np.random.default_rng(step)
    tool_rate, served, made = work.tool_rate(rng), int(RATIO * questions * N / K), []
    for _ in range(questions):
      pixels = work.image(rng)
      prompt = [_words(rng, work.prompt(rng)), _image(rng, pixels, model, *_limits(config, ""))]
      thinks = [_words(rng, work.think(rng)) for _ in range(N)]
      tools = rng.random(N) < tool_rate

      acts = functools.partial(_acts, rng, work, pixels, config, model)
      parts = [[*prompt, think, *(acts() if tool else ()), _words(rng, work.answer(rng))]
               for think, tool in zip(thinks, tools)]
      made += [_example(p, config, model, learnt_from=2) for p in parts]
      if tools.any() and served:
        served -= 1
        beginning = parts[int(tools.argmax())][:3]
        made += [_example([*beginning, *acts(), _words(rng, work.answer(rng))], config, model,
                          learnt_from=3) for _ in range(K)]
    yield made


def _limits(config: ConfigDict, kind: str) -> tuple[int, int]:
  return config.images[f"{kind}min_pixels"], config.images[f"{kind}max_pixels"]


def _acts(rng, work: Workload, pixels: float, config: ConfigDict, model: ModelConfig) -> list:
  """A call or two: what is observed, with a crop, and the thinking behind it."""
  turns = []
  for _ in range(int(rng.integers(1, work.turns))):
    crop = _image(rng, pixels * work.crop(rng), model, *_limits(config, "zoom_"))
    turns += [_words(rng, work.observed), crop, _words(rng, work.think(rng))]
  return turns


def _words(rng, count: float) -> np.ndarray:
  return rng.integers(10, 1000, max(int(count), 1))


def _image(rng, pixels: float, model: ModelConfig, least: int, most: int) -> ProcessedImage:
  """One pixel a patch, as many as the model's processor would make of a picture of this size."""
  factor = model.vision.spatial_merge_size
  patches = min(max(pixels, least), most) / model.vision.patch_size**2
  wide = rng.uniform(0.6, 1.6)
  height = max(int((patches / wide) ** 0.5) // factor, 1) * factor
  width = max(int(patches / height) // factor, 1) * factor
  form = dataclasses.replace(FORMAT, merge_size=factor)
  return ProcessedImage((width, height), str(rng.integers(2**60)), form, None)


FORMAT = PatchFormat(1, 2, 2, (0.5,) * 3, (0.5,) * 3)


def _example(parts: Sequence, config: ConfigDict, model: ModelConfig, learnt_from: int) -> Example:
  """Prompt, image, then what the policy says and sees in turn; cut where the config ends an episode."""
  images = [part for part in parts if isinstance(part, ProcessedImage)]
  shown = [isinstance(part, ProcessedImage) for part in parts]
  sizes = [part.num_tokens if image else len(part) for part, image in zip(parts, shown)]
  most = config.agent.max_total_tokens
  number = np.repeat(np.where(shown, np.cumsum(shown) - 1, -1), sizes)
  ids = np.concatenate([np.full(size, model.image_token_id) if image else part
                        for part, size, image in zip(parts, sizes, shown)])
  # Everything but prompt, images and observations, which stand before a crop.
  learnt = [i >= learnt_from and not shown[i] and not (i + 1 < len(parts) and shown[i + 1])
            for i in range(len(parts))]
  positions = mrope_positions(ids, [image.merged_hw for image in images], model.image_token_id)
  fields = {"ids_T": ids, "positions_Tx3": positions, "image_T": number,
            "image_offset_T": np.concatenate([np.arange(size) for size in sizes]),
            "loss_mask_T": np.repeat(learnt, sizes), "advantages_T": np.ones(len(ids), np.float32),
            "behaviour_logp_T": np.zeros(len(ids), np.float32)}
  return Example(images=tuple(images), **{name: x[:most] for name, x in fields.items()})


if __name__ == "__main__":
  main()
