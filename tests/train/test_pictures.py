"""Each process gets the pixels of its own rows. That two real processes then train as one:
test_processes.py; that bytes arrive: rollout/test_weight_push.py."""

import dataclasses

import numpy as np
import pytest

from axpo_jax import processes
from axpo_jax.train import pictures
from axpo_jax.train.packing import pack


@pytest.mark.parametrize("half", [0, 1])
def test_a_process_asks_for_the_pictures_of_its_own_rows(
    config, make_example, make_image, monkeypatch, half):
  examples = [make_example(i, 6, [make_image(i, (4, 4 + 2 * (i % 2)))]) for i in range(4)]
  bare = [dataclasses.replace(example, images=tuple(
    dataclasses.replace(image, pixels_HxWx3=None) for image in example.images)) for example in examples]

  def packed(examples):
    def mine(rows):
      return range(half * rows // 2, (half + 1) * rows // 2)
    return pack(examples, rows=4, length=16, block=4, vision_config=config.vision, rows_multiple_of=2,
                patch_buckets=(32,), image_rows_here=mine)

  asked = []

  def on_all(function):
    asked.append(function())
    return [[], *asked]

  def deal(make):  # what the main process does with it
    with monkeypatch.context() as main:
      main.setattr(processes, "on_all", lambda _: [[], *asked])
      main.setattr(processes, "deal", lambda make: sent.extend(make()) or b"")
      assert pictures.fetched(packed(examples), examples)
    return sent[1]

  sent = []
  monkeypatch.setattr(pictures.jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "on_all", on_all)
  monkeypatch.setattr(processes, "deal", deal)
  (want,), (got,) = packed(examples), pictures.fetched(packed(bare), bare)
  np.testing.assert_array_equal(want.vision.patches_RxPxC, got.vision.patches_RxPxC)
  shown = {image.key for image in want.vision.patches_RxPxC.images}
  assert set(asked[0]) == shown and len(shown) == 2
  assert sent[0] == b"" and len(sent[1]) == sum(
    image.pixels_HxWx3.nbytes for image in want.vision.patches_RxPxC.images)
