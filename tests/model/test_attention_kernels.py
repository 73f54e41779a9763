"""The kernels: simulated on the CPU against the XLA path, and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.model import attention, attention_gpu, attention_tpu, attention_xla, sharding
from axpo_jax.model.attention_tpu import Tile, visible_tiles
from tests.model.test_attention import forest

B, T, K, G, D = 2, 128, 2, 4, 16


@pytest.fixture(scope="module")
def trees():
  """Ends of random trees whose last block and a half are padding, and who sees whom."""
  ends, sees = forest(np.random.default_rng(0), B, T)
  ends[0, -24:], sees[0, -24:], sees[0, :, -24:] = 0, False, False
  return np.minimum(ends, np.where(np.arange(B) == 0, T - 24, T)[:, None]), sees


def arrays(*, length=T, kv_heads=K, group=G, dim=D):
  rng = np.random.default_rng(1)
  return [rng.normal(size=(B, length, heads, dim)).astype(np.float32)
          for heads in (kv_heads * group, kv_heads, kv_heads)]


def value_and_grad(attend, ends):
  """Outputs and gradients of q, k and v; padding has no loss, as in training."""
  def loss(q, k, v):
    out = attend(q, k, v)
    return (jnp.sin(out) * (ends > 0)[..., None, None]).sum(), out

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def by_xla(ends):
  def attend(q, k, v):
    return attention.attend(q, [attention_xla.block(k, v)], attention.row_visibility(ends, 0))

  return value_and_grad(attend, ends)


@pytest.mark.parametrize("kernel", [
  functools.partial(attention_tpu.attend, tile=Tile(16, 32, interpret=True)),
  functools.partial(attention_tpu.attend, tile=Tile(64, 16, interpret=True)),
  functools.partial(attention_gpu.attend, block=attention_gpu.Block(16, 32, interpret=True)),
], ids=["tpu", "tpu-tall", "gpu"])
def test_trees(trees, kernel):
  ends, _ = trees

  def attend(q, k, v):
    q_BxKxGxTxD = q.reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4)
    out = kernel(q_BxKxGxTxD, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(ends),
                 jnp.zeros(1, jnp.int32))
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)

  grads, out = value_and_grad(attend, ends)(*arrays())
  wanted_grads, wanted = by_xla(jnp.asarray(ends))(*arrays())
  np.testing.assert_allclose(out[ends > 0], wanted[ends > 0], atol=2e-6)
  assert (np.asarray(out)[ends == 0] == 0).all()
  for got, want in zip(grads, wanted_grads, strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("first, queries, keys", [(0, 16, 32), (64, 32, 8)])
def test_tiles_in_sight_are_those_that_hold_a_pair(trees, first, queries, keys):
  """No tile is left out that holds one; none is taken whose queries all precede or outlive its keys."""
  ends, sees = trees
  blocks = (T - first) // queries
  got = visible_tiles(jnp.asarray(ends), first, blocks, Tile(queries, keys, False))
  pairs = sees[:, first:].reshape(B, blocks, queries, -1, keys).any((2, 4))
  assert (np.asarray(got) | ~pairs).all()
  # Of these trees hardly any key ends between a tile's first query and one that could see it.
  assert got.sum() <= 1.2 * pairs.sum() < 0.7 * pairs.size


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_split_over_devices(backend):
  """Rows, heads and the tokens of a row on different devices: the numbers of one."""
  ends, _ = forest(np.random.default_rng(2), B, 256)
  ends, inputs = jnp.asarray(ends), arrays(length=256, group=1, dim=128)
  mesh = sharding.make_mesh({"data": 2, "context": 2, "tensor": 2})

  def attend(q, k, v):
    with sharding.use(mesh):
      assert attention.choose_backend(backend, 256, K, K, 128) == backend
      sees = attention.row_visibility(ends, 0, backend=backend)
      return attention.attend(q, [attention_xla.block(k, v)], sees)

  grads, out = value_and_grad(attend, ends)(*inputs)
  wanted_grads, wanted = by_xla(ends)(*inputs)
  np.testing.assert_allclose(out[ends > 0], wanted[ends > 0], atol=2e-6)
  for got, want in zip(grads, wanted_grads, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def test_the_choice():
  assert attention.choose_backend("auto", 32_768, 32, 8, 128) == "xla"  # a CPU
  assert attention.choose_backend("tpu", 32_768, 32, 8, 128) == "tpu"
  with pytest.raises(attention.AttentionError, match="32 tokens"):
    attention.choose_backend("tpu", 32, 32, 8, 128)
  for backend in ("tpu", "gpu"):
    with pytest.raises(attention.AttentionError, match="heads of 72"):
      attention.choose_backend(backend, 32_768, 16, 16, 72)


def test_compiles_for_a_slice_without_an_array_of_tokens_x_tokens():
  """Two rows of 32k tokens on four chips, two of which share a row; the kernel is chosen by itself."""
  pytest.importorskip("libtpu", reason="NOT TESTED HERE: compiling for TPUs. libtpu is not installed")
  from axpo_jax.plan.chips import slice_mesh
  length, kv_heads, group, dim = 32_768, 2, 4, 128
  mesh = slice_mesh("v5e:2x2", {"fsdp": 2, "context": 2})

  def attend(q, k, v, ends):
    with sharding.use(mesh):
      backend = attention.choose_backend("auto", length, kv_heads * group, kv_heads, dim)
      sees = attention.row_visibility(ends, 512, backend=backend)
      return attention.attend(q, [attention_xla.block(k, v)], sees).astype(jnp.float32).sum()

  def array(dtype, *names_and_sizes):
    names, sizes = zip(*names_and_sizes)
    target = sharding.sharding_for(names, sizes, mesh)
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=target)

  row = ("batch", 2), ("length", length)
  q, k = (array(jnp.bfloat16, *row, ("act_heads", heads), (None, dim))
          for heads in (kv_heads * group, kv_heads))
  compiled = jax.jit(jax.grad(attend, (0, 1, 2))).lower(q, k, k, array(jnp.int32, *row)).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, and two backward
  # Queries of one head x keys, as booleans, would be 512 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20


def test_lowers_to_triton():
  """As far as it gets without a GPU; since jax 0.11 the lowering asks which GPU it is for."""
  def array(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)

  def total(q, k, v, ends, first):
    return attention_gpu.attend(q, k, v, ends, first).astype(jnp.float32).sum()

  h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,),
                                   abstract_device=h100)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(
      array(1, 2, 4, 1024, 128), *[array(1, 2, 1024, 128)] * 2, array(1, 1024, dtype=jnp.int32),
      array(1, dtype=jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert all(name in text for name in ("forward", "backward_queries", "backward_keys"))
  assert text.count("xla.gpu.triton") == 3
