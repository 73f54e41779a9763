"""Attention in plain XLA: boolean masks over whole arrays of scores. It runs anywhere; see `attention`.

Keys and values may come in several blocks (a cache, then the new tokens) which share one softmax,
so that a cache need not be copied to append to it. A block has the cache's order of axes: keys
[B, K, D, S], values [B, K, S, D].

Legend: B batch, T queries, S keys, H heads, K kv heads, G = H / K, M = G T, D head size.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Finite, so that a query that attends to nothing (padding) gives finite numbers and zero gradients.
_HIDDEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tags:
  """order_BxT, end_BxT: int32; see `attention`. Of queries only the order counts."""

  order_BxT: jax.Array
  end_BxT: jax.Array


def mask(queries: Tags, keys: Tags) -> jax.Array:
  """Which keys each query attends to: bool [B, T, S]."""
  order_BxTx1 = queries.order_BxT[:, :, None]
  return (keys.order_BxT[:, None, :] <= order_BxTx1) & (order_BxTx1 < keys.end_BxT[:, None, :])


def block(k_BxSxKxD: jax.Array, v_BxSxKxD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values of tokens, as projections give them, as a block."""
  return k_BxSxKxD.transpose(0, 2, 3, 1), v_BxSxKxD.transpose(0, 2, 1, 3)


def attend(q_BxTxHxD, blocks, masks) -> jax.Array:
  """Attention over the joined blocks, each with its mask [B, T, S]: [B, T, H, D] in q's dtype."""
  B, T, H, D = q_BxTxHxD.shape
  K = blocks[0][0].shape[1]
  # Plain batches of matrices (M = all queries that share a head's keys): CPU back ends are fast at
  # these and at no other order of axes.
  q_BxKxGxTxD = q_BxTxHxD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
  out = _softmax(q_BxKxGxTxD.reshape(B, K, -1, D), tuple(blocks), tuple(masks))
  out_BxTxKxGxD = out.reshape(B, K, H // K, T, D).transpose(0, 3, 1, 2, 4)
  return out_BxTxKxGxD.reshape(B, T, H, D).astype(q_BxTxHxD.dtype)


@jax.custom_vjp
def _softmax(q_BxKxMxD, blocks, masks) -> jax.Array:
  """softmax(q k / sqrt(D)) v over all blocks: float32 [B, K, M, D].

  Forward and backward pass are written so that they go over arrays of M x S as seldom as possible:
  on a CPU that is what attention costs. So nothing but narrow arrays is ever divided or transposed.
  """
  return _softmax_forward(q_BxKxMxD, blocks, masks)[0]


def _softmax_forward(q_BxKxMxD, blocks, masks):
  B, K, M, D = q_BxKxMxD.shape
  scores = []
  for (k_BxKxDxS, _), mask_BxTxS in zip(blocks, masks, strict=True):
    _, T, S = mask_BxTxS.shape
    s_BxKxGxTxS = (_matmul(q_BxKxMxD, k_BxKxDxS) * D**-0.5).reshape(B, K, M // T, T, S)
    scores.append(jnp.where(mask_BxTxS[:, None, None], s_BxKxGxTxS, _HIDDEN).reshape(B, K, M, S))
  top = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in scores))
  exps = [jnp.exp(s - top) for s in scores]
  total = sum(e.sum(-1, keepdims=True) for e in exps)
  out = sum(_matmul(e.astype(v.dtype), v) for e, (_, v) in zip(exps, blocks)) / total
  return out, (q_BxKxMxD, blocks, exps, total, out)


def _softmax_backward(saved, g_BxKxMxD):
  q, blocks, exps, total, out = saved
  scale = q.shape[-1] ** -0.5
  inner = (g_BxKxMxD * out).sum(-1, keepdims=True) / total
  g = (g_BxKxMxD / total).astype(q.dtype)
  dq, dblocks = 0, []
  for (k, v), e in zip(blocks, exps, strict=True):
    ds = (e * (_matmul(g, v.mT) - inner)).astype(q.dtype)
    dq += _matmul(ds, k.mT)
    dk = _matmul(q.mT, ds) * scale
    dv = _matmul(g.mT, e.astype(q.dtype)).mT
    dblocks.append((dk.astype(k.dtype), dv.astype(v.dtype)))
  return (dq * scale).astype(q.dtype), tuple(dblocks), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)
