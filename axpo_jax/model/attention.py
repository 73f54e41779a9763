"""Attention: the one function that a faster back end would replace.

Two integers per token encode visibility: its order and its end. A query of order i attends to the keys with
order <= i < end. In causal text a token's order is its index and its end is the end of its sequence.
Trajectories that share a prefix are one row, depth first; a token's end is the end of its subtree, so only its
descendants attend to it:

  row     p0 p1 | a2 a3 | b4 b5        a prefix p, and its continuations a and b
  order    0  1    2  3    4  5
  end      6  6    4  4    6  6        b4 attends to p0, p1 and itself: the ends of a2, a3 are 4

All patches of an image have the same order, and the next number as end. Nothing attends to an end of 0, padding.

Three ways compute it. A kernel, where there is one for the machine and the sizes (`choose_backend`). Else XLA: short
sequences with one boolean mask, made once outside of the layer scan; long ones in blocks of queries that the
backward pass recomputes, so a full [T, S] array never exists. `key_blocks` lists the blocks of keys that a block of
queries can attend to at all, and the others are skipped.

Keys and values may come in several blocks (a cache, then the new tokens) which share one softmax,
so that a cache need not be copied to append to it. A block has the cache's order of axes: keys
[B, K, D, S], values [B, K, S, D].

Legend: B batch, T queries, S keys, H heads, K kv heads, G = H / K, D head size, C blocks of a row,
N blocks that one of them sees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axpo_jax.model import attention_gpu, attention_tpu, sharding

_KERNELS = {"tpu": attention_tpu, "gpu": attention_gpu}
# Finite, so that a query that sees nothing (padding) gives finite numbers and zero gradients.
_HIDDEN = -1e30
# Most tokens of a block of keys. A block of queries may be longer, so that keys are taken less often.
KEYS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tags:
  """order_BxT, end_BxT: int32; see the module's docstring. Of queries only the order counts."""

  order_BxT: jax.Array
  end_BxT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which keys each query sees.

  `masks` is None where queries are taken in chunks, or by a kernel. With `key_blocks_BxCxN` it holds
  one mask, of the taken keys alone: [B * C, T / C, N * size], size of a block of keys.
  """

  queries: Tags
  keys: tuple[Tags, ...]
  masks: tuple[jax.Array, ...] | None
  key_blocks_BxCxN: jax.Array | None
  chunk: int = dataclasses.field(metadata={"static": True})
  parts: int = dataclasses.field(default=1, metadata={"static": True})
  backend: str = dataclasses.field(default="xla", metadata={"static": True})


def row_visibility(ends_BxT: jax.Array, chunk: int, key_blocks_BxCxN: jax.Array | None = None,
                   backend: str = "xla") -> Visibility:
  """`visibility` of a row's tokens among each other, where a token's order is its index.

  The row may be split over devices: then each does its own queries.

  backend: from `choose_backend`.
  """
  order_BxT = jnp.broadcast_to(jnp.arange(ends_BxT.shape[1]), ends_BxT.shape)
  tags, parts = Tags(order_BxT, ends_BxT), sharding.parts("length")
  if backend != "xla":
    return Visibility(tags, (tags,), None, None, chunk, parts, backend)
  lists = key_blocks_BxCxN if parts == 1 else None  # see `reads_key_blocks`
  return dataclasses.replace(visibility(tags, [tags], chunk, lists), parts=parts)


def choose_backend(asked: str, length: int, heads: int, kv_heads: int, head_dim: int) -> str:
  """"xla", "tpu" or "gpu": what `ModelConfig.attention` asks for; for "auto" "tpu" where it runs.

  Raises:
    AttentionError: the kernel that is asked for cannot do it.
  """
  parts = sharding.parts("length")
  suiting = [name for name, kernel in _KERNELS.items()
             if length % parts == 0 and kernel.suits(
               length // parts, length, heads, kv_heads, head_dim)]
  if asked == "auto":
    return "tpu" if sharding.platform() == "tpu" and "tpu" in suiting else "xla"
  if asked in _KERNELS and asked not in suiting:
    raise AttentionError(
      f"model.attention={asked!r} does not take {length} tokens over {parts} devices with {heads} "
      f"heads of {head_dim} over {kv_heads}: use 'auto' or 'xla', or see docs/pods.md for sizes")
  return asked


def reads_key_blocks(asked: str, length: int, heads: int, kv_heads: int, head_dim: int) -> bool:
  """Whether rows of this length are attended to by lists of `key_blocks`; kernels find their tiles by
  themselves. Arguments as of `choose_backend`, on the mesh of the innermost `sharding.use`."""
  # Lists are of blocks in the order of the row, which a split row is not taken in.
  return sharding.parts("length") == 1 and choose_backend(
    asked, length, heads, kv_heads, head_dim) == "xla"


class AttentionError(ValueError):
  """Sizes that a kernel which was asked for by name does not do."""


def visibility(queries: Tags, keys: Sequence[Tags], chunk: int,
               key_blocks_BxCxN: jax.Array | None = None) -> Visibility:
  """Prepares `attend` for these tokens; call it once, outside of the layers.

  chunk: queries per block for longer sequences; 0 takes any length at once.
  key_blocks_BxCxN: from the function of that name, where `queries` are the one item of `keys`.
  """
  length = queries.order_BxT.shape[1]
  if key_blocks_BxCxN is not None:
    if blocks_at_once(length, key_blocks_BxCxN, chunk) < key_blocks_BxCxN.shape[1]:
      return Visibility(queries, tuple(keys), None, key_blocks_BxCxN, chunk)
    mask = _block_mask(_fold(queries.order_BxT, key_blocks_BxCxN.shape[1]), keys[0],
                       key_blocks_BxCxN, _key_size(length, key_blocks_BxCxN))
    return Visibility(queries, tuple(keys), (mask,), key_blocks_BxCxN, chunk)
  short = not chunk or length <= chunk
  masks = tuple(_mask(queries, k) for k in keys) if short else None
  return Visibility(queries, tuple(keys), masks, None, chunk)


def key_blocks(end_BxT: np.ndarray, queries: int) -> np.ndarray | None:
  """Which blocks of keys each block of `queries` may see, where a token's order is its index.

  On the host, from the ends alone: queries see a key of an earlier block if that key ends behind the
  first of them. A block of keys has as many tokens as one of queries, at most `KEYS`.

  Returns: int32 [B, C, N], ascending, -1 behind the last; None if it would save less than a quarter,
    since taking blocks costs something too. N is one or three quarters of the row's blocks: each N is
    a program of its own, and within one `attend` takes shorter lists as they are.
  """
  rows, length = end_BxT.shape
  size = min(queries, KEYS)
  last_BxS = end_BxT.reshape(rows, length // size, size).max(axis=-1)
  first_C, key_S = np.arange(0, length, queries), np.arange(0, length, size)
  sees_BxCxS = last_BxS[:, None, :] > first_C[:, None]
  sees_BxCxS &= key_S < first_C[:, None] + queries
  most = max(int(sees_BxCxS.sum(-1).max(initial=0)), 1)
  widths = [width for quarters in (1, 3)
            if most <= (width := -(-quarters * len(key_S) // 4)) < len(key_S)]
  if not widths:
    return None
  most = widths[0]
  taken_BxCxN = np.argsort(~sees_BxCxS, axis=-1, kind="stable")[..., :most]
  seen_BxCxN = np.take_along_axis(sees_BxCxS, taken_BxCxN, -1)
  return np.where(seen_BxCxN, taken_BxCxN, -1).astype(np.int32)


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
  if sees.backend in _KERNELS:
    return _attend_kernel(q_BxTxHxD, blocks[0], sees)
  if sees.key_blocks_BxCxN is not None:
    return _attend_listed(q_BxTxHxD, blocks[0], sees)
  if sees.masks is not None:
    return _attend(q_BxTxHxD, blocks, sees.masks)
  split = functools.partial(_chunks, chunk=sees.chunk, parts=sees.parts)

  # Without the checkpoint, the map would keep every chunk's probabilities for the backward pass.
  @jax.checkpoint
  def one(args):
    q, tags = args
    return _attend(q, blocks, [_mask(tags, k) for k in sees.keys])

  out = jax.lax.map(one, jax.tree.map(split, (q_BxTxHxD, sees.queries)))
  return _joined(out, sees.parts)[:, :q_BxTxHxD.shape[1]]


def _mask(queries: Tags, keys: Tags) -> jax.Array:
  """bool [B, T, S]."""
  order_BxTx1 = queries.order_BxT[:, :, None]
  return (keys.order_BxT[:, None, :] <= order_BxTx1) & (order_BxTx1 < keys.end_BxT[:, None, :])


def _chunks(x_BxTxX: jax.Array, chunk: int, parts: int) -> jax.Array:
  """[B, T, ...] padded with zeros (segment 0) to [T / chunk, B, chunk, ...].

  Each of the parts, which lie on different devices, gives its share of every chunk.
  """
  batch, length, *rest = x_BxTxX.shape
  chunk = -(-chunk // parts) * parts
  padded = jnp.pad(x_BxTxX, [(0, 0), (0, -length % chunk)] + [(0, 0)] * len(rest))
  split = jnp.moveaxis(padded.reshape(batch, parts, -1, chunk // parts, *rest), 2, 0)
  return split.reshape(-1, batch, chunk, *rest)


def _joined(x_NxBxCxX: jax.Array, parts: int) -> jax.Array:
  """The inverse of `_chunks`, still padded."""
  count, batch, chunk, *rest = x_NxBxCxX.shape
  split = x_NxBxCxX.reshape(count, batch, parts, chunk // parts, *rest)
  return jnp.moveaxis(split, 0, 2).reshape(batch, count * chunk, *rest)


def _attend(q_BxTxHxD, blocks, masks) -> jax.Array:
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


def _attend_kernel(q_BxTxHxD, kv, sees: Visibility) -> jax.Array:
  """`attend` by a kernel, every device for its own rows, heads and queries, and all keys."""
  (B, T, H, D), (k_BxKxDxS, v_BxKxSxD) = q_BxTxHxD.shape, kv
  K = k_BxKxDxS.shape[1]
  queries = ("batch", "act_kv_heads", None, "length", None)
  keys = ("batch", "act_kv_heads", None, None)
  kernel = functools.partial(_KERNELS[sees.backend].attend, interpret=sharding.platform() == "cpu")
  first_P = jnp.arange(sees.parts, dtype=jnp.int32) * (T // sees.parts)
  out_BxKxGxTxD = sharding.local(kernel, queries, keys, keys, ("batch", None), ("length",))(
    q_BxTxHxD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4), k_BxKxDxS.mT, v_BxKxSxD,
    sees.keys[0].end_BxT, first_P)
  return out_BxKxGxTxD.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _attend_listed(q_BxTxHxD, kv, sees: Visibility) -> jax.Array:
  """`attend` over the listed blocks of keys: a block of queries is a batch row of its own."""
  lists_BxCxN, count = sees.key_blocks_BxCxN, sees.key_blocks_BxCxN.shape[1]
  # Tokens in front, as `_take_blocks` wants them.
  kv_BxSxKxD = kv[0].transpose(0, 3, 1, 2), kv[1].transpose(0, 2, 1, 3)
  if sees.masks is not None:
    taken = _taken(*kv_BxSxKxD, lists_BxCxN, q_BxTxHxD.shape[1])
    return _attend(_fold(q_BxTxHxD, count), [block(*taken)], sees.masks).reshape(q_BxTxHxD.shape)
  groups = count // blocks_at_once(q_BxTxHxD.shape[1], lists_BxCxN, sees.chunk)
  q, order, lists = (x.reshape(len(x), groups, -1, *x.shape[2:]).swapaxes(0, 1)
                     for x in (q_BxTxHxD, sees.queries.order_BxT, lists_BxCxN))
  out_PxBxTxHxD = _attend_groups(q, *kv_BxSxKxD, order, lists, sees.keys[0])
  return out_PxBxTxHxD.swapaxes(0, 1).reshape(q_BxTxHxD.shape)


@jax.custom_vjp
def _attend_groups(q_PxBxTxHxD, k_BxSxKxD, v_BxSxKxD, order_PxBxT, lists_PxBxCxN, keys: Tags):
  """One group P of queries after the other, each with the keys that its own blocks list.

  The backward pass is written out: it recomputes a group within the branch for its length of lists, and
  adds what the group gives to its keys in place. The transpose of the loop would fill arrays for the
  branches that are not taken, and make gradients of all keys for every group.
  """
  def one(group):
    q, order, lists = group
    return _at_length(lists, lambda part: _listed(order, part, keys)(
      q, *_taken(k_BxSxKxD, v_BxSxKxD, part, order.shape[1])))

  return jax.lax.map(one, (q_PxBxTxHxD, order_PxBxT, lists_PxBxCxN))


def _groups_forward(*args):
  return _attend_groups(*args), args


def _groups_backward(args, g_PxBxTxHxD):
  q_PxBxTxHxD, k, v, order_PxBxT, lists_PxBxCxN, keys = args

  def one(sums, group):
    q, order, lists, g = group

    def with_lists(part):
      _, pull = jax.vjp(_listed(order, part, keys), q, *_taken(k, v, part, order.shape[1]))
      dq, *taken = pull(g)
      return tuple(_add_blocks(x, y, part) for x, y in zip(sums, taken, strict=True)), dq

    return _at_length(lists, with_lists)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  (dk, dv), dq = jax.lax.scan(one, zeros, (q_PxBxTxHxD, order_PxBxT, lists_PxBxCxN, g_PxBxTxHxD))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend_groups.defvjp(_groups_forward, _groups_backward)


def _at_length(lists_BxCxN, function: Callable[[jax.Array], Any]) -> Any:
  """The function of the lists without most of what is empty behind them."""
  lengths = list_lengths(lists_BxCxN.shape[2])
  longest = (lists_BxCxN >= 0).sum(-1).max()
  return jax.lax.switch((longest > jnp.asarray(lengths[:-1])).sum(),
                        [functools.partial(function, lists_BxCxN[..., :n]) for n in lengths])


def _listed(order_BxT, lists_BxCxN, keys: Tags) -> Callable[..., jax.Array]:
  """Attention of queries [B, T, H, D] to keys and values that were taken for each of their blocks."""
  count = lists_BxCxN.shape[1]
  mask = _block_mask(_fold(order_BxT, count), keys, lists_BxCxN,
                     _key_size(order_BxT.shape[1], lists_BxCxN))

  def attention(q_BxTxHxD, k, v):
    return _attend(_fold(q_BxTxHxD, count), [block(k, v)], [mask]).reshape(q_BxTxHxD.shape)

  return attention


def _taken(k_BxSxKxD, v_BxSxKxD, lists_BxCxN, queries: int) -> tuple[jax.Array, jax.Array]:
  size = _key_size(queries, lists_BxCxN)
  return _take_blocks(k_BxSxKxD, size, lists_BxCxN), _take_blocks(v_BxSxKxD, size, lists_BxCxN)


def _key_size(length: int, lists_BxCxN) -> int:
  """Tokens of a listed block of keys."""
  return min(length // lists_BxCxN.shape[1], KEYS)


def list_lengths(listed: int) -> list[int]:
  """Lengths of lists that are worth a program of their own: of a group the next one is taken."""
  return sorted({-(-listed * eighths // 8) for eighths in range(1, 9)})


def blocks_at_once(length: int, lists_BxCxN, chunk: int) -> int:
  """As many blocks of queries as have no more scores than one chunk without lists would have."""
  _, count, listed = lists_BxCxN.shape
  scores = (length // count) * listed * _key_size(length, lists_BxCxN)
  most = chunk * length // scores if chunk else count
  return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))


def _block_mask(order_AxT, keys: Tags, lists_BxCxN, size: int) -> jax.Array:
  """bool [B * C, T, N * size] of folded queries and the blocks of keys that they take."""
  order, end = (_take_blocks(x, size, lists_BxCxN) for x in (keys.order_BxT, keys.end_BxT))
  listed_AxN = lists_BxCxN.reshape(-1, lists_BxCxN.shape[2]) >= 0
  end = jnp.where(jnp.repeat(listed_AxN, size, axis=1), end, 0)
  return _mask(Tags(order_AxT, order_AxT), Tags(order, end))


def _fold(x_BxTxX: jax.Array, count: int) -> jax.Array:
  """[B, T, ...] to [B * count, T / count, ...]."""
  batch, length, *rest = x_BxTxX.shape
  return x_BxTxX.reshape(batch * count, length // count, *rest)


def _take_blocks(x_BxSxX: jax.Array, size: int, lists_BxCxN: jax.Array) -> jax.Array:
  """The listed blocks of `size` (the first for -1): [B * C, N * size, ...]."""
  batch, length, *rest = x_BxSxX.shape
  blocks = x_BxSxX.reshape(batch, length // size, size, *rest)
  taken = jax.vmap(lambda x, i: x[i])(blocks, jnp.maximum(lists_BxCxN, 0))
  return taken.reshape(batch * lists_BxCxN.shape[1], -1, *rest)


def _add_blocks(x_BxSxX: jax.Array, taken_AxMxX: jax.Array, lists_BxCxN: jax.Array) -> jax.Array:
  """The transpose of `_take_blocks`, added to what is there."""
  batch, length, *rest = x_BxSxX.shape
  lists_BxN = lists_BxCxN.reshape(batch, -1)
  taken = taken_AxMxX.reshape(*lists_BxN.shape, -1, *rest)
  blocks = x_BxSxX.reshape(batch, -1, taken.shape[2], *rest)
  added = jax.vmap(lambda x, i, y: x.at[i].add(y))(blocks, jnp.maximum(lists_BxN, 0), taken)
  return added.reshape(batch, length, *rest)
