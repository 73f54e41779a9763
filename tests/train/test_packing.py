"""Packing: nothing is lost, nothing leaks, nothing stands twice, and the shapes are few."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.config import base_config
from axpo_jax.model import sharding
from axpo_jax.model.images import ImageLimits, PatchFormat, ProcessedImage
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.vision_inputs import pack_images
from axpo_jax.stages import sections
from axpo_jax.train.batch import (
  batch_shards,
  load_batch,
  packing_metrics,
  place,
  save_batch,
  sums_by_example,
  targets,
  with_weights,
)
from axpo_jax.train.packing import PackingError, pack


@pytest.fixture
def options(config):
  return {"rows": 2, "length": 16, "block": 4, "vision_config": config.vision,
          "patch_buckets": (16, 64)}


@pytest.fixture
def make_family(make_example, make_image):
  """A question with an image, two rollouts, and two continuations of the first one's beginning, of
  which one ends with an image of its own."""

  def make(seed: int):
    image, crop = make_image(seed), make_image(seed + 50, (2, 2))
    first = make_example(seed, 12, [image])
    rest = [example_tail(first, at, seed + i, crop if i == 3 else None)
            for i, at in ((1, 8), (2, 11), (3, 11))]
    return [first, *rest]

  return make


def example_tail(example, at, seed, image=None):
  """`example` with other words, advantages and maybe an image from token `at` on."""
  rng = np.random.default_rng(seed)
  new = np.arange(len(example)) >= at
  ids = np.where(new, rng.integers(5, 64, len(example)), example.ids_T)
  changes = {}
  if image is not None:
    ids[at + 1] = 3  # the image's pad
    changes = {"image_T": np.where(np.arange(len(example)) == at + 1, 1, example.image_T),
               "images": (*example.images, image), "loss_mask_T": example.loss_mask_T.copy()}
    changes["loss_mask_T"][at + 1] = False
  return dataclasses.replace(
    example, ids_T=ids, advantages_T=np.where(new, rng.normal(), 0).astype(np.float32),
    behaviour_logp_T=np.where(new, -rng.random(len(example)), 0).astype(np.float32), **changes)


def _wanted(examples, keys=("ids_T", "positions_Tx3")):
  """Every target with all that stands before it, from the examples."""
  return collections.Counter(
    (*(getattr(e, key)[:t].tobytes() for key in keys), int(e.ids_T[t]),
     float(e.advantages_T[t]), float(e.behaviour_logp_T[t]))
    for e in examples for t in np.flatnonzero(e.loss_mask_T))


def _found(batches):
  """The same from the batches: what stands before a target is what its place may see."""
  out = collections.Counter()
  for batch in batches:
    for row, g in np.argwhere(batch.weights_BxG > 0):
      at, ends_T = batch.at_BxG[row, g], batch.ends_BxT[row]
      seen = np.flatnonzero((np.arange(len(ends_T)) <= at) & (at < ends_T))
      out[batch.tokens_BxT[row, seen].astype(np.int64).tobytes(),
          batch.positions_BxTx3[row, seen].tobytes(), int(batch.targets_BxG[row, g]),
          float(batch.advantages_BxG[row, g]), float(batch.behaviour_logp_BxG[row, g])] += 1
  return out


@pytest.mark.parametrize("share", [True, False])
def test_every_target_comes_back_with_what_stands_before_it(
    make_example, make_family, options, share):
  sizes = [5, 16, 3, 9, 7, 12, 2, 1, 8]
  examples = [make_example(i, n) for i, n in enumerate(sizes)] + make_family(20) + make_family(30)
  batches = pack(examples, share_prefixes=share, **options)
  assert _found(batches) == _wanted(examples)


def test_a_family_stands_once(make_family, options):
  """4 image tokens and 8 words, then 4 + 4 words of the first two; from word 7 of the first on the
  continuations. The last token of each is nobody's input."""
  family = make_family(20)
  batches = pack(family, **(options | {"length": 32}))
  assert len(batches) == 1 and batches[0].tokens_BxT.shape[0] == 1
  metrics = packing_metrics(batches, family)
  # 16 tokens each. The first: all but the last. The second leaves it at 8, the others at 11.
  assert metrics["pack/tokens"] == 15 + (15 - 8) + 2 * (15 - 11)
  assert metrics["pack/tokens_plain"] == 64 and metrics["pack/sharing"] == 64 / 30
  assert metrics["pack/images"] == 2
  batch = batches[0]
  # Position 10 predicts a token of the first and of both continuations.
  at_its_time = batch.positions_BxTx3[0, :, 0] == family[0].positions_Tx3[10, 0]
  [place_of_10] = np.flatnonzero(at_its_time & (batch.tokens_BxT[0] == family[0].ids_T[10]))
  scored = batch.targets_BxG[0][(batch.at_BxG[0] == place_of_10) & (batch.weights_BxG[0] > 0)]
  assert sorted(scored) == sorted(int(family[i].ids_T[11]) for i in (0, 2, 3))


def test_what_no_target_needs_is_left_out(make_example, make_image, options):
  """A source whose own continuation is masked, and an image that only stands in it."""
  example = make_example(0, 12, [make_image(0)])
  example.loss_mask_T[8:] = False
  example.loss_mask_T[6] = True
  late = example_tail(example, 12, 1, make_image(1))
  late.loss_mask_T[8:] = False
  batches = pack([example, late], **options)
  metrics = packing_metrics(batches, [example, late])
  assert metrics["pack/tokens"] == 6 and metrics["pack/images"] == 1


def test_equal_ids_at_other_positions_or_of_other_images_are_not_shared(
    make_example, make_image, options):
  one = make_example(0, 10, [make_image(0)])
  moved = dataclasses.replace(one, positions_Tx3=one.positions_Tx3 + 1)
  other = dataclasses.replace(one, images=(make_image(1),))
  flipped = dataclasses.replace(one, image_offset_T=one.image_offset_T[::-1].copy())
  same = dataclasses.replace(one, images=(make_image(0),))
  for second, tokens in ((moved, 26), (other, 26), (flipped, 26), (same, 13)):
    batches = pack([one, second], **options)
    assert packing_metrics(batches, [one, second])["pack/tokens"] == tokens


def test_a_long_tree_repeats_its_path(make_example, options):
  """Nine branches of 4 words over a path of 9: a row holds the path and what fits behind it."""
  first = make_example(0, 14)
  examples = [first] + [example_tail(first, 9, seed) for seed in range(1, 9)]
  for number, example in enumerate(examples):
    example.ids_T[9] = 5 + number
  batches = pack(examples, **options)
  assert _found(batches) == _wanted(examples)
  # Inputs: 13 a branch, 9 of them the path: 16 holds one branch.
  assert packing_metrics(batches, examples)["pack/tokens"] == 9 * 13
  wide = pack(examples, **(options | {"length": 32}))
  # 9 + 5 * 4 = 29 fit into 32; the other four make 25.
  assert [int((row > 0).sum()) for b in wide for row in b.ends_BxT] == [29, 25]
  assert _found(wide) == _wanted(examples)


def test_best_fit_decreasing_by_hand(make_example, options):
  # Inputs are one less than lengths. Longest first: 10 | 9 | 7 -> with 9 | 6 -> with 10 | 1 -> full
  # of neither, so with the fuller row that has room: none has, a row of its own.
  examples = [make_example(i, n) for i, n in enumerate([7, 11, 3, 8, 10])]
  batches = pack(examples, share_prefixes=False, **options)
  rows = [sorted((np.diff([0, *np.unique(row[row > 0])])).tolist()) for b in batches
          for row in b.ends_BxT]
  assert rows == [[6, 10], [7, 9], [2]]
  metrics = packing_metrics(batches, examples)
  assert metrics["pack/fill"] == 34 / 48 and metrics["pack/sequences"] == 5


@pytest.mark.parametrize(("count", "heights"), [
  (1, [2]), (3, [4]), (4, [4]), (5, [2] * 3), (8, [4, 4]), (9, [2] * 5), (13, [4] * 4),
])
def test_micro_batches_have_one_of_two_heights(make_example, options, count, heights):
  examples = [make_example(i, 16) for i in range(count)]
  batches = pack(examples, **(options | {"rows": 4}))
  assert [len(b.tokens_BxT) for b in batches] == heights


def test_packing_is_deterministic(make_example, make_image, options):
  examples = [make_example(i, 4 + i % 3, [make_image(i % 2)]) for i in range(7)]
  one, two = pack(examples, **options), pack(examples, **options)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_process_makes_the_patches_of_its_own_rows(make_example, make_image, options):
  examples = [make_example(i, 6, [make_image(i)]) for i in range(4)]
  options = options | {"rows": 4, "rows_multiple_of": 2}

  def packed(**more):
    (batch,) = pack(examples, **options, **more)
    patches = np.asarray(batch.vision.patches_RxPxC)
    return dataclasses.replace(
      batch, vision=dataclasses.replace(batch.vision, patches_RxPxC=patches))

  whole = packed()
  height = len(whole.vision.patches_RxPxC)
  halves = [range(height // 2), range(height // 2, height)]
  for rows in halves:
    batch = packed(image_rows_here=lambda _, rows=rows: rows)
    assert batch.vision.patches_RxPxC[rows].any()
    expected = np.zeros_like(whole.vision.patches_RxPxC)
    expected[rows] = whole.vision.patches_RxPxC[rows]
    np.testing.assert_array_equal(batch.vision.patches_RxPxC, expected)
    same = dataclasses.replace(batch, vision=dataclasses.replace(
      batch.vision, patches_RxPxC=whole.vision.patches_RxPxC))
    jax.tree.map(np.testing.assert_array_equal, same, whole)


def test_distinct_images_once_and_the_index_finds_their_patches(make_example, make_image, options):
  shared, small, large = make_image(1), make_image(2, (2, 2)), make_image(3, (4, 6))
  examples = [make_example(0, 4, [shared, small]), make_example(1, 5, [shared]),
              make_example(2, 3, [small, large]), make_example(3, 6)]
  batches = pack(examples, share_prefixes=False, **(options | {"rows": 4}))
  assert len(batches) == 1
  batch = batches[0]
  vision = batch.vision
  assert packing_metrics(batches, examples)["pack/images"] == 3
  # A merged token is 4 patches that follow each other: compare those patches themselves.
  patches_Mx4xC = np.asarray(vision.patches_RxPxC).reshape(-1, 4, vision.patches_RxPxC.shape[-1])
  for row, ends_T in enumerate(batch.ends_BxT):
    for end in np.unique(ends_T[ends_T > 0]):
      at = ends_T == end
      [example] = [e for e in examples
                   if e.ids_T[:-1].tolist() == batch.tokens_BxT[row][at].tolist()]
      index_T = batch.image_index_BxT[row][at]
      np.testing.assert_array_equal(index_T >= 0, example.image_T[:-1] >= 0)
      want = [image.patches().reshape(-1, 4, image.patch_dim)
              for image in example.images]
      if want:
        np.testing.assert_array_equal(patches_Mx4xC[index_T[index_T >= 0]], np.concatenate(want))


def test_all_micro_batches_have_one_shape(make_example, make_image, options):
  examples = [make_example(i, 12, [make_image(i)] if i < 3 else []) for i in range(6)]
  batches = pack(examples, **(options | {"rows": 1, "rows_multiple_of": 2}))
  shapes = {tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}
  assert len(batches) == 3 and len(shapes) == 1  # of two rows, one a shard
  assert batches[0].tokens_BxT.shape[0] == 2
  assert batches[0].vision.segments_RxP.shape[0] % 2 == 0
  assert all(b.vision is None and b.image_index_BxT is None for b in pack(examples[3:], **options))


def test_weights_by_example(make_example, options):
  """Every target knows its example, whatever row and micro-batch it came to."""
  examples = [make_example(0, 4), make_example(1, 9), make_example(2, 6)]
  examples[2] = dataclasses.replace(examples[2], loss_mask_T=np.zeros(6, bool))
  batches = pack(examples, **(options | {"rows": 1}))
  assert targets(batches) == 2 + 4
  assert set(np.concatenate([b.weights_BxG.ravel() for b in batches])) <= {0.0, 1.0}
  ones = [b.weights_BxG for b in batches]
  np.testing.assert_array_equal(sums_by_example(batches, ones, 3), [2, 4, 0])
  ids = [b.targets_BxG for b in batches]
  want = [e.ids_T[e.loss_mask_T].sum() for e in examples]
  np.testing.assert_array_equal(sums_by_example(batches, ids, 3), want)
  weighed = with_weights(batches, np.array([0.5, 0.25, 7.0]))
  for batch, plain in zip(weighed, batches, strict=True):
    np.testing.assert_array_equal(batch.weights_BxG != 0, plain.weights_BxG != 0)
  np.testing.assert_allclose(
    sums_by_example(weighed, [b.weights_BxG for b in weighed], 3), [1.0, 1.0, 0.0])


def test_errors_name_the_example_and_the_numbers(make_example, make_image, options):
  fine, long = make_example(0, 4), make_example(1, 17)
  with pytest.raises(PackingError, match="example 1 has 17 tokens, a row holds 16"):
    pack([fine, long], **options)
  first = dataclasses.replace(fine, loss_mask_T=np.ones(4, bool))
  with pytest.raises(PackingError, match="nothing predicts the first token"):
    pack([first], **options)
  with pytest.raises(PackingError, match=f"banned id {fine.ids_T[3]}"):
    pack([fine], banned_ids=(int(fine.ids_T[3]),), **options)
  largest = int(fine.ids_T.max())
  with pytest.raises(PackingError, match=f"example 0 has the id {largest}, the vocabulary {largest}: "):
    pack([fine], vocab_size=largest, **options)
  pack([fine], vocab_size=largest + 1, **options)
  with pytest.raises(PackingError, match="advantages_T has length 3, ids_T has 4"):
    pack([dataclasses.replace(fine, advantages_T=np.zeros(3))], **options)
  with pytest.raises(PackingError, match="rows of 18 tokens"):
    pack([fine], **(options | {"length": 18}))
  with pytest.raises(PackingError, match="example 1: an image of 24 patches; the largest may have 16"):
    pack([fine, make_example(2, 4, [make_image(0, (4, 6))])],
         **(options | {"patch_buckets": (8, 16)}))
  lost = dataclasses.replace(make_example(2, 4, [make_image(0)]), images=())
  with pytest.raises(PackingError, match="image_T names image 0 of 0"):
    pack([lost], **options)


def test_whatever_the_limits_allow_has_a_row_of_patches():
  """A crop of a whole 4K picture, and the largest square, at the defaults and the 8B's patch size."""
  config, vision = base_config(), PRESETS["8b"].vision
  lengths = sections.patch_rows(config, vision)
  assert lengths == (3920, 7840, 15680, 31360, 50176)
  form = PatchFormat(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
                     (0.5,) * 3, (0.5,) * 3)
  limits = ImageLimits(config.images.zoom_min_pixels, config.images.zoom_max_pixels)
  crop = ImageZoomIn(limits, factor=form.factor).magnify(Image.new("RGB", (3840, 2160)), [0, 0, 1000, 1000])
  for picture, patches in ((crop, 3840 * 2176 // 16**2), (Image.new("RGB", (3584, 3584)), 50176)):
    image = ProcessedImage.of(picture, form)
    assert image.num_patches == patches
    packed, _ = pack_images([image], vision, patch_buckets=lengths, lazy=True)
    assert packed.patches_RxPxC.shape == (1, 50176, vision.patch_dim)


def test_no_examples_make_no_batches(options):
  assert pack([], **options) == []


def test_a_batch_survives_its_file(make_example, make_image, options, tmp_path):
  for images in ([make_image(0)], []):
    batch = pack([make_example(0, 5, images)], **options)[0]
    save_batch(tmp_path / "dump" / "batch.npz", batch)
    loaded = load_batch(tmp_path / "dump" / "batch.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(batch)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(batch), strict=True):
      np.testing.assert_array_equal(a, b)


def test_rows_are_split_over_the_batch_axes(make_example, make_image, options):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  assert batch_shards(mesh) == 4
  examples = [make_example(i, 12, [make_image(i)]) for i in range(4)]
  batch = pack(examples, **(options | {"rows": 4, "rows_multiple_of": 4}))[0]
  placed = place(batch, mesh)
  for x in jax.tree.leaves(placed):
    assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] // 4
