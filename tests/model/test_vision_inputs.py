"""Packing images into rows, and the host-side checks."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from axpo_jax.model.presets import PRESETS
from axpo_jax.model.vision_inputs import (
  ImageTooLarge,
  VideoNotSupported,
  grid_positions,
  mrope_positions,
  pack_images,
)

VISION = PRESETS["tiny"].vision
PAD, VIDEO = 3, 4


def image(h, w, value=1.0):
  patches = np.full((h * w, VISION.patch_dim), value, np.float32)
  return SimpleNamespace(patches=lambda: patches, patch_dim=VISION.patch_dim, grid_hw=(h, w))


def test_rows_and_offsets():
  """Largest first, first fit: 48 + 16 share a row of 64, 40 + 8 + 16 the other."""
  images = [image(2, 4, 1), image(8, 6, 2), image(4, 4, 3), image(10, 4, 4), image(2, 8, 5)]
  out, offsets = pack_images(images, VISION)
  assert out.patches_RxPxC.shape == (2, 64, VISION.patch_dim)
  # Row 0: image 1 (48 patches), image 2 (16). Row 1: image 3 (40), image 4 (16), image 0 (8).
  assert offsets.tolist() == [16 + 14, 0, 12, 16, 16 + 10]
  assert out.segments_RxP.tolist() == [[1] * 48 + [2] * 16, [1] * 40 + [2] * 16 + [3] * 8]
  flat = out.patches_RxPxC.reshape(-1, 4, VISION.patch_dim)
  for number, (offset, source) in enumerate(zip(offsets, images, strict=True), 1):
    size = len(source.patches()) // 4
    assert (flat[offset : offset + size] == number).all()
  np.testing.assert_allclose(out.corner_weight_RxPx4.sum(-1), 1, rtol=1e-6)
  assert out.corner_index_RxPx4.max() == VISION.num_position_embeddings - 1


def test_lazy_patches_are_made_when_an_array_is_made_of_them():
  made = []

  def shown(h, w, value):
    patches = np.full((h * w, VISION.patch_dim), value, np.float32)
    return SimpleNamespace(patches=lambda: made.append(value) or patches,
                           patch_dim=VISION.patch_dim, grid_hw=(h, w))

  images = [shown(2, 4, 1), shown(8, 6, 2), shown(4, 4, 3)]
  lazy, offsets = pack_images(images, VISION, lazy=True)
  assert not made
  whole, same = pack_images(images, VISION)
  assert offsets.tolist() == same.tolist()
  for a, b in zip(jax.tree.leaves(lazy), jax.tree.leaves(whole), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(np.asarray(a), b)


def test_merge_block_order():
  assert grid_positions((2, 4), 2).tolist() == [
    [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
  ]  # fmt: skip


def test_buckets():
  def shape(*grids, **options):
    return pack_images([image(*g) for g in grids], VISION, **options)[0].segments_RxP.shape

  assert shape((8, 8)) == (1, 64)
  assert shape((8, 10)) == (1, 128)
  assert shape(*[(8, 8)] * 3) == (4, 64)
  assert shape(*[(8, 8)] * 3, row_buckets=(1, 3, 5)) == (3, 64)
  assert shape(*[(8, 8)] * 3, row_buckets=(1, 2)) == (3, 64)
  assert shape((8, 8), rows_multiple_of=8) == (8, 64)
  assert shape((2, 2), patch_buckets=(16, 4)) == (1, 4)
  assert shape() == (1, 64)


def test_padding_is_segment_zero():
  out, offsets = pack_images([], VISION)
  assert len(offsets) == 0
  assert not out.segments_RxP.any() and not out.corner_weight_RxPx4.any()


def test_errors_name_the_image_and_the_fix():
  with pytest.raises(ImageTooLarge, match="80 patches exceeds the largest patch bucket 64"):
    pack_images([image(8, 10)], VISION, patch_buckets=(16, 64))
  with pytest.raises(ValueError, match="image 1: grid 3 x 4 is not a multiple"):
    pack_images([image(2, 2), image(3, 4)], VISION)
  wrong = SimpleNamespace(patch_dim=1536, grid_hw=(2, 2))
  with pytest.raises(ValueError, match="patch size"):
    pack_images([wrong], VISION)
  with pytest.raises(ValueError, match=r"merge\^2"):
    pack_images([image(2, 2)], VISION, patch_buckets=(6,))


def test_mrope_by_hand():
  """Two words, a 2 x 3 image, one word, a 3 x 1 image right behind it, one word."""
  ids = [7, 7, *[PAD] * 6, 7, *[PAD] * 3, 7]
  assert mrope_positions(ids, [(2, 3), (3, 1)], PAD, VIDEO).tolist() == [
    [0, 0, 0], [1, 1, 1],
    [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4],
    [5, 5, 5],
    [6, 6, 6], [6, 7, 6], [6, 8, 6],
    [9, 9, 9],
  ]  # fmt: skip
  assert mrope_positions([], [], PAD).shape == (0, 3)


def test_video_is_refused():
  with pytest.raises(VideoNotSupported, match=r"token 2 is a video pad \(id 4\).*separate images"):
    mrope_positions([7, 7, VIDEO, 7], [], PAD, VIDEO)


@pytest.mark.parametrize(
  ("ids", "grids"),
  [
    ([7, PAD, 7], [(1, 2)]),  # collapsed: one pad for the whole image
    ([7, PAD, PAD], [(1, 1)]),  # an image without a grid
    ([PAD, 7, PAD], [(1, 2)]),  # as many pads as needed, but torn apart
    ([7], [(1, 1)]),
  ],
)
def test_pads_must_tally(ids, grids):
  with pytest.raises(ValueError, match="pads"):
    mrope_positions(ids, grids, PAD, VIDEO)
