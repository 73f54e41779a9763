"""Packing: from trajectories of any length to micro-batches of one static shape (host, NumPy).

In: Examples, one per trajectory, everything aligned with the token it belongs to. Out: Batches of
[rows, length], everything aligned with the position that *predicts* the token. Several trajectories
stand in one row behind each other; a segment id keeps them apart in attention, and each has its own
M-RoPE positions. An image that several trajectories of a micro-batch show is encoded once. All
batches of one call have the same shapes, so the step compiles once for them.

Legend: B rows, T tokens of a row or an example, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from axpo_jax.model.config import VisionConfig
from axpo_jax.model.images import ProcessedImage
from axpo_jax.model.vision_inputs import PATCH_BUCKETS, ROW_BUCKETS, pack_images
from axpo_jax.rl.losses import aggregation_weights
from axpo_jax.train.batch import Batch


class PackingError(ValueError):
  """An example that cannot be trained on as it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One trajectory in expanded form (every image pad written out). All arrays have length T.

  Attributes:
    ids_T: int, token ids.
    positions_Tx3: int, (time, height, width) of M-RoPE.
    image_T: int, -1 or which of `images` the token shows.
    image_offset_T: int, which merged token of that image (anything where image_T is -1).
    images: the images, in any order; equal keys mean equal pixels.
    loss_mask_T: bool, the token is a target. Never the first: nothing predicts it.
    advantages_T: float, of each target (1 for supervised learning).
    behaviour_logp_T: float, the sampler's log-probability of each target (0 if there is none).
  """

  ids_T: np.ndarray
  positions_Tx3: np.ndarray
  image_T: np.ndarray
  image_offset_T: np.ndarray
  images: tuple[ProcessedImage, ...]
  loss_mask_T: np.ndarray
  advantages_T: np.ndarray
  behaviour_logp_T: np.ndarray

  def __len__(self) -> int:
    return len(self.ids_T)


def pack(
  examples: Sequence[Example],
  *,
  rows: int,
  length: int,
  vision_config: VisionConfig,
  aggregation: str = "token_mean",
  banned_ids: Sequence[int] = (),
  rows_multiple_of: int = 1,
  row_buckets: Sequence[int] = ROW_BUCKETS,
  patch_buckets: Sequence[int] = PATCH_BUCKETS,
) -> list[Batch]:
  """Packs examples into micro-batches of [rows, length], first fit, longest first.

  Deterministic: equal lengths keep their order. The last micro-batch is filled up with empty rows.
  The step's denominator is the sum of all weights: `batch.denominator`.

  Args:
    aggregation: "token_mean" gives every target weight 1, "sequence_mean" 1 / (the targets of its
      example); see `rl.losses.aggregation_weights`.
    banned_ids: ids that a target may not have, since the softmax leaves them out.
    rows_multiple_of: vision rows are a multiple of it; see `batch.batch_shards`.
    row_buckets, patch_buckets: shapes of the vision tower, see `pack_images`.

  Raises:
    PackingError: an example that is longer than a row, has arrays of unequal length, a target
      without a predecessor or a banned one; the message names the example and the numbers.
    ImageTooLarge: from `pack_images`.
  """
  for number, example in enumerate(examples):
    _check(number, example, length, banned_ids)
  weights_S, _ = aggregation_weights([int(e.loss_mask_T.sum()) for e in examples], aggregation)
  groups = _place([len(example) for example in examples], rows, length)
  batches = [_fill(group, examples, weights_S, rows, length) for group in groups]
  if any(example.images for example in examples):
    options = {"config": vision_config, "rows_multiple_of": rows_multiple_of}
    batches = _with_images(batches, groups, examples, row_buckets, patch_buckets, options)
  return batches


def _check(number: int, example: Example, length: int, banned_ids: Sequence[int]) -> None:
  where, size = f"example {number}", len(example)
  if size > length:
    raise PackingError(
      f"{where} has {size} tokens, a row holds {length}; raise batch.length to at least {size} "
      "or drop the example")
  for field in dataclasses.fields(example):
    value = getattr(example, field.name)
    if field.name != "images" and len(value) != size:
      raise PackingError(f"{where}: {field.name} has length {len(value)}, ids_T has {size}")
  if size and example.loss_mask_T[0]:
    raise PackingError(f"{where}: loss_mask_T[0] is set, but nothing predicts the first token")
  banned_T = np.isin(example.ids_T, np.asarray(banned_ids, np.int64)) & example.loss_mask_T
  if banned_T.any():
    at = int(np.argmax(banned_T))
    raise PackingError(
      f"{where}: target {at} has the banned id {int(example.ids_T[at])}; mask it or drop the example")
  if (example.image_T >= len(example.images)).any():
    raise PackingError(
      f"{where}: image_T names image {int(example.image_T.max())} of {len(example.images)}")


def _place(sizes: Sequence[int], rows: int, length: int) -> list[list[list[int]]]:
  """Example numbers by micro-batch and row: first fit, longest first."""
  fill: list[int] = []
  members: list[list[int]] = []
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    row = next((r for r, used in enumerate(fill) if used + sizes[i] <= length), len(fill))
    if row == len(fill):
      fill.append(0)
      members.append([])
    fill[row] += sizes[i]
    members[row].append(i)
  return [members[at:at + rows] for at in range(0, len(members), rows)]


def _fill(group, examples, weights_S, rows: int, length: int) -> Batch:
  def zeros(dtype, *rest):
    return np.zeros((rows, length, *rest), dtype)

  batch = Batch(
    tokens_BxT=zeros(np.int32), targets_BxT=zeros(np.int32), positions_BxTx3=zeros(np.int32, 3),
    segments_BxT=zeros(np.int32), image_index_BxT=None, weights_BxT=zeros(np.float32),
    advantages_BxT=zeros(np.float32), behaviour_logp_BxT=zeros(np.float32))
  for row, number, i, start in _walk(group, examples):
    example = examples[i]
    here = (row, slice(start, start + len(example)))
    batch.tokens_BxT[here] = example.ids_T
    batch.positions_BxTx3[here] = example.positions_Tx3
    batch.segments_BxT[here] = number
    # The last token predicts nothing; its weight stays 0.
    predicts = (row, slice(start, start + len(example) - 1))
    mask = np.asarray(example.loss_mask_T[1:], bool)
    batch.targets_BxT[predicts] = example.ids_T[1:]
    batch.weights_BxT[predicts] = mask * weights_S[i]
    batch.advantages_BxT[predicts] = np.where(mask, example.advantages_T[1:], 0.0)
    batch.behaviour_logp_BxT[predicts] = np.where(mask, example.behaviour_logp_T[1:], 0.0)
  return batch


def _walk(group, examples):
  """(row, segment id, example number, first token) of everything in a micro-batch."""
  for row, members in enumerate(group):
    start = 0
    for number, i in enumerate(members, 1):
      yield row, number, i, start
      start += len(examples[i])


def _with_images(batches, groups, examples, row_buckets, patch_buckets, options) -> list[Batch]:
  """The batches with vision inputs, all of one shape: that of the fullest."""
  largest = max(len(im.patches_PxC) for e in examples for im in e.images)
  # The smallest bucket, or all of them, so that pack_images raises its own error.
  patch_buckets = [b for b in sorted(patch_buckets) if b >= largest][:1] or patch_buckets

  def packed(images, buckets):
    return pack_images(images, row_buckets=buckets, patch_buckets=patch_buckets, **options)

  distinct = [_distinct_images(group, examples) for group in groups]
  results = [packed(list(images.values()), row_buckets) for images in distinct]
  most = max(len(vision.segments_RxP) for vision, _ in results)
  out = []
  for batch, group, images, (vision, offsets) in zip(
      batches, groups, distinct, results, strict=True):
    if len(vision.segments_RxP) < most:
      vision, offsets = packed(list(images.values()), (most,))
    start_of = dict(zip(images, offsets.tolist(), strict=True))
    index_BxT = _image_index(batch.tokens_BxT.shape, group, examples, start_of)
    out.append(dataclasses.replace(batch, vision=vision, image_index_BxT=index_BxT))
  return out


def _distinct_images(group, examples) -> dict[str, ProcessedImage]:
  return {image.key: image for _, _, i, _ in _walk(group, examples) for image in examples[i].images}


def _image_index(shape, group, examples, start_of: dict[str, int]) -> np.ndarray:
  index_BxT = np.full(shape, -1, np.int32)
  for row, _, i, start in _walk(group, examples):
    example = examples[i]
    if not example.images:
      continue
    starts = np.asarray([start_of[image.key] for image in example.images])
    shown_T = example.image_T >= 0
    value_T = starts[np.maximum(example.image_T, 0)] + example.image_offset_T
    index_BxT[row, start:start + len(example)] = np.where(shown_T, value_T, -1)
  return index_BxT
