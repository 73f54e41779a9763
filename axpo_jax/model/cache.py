"""The key/value cache: one array for all layers, so that it can be donated and gathered as one.

Legend: L layers, B rows, S slots, K kv heads, H head size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from axpo_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (already rotated) and values of the tokens seen so far.

  k_LxBxSxKxH, v_LxBxSxKxH: slots from `lengths_B` on hold nothing of meaning.
  lengths_B: int32, real tokens in each row.
  """

  k_LxBxSxKxH: jax.Array
  v_LxBxSxKxH: jax.Array
  lengths_B: jax.Array

  @classmethod
  def empty(cls, config: ModelConfig, batch: int, length: int, dtype=None) -> KVCache:
    """An empty cache of `batch` rows and `length` slots; dtype defaults to the compute dtype."""
    text = config.text
    shape = (text.num_layers, batch, length, text.num_kv_heads, text.head_dim)
    dtype = dtype or config.dtype
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

  def append(self, k_LxBxTxKxH: jax.Array, v_LxBxTxKxH: jax.Array, real_BxT: jax.Array) -> KVCache:
    """Writes each row's real tokens (a prefix of its T) behind its length.

    Pads are dropped, and so are tokens beyond the last slot: the caller keeps
    lengths + T <= S.
    """
    rows_B, slots = self.k_LxBxSxKxH.shape[1], self.k_LxBxSxKxH.shape[2]
    at_BxT = self.lengths_B[:, None] + jnp.arange(real_BxT.shape[1])
    at_BxT = jnp.where(real_BxT, at_BxT, slots)  # out of bounds: the scatter drops it

    def write(cache, new):
      index = (slice(None), jnp.arange(rows_B)[:, None], at_BxT)
      return cache.at[index].set(new.astype(cache.dtype), mode="drop")

    return KVCache(
      write(self.k_LxBxSxKxH, k_LxBxTxKxH),
      write(self.v_LxBxSxKxH, v_LxBxTxKxH),
      self.lengths_B + real_BxT.sum(1, dtype=jnp.int32),
    )
