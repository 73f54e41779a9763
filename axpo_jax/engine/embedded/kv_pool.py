"""The embedded engine's KV rows: one array of keys and one of values, split over all devices.

On several devices the pool's rows are split over all axes of the mesh but `tensor`, which splits the kv
heads. A row's keys and values never leave their device, except by `copy`: a call's rows are arranged so that
each device computes for rows of its own (`prefix_pool.Layout`), so no program ever gathers the pool.

Row numbers equal to the number of rows are padding: reads of them are clamped, writes are dropped.

Legend: L layers, R rows of the pool, S slots, K kv heads, H head size; B rows of one call, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from axpo_jax.model import sharding
from axpo_jax.model.cache import Blocks, DecodeCache, KVCache, write_slots

# Of keys and of values alike, in the pool and in a call's cache.
ROWS = ("layers", "batch", "act_kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolRows:
  """Rows of a pool as a cache that is only read, layer by layer (`model.cache.Past`).

  Nothing is copied beforehand: where the layers are scanned, one layer's rows at a time are gathered
  while it runs. `held_L` is for few layers, whose loop is written out: it gathers them once for all
  tokens that read them.
  """

  pool: Pool
  rows_B: jax.Array
  lengths_B: jax.Array
  slots: int = dataclasses.field(metadata={"static": True})
  held_L: tuple[tuple[jax.Array, jax.Array], ...] | None = None

  @property
  def num_layers(self) -> int:
    return self.pool.k_LxRxKxHxS.shape[0]

  @property
  def filled(self) -> tuple[jax.Array, ...]:
    return (jnp.arange(self.slots) < self.lengths_B[:, None],)

  def layer(self, number: int | jax.Array) -> Blocks:
    if self.held_L is not None:
      return (self.held_L[number],)
    return (self.pool.read_layer(number, self.rows_B, self.slots),)

  def held(self) -> PoolRows:
    return dataclasses.replace(
      self, held_L=tuple(self.layer(number)[0] for number in range(self.num_layers)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """Keys and values of all rows, in the order of axes of `KVCache`."""

  k_LxRxKxHxS: jax.Array
  v_LxRxKxSxH: jax.Array

  def read_layer(self, number: int | jax.Array, rows_B: jax.Array, slots: int
                 ) -> tuple[jax.Array, jax.Array]:
    """Keys [B, K, H, S] and values [B, K, S, H] of one layer: the first `slots` slots of the rows."""

    # One gather: a slice of the pool, gathered afterwards, could be copied whole before the loop.
    def take(own_B, k_LxRxKxHxS, v_LxRxKxSxH):
      heads, size = k_LxRxKxHxS.shape[2:4]

      def taken(x, *sizes):
        def one(row):
          return jax.lax.dynamic_slice(x, (number, row, 0, 0, 0), (1, 1, *sizes))[:, 0]
        return jax.vmap(one, out_axes=1)(own_B)

      return taken(k_LxRxKxHxS, heads, size, slots), taken(v_LxRxKxSxH, heads, slots, size)

    k_1xBxKxHxS, v_1xBxKxSxH = self._on_own_rows(take, rows_B)
    return k_1xBxKxHxS[0], v_1xBxKxSxH[0]

  def read(self, rows_B: jax.Array, lengths_B: jax.Array, slots: int) -> KVCache:
    """The first `slots` slots of the given rows, as a cache that the model takes."""

    def take(own_B, k_LxRxKxHxS, v_LxRxKxSxH):
      layers, rows = k_LxRxKxHxS.shape[:2]
      # One gather over (layer, row) pairs: one over rows alone comes out rows-first on CPU, and is
      # then copied once more to stand layers-first.
      pairs = (jnp.arange(layers)[:, None] * rows + jnp.minimum(own_B, rows - 1)).reshape(-1)

      def taken(x):
        out = x.reshape(layers * rows, *x.shape[2:]).at[pairs].get(mode="promise_in_bounds")
        return out.reshape(layers, len(own_B), *out.shape[1:])

      return taken(k_LxRxKxHxS[..., :slots]), taken(v_LxRxKxSxH[..., :slots, :])

    return KVCache(*self._on_own_rows(take, rows_B), lengths_B)

  def write(self, rows_B: jax.Array, cache: KVCache) -> Pool:
    """Writes whole rows back, as many slots as the cache has."""

    def put(own_B, k_LxRxKxHxS, v_LxRxKxSxH, new_k, new_v):
      slots = new_v.shape[3]
      return (k_LxRxKxHxS.at[:, own_B, :, :, :slots].set(new_k, mode="drop"),
              v_LxRxKxSxH.at[:, own_B, :, :slots].set(new_v, mode="drop"))

    return Pool(*self._on_own_rows(put, rows_B, (cache.k_LxBxKxHxS, ROWS),
                                   (cache.v_LxBxKxSxH, ROWS)))

  def write_recent(self, rows_B: jax.Array, cache: DecodeCache, count_B: jax.Array) -> Pool:
    """Writes the first `count_B` tokens decoded in a block behind each row's past."""
    slot_T = jnp.arange(cache.recent_v_LxBxKxTxH.shape[3])
    at_BxT = cache.past.lengths_B[:, None] + slot_T
    at_BxT = jnp.where(slot_T < count_B[:, None], at_BxT, self.v_LxRxKxSxH.shape[3])  # or dropped

    def put(own_B, k_LxRxKxHxS, v_LxRxKxSxH, at_BxT, new_k, new_v):
      to = (own_B[:, None], at_BxT)
      return (write_slots(k_LxRxKxHxS, *to, new_k, slots_axis=4),
              write_slots(v_LxRxKxSxH, *to, new_v, slots_axis=3))

    return Pool(*self._on_own_rows(
      put, rows_B, (at_BxT, ("batch", None)), (cache.recent_k_LxBxKxHxT, ROWS),
      (cache.recent_v_LxBxKxTxH, ROWS)))

  def _on_own_rows(self, function: Callable[..., tuple[jax.Array, jax.Array]], rows_B: jax.Array,
                   *more: tuple[jax.Array, sharding.Names]) -> tuple[jax.Array, jax.Array]:
    """function(rows_B, keys, values, *more), run by every device on its part of the rows.

    There `rows_B` counts from the device's first row; numbers of padding are beyond its last.
    """
    given = [(rows_B, ("batch",)), (self.k_LxRxKxHxS, ROWS), (self.v_LxRxKxSxH, ROWS), *more]
    arrays, names = zip(*given, strict=True)
    if sharding.parts("batch") == 1:
      return tuple(sharding.constrain(x, ROWS) for x in function(*arrays))
    mesh, rules = sharding.current()

    def own(rows_B, keys, *rest):
      own_B = rows_B - jax.lax.axis_index(rules["batch"]) * keys.shape[1]
      return function(jnp.where(own_B < 0, keys.shape[1], own_B), keys, *rest)

    specs = tuple(sharding.sharding_for(n, x.shape, mesh, rules).spec
                  for x, n in zip(arrays, names, strict=True))
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(sharding.spec(ROWS, rules),) * 2,
                         check_vma=False)(*arrays)

  def copy(self, source_B: jax.Array, row_B: jax.Array, slots: int) -> Pool:
    """Copies the first `slots` slots of rows to rows, from whatever device to whatever device.

    On several devices one row's layer after the other: each goes to all devices, and one keeps it.
    """
    if sharding.parts("batch") == 1:
      return self.write(row_B, self.read(source_B, jnp.zeros_like(source_B), slots))
    mesh, rules = sharding.current()
    axes, all_rows = rules["batch"], self.k_LxRxKxHxS.shape[1]

    def moved(pool, slots_axis, layer, source, row):
      own_rows = pool.shape[1]
      first = jax.lax.axis_index(axes) * own_rows
      sizes = [1, 1, *pool.shape[2:]]
      sizes[slots_axis] = slots

      def start(row):
        return layer, jnp.clip(row - first, 0, own_rows - 1), 0, 0, 0

      def is_own(row):
        return (first <= row) & (row < first + own_rows)

      found = jax.lax.dynamic_slice(pool, start(source), sizes)
      found = jax.lax.psum(jnp.where(is_own(source), found, 0), axes)
      kept = jax.lax.dynamic_slice(pool, start(row), sizes)
      return jax.lax.dynamic_update_slice(pool, jnp.where(is_own(row), found, kept), start(row))

    def all_moved(k, v, source_B, row_B):
      layers = k.shape[0]

      def one(i, pool):
        place = i % layers, source_B[i // layers], row_B[i // layers]
        return moved(pool[0], 4, *place), moved(pool[1], 3, *place)

      return jax.lax.fori_loop(0, (row_B < all_rows).sum() * layers, one, (k, v))

    rows, whole = sharding.spec(ROWS, rules), jax.sharding.PartitionSpec()
    return Pool(*jax.shard_map(
      all_moved, mesh=mesh, in_specs=(rows, rows, whole, whole), out_specs=(rows, rows),
      check_vma=False)(self.k_LxRxKxHxS, self.v_LxRxKxSxH, source_B, row_B))


def engine_rules(rules: sharding.Rules | None = None) -> sharding.Rules:
  """The training rules, as sampling needs them: a decoded token cannot be split along the length, so
  the devices that share a row's tokens in training take rows of their own."""
  rules = sharding.DEFAULT_RULES if rules is None else rules
  return {**rules, "batch": rules["vision_rows"], "length": None}
