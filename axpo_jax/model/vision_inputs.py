"""Host side of the vision tower (NumPy): packs images of any sizes into a few static shapes.

In: processed images (a grid, and patches on demand) and the vision config. Out: `VisionInputs`, rows of packed
patches and the grids as arrays; and the rotary positions of text (`mrope_positions`).

  row 0   [ image 2: 4 x 6 patches  ][ image 0: 2 x 4 ][ padding ]
  row 1   [ image 1: 4 x 4 ][ image 3: 2 x 2 ][ padding           ]

An image is never split over rows, and attention stays within a row, so no mask over all images is made. Row
lengths and numbers come from buckets, so the tower is compiled once per bucket.

Legend: R rows, P patches in a row, C values in a patch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import jax
import numpy as np

from axpo_jax.model.buckets import PATCH_BUCKETS, ROW_BUCKETS
from axpo_jax.model.config import VisionConfig

_PATCH_UNIT = 16


def patch_lengths(usual: int, largest: int) -> tuple[int, ...]:
  """Row lengths for a run's images: few, since each is a program of its own.

  The first holds images of up to `usual` patches; each next one is twice as long, up to the `largest`. A smaller
  image shares its row with others, and its attention also computes the part that is masked.
  """
  def rounded(patches):
    return -(-patches // _PATCH_UNIT) * _PATCH_UNIT

  lengths = [rounded(usual)]
  while lengths[-1] < largest:
    lengths.append(rounded(min(2 * lengths[-1], largest)))
  return tuple(lengths)


class ImageTooLarge(ValueError):
  """An image has more patches than the largest patch bucket."""


class VideoNotSupported(ValueError):
  """The tokens hold video pads; this port takes images only."""


class HasPatches(Protocol):
  """What packing reads of a processed image. Its float patches are made only to be packed."""

  grid_hw: tuple[int, int]
  patch_dim: int

  def patches(self) -> np.ndarray:
    """float32 [h * w, patch_dim], in merge-block order."""


class LazyPatches:
  """Packed patches, float32 [R, P, C], computed from the images whenever NumPy asks for the array.

  All micro-batches of a step wait for the device at once. As arrays they would take 8 times the bytes of their
  images, and the padding on top.
  """

  dtype, ndim = np.dtype(np.float32), 3

  def __init__(self, shape: tuple[int, int, int],
               images: Sequence[tuple[HasPatches, int, slice]]):
    """images: each with its row and the patches there that it fills."""
    self.shape, self._placed = shape, images

  @property
  def images(self) -> list[HasPatches]:
    return [image for image, _, _ in self._placed]

  def map(self, function: Callable[[HasPatches], HasPatches]) -> LazyPatches:
    """The same with function(image) for every image."""
    return LazyPatches(self.shape, [(function(image), *at) for image, *at in self._placed])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    out = np.zeros(self.shape, self.dtype)
    for image, row, where in self._placed:
      out[row, where] = image.patches()
    return out if dtype is None else out.astype(dtype, copy=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionInputs:
  """Packed patches of any number of images.

  patches_RxPxC: float32 pixel values, (channel, time, row, column) flattened.
  segments_RxP: int32, 0 for padding, else 1, 2, ... for the images of the row.
  positions_RxPx2: int32 (row, column) in the image's patch grid.
  corner_index_RxPx4: int32, the four neighbours in the learned position grid (flattened).
  corner_weight_RxPx4: float32, their bilinear weights (0 on padding).
  """

  patches_RxPxC: jax.Array | np.ndarray | LazyPatches
  segments_RxP: jax.Array | np.ndarray
  positions_RxPx2: jax.Array | np.ndarray
  corner_index_RxPx4: jax.Array | np.ndarray
  corner_weight_RxPx4: jax.Array | np.ndarray


def pack_images(
  images: Sequence[HasPatches],
  config: VisionConfig,
  *,
  row_buckets: Sequence[int] = ROW_BUCKETS,
  patch_buckets: Sequence[int] = PATCH_BUCKETS,
  rows_multiple_of: int = 1,
  rows_here: Callable[[int], Collection[int]] | None = None,
  lazy: bool = False,
) -> tuple[VisionInputs, np.ndarray]:
  """Packs images into rows of one bucketed length.

  The row length is the smallest patch bucket that holds the largest image; the number of rows is
  the smallest row bucket that is enough and a multiple of `rows_multiple_of` (the devices that
  share the rows). No images give one bucket of padding.

  Args:
    rows_here: number of rows -> the rows whose patches this process computes; others stay zeros, whose memory
      the system allocates only when they are read. None: all.
    lazy: leave the patches as `LazyPatches`.

  Returns: the inputs, and int32 [number of images]: the index of each image's first merged token in the
    flattened [R * P / merge^2] output of the tower. The image's other tokens follow it.
  Raises: ImageTooLarge; ValueError if an image's grid or patches are not those of the config.
  """
  sizes = [_checked_size(i, image, config) for i, image in enumerate(images)]
  length = _bucket(max(sizes, default=1), patch_buckets)
  if length % config.merge_unit:
    raise ValueError(f"patch bucket {length} must be a multiple of merge^2={config.merge_unit}")
  places, used_rows = _place(sizes, length)
  rows = _num_rows(used_rows, row_buckets, rows_multiple_of)
  made = range(rows) if rows_here is None else rows_here(rows)

  where = [(row, slice(start, start + size)) for size, (row, start, _) in zip(sizes, places)]
  patches = LazyPatches((rows, length, config.patch_dim),
                        [(image, *at) for image, at in zip(images, where, strict=True)
                         if at[0] in made])
  out = VisionInputs(
    patches_RxPxC=patches if lazy else np.asarray(patches),
    segments_RxP=np.zeros((rows, length), np.int32),
    positions_RxPx2=np.zeros((rows, length, 2), np.int32),
    corner_index_RxPx4=np.zeros((rows, length, 4), np.int32),
    corner_weight_RxPx4=np.zeros((rows, length, 4), np.float32),
  )
  for image, at, (_, _, number) in zip(images, where, places, strict=True):
    positions = grid_positions(image.grid_hw, config.spatial_merge_size)
    out.segments_RxP[at] = number
    out.positions_RxPx2[at] = positions
    out.corner_index_RxPx4[at], out.corner_weight_RxPx4[at] = bilinear_corners(
      positions, image.grid_hw, config.grid_side
    )
  offsets = [(row * length + start) // config.merge_unit for row, start, _ in places]
  return out, np.asarray(offsets, np.int32)


def grid_positions(grid_hw: tuple[int, int], merge: int) -> np.ndarray:
  """(row, column) of every patch, merge block by merge block: int32 [h * w, 2]."""
  h, w = grid_hw
  row, col = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
  grid = np.stack([row, col], -1).reshape(h // merge, merge, w // merge, merge, 2)
  return grid.swapaxes(1, 2).reshape(h * w, 2).astype(np.int32)


def bilinear_corners(
  positions_Px2: np.ndarray, grid_hw: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
  """The four neighbours of each patch in the learned side x side position grid, corners aligned.

  Returns: flat indices int32 [P, 4] and weights float32 [P, 4] that sum to one. float32 all the
    way, in the order of the reference implementation, so that weights agree to the last bit.
  """
  steps = np.maximum(np.asarray(grid_hw) - 1, 1).astype(np.float32)
  at = positions_Px2.astype(np.float32) * np.float32(side - 1) / steps
  low = np.floor(at)
  frac = at - low
  taps = np.stack([low, low + 1], -1).astype(np.int32).clip(0, side - 1)  # [P, axis, low/high]
  weights = np.stack([1 - frac, 1 - (1 - frac)], -1)
  index = taps[:, 0, :, None] * side + taps[:, 1, None, :]
  weight = weights[:, 0, :, None] * weights[:, 1, None, :]
  return index.reshape(-1, 4), weight.reshape(-1, 4).astype(np.float32)


def mrope_positions(
  ids_T: Sequence[int] | np.ndarray,
  grids_merged: Sequence[tuple[int, int]],
  image_token_id: int,
  video_token_id: int | None = None,
) -> np.ndarray:
  """(time, height, width) of every token for M-RoPE.

  The three are equal for text. An image's tokens share the time; height and width run over its merged grid. All
  are offset by the position reached so far. The next position is the largest so far plus one:

    tokens  a  b  [ 2 x 2 image ]  c
    time    0  1   2  2  2  2      4
    height  0  1   2  2  3  3      4
    width   0  1   2  3  2  3      4

  Args:
    ids_T: tokens in expanded form: an image of h x w merged tokens has h * w pads.
    grids_merged: (h, w) of the images in order, in merged tokens.
    video_token_id: if given, its presence is refused.
  Returns: int32 [T, 3].
  Raises: VideoNotSupported; ValueError if the pads and the grids do not match.
  """
  ids = np.asarray(ids_T, np.int64).reshape(-1)
  if video_token_id is not None and (ids == video_token_id).any():
    raise VideoNotSupported(
      f"token {int(np.argmax(ids == video_token_id))} is a video pad (id {video_token_id}); "
      "pass the frames as separate images"
    )
  pads = ids == image_token_id
  wanted = sum(h * w for h, w in grids_merged)
  if pads.sum() != wanted:
    raise ValueError(
      f"{int(pads.sum())} image pads in the tokens, but the images {list(grids_merged)} need "
      f"{wanted}; expand every pad to h * w pads of its image"
    )
  out = np.zeros((len(ids), 3), np.int32)
  at, position = 0, 0
  for h, w in grids_merged:
    start = at + int(np.argmax(pads[at:]))
    if not pads[start : start + h * w].all():
      raise ValueError(f"the image at token {start} has fewer pads than its {h} x {w} grid")
    out[at:start] = np.arange(position, position + start - at)[:, None]
    position += start - at
    out[start : start + h * w, 0] = position
    out[start : start + h * w, 1:] = position + np.indices((h, w)).reshape(2, -1).T
    position += max(h, w)
    at = start + h * w
  out[at:] = np.arange(position, position + len(ids) - at)[:, None]
  return out


def _checked_size(number: int, image: HasPatches, config: VisionConfig) -> int:
  (h, w), merge = image.grid_hw, config.spatial_merge_size
  if h % merge or w % merge:
    raise ValueError(f"image {number}: grid {h} x {w} is not a multiple of the merge size {merge}")
  if image.patch_dim != config.patch_dim:
    raise ValueError(
      f"image {number}: patches of {image.patch_dim} values, but the model takes "
      f"{config.patch_dim}; was it processed with this model's patch size?"
    )
  return h * w


def _bucket(value: int, buckets: Sequence[int]) -> int:
  for bucket in sorted(buckets):
    if bucket >= value:
      return bucket
  raise ImageTooLarge(
    f"an image of {value} patches exceeds the largest patch bucket {max(buckets)}; lower "
    "max_pixels or add a bucket"
  )


def _place(sizes: Sequence[int], length: int) -> tuple[list[tuple[int, int, int]], int]:
  """First fit, largest first: (row, start, number in the row) of every image, and the rows used."""
  fill: list[int] = []
  count: list[int] = []
  places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(sizes)
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    row = next((r for r, used in enumerate(fill) if used + sizes[i] <= length), len(fill))
    if row == len(fill):
      fill.append(0)
      count.append(0)
    count[row] += 1
    places[i] = (row, fill[row], count[row])
    fill[row] += sizes[i]
  return places, len(fill)


def _num_rows(used: int, buckets: Sequence[int], multiple: int) -> int:
  enough = [b for b in sorted(buckets) if b >= used]
  rows = enough[0] if enough else used
  return -(-rows // multiple) * multiple
