"""Chunked log-probabilities against a plain log-softmax, and the memory they were made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.model import sharding
from axpo_jax.train.logprobs import token_logprobs

B, T, D, V = 3, 10, 8, 37
BANNED = (5, 36)


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  unembed = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.choice([v for v in range(V) if v not in BANNED], size=(B, T)).astype(np.int32)
  return hidden, unembed, targets


def reference(hidden, unembed, targets, temperature):
  """The whole array of logits in float64, the banned columns deleted."""
  kept = [v for v in range(V) if v not in BANNED]
  logits = (hidden.astype(np.float64) @ unembed.astype(np.float64).T / temperature)[..., kept]
  logits -= logits.max(-1, keepdims=True)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  place = np.vectorize(kept.index)(targets)
  return np.take_along_axis(logp, place[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 6, 7, 30, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_equal_a_plain_softmax(inputs, chunk, temperature):
  logp, entropy = token_logprobs(*inputs, banned_ids=BANNED, temperature=temperature, chunk=chunk)
  want_logp, want_entropy = reference(*inputs, temperature)
  np.testing.assert_allclose(logp, want_logp, atol=2e-6, rtol=1e-5)
  np.testing.assert_allclose(entropy, want_entropy, atol=2e-6, rtol=1e-5)


def test_gradients_equal_those_of_a_plain_softmax(inputs):
  hidden, unembed, targets = inputs
  weights = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32)

  def plain(hidden, unembed):
    keep = jnp.array([v not in BANNED for v in range(V)])
    logits = jnp.where(keep, hidden @ unembed.T, -1e9)
    logp = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(logp) * jnp.where(keep, logp, 0), -1)
    taken = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return jnp.sum(weights[0] * taken + weights[1] * entropy)

  def chunked(hidden, unembed):
    logp, entropy = token_logprobs(hidden, unembed, targets, banned_ids=BANNED, chunk=7)
    return jnp.sum(weights[0] * logp + weights[1] * entropy)

  for got, want in zip(jax.grad(chunked, (0, 1))(hidden, unembed),
                       jax.grad(plain, (0, 1))(hidden, unembed), strict=True):
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=1e-4)


def test_a_masked_banned_target_leaves_gradients_finite(inputs):
  hidden, unembed, targets = inputs
  targets = targets.copy()
  targets[0, 0] = BANNED[0]  # an image pad among the observed tokens
  mask = targets != BANNED[0]

  def loss(hidden):
    logp, _ = token_logprobs(hidden, unembed, targets, banned_ids=BANNED, chunk=7)
    assert logp.shape == (B, T)
    return jnp.sum(jnp.where(mask, logp, 0.0)), logp

  grads, logp = jax.grad(loss, has_aux=True)(hidden)
  assert logp[0, 0] == -jnp.inf and np.isfinite(np.asarray(logp)[mask]).all()
  assert np.isfinite(grads).all() and not np.asarray(grads)[0, 0].any()


def _sizes(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield getattr(variable.aval, "size", 0)
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _sizes(inner)


def test_no_array_of_tokens_by_vocabulary_exists():
  rows, length, width, vocab, chunk = 2, 256, 4, 2000, 16

  def loss(hidden, unembed, targets):
    logp, entropy = token_logprobs(hidden, unembed, targets, banned_ids=(1,), chunk=chunk)
    return jnp.sum(logp + entropy)

  args = (jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
          jax.ShapeDtypeStruct((vocab, width), jnp.float32),
          jax.ShapeDtypeStruct((rows, length), jnp.int32))
  grad = jax.grad(loss, (0, 1))
  largest = max(_sizes(jax.make_jaxpr(grad)(*args).jaxpr))
  assert largest == chunk * vocab  # a chunk's logits, and nothing larger
  memory = jax.jit(grad).lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < rows * length * vocab * 4 / 4


def test_bfloat16_hidden_gives_float32_results_and_master_gradients(inputs):
  hidden, unembed, targets = inputs
  half = jnp.asarray(hidden, jnp.bfloat16)

  def loss(unembed):
    logp, _ = token_logprobs(half, unembed, targets, banned_ids=BANNED, chunk=6)
    assert logp.dtype == jnp.float32
    return jnp.sum(logp), logp

  grads, logp = jax.grad(loss, has_aux=True)(unembed)
  assert grads.dtype == jnp.float32
  np.testing.assert_allclose(logp, reference(hidden, unembed, targets, 1.0)[0], atol=0.1)


def test_a_mesh_changes_nothing(inputs):
  hidden, unembed, targets = inputs
  hidden, targets = np.tile(hidden[:2], (2, 1, 1)), np.tile(targets[:2], (2, 1))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

  @jax.jit
  def sharded(hidden, unembed, targets):
    with sharding.use(mesh):
      return token_logprobs(hidden, unembed, targets, banned_ids=BANNED[:1], chunk=16)

  # 36 words: two devices divide them.
  args = (hidden, unembed[:36], targets)
  plain = token_logprobs(*args, banned_ids=BANNED[:1], chunk=1000)
  for got, want in zip(sharded(*args), plain, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"chunk": 0}, {"banned_ids": (V,)}])
def test_bad_options_are_refused(inputs, options):
  with pytest.raises(ValueError, match=next(iter(options))):
    token_logprobs(*inputs, **options)
