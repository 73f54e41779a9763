"""Attention that skips blocks of keys in long rows of many short trajectories; see `attention`.

On the host, `key_blocks` lists for each block of queries the blocks of keys that it can attend to:

  keys        0  1  2  3        3 trajectories: blocks 0-1, 2 and 3
  queries 0   x                 lists   0 -
          1   x  x                      0 1
          2         x                   2 -
          3            x                3 -

On the device, each block of queries becomes a batch row of its own, with copies of the keys in its list.

Legend: B batch, T queries, S keys, H heads, K kv heads, D head size, C blocks of queries of a row,
N blocks of keys that one of them lists, A = B C, P groups of query blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from axpo_jax.model import attention_xla
from axpo_jax.model.attention_xla import Tags, block, mask

# Most tokens of a block of keys. A block of queries may be longer, so that keys are taken less often.
KEYS = 64


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


def list_lengths(listed: int) -> list[int]:
  """Lengths of lists that get a program of their own; a group of blocks takes the next longer one."""
  return sorted({-(-listed * eighths // 8) for eighths in range(1, 9)})


def blocks_at_once(length: int, lists_BxCxN, chunk: int) -> int:
  """As many blocks of queries as have no more scores than one chunk without lists would have."""
  _, count, listed = lists_BxCxN.shape
  scores = (length // count) * listed * _key_size(length, lists_BxCxN)
  most = chunk * length // scores if chunk else count
  return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))


def attend(q_BxTxHxD: jax.Array, kv: tuple[jax.Array, jax.Array], tags: Tags,
           lists_BxCxN: jax.Array, chunk: int) -> jax.Array:
  """Attention of a row's tokens to the listed blocks of its own keys: [B, T, H, D].

  Args:
    kv: keys and values, see `attention_xla.block`.
    chunk: as of `attention.visibility`.
  """
  count = lists_BxCxN.shape[1]
  groups = count // blocks_at_once(q_BxTxHxD.shape[1], lists_BxCxN, chunk)
  q, order, lists = (x.reshape(len(x), groups, -1, *x.shape[2:]).swapaxes(0, 1)
                     for x in (q_BxTxHxD, tags.order_BxT, lists_BxCxN))
  out_PxBxTxHxD = _attend_groups(q, *_tokens_first(kv), order, lists, tags)
  return out_PxBxTxHxD.swapaxes(0, 1).reshape(q_BxTxHxD.shape)


def attend_at_once(q_BxTxHxD: jax.Array, kv: tuple[jax.Array, jax.Array], lists_BxCxN: jax.Array,
                   mask_AxTxM: jax.Array) -> jax.Array:
  """`attend` to all blocks at once, with the mask that `mask_at_once` made."""
  taken = _taken(*_tokens_first(kv), lists_BxCxN, q_BxTxHxD.shape[1])
  q = _fold(q_BxTxHxD, lists_BxCxN.shape[1])
  return attention_xla.attend(q, [block(*taken)], [mask_AxTxM]).reshape(q_BxTxHxD.shape)


def mask_at_once(tags: Tags, lists_BxCxN: jax.Array) -> jax.Array:
  """bool [B * C, T / C, N * size], size of a block of keys."""
  order_BxT, count = tags.order_BxT, lists_BxCxN.shape[1]
  return _block_mask(_fold(order_BxT, count), tags, lists_BxCxN,
                     _key_size(order_BxT.shape[1], lists_BxCxN))


def _tokens_first(kv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """A block as `_take_blocks` wants it: [B, S, K, D]."""
  return kv[0].transpose(0, 3, 1, 2), kv[1].transpose(0, 2, 1, 3)


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
  sees = _block_mask(_fold(order_BxT, count), keys, lists_BxCxN,
                     _key_size(order_BxT.shape[1], lists_BxCxN))

  def attention(q_BxTxHxD, k, v):
    out = attention_xla.attend(_fold(q_BxTxHxD, count), [block(k, v)], [sees])
    return out.reshape(q_BxTxHxD.shape)

  return attention


def _taken(k_BxSxKxD, v_BxSxKxD, lists_BxCxN, queries: int) -> tuple[jax.Array, jax.Array]:
  size = _key_size(queries, lists_BxCxN)
  return _take_blocks(k_BxSxKxD, size, lists_BxCxN), _take_blocks(v_BxSxKxD, size, lists_BxCxN)


def _key_size(length: int, lists_BxCxN) -> int:
  """Tokens of a listed block of keys."""
  return min(length // lists_BxCxN.shape[1], KEYS)


def _block_mask(order_AxT, keys: Tags, lists_BxCxN, size: int) -> jax.Array:
  """bool [B * C, T, N * size] of folded queries and the blocks of keys that they take."""
  order, end = (_take_blocks(x, size, lists_BxCxN) for x in (keys.order_BxT, keys.end_BxT))
  listed_AxN = lists_BxCxN.reshape(-1, lists_BxCxN.shape[2]) >= 0
  end = jnp.where(jnp.repeat(listed_AxN, size, axis=1), end, 0)
  return mask(Tags(order_AxT, order_AxT), Tags(order, end))


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
  """The transpose of `_take_blocks`, added to x."""
  batch, length, *rest = x_BxSxX.shape
  lists_BxN = lists_BxCxN.reshape(batch, -1)
  taken = taken_AxMxX.reshape(*lists_BxN.shape, -1, *rest)
  blocks = x_BxSxX.reshape(batch, -1, taken.shape[2], *rest)
  added = jax.vmap(lambda x, i, y: x.at[i].add(y))(blocks, jnp.maximum(lists_BxN, 0), taken)
  return added.reshape(batch, length, *rest)
