"""A micro-batch: its arrays, their sharding, statistics of its packing, and its file.

`packing.pack` makes Batches on the host, `step.Learner` trains on them. Where trajectories branch, one position
predicts several next tokens, so a batch lists the tokens to compute and the targets to score separately:

  tokens    q u e s t i o n  t h i n k  c a l l A  c a l l B       two calls after one shared beginning
  targets                    t h i n k  c a l l A  c a l l B       "c" twice, both predicted at the last "k"

Legend: B rows, T tokens of a row, G targets of a row, C, N blocks of attention (see
`model.attention_blocks.key_blocks`), R, P rows and patches of the vision tower.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Collection, Iterable, Sequence, Sized

import jax
import numpy as np
from etils import epath

from axpo_jax import paths
from axpo_jax.model import sharding
from axpo_jax.model.vision_inputs import LazyPatches, VisionInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """One micro-batch: the tokens to compute and, separately, the targets to score.

  Attributes:
    tokens_BxT: int32 ids, 0 on padding.
    positions_BxTx3: int32 M-RoPE positions.
    ends_BxT: int32, 0 for padding, else one more than the last position of the row that may attend to this
      token. Trajectories with a common beginning are laid out depth first, see `train.tree`.
    at_BxG: int32, the position in the row that predicts the target. One position may have several.
    targets_BxG: int32 ids.
    weights_BxG: float32, weight of the target in the loss; 0 for padding. `pack` gives every target 1,
      `with_weights` what an update wants.
    advantages_BxG: float32.
    behaviour_logp_BxG: float32, the sampler's log-probability of the target.
    lag_BxG: int32, versions by which the weights that drew the target are behind.
    key_blocks_BxCxN: int32, which blocks of keys a block of queries attends to; None: all.
    image_index_BxT: int32, -1 or the token's index among the merged image tokens of `vision`.
    vision: packed patches; None (and image_index_BxT None) if no example of the `pack` call has an
      image.
    old_logp_BxG: float32, the target's log-probability under the weights at the start of the step;
      None: the pass itself, so that the ratio is exactly one.
    ref_logp_BxG: float32, the same under the fixed reference; None: no KL.
    example_BxG: int32, number of the target's example in the `pack` call, -1 for padding. Only surrogates of
      whole sequences need it on the devices.
  """

  tokens_BxT: np.ndarray | jax.Array
  positions_BxTx3: np.ndarray | jax.Array
  ends_BxT: np.ndarray | jax.Array
  at_BxG: np.ndarray | jax.Array
  targets_BxG: np.ndarray | jax.Array
  weights_BxG: np.ndarray | jax.Array
  advantages_BxG: np.ndarray | jax.Array
  behaviour_logp_BxG: np.ndarray | jax.Array
  lag_BxG: np.ndarray | jax.Array
  key_blocks_BxCxN: np.ndarray | jax.Array | None = None
  image_index_BxT: np.ndarray | jax.Array | None = None
  vision: VisionInputs | None = None
  old_logp_BxG: np.ndarray | jax.Array | None = None
  ref_logp_BxG: np.ndarray | jax.Array | None = None
  example_BxG: np.ndarray | None = None


def place(batch: Batch, mesh: jax.sharding.Mesh, rules: sharding.Rules | None = None, *,
          examples: bool = False) -> Batch:
  """Puts the batch on the devices with `shardings`; `example_BxG` only with `examples`. Images become float
  patches here and not earlier."""
  if not examples:
    batch = dataclasses.replace(batch, example_BxG=None)
  if batch.vision is not None and isinstance(batch.vision.patches_RxPxC, LazyPatches):
    vision = dataclasses.replace(batch.vision, patches_RxPxC=np.asarray(batch.vision.patches_RxPxC))
    batch = dataclasses.replace(batch, vision=vision)
  return jax.tree.map(sharding.put, batch, shardings(batch, mesh, rules))


def shardings(batch: Batch, mesh: jax.sharding.Mesh, rules: sharding.Rules | None = None) -> Batch:
  """A NamedSharding for every array (or shape): token rows over the batch axes, patch rows over the
  vision rows'."""

  def of(path, x):
    names = ("vision_rows", "patches") if path[0].name == "vision" else ("batch", "length")
    names += (None,) * (x.ndim - 2)
    return sharding.sharding_for(names, x.shape, mesh, rules, label=sharding.path_name(path))

  return jax.tree_util.tree_map_with_path(of, batch)


def batch_shards(mesh: jax.sharding.Mesh, rules: sharding.Rules | None = None) -> int:
  """How many parts the batch axis is split into; the rows of a micro-batch must be a multiple."""
  return sharding.parts("batch", mesh, rules)


def vision_rows_here(mesh: jax.sharding.Mesh, rules: sharding.Rules | None = None
                     ) -> Callable[[int], Collection[int]] | None:
  """A function from the number of vision rows to those that this process puts on its devices; None: all of them."""
  if jax.process_count() == 1:
    return None

  def here(rows: int) -> Collection[int]:
    target = sharding.sharding_for(("vision_rows",), (rows,), mesh, rules)
    parts = target.addressable_devices_indices_map((rows,)).values()
    return frozenset(row for (part,) in parts for row in range(rows)[part])

  return here


def shape_of(batch: Batch) -> str:
  """What selects the compiled program of a batch: its sizes, and which fields it has."""
  rows, length = batch.tokens_BxT.shape
  parts = [f"{rows} x {length} tokens", f"{batch.targets_BxG.shape[1]} targets"]
  if batch.key_blocks_BxCxN is not None:
    parts.append("lists of {1} x {2} blocks".format(*batch.key_blocks_BxCxN.shape))
  if batch.vision is not None:
    parts.append("{} x {} patches".format(*batch.vision.segments_RxP.shape))
  parts += [name for name, logp in (("old", batch.old_logp_BxG), ("reference", batch.ref_logp_BxG))
            if logp is not None]
  return ", ".join(parts)


def with_weights(batches: Sequence[Batch], weights_S: np.ndarray) -> list[Batch]:
  """The batches with the weight `weights_S[s]` on every target of example s; see `rl.weights`."""
  padded = np.append(np.asarray(weights_S, np.float32), np.float32(0))  # -1 picks the last
  return [dataclasses.replace(batch, weights_BxG=padded[batch.example_BxG]) for batch in batches]


def targets(batches: Sequence[Batch]) -> float:
  """How many targets host batches score: the divisor of a plain mean over them; 1 if none."""
  return float(max(sum(int((batch.weights_BxG != 0).sum()) for batch in batches), 1))


def sums_by_example(batches: Sequence[Batch], values: Sequence[np.ndarray], examples: int) -> np.ndarray:
  """float64 [examples]: sums over each example's targets of host values [B, G], one array a batch."""
  total_S = np.zeros(examples)
  for batch, value_BxG in zip(batches, values, strict=True):
    target_BxG = batch.example_BxG >= 0
    total_S += np.bincount(batch.example_BxG[target_BxG], value_BxG[target_BxG], minlength=examples)
  return total_S


def packing_metrics(batches: Sequence[Batch], examples: Sequence[Sized]) -> dict[str, float]:
  """Counts of the host batches of these examples; the tokens that sharing prefixes saved; and the shares of
  positions, target slots and patch slots that are not padding."""
  tokens = sum(int((batch.ends_BxT > 0).sum()) for batch in batches)
  plain = sum(map(len, examples))
  out = {
    "pack/micro_batches": len(batches),
    "pack/sequences": len(examples),
    "pack/tokens": tokens,
    "pack/tokens_plain": plain,
    "pack/sharing": plain / max(tokens, 1),
    "pack/fill": _share(batch.ends_BxT > 0 for batch in batches),
    "pack/target_fill": _share(batch.weights_BxG != 0 for batch in batches),
  }
  if patches := [batch.vision.segments_RxP for batch in batches if batch.vision is not None]:
    out["pack/images"] = sum(int(segments.max(axis=1).sum()) for segments in patches)
    out["pack/vision_fill"] = _share(segments > 0 for segments in patches)
  return {name: float(value) for name, value in out.items()}


def _share(masks: Iterable[np.ndarray]) -> float:
  counts = [(mask.sum(), mask.size) for mask in masks]
  return sum(held for held, _ in counts) / max(sum(size for _, size in counts), 1)


def save_batch(path: str | os.PathLike, batch: Batch) -> None:
  """Writes every array of a batch to one .npz, to inspect a batch that broke the step."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  arrays = {sharding.path_name(key): np.asarray(value) for key, value in leaves}
  path, packed = epath.Path(path), io.BytesIO()
  np.savez_compressed(packed, **arrays)
  paths.make(path.parent)
  paths.write_bytes(path, packed.getvalue())


def load_batch(path: str | os.PathLike) -> Batch:
  """What `save_batch` wrote."""
  with epath.Path(path).open("rb") as file:
    arrays = dict(np.load(file))
  vision = {key.removeprefix("vision/"): arrays.pop(key)
            for key in list(arrays) if key.startswith("vision/")}
  return Batch(**arrays, vision=VisionInputs(**vision) if vision else None)
