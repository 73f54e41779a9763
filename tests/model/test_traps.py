"""The mistakes that other ports of Qwen3-VL made, one by one.

Where a mistake is a wrong number, the test makes it on purpose and asks that parity would notice;
where it is a wrong shape or cost, the test looks at the traced program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from axpo_jax.model import rope
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision import VisionFeatures
from axpo_jax.model.vision_inputs import VisionInputs, pack_images

NOTICED = 1e-3  # a hundred times test_parity's tolerance


def relative(a, b) -> float:
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.fixture(scope="module")
def case(make_case):
  return make_case([(4, 10), (8, 6)])


@pytest.fixture(scope="module")
def right(untied, case):
  return np.asarray(jax.jit(lambda p: case.logits(untied.model(p)))(untied.params))


def test_parity_notices_lost_deepstack(untied, case, right):
  def without(params):
    model = untied.model(params)
    features = model.encode_images(case.vision)
    lost = VisionFeatures(features.embeds_MxD, features.deepstack_NxMxD[:0])
    return case.logits(model, vision=lost)

  assert relative(jax.jit(without)(untied.params), right) > NOTICED


def test_parity_notices_each_deepstack_layer(untied, case, right):
  @jax.jit
  def swapped(params, order):
    model = untied.model(params)
    features = model.encode_images(case.vision)
    other = VisionFeatures(features.embeds_MxD, features.deepstack_NxMxD[order])
    return case.logits(model, vision=other)

  np.testing.assert_allclose(swapped(untied.params, jnp.arange(3)), right, atol=1e-4)
  assert relative(swapped(untied.params, jnp.array([1, 0, 2])), right) > NOTICED
  assert relative(swapped(untied.params, jnp.array([0, 2, 1])), right) > NOTICED


def test_parity_notices_one_dimensional_rope(untied, case, right):
  plain = np.tile(np.arange(len(case.ids_T))[None, :, None], 3)
  got = jax.jit(lambda p: case.logits(untied.model(p), positions_BxTx3=plain))(untied.params)
  assert relative(got, right) > NOTICED


def test_parity_notices_mrope_in_sections(untied, case, right, monkeypatch):
  """Qwen2.5-VL's layout: all of time, then all of height, then all of width."""
  monkeypatch.setattr(rope, "mrope_axes", lambda section: np.repeat([0, 1, 2], section))
  got = jax.jit(lambda p: case.logits(untied.model(p)))(untied.params)
  assert relative(got, right) > NOTICED


def test_mrope_axes_of_the_released_models():
  axes = rope.mrope_axes((24, 20, 20))
  assert len(axes) == 64
  assert [axes[i] for i in range(6)] == [0, 1, 2, 0, 1, 2]
  assert all(axes[i] == (i % 3 if i < 60 else 0) for i in range(64))


@pytest.mark.parametrize("wrong", [True, False])
def test_parity_notices_the_wrong_gelu(untied, case, right, monkeypatch, wrong):
  """Blocks take the tanh form, mergers the exact one; the difference is small but seen."""
  gelu = jax.nn.gelu
  monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=wrong))
  got = jax.jit(lambda p: case.logits(untied.model(p)))(untied.params)
  assert relative(got, right) > 5e-5  # five times test_parity's tolerance


def test_no_recompilation_when_images_change(untied, random_image):
  """Other numbers, sizes and aspect ratios of images inside one bucket: one compilation."""
  encode = jax.jit(lambda p, v: untied.model(p).encode_images(v).embeds_MxD)
  for grids in ([(8, 8)], [(2, 2), (4, 14)], [(32, 2)], [(6, 4), (2, 10), (2, 8)], []):
    images = [random_image(*g) for g in grids]
    vision, _ = pack_images(images, untied.config.vision, patch_buckets=(64, 128))
    assert np.isfinite(encode(untied.params, vision)).all()
  assert encode._cache_size() == 1


def test_tower_sees_arrays_only(untied, case):
  """No grid, no Python integer: every field of the inputs may be a tracer."""
  traced = jax.make_jaxpr(lambda v: untied.model().encode_images(v).embeds_MxD)(case.vision)
  assert len(traced.in_avals) == len(dataclasses.fields(VisionInputs))


def _with_depth(config: ModelConfig, depth: int) -> ModelConfig:
  return dataclasses.replace(
    config,
    text=dataclasses.replace(config.text, num_layers=depth),
    vision=dataclasses.replace(config.vision, depth=depth),
  )


def _equations(jaxpr) -> int:
  count = 0
  for eqn in jaxpr.eqns:
    count += 1 + sum(_equations(sub) for sub in jaxprs_in_params(eqn.params))
  return count


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_does_not_grow_with_depth(untied, case, remat):
  def size(depth: int) -> tuple[int, int]:
    config = dataclasses.replace(_with_depth(untied.config, depth), remat=remat)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))

    def loss(params):
      return case.logits(nnx.merge(graphdef, params)).sum()

    traced = jax.jit(jax.grad(loss)).trace(params)
    return _equations(traced.jaxpr.jaxpr), len(traced.lower().as_text().splitlines())

  assert size(4) == size(12)


@pytest.mark.parametrize(("remat", "depth", "loops"), [("none", 3, 0), ("none", 4, 1),
                                                       ("full", 3, 1)])
def test_few_layers_are_written_out(untied, remat, depth, loops):
  """A loop costs a small model a quarter of its step; with remat it must stay."""
  text = dataclasses.replace(untied.config.text, num_layers=depth)
  config = dataclasses.replace(untied.config, text=text, remat=remat)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))
  ids = jnp.zeros((1, 8), jnp.int32)

  def hidden(params):
    return nnx.merge(graphdef, params)(ids, jnp.zeros((1, 8, 3), jnp.int32), ids + 8)[0]

  assert jax.jit(hidden).lower(params).as_text().count("stablehlo.while") == loops


def _shapes(jaxpr):
  for eqn in jaxpr.eqns:
    yield from (tuple(v.aval.shape) for v in eqn.outvars)
    for sub in jaxprs_in_params(eqn.params):
      yield from _shapes(sub)


def test_no_mask_over_all_images(untied, random_image):
  """Attention stays in a row: nothing in the tower is (all patches) x (all patches)."""
  images = [random_image(8, 8, seed) for seed in range(8)]
  vision, _ = pack_images(images, untied.config.vision)
  rows, length = vision.segments_RxP.shape
  assert (rows, length) == (8, 64)
  jaxpr = jax.make_jaxpr(lambda v: untied.model().encode_images(v).embeds_MxD)(vision)
  heads = untied.config.vision.num_heads
  scores = rows * heads * length**2
  activations = rows * length * 4 * untied.config.vision.hidden_size * 4
  assert scores < (rows * length) ** 2
  largest = max(int(np.prod(s)) for s in _shapes(jaxpr.jaxpr))
  assert largest <= max(scores, activations)
  assert not any(s.count(rows * length) > 1 for s in _shapes(jaxpr.jaxpr))


def test_long_rows_never_hold_all_scores(untied):
  """Beyond `attention_chunk`, no array has (all queries) x (all keys) of a row."""
  length, chunk = 256, 32
  model = untied.configured(attention_chunk=chunk, remat="full")
  graphdef, params = nnx.split(model)
  shape = functools.partial(jnp.zeros, dtype=jnp.int32)

  def loss(params):
    hidden, _ = nnx.merge(graphdef, params)(
      shape((1, length)), shape((1, length, 3)), shape((1, length))
    )
    return hidden.sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
  assert not any(s.count(length) > 1 for s in _shapes(jaxpr.jaxpr))
  assert any(s[-2:] == (chunk, length) for s in _shapes(jaxpr.jaxpr))


def test_remat_keeps_one_hidden_state_a_layer(untied, case):
  """What the forward pass leaves for the backward pass, per layer and in bytes."""

  def residuals(remat: str) -> list:
    graphdef = nnx.graphdef(untied.configured(remat=remat))

    def forward(params):
      _, backward = jax.vjp(lambda p: case.logits(nnx.merge(graphdef, p)).sum(), params)
      return backward

    return jax.tree.leaves(jax.eval_shape(forward, untied.params))

  full, dots, none = (residuals(remat) for remat in ("full", "dots", "none"))
  text, vision = untied.config.text, untied.config.vision
  rows, patches = case.vision.segments_RxP.shape
  stacked = {(vision.depth, rows), (text.num_layers, 1)}
  assert [x.shape for x in full if x.shape[:2] in stacked] == [
    (vision.depth, rows, patches, vision.hidden_size),
    (text.num_layers, 1, len(case.ids_T), text.hidden_size),
  ]

  def size(leaves):
    return sum(x.size * x.dtype.itemsize for x in leaves)

  assert size(full) < size(dots) < size(none)
