"""Static sizes of the embedded engine's calls, and how many programs they can make.

In: the engine's config and the devices that share its rows. Out: buckets, which the engine pads its calls
to, and the shapes that calls can have. Each shape is compiled when a call first has it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from axpo_jax.engine.embedded.batches import padded_list, prefill_rows
from axpo_jax.model.buckets import ROW_BUCKETS, Buckets

if TYPE_CHECKING:
  from axpo_jax.engine.settings import EmbeddedConfig


@dataclasses.dataclass(frozen=True)
class CallSizes:
  """Attributes:
    shards: devices that share the rows.
    batch: rows that a device has of a prefill or a decode.
    copy: rows of a copy.
    tokens: computed by a prefill, a row.
    slots: of the cache, a row.
  """

  config: EmbeddedConfig
  shards: int
  batch: Buckets
  copy: Buckets
  tokens: Buckets
  slots: Buckets

  @classmethod
  def of(cls, config: EmbeddedConfig, shards: int) -> CallSizes:
    return cls(
      config, shards,
      batch=Buckets(-(-config.min_batch // shards), -(-config.max_running // shards)),
      copy=Buckets(config.min_batch, config.max_running),
      tokens=Buckets(config.min_tokens, config.length),
      slots=Buckets(config.min_slots, config.length, fine=True))

  def encodes(self) -> set[tuple[int, int]]:
    """(rows, patches of a row) of the vision tower, for waves of up to 512 rows."""
    return {(-(-rows // self.shards) * self.shards, patches)
            for rows in ROW_BUCKETS for patches in self.config.patch_lengths}

  def copies(self) -> set[tuple[int, int]]:
    """(rows, slots)."""
    return {(rows, slots) for rows in self.copy.sizes for slots in self.slots.sizes}

  def prefills(self) -> set[tuple[int, int, int]]:
    """(rows of a device, tokens, slots)."""
    found, before = set(), 0
    for tokens in self.tokens.sizes:
      rows = prefill_rows(self.batch, tokens, self.shards, self.config.prefill_tokens)
      least = self.slots(before + 1)  # a row holds at least what is computed for it
      found |= {(count, tokens, slots) for count in rows for slots in self.slots.sizes if slots >= least}
      before = tokens
    return found

  def decodes(self) -> set[tuple[int, int]]:
    """(rows of a device, slots)."""
    least = self.slots(min(1 + self.config.decode_block, self.config.length))
    return {(rows, slots) for rows in self.batch.sizes for slots in self.slots.sizes if slots >= least}

  def programs(self, merge_unit: int, penalised: tuple[int, ...] = (0,)) -> dict[str, int]:
    """How many programs each function can have, at most.

    Args:
      merge_unit: patches of an image token.
      penalised: for every kind of sampling, the longest answer whose tokens it penalises; 0: none.
    """
    features = {rows * patches // merge_unit for rows, patches in self.encodes()}
    lists = {padded_list(length) if longest else 0
             for longest in penalised for length in range(min(longest, self.config.length) + 1)}
    prefills = self.prefills()
    computed = {rows * tokens for rows, tokens, _ in prefills}
    return {"encode": len(self.encodes()), "pick": len(features) * len(computed),
            "copy": len(self.copies()), "prefill": 2 * len(prefills),  # with images and without
            "decode": len(self.decodes()) * len(lists)}
