"""The attention function against plain NumPy loops, whole and in chunks, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.model.attention import Tags, attend, block, visibility

B, T, S, H, K, D = 2, 13, 6, 6, 2, 8


def naive(q, k, v, sees):
  """One query and head at a time, float64."""
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(sees[b, t])
    if len(keys):
      group = h // (H // K)
      scores = k[b, keys, group] @ q[b, t, h] / np.sqrt(D)
      weights = np.exp(scores - scores.max())
      out[b, t, h] = (weights / weights.sum()) @ v[b, keys, group]
  return out


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, D), (B, S, K, D), (B, S, K, D)]
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


SEGMENTS = np.asarray([[1] * 4 + [2] * 6 + [0] * 3, [3] * 13], np.int32)


@pytest.mark.parametrize("chunk", [0, 13, 5, 4, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_segments(arrays, chunk, causal):
  q, k, v = arrays[:3]
  order = np.tile(np.arange(T) if causal else np.zeros(T, int), (B, 1)).astype(np.int32)
  tags = Tags(jnp.asarray(SEGMENTS), jnp.asarray(order))
  got = jax.jit(lambda: attend(q, [block(k, v)], visibility(tags, [tags], chunk)))()
  sees = np.zeros((B, T, T), bool)
  for b, t, s in np.ndindex(B, T, T):
    sees[b, t, s] = SEGMENTS[b, t] == SEGMENTS[b, s] > 0 and (s <= t or not causal)
  real = SEGMENTS > 0
  np.testing.assert_allclose(got[real], naive(q, k, v, sees)[real], atol=2e-6)
  assert np.isfinite(got).all()


@pytest.mark.parametrize("chunk", [0, 5])
def test_two_blocks_share_one_softmax(arrays, chunk):
  q, k, v, old_k, old_v = arrays
  filled = np.asarray([4, 0])
  old = (np.arange(S) < filled[:, None]).astype(np.int32)
  ones, order = np.ones((B, T), np.int32), np.tile(np.arange(T), (B, 1)).astype(np.int32)
  new = Tags(jnp.asarray(ones), jnp.asarray(order))
  keys = [Tags(jnp.asarray(old), jnp.zeros((B, S), jnp.int32)), new]
  got = jax.jit(lambda: attend(q, [block(old_k, old_v), block(k, v)], visibility(new, keys, chunk)))()
  causal = np.tile(np.tril(np.ones((T, T), bool)), (B, 1, 1))
  sees = np.concatenate([np.repeat(old[:, None] > 0, T, 1), causal], -1)
  want = naive(q, np.concatenate([old_k, k], 1), np.concatenate([old_v, v], 1), sees)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_gradient_in_chunks(arrays):
  order = jnp.tile(jnp.arange(T), (B, 1))
  tags = Tags(jnp.asarray(SEGMENTS), order)

  def gradient(chunk):
    def loss(qkv):
      q, k, v = qkv
      out = attend(q, [block(k, v)], visibility(tags, [tags], chunk))
      return (jnp.sin(out) * (SEGMENTS > 0)[..., None, None]).sum()

    return jax.jit(jax.grad(loss))(arrays[:3])

  for got, want in zip(gradient(5), gradient(0), strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-6)
  # A query or key of padding gets no gradient, not even through its finite scores.
  assert all(np.abs(np.asarray(g)[0, 10:]).max() == 0 for g in gradient(5))


def test_softmax_is_float32_for_bfloat16(arrays):
  """With bfloat16 inputs the only loss is that of the inputs and of the rounded weights."""
  q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays[:3])
  tags = Tags(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))
  got = attend(q, [block(k, v)], visibility(tags, [tags], 0))
  assert got.dtype == jnp.bfloat16
  causal = np.tile(np.tril(np.ones((T, T), bool)), (B, 1, 1))
  want = naive(*(np.asarray(a, np.float64) for a in (q, k, v)), causal)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02)
