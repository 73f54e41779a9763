"""The attention function against plain NumPy loops, whole and in chunks, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.model import attention_blocks
from axpo_jax.model.attention import attend, visibility
from axpo_jax.model.attention_blocks import key_blocks
from axpo_jax.model.attention_xla import Tags, block

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


# Two sequences and padding; one sequence.
ENDS = np.asarray([[4] * 4 + [10] * 6 + [0] * 3, [13] * 13], np.int32)


@pytest.mark.parametrize("chunk", [0, 13, 5, 4, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_sequences(arrays, chunk, causal):
  """Behind each other, each causal as text is or, by one order for all, seeing itself whole."""
  q, k, v = arrays[:3]
  order = np.tile(np.arange(T), (B, 1)) if causal else np.where(ENDS == 10, 4, 0)
  tags = Tags(jnp.asarray(order), jnp.asarray(ENDS))
  got = jax.jit(lambda: attend(q, [block(k, v)], visibility(tags, [tags], chunk)))()
  sees = np.zeros((B, T, T), bool)
  for b, t, s in np.ndindex(B, T, T):
    sees[b, t, s] = ENDS[b, t] == ENDS[b, s] > 0 and (s <= t or not causal)
  real = ENDS > 0
  np.testing.assert_allclose(got[real], naive(q, k, v, sees)[real], atol=2e-6)
  assert np.isfinite(got).all()


def forest(rng, rows, length):
  """Random trees in rows, depth first: the ends of all tokens, and who sees whom by parents."""
  ends, sees = np.zeros((rows, length), np.int32), np.zeros((rows, length, length), bool)
  for row in range(rows):
    path = []
    for t in range(length - rng.integers(0, 3)):
      # Mostly straight on; else back to an early ancestor, or a new tree.
      path = path if rng.random() < 0.8 else path[:rng.integers(0, min(len(path), 8) + 1)]
      path = [*path, t]
      ends[row, path] = t + 1
      sees[row, t, path] = True
  return ends, sees


@pytest.mark.parametrize("chunk", [0, 6, 1])
@pytest.mark.parametrize("size", [None, 2, 4, 6])
def test_trees_with_and_without_key_blocks(size, chunk, monkeypatch):
  monkeypatch.setattr(attention_blocks, "KEYS", 2 if size == 6 else 4)  # three blocks of keys in one of queries
  rng = np.random.default_rng(chunk)
  ends, sees = forest(rng, 3, 96)
  q, k, v = (rng.normal(size=(3, 96, n, D)).astype(np.float32) for n in (H, K, K))
  lists = None if size is None else key_blocks(ends, size)
  assert size is None or lists.shape[2] <= 96 // min(size, attention_blocks.KEYS) * 3 // 4
  order = jnp.tile(jnp.arange(96), (3, 1))

  def run(lists, chunk):
    def loss(qkv):
      q, k, v = qkv
      tags = Tags(order, jnp.asarray(ends))
      out = attend(q, [block(k, v)], visibility(tags, [tags], chunk, lists))
      return (jnp.sin(out) * (ends > 0)[..., None, None]).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))((q, k, v))

  grads, out = run(lists, chunk)
  real = ends > 0
  np.testing.assert_allclose(out[real], naive(q, k, v, sees)[real], atol=2e-6)
  for got, want in zip(grads, run(None, 0)[0], strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_key_blocks_by_hand():
  # A root of 3, a branch of 4, a branch of 3, then a tree of 2 and padding.
  ends = np.asarray([[10] * 3 + [7] * 4 + [10] * 3 + [12] * 2 + [0] * 4])
  assert key_blocks(ends, 2)[0].tolist() == [
    [0, *[-1] * 5], [0, 1, *[-1] * 4], [0, 1, 2, *[-1] * 3], [0, 1, 2, 3, -1, -1],
    [0, 1, 3, 4, -1, -1], [5, *[-1] * 5], [-1] * 6, [-1] * 6]
  # One sequence: the last block sees them all.
  assert key_blocks(np.full((1, 64), 64), 4) is None


def test_key_blocks_that_are_shorter_than_those_of_queries(monkeypatch):
  monkeypatch.setattr(attention_blocks, "KEYS", 2)
  ends = np.asarray([[10] * 3 + [7] * 4 + [10] * 3 + [12] * 2 + [0] * 20])
  assert key_blocks(ends, 4)[0].tolist() == [  # 5 of 16 blocks: more than a quarter
    [0, 1, *[-1] * 10], [0, 1, 2, 3, *[-1] * 8], [0, 1, 3, 4, 5, *[-1] * 7], *[[-1] * 12] * 5]


def test_few_lengths_of_lists():
  """Whatever is packed: each length is a program of its own."""
  found = set()
  for size in range(64, 1024, 64):  # sequences of one length that fill a row
    ends = np.asarray([[min((t // size + 1) * size, 1024) for t in range(1024)]])
    lists = key_blocks(ends, 64)
    found.add(None if lists is None else lists.shape[2])
  assert found == {4, 12, None}


@pytest.mark.parametrize("chunk", [0, 5])
def test_two_blocks_share_one_softmax(arrays, chunk):
  q, k, v, old_k, old_v = arrays
  filled = np.asarray([4, 0])
  old = np.where(np.arange(S) < filled[:, None], T, 0)
  new = Tags(jnp.tile(jnp.arange(T), (B, 1)), jnp.full((B, T), T))
  keys = [Tags(jnp.zeros((B, S), jnp.int32), jnp.asarray(old)), new]
  got = jax.jit(lambda: attend(q, [block(old_k, old_v), block(k, v)],
                               visibility(new, keys, chunk)))()
  causal = np.tile(np.tril(np.ones((T, T), bool)), (B, 1, 1))
  sees = np.concatenate([np.repeat(old[:, None] > 0, T, 1), causal], -1)
  want = naive(q, np.concatenate([old_k, k], 1), np.concatenate([old_v, v], 1), sees)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_gradient_in_chunks(arrays):
  order = jnp.tile(jnp.arange(T), (B, 1))
  tags = Tags(order, jnp.asarray(ENDS))

  def gradient(chunk):
    def loss(qkv):
      q, k, v = qkv
      out = attend(q, [block(k, v)], visibility(tags, [tags], chunk))
      return (jnp.sin(out) * (ENDS > 0)[..., None, None]).sum()

    return jax.jit(jax.grad(loss))(arrays[:3])

  for got, want in zip(gradient(5), gradient(0), strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-6)
  # A query or key of padding gets no gradient, not even through its finite scores.
  assert all(np.abs(np.asarray(g)[0, 10:]).max() == 0 for g in gradient(5))


def test_softmax_is_float32_for_bfloat16(arrays):
  """With bfloat16 inputs the only loss is that of the inputs and of the rounded weights."""
  q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays[:3])
  tags = Tags(jnp.tile(jnp.arange(T), (B, 1)), jnp.full((B, T), T))
  got = attend(q, [block(k, v)], visibility(tags, [tags], 0))
  assert got.dtype == jnp.bfloat16
  causal = np.tile(np.tril(np.ones((T, T), bool)), (B, 1, 1))
  want = naive(*(np.asarray(a, np.float64) for a in (q, k, v)), causal)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02)
