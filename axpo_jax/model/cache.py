"""The key/value cache: one array for all layers, so that it can be donated and gathered as one.

Slots are the last axis of keys and the last but one of values. A single query's two products read them in
this order; a cache in the order of the tokens would be transposed in every decode step.

Legend: L layers, B rows, S slots, T new tokens, K kv heads, H head size.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from axpo_jax.model.config import ModelConfig

# (keys [B, K, H, S], values [B, K, S, H]) of every block of slots that a layer attends to.
Blocks = tuple[tuple[jax.Array, jax.Array], ...]


class Past(Protocol):
  """A cache that is only read: `KVCache`, or rows of the embedded engine's pool."""

  lengths_B: jax.Array

  @property
  def num_layers(self) -> int: ...

  @property
  def filled(self) -> tuple[jax.Array, ...]: ...

  def layer(self, number: int | jax.Array) -> Blocks: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (already rotated) and values of the tokens seen so far.

  k_LxBxKxHxS, v_LxBxKxSxH: slots from `lengths_B` on are undefined.
  lengths_B: int32, real tokens in each row.
  """

  k_LxBxKxHxS: jax.Array
  v_LxBxKxSxH: jax.Array
  lengths_B: jax.Array

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int, dtype=None) -> KVCache:
    """An empty cache of `batch` rows and `length` slots; dtype defaults to the compute dtype."""
    text = config.text
    head = (text.num_layers, batch, text.num_kv_heads)
    dtype = dtype or config.dtype
    return cls(jnp.zeros((*head, text.head_dim, length), dtype),
               jnp.zeros((*head, length, text.head_dim), dtype), jnp.zeros(batch, jnp.int32))

  @property
  def num_layers(self) -> int:
    return self.k_LxBxKxHxS.shape[0]

  def layer(self, number: int | jax.Array) -> Blocks:
    """The blocks of slots of one layer."""
    return ((self.k_LxBxKxHxS[number], self.v_LxBxKxSxH[number]),)

  @property
  def filled(self) -> tuple[jax.Array, ...]:
    """bool [B, S] for every block: the slots that hold a token."""
    return (jnp.arange(self.v_LxBxKxSxH.shape[3]) < self.lengths_B[:, None],)

  def append(self, k_LxBxKxHxT: jax.Array, v_LxBxKxTxH: jax.Array, real_BxT: jax.Array) -> KVCache:
    """Writes each row's real tokens (a prefix of its T) behind its length.

    Pads are dropped, and so are tokens beyond the last slot: the caller keeps
    lengths + T <= S.
    """
    slots = self.v_LxBxKxSxH.shape[3]
    at_BxT = self.lengths_B[:, None] + jnp.arange(real_BxT.shape[1])
    at_BxT = jnp.where(real_BxT, at_BxT, slots)  # out of bounds: the scatter drops it
    rows_Bx1 = jnp.arange(len(at_BxT))[:, None]
    return KVCache(
      write_slots(self.k_LxBxKxHxS, rows_Bx1, at_BxT, k_LxBxKxHxT, slots_axis=4),
      write_slots(self.v_LxBxKxSxH, rows_Bx1, at_BxT, v_LxBxKxTxH, slots_axis=3),
      self.lengths_B + real_BxT.sum(1, dtype=jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
  """A cache that stays as it is, and a short block for the tokens that are decoded after it.

      past (constant)                 recent (carried by the loop)
      row 0   a a a a a . .           t0 t1 t2 .
      row 1   b b . . . . .           t0 t1 t2 .      3 steps done

  Rows advance together: step t writes slot t of every row. So a loop over steps carries only the short
  block, and its writes are plain slices. What a stopped row writes is never read.

  recent_k_LxBxKxHxT, recent_v_LxBxKxTxH: the first `steps` of T slots are written.
  """

  past: Past
  recent_k_LxBxKxHxT: jax.Array
  recent_v_LxBxKxTxH: jax.Array
  steps: jax.Array

  @classmethod
  def after(cls, past: Past, slots: int) -> DecodeCache:
    """An empty block of `slots` tokens a row after `past`."""
    k = past.layer(0)[0][0]
    layers, (rows, heads, size, _) = past.num_layers, k.shape
    return cls(past, jnp.zeros((layers, rows, heads, size, slots), k.dtype),
               jnp.zeros((layers, rows, heads, slots, size), k.dtype), jnp.int32(0))

  def layer(self, number: int | jax.Array) -> Blocks:
    return (*self.past.layer(number),
            (self.recent_k_LxBxKxHxT[number], self.recent_v_LxBxKxTxH[number]))

  @property
  def filled(self) -> tuple[jax.Array, ...]:
    rows, slots = self.past.lengths_B.shape[0], self.recent_v_LxBxKxTxH.shape[3]
    written_T = jnp.arange(slots) < self.steps
    return (*self.past.filled, jnp.broadcast_to(written_T, (rows, slots)))

  def append(self, k_LxBxKxHx1: jax.Array, v_LxBxKx1xH: jax.Array, _real_Bx1) -> DecodeCache:
    """Writes one token of every row."""
    def put(recent, new, axis):
      return jax.lax.dynamic_update_slice_in_dim(
        recent, new.astype(recent.dtype), self.steps, axis)

    return DecodeCache(
      self.past, put(self.recent_k_LxBxKxHxT, k_LxBxKxHx1, 4),
      put(self.recent_v_LxBxKxTxH, v_LxBxKx1xH, 3), self.steps + 1)


def write_slots(cache: jax.Array, rows_Bx1: jax.Array, at_BxT: jax.Array, new: jax.Array, *,
                slots_axis: int) -> jax.Array:
  """`cache` with the T slots of `new` at slots `at_BxT` of rows `rows_Bx1`; those out of bounds are
  dropped. Both arrays have rows on axis 1 and slots on `slots_axis`."""
  index = [slice(None)] * cache.ndim
  index[1], index[slots_axis] = rows_Bx1, at_BxT
  # NumPy's rule: indexed axes that are not adjacent come first in the result.
  new_BxTxLxX = jnp.moveaxis(new, (1, slots_axis), (0, 1))
  return cache.at[tuple(index)].set(new_BxTxLxX.astype(cache.dtype), mode="drop")
