"""Prefill and decode through the KV cache against one full forward, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.model.cache import DecodeCache, KVCache

TOLERANCE = 1e-5


def worst(a, b) -> float:
  """Largest difference, in units of the reference's scale."""
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def step(untied):
  @jax.jit
  def step(params, cache, tokens, positions, real, vision=None, index=None):
    model = untied.model(params)
    hidden, cache = model(
      tokens, positions, real, vision=vision, image_index_BxT=index, cache=cache
    )
    return model.logits(hidden), cache

  return step


@pytest.fixture(scope="module")
def full(untied):
  return jax.jit(lambda p, case_args: _full(untied, p, case_args))


def _full(untied, params, args):
  model = untied.model(params)
  ids, positions, vision, index = args
  ends = jnp.full((1, len(ids)), len(ids))
  kwargs = {} if vision is None else {"vision": vision, "image_index_BxT": index[None]}
  return model.logits(model(ids[None], positions[None], ends, **kwargs)[0])[0]


def test_prefill_then_decode(untied, make_case, step, full):
  case = make_case([(4, 6), (8, 2)], text=9, tail=6)
  want = np.asarray(
    full(untied.params, (case.ids_T, case.positions_Tx3, case.vision, case.index_T))
  )
  length = len(case.ids_T)
  after_images = int(np.flatnonzero(case.index_T >= 0).max()) + 2
  cache = KVCache.empty(untied.config, 1, length)
  ids, positions = case.ids_T[None], case.positions_Tx3[None]
  ones = np.ones((1, length), np.int32)
  cut = slice(0, after_images)
  got, cache = step(
    untied.params, cache, ids[:, cut], positions[:, cut], ones[:, cut], case.vision,
    case.index_T[None, cut],
  )  # fmt: skip
  logits = [got[0]]
  for t in range(after_images, length):
    at = slice(t, t + 1)
    got, cache = step(untied.params, cache, ids[:, at], positions[:, at], ones[:, at])
    logits.append(got[0])
  assert worst(np.concatenate(logits), want) < TOLERANCE
  assert cache.lengths_B.tolist() == [length]


def test_images_arrive_in_a_later_prefill(untied, make_case, step, full):
  """A tool returns an image in the middle of an episode: the second chunk brings it."""
  case = make_case([(4, 4), (2, 8)], text=6)
  want = full(untied.params, (case.ids_T, case.positions_Tx3, case.vision, case.index_T))
  cut = int(np.argmin(case.index_T[8:] >= 0)) + 8  # behind the first image
  cache = KVCache.empty(untied.config, 1, len(case.ids_T) + 5)
  for at in (slice(0, cut), slice(cut, len(case.ids_T))):
    ones = np.ones((1, at.stop - at.start), np.int32)
    got, cache = step(
      untied.params, cache, case.ids_T[None, at], case.positions_Tx3[None, at], ones, case.vision,
      case.index_T[None, at],
    )  # fmt: skip
    assert worst(np.asarray(got[0]), np.asarray(want[at])) < TOLERANCE


def test_rows_of_different_lengths(untied, make_case, step, full):
  """Right-padded prefill, then decode with a resting row: each row as if alone."""
  cases = [make_case(seed=i, text=9) for i in range(3)]
  lengths, more = [9, 4, 6], 2
  want = [np.asarray(full(untied.params, (c.ids_T, c.positions_Tx3, None, None))) for c in cases]
  ids = np.stack([c.ids_T for c in cases])
  positions = np.stack([c.positions_Tx3 for c in cases])
  prefill = np.asarray([n - more for n in lengths])
  width = int(prefill.max())
  real = (np.arange(width) < prefill[:, None]).astype(np.int32)
  # Exactly as many slots as the longest row: the pads of a full row have nowhere to go.
  cache = KVCache.empty(untied.config, 3, max(lengths))
  got, cache = step(untied.params, cache, ids[:, :width], positions[:, :width], real)
  assert cache.lengths_B.tolist() == prefill.tolist()
  for row, n in enumerate(prefill):
    assert worst(got[row, :n], want[row][:n]) < TOLERANCE
  active = np.asarray([1, 0, 1], np.int32)
  resting = np.asarray(cache.k_LxBxKxHxS[:, 1])
  for _ in range(more):
    at = np.asarray(cache.lengths_B)
    rows = np.arange(3)
    got, cache = step(
      untied.params, cache, ids[rows, at][:, None], positions[rows, at][:, None], active[:, None]
    )
    for row in (0, 2):
      assert worst(got[row, 0], want[row][at[row]]) < TOLERANCE
  assert cache.lengths_B.tolist() == [9, 2, 6]
  np.testing.assert_array_equal(cache.k_LxBxKxHxS[:, 1], resting)


def test_decode_compiles_once(untied, make_case, step):
  case = make_case(text=6)
  cache = KVCache.empty(untied.config, 1, 16)
  ones = np.ones((1, 1), np.int32)
  sizes = []
  for t in range(4):
    at = slice(t, t + 1)
    _, cache = step(untied.params, cache, case.ids_T[None, at], case.positions_Tx3[None, at], ones)
    sizes.append(step._cache_size())
  assert len(set(sizes)) == 1
  assert int(cache.lengths_B[0]) == 4


def test_long_prefill_in_chunks(untied, make_case):
  """Query blocks (attention_chunk) over cache and new tokens give what one block gives."""
  case = make_case(text=41)
  chunked, whole = (jax.jit(lambda c=c: _two_prefills(untied, case, c))() for c in (7, 0))
  assert worst(chunked, whole) < TOLERANCE


def _two_prefills(untied, case, chunk):
  model = untied.configured(attention_chunk=chunk)
  cache = KVCache.empty(untied.config, 1, 64)
  for at in (slice(0, 17), slice(17, 41)):
    ones = jnp.ones((1, at.stop - at.start), jnp.int32)
    hidden, cache = model(case.ids_T[None, at], case.positions_Tx3[None, at], ones, cache=cache)
  return hidden


def test_cache_dtype_follows_the_compute_dtype(untied):
  assert KVCache.empty(untied.config, 2, 8).k_LxBxKxHxS.dtype == jnp.float32
  cache = KVCache.empty(untied.config, 2, 8, jnp.bfloat16)
  text = untied.config.text
  assert cache.v_LxBxKxSxH.dtype == jnp.bfloat16
  assert cache.k_LxBxKxHxS.shape == (text.num_layers, 2, text.num_kv_heads, text.head_dim, 8)


def test_decode_block_behind_a_cache(untied, make_case, step, full):
  """Tokens in the short block of a DecodeCache count like those in the cache itself."""
  cases = [make_case(seed=i, text=9) for i in range(2)]
  want = [np.asarray(full(untied.params, (c.ids_T, c.positions_Tx3, None, None))) for c in cases]
  ids, positions = (np.stack([getattr(c, f) for c in cases]) for f in ("ids_T", "positions_Tx3"))
  prefill = np.asarray([6, 3])
  real = (np.arange(6) < prefill[:, None]).astype(np.int32)
  past = KVCache.empty(untied.config, 2, 8)
  _, past = step(untied.params, past, ids[:, :6], positions[:, :6], real)
  cache, rows = DecodeCache.after(past, 4), np.arange(2)
  for t in range(3):
    at = prefill + t
    got, cache = step(untied.params, cache, ids[rows, at][:, None], positions[rows, at][:, None],
                      np.ones((2, 1), np.int32))
    assert max(worst(got[r, 0], want[r][at[r]]) for r in rows) < TOLERANCE
