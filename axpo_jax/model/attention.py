"""Attention: the one function that a faster back end would replace.

Who sees whom is told by two integers a token, not by a mask: a query sees the keys of its own
segment (0 is padding, which nobody sees) whose order is not later than its own. Causal text has
its index as order, image patches all have 0. Short sequences turn this into one boolean mask,
made once outside of the layer scan; long ones are done in blocks of queries, recomputed in the
backward pass, and a full [T, S] array never exists.

Keys and values may come in several blocks (a cache, then the new tokens) which share one softmax,
so that a cache need not be copied to append to it. A block has the cache's order of axes: keys
[B, K, D, S], values [B, K, S, D].

Legend: B batch, T queries, S keys, H heads, K kv heads, G = H / K, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Finite, so that a query that sees nothing (padding) gives finite numbers and zero gradients.
_HIDDEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tags:
  """segments_BxT, order_BxT: int32; see the module's docstring."""

  segments_BxT: jax.Array
  order_BxT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which keys each query sees. `masks` is None where queries are taken in chunks."""

  queries: Tags
  keys: tuple[Tags, ...]
  masks: tuple[jax.Array, ...] | None
  chunk: int = dataclasses.field(metadata={"static": True})


def visibility(queries: Tags, keys: Sequence[Tags], chunk: int) -> Visibility:
  """Prepares `attend` for these tokens; call it once, outside of the layers.

  chunk: queries per block for longer sequences; 0 takes any length at once.
  """
  short = not chunk or queries.segments_BxT.shape[1] <= chunk
  masks = tuple(_mask(queries, k) for k in keys) if short else None
  return Visibility(queries, tuple(keys), masks, chunk)


def block(k_BxSxKxD: jax.Array, v_BxSxKxD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values of tokens, as projections give them, in the order of axes of `attend`."""
  return k_BxSxKxD.transpose(0, 2, 3, 1), v_BxSxKxD.transpose(0, 2, 1, 3)


def attend(
  q_BxTxHxD: jax.Array, blocks: Sequence[tuple[jax.Array, jax.Array]], sees: Visibility
) -> jax.Array:
  """Grouped-query attention over the joined key blocks, softmax in float32.

  Args:
    blocks: (keys, values), see `block`, in the order of `sees.keys`.
  Returns: [B, T, H, D] in q's dtype.
  """
  if sees.masks is not None:
    return _attend(q_BxTxHxD, blocks, sees.masks)
  length = q_BxTxHxD.shape[1]
  split = functools.partial(_chunks, chunk=sees.chunk)

  # Without the checkpoint, the map would keep every chunk's probabilities for the backward pass.
  @jax.checkpoint
  def one(args):
    q, tags = args
    return _attend(q, blocks, [_mask(tags, k) for k in sees.keys])

  out = jax.lax.map(one, jax.tree.map(split, (q_BxTxHxD, sees.queries)))
  return out.swapaxes(0, 1).reshape(q_BxTxHxD.shape[0], -1, *q_BxTxHxD.shape[2:])[:, :length]


def _mask(queries: Tags, keys: Tags) -> jax.Array:
  """bool [B, T, S]."""
  same = queries.segments_BxT[:, :, None] == keys.segments_BxT[:, None, :]
  earlier = queries.order_BxT[:, :, None] >= keys.order_BxT[:, None, :]
  return same & earlier & (keys.segments_BxT[:, None, :] > 0)


def _chunks(x_BxTxX: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] padded with zeros (segment 0) to [T / chunk, B, chunk, ...]."""
  batch, length, *rest = x_BxTxX.shape
  padded = jnp.pad(x_BxTxX, [(0, 0), (0, -length % chunk)] + [(0, 0)] * len(rest))
  return padded.reshape(batch, -1, chunk, *rest).swapaxes(0, 1)


def _attend(q_BxTxHxD, blocks, masks) -> jax.Array:
  B, T, H, D = q_BxTxHxD.shape
  K = blocks[0][0].shape[1]
  # Plain batches of matrices (M = all queries that share a head's keys): CPU back ends are fast at
  # these and at no other order of axes.
  q_BxKxGxTxD = q_BxTxHxD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
  q_BxKxMxD = q_BxKxGxTxD.reshape(B, K, -1, D)
  scores = []
  for (k_BxKxDxS, _), mask_BxTxS in zip(blocks, masks, strict=True):
    s_BxKxMxS = _matmul(q_BxKxMxD, k_BxKxDxS) * D**-0.5
    s_BxKxGxTxS = s_BxKxMxS.reshape(B, K, H // K, T, -1)
    scores.append(jnp.where(mask_BxTxS[:, None, None], s_BxKxGxTxS, _HIDDEN))
  probs = jax.nn.softmax(jnp.concatenate(scores, -1) if len(scores) > 1 else scores[0], axis=-1)
  out, at = 0, 0
  for _, v_BxKxSxD in blocks:
    S = v_BxKxSxD.shape[2]
    p_BxKxMxS = probs[..., at : at + S].astype(v_BxKxSxD.dtype).reshape(B, K, -1, S)
    out += _matmul(p_BxKxMxS, v_BxKxSxD)
    at += S
  out_BxTxKxGxD = out.reshape(B, K, H // K, T, D).transpose(0, 3, 1, 2, 4)
  return out_BxTxKxGxD.reshape(B, T, H, D).astype(q_BxTxHxD.dtype)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)
