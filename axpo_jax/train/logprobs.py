"""Log-probabilities and entropy over the vocabulary, a chunk of tokens at a time.

In: the model's last hidden states and its unembedding matrix. Out: log p(target) and the entropy at
every position. Logits of all tokens would be the largest array of the whole step (24,576 tokens
times 151,936 words in float32 are 15 GB), so they exist for one chunk at a time, and the backward
pass computes each chunk again instead of keeping it.

Legend: B rows, T tokens of a row, S tokens of a row in one chunk, N chunks, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from axpo_jax.model import sharding
from axpo_jax.model.sharding import constrain


def token_logprobs(
  hidden_BxTxD: jax.Array,
  unembed_VxD: jax.Array,
  targets_BxT: jax.Array,
  *,
  banned_ids: Sequence[int] = (),
  temperature: float = 1.0,
  chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
  """log p(target) and entropy of softmax(hidden @ unembed.T / temperature) without `banned_ids`.

  The matmul runs in the dtype of `hidden` and accumulates in float32; all else is float32.
  Differentiable in `hidden` and `unembed`.

  Args:
    hidden_BxTxD: after the final norm.
    unembed_VxD: any float dtype. Its gradient is summed over the chunks in that dtype.
    targets_BxT: int32; what the position predicts.
    banned_ids: ids that the sampler cannot draw. They get probability zero and the softmax is
      normalised over the others. A banned target has log-probability -inf.
    temperature: of the sampler, so that trainer and sampler speak of one distribution.
    chunk: tokens (over all rows) whose logits exist at once; at least one a row.

  Returns:
    logp float32 [B, T], entropy float32 [B, T] in nats.

  Raises:
    ValueError: temperature or chunk that is not positive, or a banned id outside the vocabulary.
  """
  banned_V = _banned_mask(banned_ids, unembed_VxD.shape[0])
  if temperature <= 0 or chunk <= 0:
    raise ValueError(f"temperature={temperature} and chunk={chunk} must be positive")
  rows, length = targets_BxT.shape
  # Chunks are cut along the length: every chunk keeps all rows, so the rows' sharding holds.
  size = min(max(chunk // rows, 1), length)
  # Where the length is split too, every device takes an equal part of a chunk.
  size = -(-size // sharding.parts("length")) * sharding.parts("length")
  # One gather of the fsdp shards for all chunks; the vocabulary stays split.
  unembed_VxD = constrain(unembed_VxD, ("vocab", "act_embed"))

  @jax.checkpoint
  def one_chunk(hidden_BxSxD, targets_BxS):
    return _chunk(hidden_BxSxD, unembed_VxD, targets_BxS, banned_V, temperature)

  def body(_, chunk_inputs):
    return None, one_chunk(*chunk_inputs)

  inputs = (_to_chunks(hidden_BxTxD, size), _to_chunks(targets_BxT, size))
  _, (logp, entropy) = jax.lax.scan(body, None, inputs)
  return _from_chunks(logp, length), _from_chunks(entropy, length)


def _chunk(hidden_BxSxD, unembed_VxD, targets_BxS, banned_V, temperature):
  # The cast is inside the chunk so that its transpose adds up the chunks' gradients in the
  # dtype of the master parameters, not in bfloat16.
  logits_BxSxV = jnp.einsum("bsd,vd->bsv", hidden_BxSxD, unembed_VxD.astype(hidden_BxSxD.dtype),
                            preferred_element_type=jnp.float32) / temperature
  logits_BxSxV = constrain(logits_BxSxV, ("batch", "length", "act_vocab"))
  normaliser_BxS = jax.nn.logsumexp(jnp.where(banned_V, -jnp.inf, logits_BxSxV), axis=-1)
  # A comparison and a sum, not a gather: a gather along a split vocabulary would collect it.
  hit_BxSxV = jnp.arange(len(banned_V)) == targets_BxS[..., None]
  target_BxS = jnp.sum(jnp.where(hit_BxSxV, logits_BxSxV, 0.0), axis=-1)
  logp_BxS = jnp.where(jnp.asarray(banned_V)[targets_BxS], -jnp.inf, target_BxS - normaliser_BxS)
  # -E[log p] and not log Z - E[logit], which cancels digits. Banned entries are 0 * finite, so no
  # 0 * inf arises.
  log_BxSxV = logits_BxSxV - normaliser_BxS[..., None]
  return logp_BxS, -jnp.sum(jnp.where(banned_V, 0.0, jnp.exp(log_BxSxV)) * log_BxSxV, axis=-1)


def _banned_mask(banned_ids: Sequence[int], vocab: int) -> np.ndarray:
  ids = np.asarray(tuple(banned_ids), np.int64)
  if ids.size and (ids.min() < 0 or ids.max() >= vocab):
    raise ValueError(f"banned_ids={ids.tolist()} must lie in the vocabulary of {vocab}")
  mask = np.zeros(vocab, bool)
  mask[ids] = True
  return mask


def _to_chunks(x_BxT, size: int):
  """[B, T, ...] -> [N, B, size, ...], zeros after T."""
  rows, length = x_BxT.shape[:2]
  count = -(-length // size)
  rest = x_BxT.shape[2:]
  padded = jnp.pad(x_BxT, [(0, 0), (0, count * size - length)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(padded.reshape(rows, count, size, *rest), 1, 0)


def _from_chunks(x_NxBxS, length: int):
  """The inverse of `_to_chunks` for [N, B, S]."""
  count, rows, size = x_NxBxS.shape
  return jnp.moveaxis(x_NxBxS, 0, 1).reshape(rows, count * size)[:, :length]
