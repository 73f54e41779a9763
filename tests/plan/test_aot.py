"""The shapes that are compiled ahead of time are those that a run meets."""

import jax
import numpy as np
import pytest

from axpo_jax.engine.embedded import memory as embedded_memory
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import sharding
from axpo_jax.plan import aot
from axpo_jax.train.batch import place
from axpo_jax.train.packing import pack


@pytest.fixture
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])


def shape(x):
  return x.shape, x.dtype, x.sharding


def test_the_fullest_batch_is_one_that_packing_makes(config, make_example, make_image, mesh):
  """Four rows that are full, a quarter of them image tokens: three words to an image token."""
  options = dict(rows=3, length=16, vision_config=config.vision, patch_buckets=(16, 64), row_buckets=(2, 4),
                 rows_multiple_of=4, image_rows_multiple_of=4)
  examples = [make_example(i, 12, [make_image(i)]) for i in range(4)]
  (batch,) = pack(examples, block=4, list_blocks=False, share_prefixes=False, **options)
  found = aot.abstract_batch(mesh, options, image_share=0.25, scored=False)
  jax.tree.map(lambda a, b: np.testing.assert_equal(shape(a), shape(b)), found, place(batch, mesh))


def test_a_crop_of_the_largest_size_makes_longer_rows_of_patches(config, mesh):
  options = dict(rows=4, length=64, vision_config=config.vision, patch_buckets=(16, 64),
                 row_buckets=(2, 4, 8, 16), rows_multiple_of=4, image_rows_multiple_of=4)
  usual, largest = (aot.abstract_batch(mesh, options, image_share=0.25, scored=True, largest=largest)
                    for largest in (False, True))
  assert usual.vision.segments_RxP.shape == (16, 16)  # 64 image tokens of four patches each
  assert largest.vision.segments_RxP.shape == (4, 64)
  assert aot.abstract_batch(mesh, options, image_share=0, scored=True).vision is None


def test_the_engine_that_is_compiled_is_the_one_that_starts(config, mesh):
  """Its weights and pool, and what is said to be needed before it starts."""
  sizes = EmbeddedConfig(rows=8, length=32, max_running=4, min_batch=1, decode_block=4, dtype="bfloat16")
  held, programs = aot.compile_sampler(config, sizes, mesh)
  assert set(programs) == set(aot.SAMPLER)
  need = embedded_memory.needed(config, sizes, mesh.shape)
  assert held == {"engine's weights": need.weights, "engine's pool": need.pool}
