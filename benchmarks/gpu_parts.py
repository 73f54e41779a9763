"""The two sides of `gpu.py`: ours and transformers', with the same random weights and inputs.

Legend: T tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.protocol import SampleRequest, SamplingParams
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import flops, hf, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.images import PatchFormat, ProcessedImage
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import mrope_positions
from axpo_jax.train.batch import Batch, targets
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import Example, pack
from axpo_jax.train.state import init_params, make_optimizer
from axpo_jax.train.step import Learner, supervised_objective
from benchmarks.torch_side import PyTorch

# Ids below are words in every vocabulary; special tokens and images are above or few.
_WORDS = (10, 1000)
_LARGEST_SIDE = 64  # patches of an image


def model_config(size: str, *, attention: str, remat: str) -> ModelConfig:
  return dataclasses.replace(PRESETS[size], dtype="bfloat16", attention=attention, remat=remat)


def torch_device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def write_random_weights(config: ModelConfig, folder: pathlib.Path) -> pathlib.Path:
  """A bfloat16 checkpoint as transformers initialises it."""
  torch.manual_seed(0)
  with torch.device(torch_device()):
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_hf()))
  model.to(torch.bfloat16).save_pretrained(folder)
  return folder


def example(config: ModelConfig, length: int, seed: int) -> Example:
  """Words around a square image of at most an eighth of the tokens; all words behind it are targets."""
  rng = np.random.default_rng(seed)
  side = min(2 * int((length / 8) ** 0.5), _LARGEST_SIDE)
  vision = config.vision
  form = PatchFormat(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
                     (0.5,) * 3, (0.5,) * 3)
  size = (side * form.patch_size, side * form.patch_size, 3)
  image = ProcessedImage.of(Image.fromarray(rng.integers(0, 256, size, np.uint8)), form)
  count, before = image.num_tokens, 8
  ids = rng.integers(*_WORDS, length)
  ids[before] = config.vision_start_token_id
  shown = slice(before + 1, before + 1 + count)
  ids[shown], ids[shown.stop] = config.image_token_id, config.vision_end_token_id
  number, offset = np.full(length, -1), np.zeros(length, int)
  number[shown], offset[shown] = 0, np.arange(count)
  mask = np.arange(length) > shown.stop
  return Example(
    ids_T=ids, images=(image,), loss_mask_T=mask, image_T=number, image_offset_T=offset,
    positions_Tx3=mrope_positions(ids, [(side // 2, side // 2)], config.image_token_id),
    advantages_T=np.zeros(length, np.float32), behaviour_logp_T=np.zeros(length, np.float32))


def torch_logprobs(folder: pathlib.Path, one: Example) -> tuple[np.ndarray, np.ndarray]:
  """Of the targets: by the model in float32, and in bfloat16."""
  return tuple(_torch_logprobs(PyTorch(folder, dtype, torch_device()), one)
               for dtype in (torch.float32, torch.bfloat16))


def _torch_logprobs(side: PyTorch, one: Example) -> np.ndarray:
  inputs = side.inputs([(one.ids_T, one.images)], left=False)
  with torch.inference_mode():
    logits = side.model.eval()(**inputs, use_cache=False).logits[0, :-1].float()
  logp = torch.log_softmax(logits, -1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
  out = logp.cpu().numpy()[one.loss_mask_T[1:]]
  del logits, logp, side
  torch.cuda.empty_cache()
  return out


def our_logprobs(folder: pathlib.Path, config: ModelConfig, one: Example) -> np.ndarray:
  learner = _learner(config, "float32", one)
  batch = _packed(config, [one])[0]
  params = hf.load_params(folder, config, mesh=learner.mesh)
  logp_BxG, _ = learner.score(params, batch)
  return np.asarray(logp_BxG)[batch.weights_BxG != 0]


def train_step(config: ModelConfig, length: int, micro_batches: int, mu_dtype: str
               ) -> tuple[Callable[[], None], float]:
  """One optimizer step with all parameters trained, and the FLOPs that it needs at least."""
  examples = [example(config, length, seed) for seed in range(micro_batches)]
  learner, batches = _learner(config, mu_dtype, examples[0]), _packed(config, examples)
  params = init_params(config, 0, learner.mesh, sharding.DEFAULT_RULES)
  state = learner.init(params)
  del params

  def step():
    nonlocal state
    state, result = learner.update(state, batches, targets(batches))
    learner.metrics(result, batches, tempfile.gettempdir())  # waits; raises if it is not finite
    jax.block_until_ready(state)

  needed = sum(3 * flops.needed(
    config, tokens=len(e), targets=int(e.loss_mask_T.sum()), seen=len(e) / 2,
    patches=e.images[0].num_patches, seen_patches=e.images[0].num_patches)
    for e in examples)
  return step, needed


def peak_gib() -> float | None:
  """Most memory that jax has held on its first device, if it tells."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def our_sampler(folder: pathlib.Path, config: ModelConfig, runner: asyncio.Runner, batch: int,
                prompt: int, new_tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
  """Samples from `batch` different prompts by the embedded engine; how to close it."""
  config = dataclasses.replace(config, param_dtype="bfloat16")
  mesh = _mesh()
  graphdef = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))[0]
  params = hf.load_params(folder, config, mesh=mesh)
  engine = EmbeddedEngine(
    config, graphdef, params, mesh=mesh,
    config=EmbeddedConfig(rows=batch, length=-(-(prompt + new_tokens) // 128) * 128,
                          max_running=batch, min_batch=batch))
  drawn = SamplingParams(max_new_tokens=new_tokens)
  requests = [SampleRequest(tuple(ids.tolist()), (), drawn, (seed,))
              for seed, ids in enumerate(_prompts(batch, prompt))]

  async def all_at_once():
    # New weights drop the cached prompts, as every training step does.
    await engine.update_weights(params, 0)
    samples = await asyncio.gather(*map(engine.generate, requests))
    assert all(len(sample.ids) == new_tokens for [sample] in samples)

  return lambda: runner.run(all_at_once()), lambda: runner.run(engine.close())


def torch_sampler(folder: pathlib.Path, config: ModelConfig, batch: int, prompt: int, new_tokens: int
                  ) -> Callable[[], None]:
  side = PyTorch(folder, torch.bfloat16, torch_device())
  inputs = side.inputs([(ids, ()) for ids in _prompts(batch, prompt)], left=True)

  def sample():
    side.generate(inputs, new_tokens)
    if torch.cuda.is_available():
      torch.cuda.synchronize()

  return sample


def _prompts(batch: int, length: int) -> np.ndarray:
  return np.random.default_rng(0).integers(*_WORDS, (batch, length))


def _mesh() -> jax.sharding.Mesh:
  return sharding.make_mesh({"data": 1}, jax.devices()[:1])


def _learner(config: ModelConfig, mu_dtype: str, one: Example) -> Learner:
  options = OptimizerConfig(1e-6, total_steps=100, mu_dtype=mu_dtype)
  return Learner(config, make_optimizer(options), supervised_objective(), _mesh(),
                 chunk=min(len(one), 2048))


def _packed(config: ModelConfig, examples: list[Example]) -> list[Batch]:
  """One trajectory a row, one row a micro-batch."""
  length = -(-max(map(len, examples)) // 128) * 128
  return pack(examples, rows=1, length=length, vision_config=config.vision, share_prefixes=False)
