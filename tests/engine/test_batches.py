"""Buckets, and the padded arrays of a wave."""

import numpy as np
import pytest

from axpo_jax.engine.embedded.batches import (
  Prompt,
  copy_batches,
  prefill_batches,
  wave_images,
)
from axpo_jax.engine.embedded.prefix_pool import Layout, Move
from axpo_jax.model.buckets import Buckets

ONE_DEVICE = Layout(9)
BATCH, TOKENS, SLOTS = Buckets(2, 4), Buckets(4, 32), Buckets(16, 96)


@pytest.fixture
def prompt(model_config, ask):
  return lambda ids, images=(): Prompt.of(ask(ids, images), model_config)


def _prefills(jobs, place=None, most_tokens=1000, layout=ONE_DEVICE):
  return list(prefill_batches(
    jobs, place or {}, BATCH, TOKENS, SLOTS, layout=layout, most_tokens=most_tokens
  ))  # fmt: skip


def test_buckets_double_up_to_the_largest():
  assert Buckets(8, 100).sizes == (8, 16, 32, 64, 100)
  assert Buckets(8, 4).sizes == (4,)
  assert Buckets(8, 32, fine=True).sizes == (8, 12, 16, 24, 32)
  assert Buckets(8, 40, fine=True).sizes == (8, 12, 16, 24, 32, 40)
  assert [Buckets(8, 100)(n) for n in (1, 8, 9, 100)] == [8, 8, 16, 100]
  with pytest.raises(ValueError, match="101 exceeds the largest bucket 100"):
    Buckets(8, 100)(101)


def test_a_prompt_expands_its_pictures(prompt, picture, image):
  pads = prompt((7, *picture, 8), (image(0),))
  start, pad, end = picture
  assert pads.tokens_T.tolist() == [7, start] + [pad] * 6 + [end, 8]
  assert pads.image_T.tolist() == [-1, -1] + [0] * 6 + [-1, -1]
  assert pads.offset_T[2:8].tolist() == [0, 1, 2, 3, 4, 5]
  assert pads.last_position == 2 + 3 + 1  # a 2 x 3 image takes max(2, 3) positions
  assert pads.images_from(8) == [] and len(pads.images_from(7)) == 1


def test_requests_of_one_prompt_are_one_for_planning(prompt, picture, image):
  one, same, other = (prompt((7, *picture, 8), (image(number),)) for number in (0, 0, 1))
  assert one is not same and one.digest == same.digest != other.digest


def test_only_what_lacks_tokens_is_prefilled_and_only_what_moves_is_copied(prompt):
  whole, part = prompt(range(10, 20)), prompt(range(20, 27))
  jobs = [(whole, Move(1, 3, 9)), (whole, Move(2, 2, 9)), (part, Move(4, 5, 2))]
  ((source, row, slots),) = copy_batches(jobs, BATCH, SLOTS, ONE_DEVICE)
  assert (source.tolist(), row.tolist(), slots) == ([3, 9], [1, 9], 16)
  ((inputs, slots),) = _prefills(jobs)
  # Alone, so without padding rows.
  assert (inputs.source_B.tolist(), inputs.row_B.tolist()) == ([5], [4])
  assert inputs.start_B.tolist() == [2] and slots == 16
  assert inputs.tokens_BxT.tolist() == [[22, 23, 24, 25]]
  assert inputs.real_BxT.tolist() == [[1] * 4]
  assert inputs.positions_BxTx3[0, :, 0].tolist() == [2, 3, 4, 5]
  assert inputs.image_index_BxT is None


def test_prefills_are_grouped_by_length_within_the_budget(prompt):
  jobs = [(prompt(range(10, 10 + n)), Move(n, n, 0)) for n in (4, 5, 3, 8, 3, 2, 4)]
  shapes = [inputs.tokens_BxT.shape for inputs, _ in _prefills(jobs)]
  assert shapes == [(4, 4), (2, 4), (1, 8)]
  assert [i.tokens_BxT.shape for i, _ in _prefills(jobs, most_tokens=4)] == [(1, 4)] * 6 + [(1, 8)]


def test_each_device_computes_for_rows_of_its_own(prompt):
  """Two devices with the rows 0 to 3 and 4 to 7. What is cached on the other one is copied first."""
  layout = Layout(8, shards=2)
  jobs = [(prompt(range(10, 10 + n)), move) for n, move in (
    (4, Move(5, 5, 0)), (4, Move(1, 1, 0)), (3, Move(6, 5, 1)), (4, Move(7, 2, 2)), (5, Move(2, 3, 4)))]
  copies = [(source.tolist(), row.tolist()) for source, row, _ in
            copy_batches(jobs, BATCH, SLOTS, layout)]
  assert copies == [([2, 3], [7, 2])]  # the last lacks nothing but its row
  ((inputs, _),) = _prefills(jobs, layout=layout)
  assert inputs.row_B.tolist() == [1, 8, 8, 8, 5, 6, 7, 8]  # 8 is padding
  assert inputs.source_B.tolist() == [1, 8, 8, 8, 5, 5, 7, 8]
  assert inputs.start_B.tolist() == [0, 0, 0, 0, 0, 1, 2, 0]
  rows = [i.row_B.tolist() for i, _ in _prefills(jobs, layout=layout, most_tokens=8)]
  assert rows == [[1, 5], [8, 6], [8, 7]]  # four tokens a device


def test_each_distinct_picture_is_packed_once(prompt, model_config, picture, image):
  twice = prompt((7, *picture, *picture, 8), (image(0), image(1)))
  again = prompt((9, *picture, 8), (image(1),))
  cached = prompt((6, *picture, 8, 8, 8), (image(2),))
  jobs = [(twice, Move(0, 0, 0)), (again, Move(1, 1, 4)), (cached, Move(2, 2, 10))]
  vision, place = wave_images(jobs, model_config)
  assert sorted(place) == sorted({image(0).key, image(1).key})
  assert (vision.segments_RxP > 0).sum() == 2 * 24
  index = {b.row_B[0].item(): b.image_index_BxT for b, _ in _prefills(jobs, place) if
           b.image_index_BxT is not None}  # fmt: skip
  first, second = place[image(0).key], place[image(1).key]
  expected = [-1, -1, *range(first, first + 6), -1, -1, *range(second, second + 6), -1]
  assert index[0][0, : len(expected)].tolist() == expected
  # The cached part of the other one ends inside its picture: four of its six tokens are left.
  assert index[1][0, :5].tolist() == [*range(second + 2, second + 6), -1]
  assert wave_images(jobs[2:], model_config) == (None, {})
  assert all(b.image_index_BxT is None for b, _ in _prefills(jobs[2:]))
  assert np.all(vision.patches_RxPxC[vision.segments_RxP == 0] == 0)
