"""One AXPO step computed with shared prefixes against one padded row for every rollout.

  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/shared_prefix.py

The reference step: 64 questions, N = 8 rollouts each, of which `tool_rate` call a tool, and a budget of
r = 0.25 for prefixes with K = 4 continuations. A prompt has 300 tokens and an image of 1,000,
thinking 800, a call 60, its observation 340 with a crop of 300, the answer 200. The cost is linear in
the questions: `--questions 4` is a quick look. The model is scaled in width and depth, not in structure.

The other side is what trainers do without sharing: every rollout and continuation is a row of its
own, padded to the longest, its question's image encoded for it alone. It runs the same step here,
logits for targets alone included, by `share_prefixes=False`; gradients must be equal. Either side has the
`attention_chunk` that it is fastest with.

FLOPs are XLA's own count. It counts the body of a loop once, so the program that it is asked about
has its loops unrolled; the one that runs has not. Of a branch it counts the most expensive side, while
attention takes shorter lists of keys where they do: so it is asked about two lengths of lists, and the
line through both is read at the mean length that is taken. Memory is XLA's, of the program of one micro-batch:
arguments and temporaries. The machine may be busy: compare CPU seconds then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from PIL import Image

from axpo_jax.model import attention_blocks, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.images import PatchFormat, ProcessedImage
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.vision_inputs import mrope_positions
from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.resample import ResampleConfig, prefix_budget
from axpo_jax.train.batch import Batch, packing_metrics, place, targets
from axpo_jax.train.packing import Example, pack
from axpo_jax.train.state import OptimizerConfig, init_params, make_optimizer
from axpo_jax.train.step import Learner, policy_objective

N, K, RATIO = 8, 4, 0.25
PROMPT, THINK, CALL, ANSWER = 300, 800, 60, 200
OBSERVED = 20  # text before the crop, and as much behind it
IMAGE_HW, CROP_HW = (50, 80), (30, 40)  # patches; four make a token
ROW = 24_576  # tokens of a shared row, as in the paper's config; a question's tree has 10,000 to 14,000
PATCHES = (1216, 4032)
# Queries of attention at once: of those tried the fastest for each side (128 and 512; 64 to 512).
PLAIN, SHARED = "one row each", "shared"
CHUNKS = {PLAIN: 512, SHARED: 128}


def main() -> None:
  args = _arguments()
  config = _model_config()
  examples = step_examples(args.questions, args.tool_rate, config)
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  params = init_params(config, 0, mesh, sharding.DEFAULT_RULES)
  sides = {PLAIN: _packed(_unshared(examples), config, share=False),
           SHARED: _packed(examples, config, share=True)}
  _print_setting(args, config, params, examples)
  results = {}
  for name, batches in sides.items():
    learner = Learner(dataclasses.replace(config, attention_chunk=CHUNKS[name]),
                      make_optimizer(OptimizerConfig(1e-6, total_steps=1)),
                      policy_objective(LossConfig(kl_coef=0.0)), mesh, chunk=2048)
    packed = packing_metrics(batches, examples)
    results[name] = _measure(learner, params, batches, args.repetitions) | {
      "tokens": packed["pack/tokens"], "images": packed["pack/images"],
      "places": sum(batch.tokens_BxT.size for batch in batches)}
    print(f"{name}: {len(batches)} micro-batches, {results[name]['wall']:,.1f} s", flush=True)
  _print_table(*results.values())
  _check(results[SHARED], results[PLAIN])


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--questions", type=int, default=64)
  parser.add_argument("--tool_rate", type=float, default=0.3, help="share of rollouts with a call")
  parser.add_argument("--repetitions", type=int, default=1)
  args = parser.parse_args()
  if args.questions < 1 or args.repetitions < 1 or not 0 <= args.tool_rate <= 1:
    parser.error(f"{vars(args)}: counts must be positive, --tool_rate in 0..1")
  return args


def _model_config() -> ModelConfig:
  """Qwen3-VL with three text layers of 128 and one vision layer of 32, one head in each: the vision tower
  has about the share of the work that it has in the 8B model."""
  tiny = PRESETS["tiny"]
  text = dataclasses.replace(tiny.text, vocab_size=1024, hidden_size=128, intermediate_size=384,
                             num_heads=1, num_kv_heads=1)
  vision = dataclasses.replace(
    tiny.vision, depth=1, deepstack_layers=(0,), hidden_size=32, intermediate_size=128, num_heads=1,
    patch_size=4, out_hidden_size=128)
  return dataclasses.replace(tiny, text=text, vision=vision, remat="full")


# The step's trajectories -----------------------------------------------------------------------


def step_examples(questions: int, tool_rate: float, config: ModelConfig) -> list[Example]:
  """The trajectories of a step with their credit, in the order of `assign_credit`."""
  tools = np.diff(np.round(np.arange(questions + 1) * N * tool_rate)).astype(int)
  served = prefix_budget(questions * N, ResampleConfig(ratio=RATIO, k=K))
  made = []
  for q in range(questions):
    rng = np.random.default_rng(q)
    prompt = [_words(rng, PROMPT), _image(rng, IMAGE_HW, config)]
    rollouts = [[*prompt, _words(rng, THINK), *(_act(rng, config) if i < tools[q] else ()),
                 _words(rng, ANSWER)] for i in range(N)]
    # Rollouts with a call are wrong. The first one's call is sampled anew, once right.
    rewards, branches = np.eye(N)[-1], []
    if tools[q] and served:
      served, branches = served - 1, [BranchOutcome(0, np.eye(K)[0])]
    continuations = [[*rollouts[0][:3], *_act(rng, config), _words(rng, ANSWER)] for _ in range(K)]
    credits = assign_credit([GroupOutcome(rewards, branches)],
                            CreditConfig())
    made += [_example((rollouts if c.branch is None else continuations)[c.rollout], c, rng, config)
             for c in credits]
  return made


def _words(rng, count: int) -> np.ndarray:
  return rng.integers(10, 1000, count)


def _image(rng, grid_hw, config: ModelConfig) -> ProcessedImage:
  form = PatchFormat(config.vision.patch_size, config.vision.temporal_patch_size,
                     config.vision.spatial_merge_size, (0.5,) * 3, (0.5,) * 3)
  size = (*(side * form.patch_size for side in grid_hw), 3)
  return ProcessedImage.of(Image.fromarray(rng.integers(0, 256, size, np.uint8)), form)


def _act(rng, config: ModelConfig) -> list:
  return [_words(rng, CALL), _words(rng, OBSERVED), _image(rng, CROP_HW, config),
          _words(rng, OBSERVED)]


def _example(parts: Sequence, credit, rng, config: ModelConfig) -> Example:
  """Parts: prompt, image, thinking, maybe call, observation, crop, observation, then the answer."""
  images = [part for part in parts if isinstance(part, ProcessedImage)]
  shown = [isinstance(part, ProcessedImage) for part in parts]
  sizes = [part.num_tokens if image else len(part) for part, image in zip(parts, shown)]
  learnt = {"all": {2, 3, len(parts) - 1}, "prefix": {2}, "continuation": {3, len(parts) - 1}}
  mask = np.repeat([i in learnt[credit.region] for i in range(len(parts))], sizes)
  ids = np.concatenate([np.full(size, config.image_token_id) if image else part
                        for part, size, image in zip(parts, sizes, shown)])
  number = np.where(shown, np.cumsum(shown) - 1, -1)
  return Example(
    ids_T=ids, images=tuple(images), loss_mask_T=mask,
    positions_Tx3=mrope_positions(ids, [(i.grid_hw[0] // 2, i.grid_hw[1] // 2) for i in images],
                                  config.image_token_id),
    image_T=np.repeat(number, sizes),
    image_offset_T=np.concatenate([np.arange(size) for size in sizes]),
    advantages_T=np.where(mask, credit.advantage, 0).astype(np.float32),
    behaviour_logp_T=np.where(mask, -rng.uniform(5, 8, len(ids)), 0).astype(np.float32))


def _unshared(examples: Sequence[Example]) -> list[Example]:
  """The same with images that no two trajectories have in common."""
  return [dataclasses.replace(e, images=tuple(
    dataclasses.replace(image, key=f"{image.key} of {i}") for image in e.images))
    for i, e in enumerate(examples)]


def _packed(examples: Sequence[Example], config: ModelConfig, share: bool) -> list[Batch]:
  longest = -(-max(map(len, examples)) // 64) * 64
  return pack(examples, rows=1 if share else 4, length=ROW if share else longest,
              share_prefixes=share, vision_config=config.vision, patch_buckets=PATCHES,
              row_buckets=range(1, 1000))


# Measures --------------------------------------------------------------------------------------


def _measure(learner: Learner, params, batches: Sequence[Batch], repetitions: int) -> dict:
  first = place(batches[0], learner.mesh)
  start = time.perf_counter()
  program = learner._accumulate.lower(params, learner.zeros(), first).compile()
  compiled = time.perf_counter() - start

  def gradients():
    grads, loss = learner.zeros(), 0.0
    for batch in batches:
      grads, out = program(params, grads, place(batch, learner.mesh))
      loss += float(out["loss"])
    return jax.block_until_ready(grads), loss

  wall, cpu = [], []
  for _ in range(repetitions):
    start, cpu_start = time.perf_counter(), time.process_time()
    grads, loss = gradients()
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - cpu_start)
  divisor, memory = targets(batches), program.memory_analysis()
  return {"flops": sum(_flops(learner, params, batches)), "compiled": compiled,
          "memory": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
          "wall": min(wall), "cpu": min(cpu), "loss": loss / divisor,
          "gradients": jax.tree.map(lambda g: np.asarray(g) / divisor, grads)}


def _flops(learner: Learner, params, batches: Sequence[Batch]) -> list[float]:
  """Of forward and backward pass of each micro-batch, all of one shape, by XLA, all loops unrolled."""
  first = batches[0]
  whole = _counted(learner, params, first)
  if first.key_blocks_BxCxN is None:
    return [whole] * len(batches)
  longest = first.key_blocks_BxCxN.shape[2]
  half = longest // 2
  cut = dataclasses.replace(first, key_blocks_BxCxN=first.key_blocks_BxCxN[..., :half])
  slope = (whole - _counted(learner, params, cut)) / (longest - half)
  return [whole - slope * (longest - _mean_length(batch)) for batch in batches]


def _counted(learner: Learner, params, batch: Batch) -> float:
  with _unrolled():
    # A function of its own, or the trace with loops would be taken again.
    lowered = jax.jit(lambda *args: learner._accumulate_fn(*args)).lower(
      params, learner.zeros(), place(batch, learner.mesh))
  return lowered.cost_analysis()["flops"]


def _mean_length(batch: Batch) -> float:
  """Blocks of keys that a group of queries takes, on average; see `attention_blocks.attend`."""
  lists = np.asarray(batch.key_blocks_BxCxN)
  at_once = attention_blocks.blocks_at_once(batch.tokens_BxT.shape[1], lists, CHUNKS[SHARED])
  longest_G = (lists >= 0).sum(-1).reshape(-1, at_once).max(-1)
  widths = np.asarray(attention_blocks.list_lengths(lists.shape[2]))
  return float(widths[np.searchsorted(widths, longest_G)].mean())


@contextlib.contextmanager
def _unrolled() -> Iterator[None]:
  scan, loop = jax.lax.scan, jax.lax.map

  def unrolled_scan(*args, **options):
    return scan(*args, **options | {"unroll": True})

  jax.lax.scan = unrolled_scan
  jax.lax.map = lambda f, xs: unrolled_scan(lambda _, x: (None, f(x)), None, xs)[1]
  try:
    yield
  finally:
    jax.lax.scan, jax.lax.map = scan, loop


# Tables ----------------------------------------------------------------------------------------


def _print_setting(args, config: ModelConfig, params, examples: Sequence[Example]) -> None:
  sizes = sorted({len(e) for e in examples})
  print(f"step      {args.questions} questions x {N} rollouts, {args.tool_rate:.0%} with a call; "
        f"{len(examples) - args.questions * N} continuations; trajectories of {sizes} tokens")
  print(f"model     {sum(x.size for x in jax.tree.leaves(params)):,} parameters, "
        f"{config.text.num_layers} layers of {config.text.hidden_size}, {config.dtype}, "
        f"remat {config.remat}")
  print(f"machine   {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{jax.default_backend()}, jax {jax.__version__}", flush=True)


def _print_table(plain: dict, shared: dict) -> None:
  print(f"\n{'':<28}{'one row each':>16}{'shared':>16}{'gain':>8}")
  for label, key, unit in (
      ("tokens computed", "tokens", 1), ("places, padding included", "places", 1),
      ("images encoded", "images", 1), ("GFLOPs", "flops", 1e9),
      ("memory of a program, MiB", "memory", 2**20), ("wall seconds", "wall", 1),
      ("CPU seconds", "cpu", 1), ("seconds to compile", "compiled", 1)):
    a, b = plain[key] / unit, shared[key] / unit
    digits = 0 if a >= 1000 or a == int(a) else 1
    print(f"{label:<28}{a:>16,.{digits}f}{b:>16,.{digits}f}{a / b:>8.2f}")


def _check(got: dict, want: dict) -> None:
  """Raises AssertionError if loss or a gradient differ by more than rounding."""
  def difference(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

  worst = max(jax.tree.leaves(jax.tree.map(difference, got["gradients"], want["gradients"])))
  print(f"\nloss {want['loss']:.7f} and {got['loss']:.7f}; gradients: the parameter that differs "
        f"most by {worst:.1e} of its norm")
  np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
  assert worst < 1e-4, "the two sides do not compute the same gradients"


if __name__ == "__main__":
  main()
