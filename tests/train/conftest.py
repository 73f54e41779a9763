"""Small examples with and without images, a model small enough to compile in seconds, and what
packing must not change: one trajectory a row."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from axpo_jax.model.images import PatchFormat, ProcessedImage
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.sharding import path_name
from axpo_jax.model.vision_inputs import mrope_positions, pack_images
from axpo_jax.train.batch import Batch
from axpo_jax.train.packing import Example

VOCAB = 64


@pytest.fixture(scope="session")
def config():
  """Two layers, 64 words; every dimension that a rule splits is even."""
  tiny = PRESETS["tiny"]
  text = dataclasses.replace(
    tiny.text, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, mrope_section=(2, 1, 1))
  vision = dataclasses.replace(
    tiny.vision, depth=2, hidden_size=16, intermediate_size=24, out_hidden_size=32, num_heads=2,
    deepstack_layers=(0,))
  return dataclasses.replace(tiny, text=text, vision=vision)


def _abstract_params(config):
  return nnx.eval_shape(lambda: nnx.state(Qwen3VL(config, rngs=nnx.Rngs(0)), nnx.Param))


@pytest.fixture(scope="session")
def abstract_params(config):
  return _abstract_params(config)


@pytest.fixture(scope="session")
def make_params():
  """Random parameters made with NumPy: compiling the initialisers would take longer than a step."""

  def make(config):
    rng = np.random.default_rng(0)

    def fill(path, x):
      noise = rng.normal(size=x.shape, scale=0.1)
      return (1 + noise if "scale" in path_name(path) else noise).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(fill, _abstract_params(config))

  return make


@pytest.fixture(scope="session")
def host_params(config, make_params):
  return make_params(config)


@pytest.fixture(scope="session")
def make_image(config):
  def make(seed: int, grid_hw=(4, 4)) -> ProcessedImage:
    vision = config.vision
    pixels = np.random.default_rng([seed, *grid_hw]).integers(
      0, 256, (*(side * vision.patch_size for side in grid_hw), 3), np.uint8)
    form = PatchFormat(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
                       (0.5,) * 3, (0.5,) * 3)
    return ProcessedImage.of(Image.fromarray(pixels), form)

  return make


@pytest.fixture(scope="session")
def make_example(config):
  """An example of random words: its images first, then `length` words; the last half are targets."""

  def make(seed: int, length: int, images=()) -> Example:
    rng = np.random.default_rng(seed)
    pads = [image.num_tokens for image in images]
    ids = np.concatenate([np.full(sum(pads), config.image_token_id, np.int64),
                          rng.integers(5, VOCAB, size=length)])
    total = len(ids)
    grids = [(h // 2, w // 2) for h, w in (image.grid_hw for image in images)]
    mask = np.arange(total) >= total - length // 2
    return Example(
      ids_T=ids, positions_Tx3=mrope_positions(ids, grids, config.image_token_id),
      image_T=np.concatenate([np.repeat(np.arange(len(pads)), pads), np.full(length, -1)]),
      image_offset_T=np.concatenate([*map(np.arange, pads), np.zeros(length, int)]),
      images=tuple(images), loss_mask_T=mask,
      advantages_T=np.where(mask, rng.normal(), 0).astype(np.float32),
      behaviour_logp_T=np.where(mask, -rng.uniform(2, 5, total), 0).astype(np.float32))

  return make


@pytest.fixture(scope="session")
def one_a_row(config):
  """Every example in a row of its own, written down without `pack`: whole, each image anew, and
  every token but the first scored at the place before it (with weight 0 if it is no target)."""

  def make(examples, length: int, **image_options) -> Batch:
    def rows(values, fill=0, dtype=np.int32):
      out = np.full((len(examples), length, *np.shape(values[0])[1:]), fill, dtype)
      for row, value in zip(out, values, strict=True):
        row[:len(value)] = value
      return out

    images = [image for e in examples for image in e.images]
    vision, offsets = pack_images(images, config.vision, **image_options)
    index, offsets = [], list(offsets)
    for e in examples:
      first = np.array([offsets.pop(0) for _ in e.images] + [0])
      index.append(np.where(e.image_T >= 0, first[e.image_T] + e.image_offset_T, -1))
    return Batch(
      tokens_BxT=rows([e.ids_T for e in examples]),
      positions_BxTx3=rows([e.positions_Tx3 for e in examples]),
      ends_BxT=rows([np.full(len(e), len(e)) for e in examples]),
      image_index_BxT=rows(index, -1), vision=vision,
      at_BxG=rows([np.arange(len(e) - 1) for e in examples]),
      targets_BxG=rows([e.ids_T[1:] for e in examples]),
      weights_BxG=rows([e.loss_mask_T[1:] for e in examples], 0, np.float32),
      advantages_BxG=rows([e.advantages_T[1:] for e in examples], 0, np.float32),
      behaviour_logp_BxG=rows([e.behaviour_logp_T[1:] for e in examples], 0, np.float32),
      lag_BxG=rows([np.zeros(len(e) - 1, np.int32) for e in examples]),
      example_BxG=rows([np.full(len(e) - 1, number) for number, e in enumerate(examples)], -1))

  return make
