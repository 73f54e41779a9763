"""Packing: nothing is lost, nothing leaks, and the shapes are few."""

import dataclasses

import jax
import numpy as np
import pytest

from axpo_jax.model import sharding
from axpo_jax.train.batch import (
  batch_shards,
  denominator,
  load_batch,
  packing_metrics,
  place,
  save_batch,
)
from axpo_jax.train.packing import PackingError, pack


@pytest.fixture
def options(config):
  return {"rows": 2, "length": 16, "vision_config": config.vision, "patch_buckets": (16, 64)}


def _recovered(batches):
  """Every trajectory as (ids, positions, [(target, weight, advantage, behaviour)]) read back."""
  out = []
  for batch in batches:
    for row in range(len(batch.tokens_BxT)):
      for segment in range(1, batch.segments_BxT[row].max() + 1):
        at = batch.segments_BxT[row] == segment
        out.append(tuple(getattr(batch, name)[row][at] for name in (
          "tokens_BxT", "positions_BxTx3", "targets_BxT", "weights_BxT", "advantages_BxT",
          "behaviour_logp_BxT")))
  return out


def test_every_example_comes_back_shifted(make_example, options):
  sizes = [5, 16, 3, 9, 7, 12, 2, 1, 8]
  examples = [make_example(i, n) for i, n in enumerate(sizes)]
  batches = pack(examples, **options)
  found = {tuple(r[0].tolist()): r for r in _recovered(batches)}
  assert len(found) == len(examples)
  for example in examples:
    _, positions, targets, weights, advantages, behaviour = found[tuple(example.ids_T.tolist())]
    np.testing.assert_array_equal(positions, example.positions_Tx3)
    np.testing.assert_array_equal(targets, [*example.ids_T[1:], 0])
    np.testing.assert_array_equal(weights, [*example.loss_mask_T[1:], 0])
    np.testing.assert_array_equal(advantages, [*example.advantages_T[1:], 0])
    np.testing.assert_array_equal(behaviour, [*example.behaviour_logp_T[1:], 0])


def test_first_fit_decreasing_by_hand(make_example, options):
  # Longest first: 10 | 9 | 7 -> with 9 | 6 -> with 10 | 1 does not fit the two full rows.
  examples = [make_example(i, n) for i, n in enumerate([6, 10, 1, 7, 9])]
  batches = pack(examples, **options)
  assert len(batches) == 2
  rows = [[int((s == k).sum()) for k in range(1, s.max() + 1)]
          for b in batches for s in b.segments_BxT]
  assert rows == [[10, 6], [9, 7], [1], []]
  metrics = packing_metrics(batches)
  assert metrics["pack/fill"] == 33 / 64 and metrics["pack/sequences"] == 5


def test_packing_is_deterministic(make_example, make_image, options):
  examples = [make_example(i, 4 + i % 3, [make_image(i % 2)]) for i in range(7)]
  one, two = pack(examples, **options), pack(examples, **options)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)


def test_distinct_images_once_and_the_index_finds_their_patches(make_example, make_image, options):
  shared, small, large = make_image(1), make_image(2, (2, 2)), make_image(3, (4, 6))
  examples = [make_example(0, 4, [shared, small]), make_example(1, 5, [shared]),
              make_example(2, 3, [small, large]), make_example(3, 6)]
  batches = pack(examples, **(options | {"rows": 4}))
  assert len(batches) == 1
  batch = batches[0]
  vision = batch.vision
  assert packing_metrics(batches)["pack/images"] == 3
  # A merged token is 4 patches that follow each other: compare those patches themselves.
  patches_Mx4xC = vision.patches_RxPxC.reshape(-1, 4, vision.patches_RxPxC.shape[-1])
  by_ids = {tuple(e.ids_T.tolist()): e for e in examples}
  for row in range(4):
    for segment in range(1, batch.segments_BxT[row].max() + 1):
      at = batch.segments_BxT[row] == segment
      example, index_T = by_ids[tuple(batch.tokens_BxT[row][at])], batch.image_index_BxT[row][at]
      np.testing.assert_array_equal(index_T >= 0, example.image_T >= 0)
      want = [image.patches_PxC.reshape(-1, 4, image.patches_PxC.shape[-1])
              for image in example.images]
      if want:
        np.testing.assert_array_equal(patches_Mx4xC[index_T[index_T >= 0]], np.concatenate(want))


def test_all_micro_batches_have_one_shape(make_example, make_image, options):
  examples = [make_example(i, 12, [make_image(i)] if i < 3 else []) for i in range(6)]
  batches = pack(examples, **(options | {"rows": 1, "rows_multiple_of": 2}))
  shapes = {tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}
  assert len(batches) == 6 and len(shapes) == 1
  assert batches[0].vision.segments_RxP.shape[0] % 2 == 0
  assert all(b.vision is None and b.image_index_BxT is None for b in pack(examples[3:], **options))


def test_weights_of_both_aggregations(make_example, options):
  examples = [make_example(0, 4), make_example(1, 9), make_example(2, 6)]
  examples[2] = dataclasses.replace(examples[2], loss_mask_T=np.zeros(6, bool))
  token = pack(examples, **options)
  assert denominator(token) == 2 + 4
  assert set(np.concatenate([b.weights_BxT.ravel() for b in token])) == {0.0, 1.0}
  sequence = pack(examples, aggregation="sequence_mean", **options)
  assert denominator(sequence) == pytest.approx(2, rel=1e-6)
  nonzero = np.concatenate([b.weights_BxT[b.weights_BxT > 0] for b in sequence])
  np.testing.assert_allclose(sorted(nonzero), [1 / 4] * 4 + [1 / 2] * 2, rtol=1e-6)


def test_errors_name_the_example_and_the_numbers(make_example, make_image, options):
  fine, long = make_example(0, 4), make_example(1, 17)
  with pytest.raises(PackingError, match="example 1 has 17 tokens, a row holds 16"):
    pack([fine, long], **options)
  first = dataclasses.replace(fine, loss_mask_T=np.ones(4, bool))
  with pytest.raises(PackingError, match="nothing predicts the first token"):
    pack([first], **options)
  with pytest.raises(PackingError, match=f"banned id {fine.ids_T[3]}"):
    pack([fine], banned_ids=(int(fine.ids_T[3]),), **options)
  with pytest.raises(PackingError, match="advantages_T has length 3, ids_T has 4"):
    pack([dataclasses.replace(fine, advantages_T=np.zeros(3))], **options)
  lost = dataclasses.replace(make_example(2, 4, [make_image(0)]), images=())
  with pytest.raises(PackingError, match="image_T names image 0 of 0"):
    pack([lost], **options)


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
