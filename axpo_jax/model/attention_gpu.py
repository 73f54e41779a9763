"""Attention of `model.attention` as Pallas kernels for NVIDIA GPUs, lowered through Triton.

One program computes a block of queries, of all heads that share a kv head. It loops over the blocks of keys
before it, and skips those in which every end is at or before its first query. The keys' gradients are computed by
one program per block of keys. No array of queries x keys exists. cuDNN's attention and tokamax's kernels
(0.0.12) would need one to express this visibility.

The kernels have been simulated on a CPU and lowered to Triton's IR, and not yet run on a GPU. So they are used
only where `model.attention` names them. jax 0.11 deprecated Pallas through Triton in
favour of Pallas for Mosaic GPU and warns where it lowers a kernel; jax 0.12 still lowers these.

Legend: B rows, T queries, S keys, K kv heads, G query heads a kv head, D head size, N blocks of keys;
inside a kernel M = G x the block's queries, and S the block's keys.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Queries of a block, counted in all heads of a group, and keys.
_QUERIES, _KEYS = 128, 64
# A masked score, and the maximum to start from: exp(_HIDDEN - _LEAST) is 0 too.
_HIDDEN, _LEAST = -2e30, -1e30


@dataclasses.dataclass(frozen=True)
class Block:
  """Sizes of a block, in tokens, and whether the kernel is simulated (on a CPU)."""

  queries: int
  keys: int
  interpret: bool


def suits(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> bool:
  """Whether so many queries and keys, with heads of this size, can be cut into blocks, which Triton
  takes in powers of two alone."""
  group = heads // kv_heads
  return (queries % _QUERIES == keys % _KEYS == 0 and head_dim in (32, 64, 128, 256)
          and group & (group - 1) == 0 and group <= _QUERIES // 16)


def attend(q_BxKxGxTxD: jax.Array, k_BxKxSxD: jax.Array, v_BxKxSxD: jax.Array, end_BxS: jax.Array,
           first: jax.Array, *, interpret: bool = False, block: Block | None = None) -> jax.Array:
  """As `attention_tpu.attend`."""
  block = block or Block(_QUERIES // q_BxKxGxTxD.shape[2], _KEYS, interpret)
  return _attend(block, q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, end_BxS, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block: Block, q, k, v, end_BxS, first) -> jax.Array:
  return _attend_forward(block, q, k, v, end_BxS, first)[0]


def _attend_forward(block: Block, q, k, v, end_BxS, first):
  statistic = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
  out, lse = _call(_forward, block, end_BxS, first, (q, k, v), ("query", "all", "all"),
                   (q, statistic), ("query", "query"), by_query=True, products=2)
  return out, (q, k, v, end_BxS, first, out, lse)


def _attend_backward(block: Block, saved, g):
  q, k, v, end_BxS, first, out, lse = saved
  inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
  arrays = (q, k, v, g, lse, inner)
  (dq,) = _call(_backward_queries, block, end_BxS, first, arrays,
                ("query", "all", "all", "query", "query", "query"), (q,), ("query",),
                by_query=True, products=3)
  dk, dv = _call(_backward_keys, block, end_BxS, first, arrays,
                 ("all", "key", "key", "all", "all", "all"), (k, v), ("key", "key"),
                 by_query=False, products=4)
  return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, block: Block, end_BxS, first, inputs, kinds, outputs, out_kinds, *, by_query,
          products: int):
  """One program a row, kv head and block of queries (or keys).

  kinds: how much of an array a program sees: the "query" or "key" block that is its own, or "all".
  """
  B, K, G, T, D = inputs[0].shape
  S = end_BxS.shape[1]
  last_BxN = end_BxS.reshape(B, -1, block.keys).max(-1)

  def spec(kind, x):
    size, axis = list(x.shape[2:]), {"query": 1, "key": 0}.get(kind)
    if axis is not None:
      size[axis] = block.queries if kind == "query" else block.keys
    return pl.BlockSpec((None, None, *size), lambda b, h, i: (
      b, h, *(i if a == axis else 0 for a in range(len(size)))))

  pairs = B * K * G * T * S / 2
  return pl.pallas_call(
    functools.partial(kernel, block),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    grid=(B, K, T // block.queries if by_query else S // block.keys),
    in_specs=[pl.BlockSpec((1,), lambda b, h, i: (0,)),
              pl.BlockSpec((None, S // block.keys), lambda b, h, i: (b, 0)),
              pl.BlockSpec((None, S), lambda b, h, i: (b, 0)),
              *(spec(kind, x) for kind, x in zip(kinds, inputs, strict=True))],
    out_specs=[spec(kind, x) for kind, x in zip(out_kinds, outputs, strict=True)],
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
    cost_estimate=pl.CostEstimate(
      flops=int(2 * products * pairs * D), transcendentals=int(pairs),
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))),
    interpret=block.interpret, name=kernel.__name__.strip("_"),
  )(first, last_BxN, end_BxS, *inputs)


def _scores(block: Block, q_MxD, k_SxD, end_S, first_query, first_key) -> jax.Array:
  """float32 [M, S], hidden ones replaced."""
  s_MxS = _dot(q_MxD, k_SxD.T) * q_MxD.shape[1] ** -0.5
  place_Mx1 = (first_query + jnp.arange(q_MxD.shape[0]) % block.queries)[:, None]
  place_1xS = (first_key + jnp.arange(block.keys))[None]
  return jnp.where((place_1xS <= place_Mx1) & (place_Mx1 < end_S[None]), s_MxS, _HIDDEN)


def _over_keys(block: Block, first_query, last_ref, end_ref, k_ref, v_ref, add, start):
  """`start` after add(keys, values, ends, first key, sum) for each visible block of keys."""

  def one(n, total):
    here = pl.ds(n * block.keys, block.keys)
    return add(k_ref[here, :], v_ref[here, :], end_ref[here], n * block.keys, total)

  before = jnp.minimum(pl.cdiv(first_query + block.queries, block.keys), last_ref.shape[0])
  return jax.lax.fori_loop(0, before, lambda n, total: jax.lax.cond(
    last_ref[n] > first_query, one, lambda _, total: total, n, total), start)


def _forward(block, first_ref, last_ref, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref):
  first_query, q_MxD = first_ref[0] + pl.program_id(2) * block.queries, _rows(q_ref[...])

  def add(k_SxD, v_SxD, end_S, first_key, total):
    top_M, sum_M, sum_MxD = total
    s_MxS = _scores(block, q_MxD, k_SxD, end_S, first_query, first_key)
    new_top_M = jnp.maximum(top_M, s_MxS.max(1))
    p_MxS, decay_M = jnp.exp(s_MxS - new_top_M[:, None]), jnp.exp(top_M - new_top_M)
    sum_MxD = sum_MxD * decay_M[:, None] + _dot(p_MxS.astype(v_SxD.dtype), v_SxD)
    return new_top_M, sum_M * decay_M + p_MxS.sum(1), sum_MxD

  M = len(q_MxD)
  top_M, sum_M, sum_MxD = _over_keys(
    block, first_query, last_ref, end_ref, k_ref, v_ref, add,
    (jnp.full(M, _LEAST), jnp.zeros(M), jnp.zeros(q_MxD.shape)))
  seen_M = jnp.where(sum_M > 0, sum_M, 1.0)
  out_ref[...] = (sum_MxD / seen_M[:, None]).reshape(out_ref.shape).astype(out_ref.dtype)
  lse_ref[...] = (top_M + jnp.log(seen_M)).reshape(lse_ref.shape)


def _weights(block, q_MxD, k_SxD, v_SxD, g_MxD, lse_M, inner_M, end_S, first_query, first_key):
  """Probabilities and the gradients of scores: float32 [M, S] each."""
  s_MxS = _scores(block, q_MxD, k_SxD, end_S, first_query, first_key)
  p_MxS = jnp.exp(s_MxS - lse_M[:, None])
  return p_MxS, p_MxS * (_dot(g_MxD, v_SxD.T) - inner_M[:, None])


def _backward_queries(block, first_ref, last_ref, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref,
                      inner_ref, dq_ref):
  first_query = first_ref[0] + pl.program_id(2) * block.queries
  q_MxD, g_MxD = _rows(q_ref[...]), _rows(g_ref[...])
  lse_M, inner_M = lse_ref[...].reshape(-1), inner_ref[...].reshape(-1)

  def add(k_SxD, v_SxD, end_S, first_key, dq_MxD):
    _, ds_MxS = _weights(block, q_MxD, k_SxD, v_SxD, g_MxD, lse_M, inner_M, end_S, first_query,
                         first_key)
    return dq_MxD + _dot(ds_MxS.astype(k_SxD.dtype), k_SxD)

  dq_MxD = _over_keys(block, first_query, last_ref, end_ref, k_ref, v_ref, add,
                      jnp.zeros(q_MxD.shape))
  dq_ref[...] = (dq_MxD * q_MxD.shape[1] ** -0.5).reshape(dq_ref.shape).astype(dq_ref.dtype)


def _backward_keys(block, first_ref, last_ref, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref,
                   dk_ref, dv_ref):
  number, first = pl.program_id(2), first_ref[0]
  first_key = number * block.keys
  k_SxD, v_SxD = k_ref[...], v_ref[...]
  end_S = end_ref[pl.ds(first_key, block.keys)]

  def add(i, total):
    dk_SxD, dv_SxD = total
    here = pl.ds(i * block.queries, block.queries)
    q_MxD, g_MxD = _rows(q_ref[:, here, :]), _rows(g_ref[:, here, :])
    p_MxS, ds_MxS = _weights(block, q_MxD, k_SxD, v_SxD, g_MxD, lse_ref[:, here].reshape(-1),
                             inner_ref[:, here].reshape(-1), end_S, first + i * block.queries,
                             first_key)
    return (dk_SxD + _dot(ds_MxS.astype(q_MxD.dtype).T, q_MxD),
            dv_SxD + _dot(p_MxS.astype(g_MxD.dtype).T, g_MxD))

  # Blocks of queries behind the first key and before the last end: these follow one another.
  start = jnp.maximum((first_key - first) // block.queries, 0)
  stop = jnp.clip(pl.cdiv(last_ref[number] - first, block.queries), 0,
                  q_ref.shape[1] // block.queries)
  dk_SxD, dv_SxD = jax.lax.fori_loop(start, stop, add,
                                     (jnp.zeros(k_SxD.shape), jnp.zeros(v_SxD.shape)))
  dk_ref[...] = (dk_SxD * k_SxD.shape[1] ** -0.5).astype(dk_ref.dtype)
  dv_ref[...] = dv_SxD.astype(dv_ref.dtype)


def _rows(x_GxTxD: jax.Array) -> jax.Array:
  """[M, D]"""
  return x_GxTxD.reshape(-1, x_GxTxD.shape[-1])


def _dot(a, b) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
