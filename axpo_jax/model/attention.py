"""Attention: which keys a query attends to, and the back end that computes it.

Two integers per token encode visibility: its order and its end. A query of order i attends to the keys with
order <= i < end. In causal text a token's order is its index and its end is the end of its sequence.
Trajectories that share a prefix are one row, depth first; a token's end is the end of its subtree, so only its
descendants attend to it:

  row     p0 p1 | a2 a3 | b4 b5        a prefix p, and its continuations a and b
  order    0  1    2  3    4  5
  end      6  6    4  4    6  6        b4 attends to p0, p1 and itself: the ends of a2, a3 are 4

All patches of an image have the same order, and the next number as end. Nothing attends to an end of 0, padding.

A back end computes it:

  attention_tpu, attention_gpu   Pallas kernels, where `choose_backend` finds that the sizes suit one
  attention_blocks               XLA, for rows of many trajectories: skips blocks of keys that no query attends to
  attention_xla                  XLA, for everything else

In XLA a short sequence has one boolean mask, made once outside of the layer scan. A long one is computed in
chunks of queries, which the backward pass recomputes, so a full [T, S] array never exists.

Legend: B batch, T queries, S keys, H heads, K kv heads, G = H / K, D head size, C blocks of queries of a row,
N blocks of keys that one of them lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from axpo_jax.model import attention_blocks, attention_gpu, attention_tpu, attention_xla, sharding
from axpo_jax.model.attention_xla import Tags

_KERNELS = {"tpu": attention_tpu, "gpu": attention_gpu}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which keys each query attends to.

  `masks` is None where queries are computed in chunks, or by a kernel. With `key_blocks_BxCxN` it holds
  the one mask of `attention_blocks.mask_at_once`.
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

  The row may be split over devices: then each computes its own queries.

  backend: from `choose_backend`.
  """
  order_BxT = jnp.broadcast_to(jnp.arange(ends_BxT.shape[1]), ends_BxT.shape)
  tags, parts = Tags(order_BxT, ends_BxT), sharding.parts("length")
  if backend != "xla":
    return Visibility(tags, (tags,), None, None, chunk, parts, backend)
  lists = key_blocks_BxCxN if parts == 1 else None  # see `reads_key_blocks`
  return dataclasses.replace(visibility(tags, [tags], chunk, lists), parts=parts)


def choose_backend(asked: str, length: int, heads: int, kv_heads: int, head_dim: int) -> str:
  """"xla", "tpu" or "gpu": what `ModelConfig.attention` asks for. "auto" is "tpu" where it runs, else "xla".

  Raises:
    AttentionError: the kernel that the config names does not take these sizes.
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
  """Whether rows of this length need `attention_blocks.key_blocks`; kernels find their tiles by themselves.

  Arguments as of `choose_backend`, on the mesh of the innermost `sharding.use`.
  """
  # The lists number blocks in the order of the row. A row that is split over devices is chunked in another order.
  return sharding.parts("length") == 1 and choose_backend(
    asked, length, heads, kv_heads, head_dim) == "xla"


class AttentionError(ValueError):
  """The config names a kernel that does not take these sizes."""


def visibility(queries: Tags, keys: Sequence[Tags], chunk: int,
               key_blocks_BxCxN: jax.Array | None = None) -> Visibility:
  """Prepares `attend` for these tokens; call it once, outside of the layers.

  chunk: queries per block for longer sequences; 0 takes any length at once.
  key_blocks_BxCxN: from `attention_blocks.key_blocks`, where `queries` are the one item of `keys`.
  """
  length = queries.order_BxT.shape[1]
  if key_blocks_BxCxN is not None:
    at_once = attention_blocks.blocks_at_once(length, key_blocks_BxCxN, chunk)
    masks = ((attention_blocks.mask_at_once(queries, key_blocks_BxCxN),)
             if at_once == key_blocks_BxCxN.shape[1] else None)
    return Visibility(queries, tuple(keys), masks, key_blocks_BxCxN, chunk)
  short = not chunk or length <= chunk
  masks = tuple(attention_xla.mask(queries, k) for k in keys) if short else None
  return Visibility(queries, tuple(keys), masks, None, chunk)


def attend(
  q_BxTxHxD: jax.Array, blocks: Sequence[tuple[jax.Array, jax.Array]], sees: Visibility
) -> jax.Array:
  """Grouped-query attention over the joined key blocks, softmax in float32.

  Args:
    blocks: (keys, values), see `attention_xla.block`, in the order of `sees.keys`.
  Returns: [B, T, H, D] in q's dtype.
  """
  if sees.backend in _KERNELS:
    return _attend_kernel(q_BxTxHxD, blocks[0], sees)
  if sees.key_blocks_BxCxN is not None:
    lists = sees.key_blocks_BxCxN
    if sees.masks is not None:
      return attention_blocks.attend_at_once(q_BxTxHxD, blocks[0], lists, sees.masks[0])
    return attention_blocks.attend(q_BxTxHxD, blocks[0], sees.keys[0], lists, sees.chunk)
  if sees.masks is not None:
    return attention_xla.attend(q_BxTxHxD, blocks, sees.masks)
  split = functools.partial(_chunks, chunk=sees.chunk, parts=sees.parts)

  # Without the checkpoint, the map would keep every chunk's probabilities for the backward pass.
  @jax.checkpoint
  def one(args):
    q, tags = args
    return attention_xla.attend(q, blocks, [attention_xla.mask(tags, k) for k in sees.keys])

  out = jax.lax.map(one, jax.tree.map(split, (q_BxTxHxD, sees.queries)))
  return _joined(out, sees.parts)[:, :q_BxTxHxD.shape[1]]


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
