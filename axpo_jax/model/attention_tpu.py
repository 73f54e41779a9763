"""Attention of `model.attention` as a Pallas kernel for TPUs: forward and backward pass, tile by tile.

A tile is a block of queries, of all heads that share a kv head, times a block of keys. Before each call the
ends say which tiles hold a query and a key that it attends to, and the kernel's grid is the list of these:
other tiles cost nothing, and no array of queries x keys exists, not even of booleans. Inside a tile, scores
have keys as the first axis ([S, M], M = heads of a group x queries), so that the statistics of a query lie
along the lanes, as they do in memory.

Published kernels cannot express this: splash attention makes its mask from a dense one or from indices alone,
and the fast kernels of tokamax (0.0.12) do not support its `q_end`, which is our end.

Legend: B rows, T queries, S keys, K kv heads, G query heads a kv head, D head size, C, N blocks of
queries and of keys; inside a kernel S and M are those of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Queries of a tile, counted in all heads of a group, and keys.
_QUERIES, _KEYS = 1024, 512
# Tiles of a call: their list is in scalar memory, which is a MiB.
_TILES = 1 << 17
# A masked score, and the maximum to start from. The score is twice the maximum, so that its probability is
# zero even where a query attends to nothing.
_HIDDEN, _LEAST = -2e30, -1e30
# Products a @ b.T and a.T @ b.
_NT, _TN = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Tile:
  """Sizes of a tile, in tokens, and whether the kernel is simulated (on a CPU)."""

  queries: int
  keys: int
  interpret: bool


def suits(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> bool:
  """Whether so many queries and keys, with heads of this size, can be cut into tiles."""
  group = heads // kv_heads
  if queries % LANES or keys % LANES or head_dim % LANES or group > _QUERIES // LANES:
    return False
  tile = _tile(queries, keys, group, interpret=False)
  return queries // tile.queries * (keys // tile.keys) <= _TILES


def attend(q_BxKxGxTxD: jax.Array, k_BxKxSxD: jax.Array, v_BxKxSxD: jax.Array, end_BxS: jax.Array,
           first: jax.Array, *, interpret: bool = False, tile: Tile | None = None) -> jax.Array:
  """softmax(q k / sqrt(D)) v, where query t attends to key s if s <= first + t < end[s].

  Args:
    first: int32 [1], index in the row of the first of these queries. There may be fewer queries than keys.
    interpret: run on a CPU, for tests.
    tile: default the largest that divides the lengths.
  Returns: [B, K, G, T, D] in q's dtype; zeros where a query attends to nothing.
  """
  G, T, S = *q_BxKxGxTxD.shape[2:4], k_BxKxSxD.shape[2]
  tile = tile or _tile(T, S, G, interpret)
  return _attend(tile, q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, end_BxS, first)


def _tile(queries: int, keys: int, group: int, interpret: bool) -> Tile:
  def largest(length, most):
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)

  return Tile(largest(queries, _QUERIES // group), largest(keys, _KEYS), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tile: Tile, q, k, v, end_BxS, first) -> jax.Array:
  return _attend_forward(tile, q, k, v, end_BxS, first)[0]


def _attend_forward(tile: Tile, q, k, v, end_BxS, first):
  call = _Call(tile, q, k, end_BxS, first, by_query=True)
  out, lse = call(
    _forward, {"q": q, "k": k, "v": v}, (jax.ShapeDtypeStruct(q.shape, q.dtype), call.statistic),
    ("q", "statistic"), [(1, call.M), (1, call.M), (call.D, call.M)], products=2)
  return out, (q, k, v, end_BxS, first, out, lse)


def _attend_backward(tile: Tile, saved, g):
  q, k, v, end_BxS, first, out, lse = saved
  call = _Call(tile, q, k, end_BxS, first, by_query=True)
  inner = call.as_statistic(jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1))
  inputs = {"q": q, "k": k, "v": v, "g": g, "lse": lse, "inner": inner}
  (dq,) = call(_backward_queries, inputs, (jax.ShapeDtypeStruct(q.shape, q.dtype),), ("q",),
               [(call.D, call.M)], products=3)
  call = _Call(tile, q, k, end_BxS, first, by_query=False)
  shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
  dk, dv = call(_backward_keys, inputs, (shape, shape), ("k", "k"), [(tile.keys, call.D)] * 2,
                products=4)
  return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


class _Call:
  """A kernel call over the visible tiles, grouped by the block of queries (or of keys) that they add to."""

  def __init__(self, tile: Tile, q, k, end_BxS, first, *, by_query: bool):
    self.B, self.K, self.G, self.T, self.D = q.shape
    self.S, self.tile, self.by_query = k.shape[2], tile, by_query
    self.M, self.C = self.G * tile.queries, self.T // tile.queries
    self.end_Bx1xS, self.first = end_BxS[:, None], first
    self.statistic = jax.ShapeDtypeStruct((self.B, self.K, self.C, 1, self.M), jnp.float32)
    sees_BxCxN = visible_tiles(end_BxS, first[0], self.C, tile)
    sees = sees_BxCxN if by_query else sees_BxCxN.swapaxes(1, 2)
    (_, self.groups, self.others), (self.tiles, self.count) = sees.shape, _listed(sees)

  def as_statistic(self, x_BxKxGxT: jax.Array) -> jax.Array:
    parts = x_BxKxGxT.reshape(self.B, self.K, self.G, self.C, self.tile.queries)
    return parts.swapaxes(2, 3).reshape(self.statistic.shape)

  def __call__(self, kernel: Callable, inputs: dict[str, jax.Array], out_shapes, out_kinds, scratch,
               *, products: int):
    specs = self._specs()
    # All inputs that are not keys or values belong to queries.
    kind = {"q": "q", "g": "q", "k": "k", "v": "k", "lse": "statistic", "inner": "statistic"}
    pairs = self.B * self.K * self.G * self.T * self.S / 2
    return pl.pallas_call(
      functools.partial(kernel, self),
      out_shape=out_shapes,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2, grid=(self.K, self.count),
        in_specs=[specs["end"], *(specs[kind[name]] for name in inputs)],
        out_specs=[specs[name] for name in out_kinds],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
      cost_estimate=pl.CostEstimate(
        flops=int(2 * products * pairs * self.D), transcendentals=int(pairs),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *out_shapes))),
      interpret=self.tile.interpret, name=kernel.__name__.strip("_"),
    )(self.tiles, self.first, self.end_Bx1xS, *inputs.values())

  def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch row, block of queries and block of keys of a listed tile."""
    group, other = tile // self.others, tile % self.others
    row, group = group // self.groups, group % self.groups
    return (row, group, other) if self.by_query else (row, other, group)

  def edges(self, tiles) -> tuple[jax.Array, jax.Array]:
    """Whether the present tile is the first, and the last, that adds to its block of results."""
    here, last = pl.program_id(1), pl.num_programs(1) - 1
    group, before, behind = (tiles[n] // self.others for n in (
      here, jnp.maximum(here - 1, 0), jnp.minimum(here + 1, last)))
    return (here == 0) | (before != group), (here == last) | (behind != group)

  def _specs(self) -> dict[str, pl.BlockSpec]:
    queries, keys = self.tile.queries, self.tile.keys

    def spec(shape, index):
      """index: from kv head, batch row, block of queries and block of keys."""
      return pl.BlockSpec(shape, lambda h, n, tiles, _: index(h, *self.place(tiles[n])))

    return {
      "q": spec((1, 1, self.G, queries, self.D), lambda h, b, c, n: (b, h, 0, c, 0)),
      "k": spec((1, 1, keys, self.D), lambda h, b, c, n: (b, h, n, 0)),
      "statistic": spec((1, 1, 1, 1, self.M), lambda h, b, c, n: (b, h, c, 0, 0)),
      "end": spec((1, 1, keys), lambda h, b, c, n: (b, 0, n)),
    }


def visible_tiles(end_BxS: jax.Array, first: jax.Array, blocks: int, tile: Tile) -> jax.Array:
  """bool [B, C, N]: tiles that hold a query and a key it attends to. `blocks` is C; see `attend`."""
  last_BxN = end_BxS.reshape(len(end_BxS), -1, tile.keys).max(-1)
  first_C = first + jnp.arange(blocks) * tile.queries
  begin_N = jnp.arange(last_BxN.shape[1]) * tile.keys
  past_CxN = begin_N <= first_C[:, None] + tile.queries - 1
  return past_CxN & (first_C[:, None] < last_BxN[:, None, :])


def _listed(sees_BxCxN: jax.Array):
  """The flat indices of the visible tiles, ascending, and their number.

  A block of queries with no visible tile is listed once, since its output must be written.
  """
  sees_BxCxN = sees_BxCxN.at[:, :, 0].max(~sees_BxCxN.any(-1))
  # By a cumulative sum: a sort of so many indices takes seconds to compile.
  behind = jnp.cumsum(sees_BxCxN.ravel(), dtype=jnp.int32)
  size = len(behind)
  to = jnp.where(sees_BxCxN.ravel(), behind - 1, size)
  return jnp.zeros(size, jnp.int32).at[to].set(
    jnp.arange(size, dtype=jnp.int32), mode="drop"), behind[-1]


def _scores(call: _Call, tiles, first, end_ref, q_MxD, k_SxD) -> jax.Array:
  """float32 [S, M], hidden ones replaced."""
  _, query, key = call.place(tiles[pl.program_id(1)])
  tile = call.tile
  s_SxM = _dot(k_SxD, q_MxD, _NT) * q_MxD.shape[1] ** -0.5
  place_1xM = jax.lax.broadcasted_iota(jnp.int32, (1, q_MxD.shape[0]), 1) % tile.queries
  place_1xM += first[0] + query * tile.queries
  place_Sx1 = jax.lax.broadcasted_iota(jnp.int32, (tile.keys, 1), 0) + key * tile.keys
  end_Sx1 = end_ref[0].T
  return jnp.where((place_Sx1 <= place_1xM) & (place_1xM < end_Sx1), s_SxM, _HIDDEN)


def _forward(call, tiles, first, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, top, total, sum_DxM):
  is_first, is_last = call.edges(tiles)

  @pl.when(is_first)
  def _():
    top[...] = jnp.full_like(top, _LEAST)
    total[...] = jnp.zeros_like(total)
    sum_DxM[...] = jnp.zeros_like(sum_DxM)

  s_SxM = _scores(call, tiles, first, end_ref, _rows(q_ref), k_ref[0, 0])
  new_top = jnp.maximum(top[...], s_SxM.max(0, keepdims=True))
  p_SxM, decay = jnp.exp(s_SxM - new_top), jnp.exp(top[...] - new_top)
  top[...] = new_top
  total[...] = total[...] * decay + p_SxM.sum(0, keepdims=True)
  sum_DxM[...] = sum_DxM[...] * decay + _dot(v_ref[0, 0], p_SxM.astype(v_ref.dtype), _TN)

  @pl.when(is_last)
  def _():
    seen = jnp.where(total[...] > 0, total[...], 1.0)
    out_ref[...] = (sum_DxM[...] / seen).T.reshape(out_ref.shape).astype(out_ref.dtype)
    lse_ref[...] = (top[...] + jnp.log(seen)).reshape(lse_ref.shape)


def _weights(call, tiles, first, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref):
  """Probabilities and the gradients of scores: float32 [S, M] each."""
  s_SxM = _scores(call, tiles, first, end_ref, _rows(q_ref), k_ref[0, 0])
  p_SxM = jnp.exp(s_SxM - lse_ref[0, 0, 0])
  return p_SxM, p_SxM * (_dot(v_ref[0, 0], _rows(g_ref), _NT) - inner_ref[0, 0, 0])


def _backward_queries(call, tiles, first, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref,
                      dq_ref, dq_DxM):
  is_first, is_last = call.edges(tiles)

  @pl.when(is_first)
  def _():
    dq_DxM[...] = jnp.zeros_like(dq_DxM)

  _, ds_SxM = _weights(call, tiles, first, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref)
  dq_DxM[...] += _dot(k_ref[0, 0], ds_SxM.astype(k_ref.dtype), _TN)

  @pl.when(is_last)
  def _():
    scale = dq_DxM.shape[0] ** -0.5
    dq_ref[...] = (dq_DxM[...] * scale).T.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _backward_keys(call, tiles, first, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref,
                   dk_ref, dv_ref, dk_SxD, dv_SxD):
  is_first, is_last = call.edges(tiles)

  @pl.when(is_first)
  def _():
    dk_SxD[...] = jnp.zeros_like(dk_SxD)
    dv_SxD[...] = jnp.zeros_like(dv_SxD)

  p_SxM, ds_SxM = _weights(
    call, tiles, first, end_ref, q_ref, k_ref, v_ref, g_ref, lse_ref, inner_ref)
  dv_SxD[...] += _dot(p_SxM.astype(g_ref.dtype), _rows(g_ref))
  dk_SxD[...] += _dot(ds_SxM.astype(q_ref.dtype), _rows(q_ref))

  @pl.when(is_last)
  def _():
    scale = dk_SxD.shape[1] ** -0.5
    dk_ref[0, 0] = (dk_SxD[...] * scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_SxD[...].astype(dv_ref.dtype)


def _rows(ref) -> jax.Array:
  """The [1, 1, G, T, D] block as [M, D]."""
  return ref[...].reshape(-1, ref.shape[-1])


def _dot(a, b, dimensions=(((1,), (0,)), ((), ()))) -> jax.Array:
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
