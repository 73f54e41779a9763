"""Images against the complete `transformers` processor and against the resizing rule."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from axpo_jax.model.images import (
  ImageError,
  ImageLimits,
  ImageProcessor,
  PatchFormat,
  fitted_size,
  image_key,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "axpo_jax/assets/tiny_tokenizer"
# The mean and std differ by channel so that a mixed-up channel order shows.
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
WIDE = ImageLimits(1, 10**8)


def picture(width, height, seed=0, mode="RGB"):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels).convert(mode)


def reference(image, limits, patch_size=16):
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  processor = Qwen2VLImageProcessorPil(
    patch_size=patch_size, temporal_patch_size=2, merge_size=2, image_mean=MEAN, image_std=STD,
    size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
  )
  outputs = processor(image)
  return outputs["pixel_values"], tuple(int(n) for n in outputs["image_grid_thw"][0][1:])


@pytest.mark.parametrize("size", [(96, 64), (32, 32), (32, 224)])
def test_legal_image_gets_the_values_of_the_complete_processor(size):
  image = picture(*size)
  processed = ImageProcessor(16, 2, 2, MEAN, STD)(image, WIDE)
  patches, grid = reference(image, WIDE)
  assert processed.patches().dtype == np.float32
  np.testing.assert_array_equal(processed.patches(), patches)
  assert processed.grid_hw == grid == (size[1] // 16, size[0] // 16)
  assert processed.picture().tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(100, 75), (500, 20), (7, 9), (33, 130), (640, 480)])
def test_any_image_is_resized_as_by_the_complete_processor(size):
  limits = ImageLimits(32 * 32 * 4, 32 * 32 * 40)
  processed = ImageProcessor(16, 2, 2, MEAN, STD)(picture(*size), limits)
  patches, grid = reference(picture(*size), limits)
  assert processed.grid_hw == grid
  np.testing.assert_array_equal(processed.patches(), patches)


def test_every_value_of_a_pixel_becomes_the_bits_of_the_complete_processor():
  """All 256 levels of all channels, with statistics that no float32 holds exactly."""
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
  image = Image.fromarray(np.tile(levels, (4, 6, 1)))
  patches, _ = reference(image, WIDE)
  got = ImageProcessor(16, 2, 2, MEAN, STD)(image, WIDE).patches()
  assert got.tobytes() == patches.tobytes()


def test_a_megapixel_is_stored_and_sent_in_three_megabytes():
  """Floats (25 MB), or a second copy of the pixels, would show."""
  image = ImageProcessor(16, 2, 2, MEAN, STD)(picture(1024, 1024), WIDE)
  sent = pickle.dumps([image, image])  # rollouts of a question share its image
  assert len(sent) < 3 * 2**20 + 2000
  loaded, again = pickle.loads(sent)
  assert loaded is again and loaded.key == image.key == image_key(loaded.picture())
  assert loaded.patches().tobytes() == image.patches().tobytes()


def test_what_is_returned_is_what_the_tower_sees():
  """Processing the returned picture again, as another engine would, changes nothing."""
  processor = ImageProcessor(16, 2, 2, MEAN, STD)
  limits = ImageLimits(32 * 32 * 4, 32 * 32 * 12)
  first = processor(picture(301, 97), limits)
  second = processor(first.picture(), limits)
  np.testing.assert_array_equal(first.patches(), second.patches())
  assert first.key == second.key


def test_size_and_tokens_follow_from_patch_and_merge():
  processor = ImageProcessor(8, 2, 2, MEAN, STD)
  processed = processor(picture(80, 80), WIDE)
  assert processed.picture().size == (80, 80)
  assert processed.grid_hw == (10, 10)
  assert processed.patches().shape == (100, 3 * 2 * 8 * 8)
  assert processed.num_tokens == 25
  # 160 x 80 to at most 80 * 80 pixels: scale 1/sqrt(2), sides 113.1 x 56.6, floored to 112 x 48.
  assert processor.resize(picture(160, 80), ImageLimits(1, 6400)).size == (112, 48)
  # 20 x 20 to at least 6400: scale 4, no rounding needed.
  assert processor.resize(picture(20, 20), ImageLimits(6400, 10**6)).size == (80, 80)
  # Rounding, not flooring, inside the limits: 23 -> 16, 25 -> 32.
  assert processor.resize(picture(23, 25), ImageLimits(256, 10**6)).size == (16, 32)


def test_patches_come_in_merge_blocks():
  """Paint each patch with its place; the first four patches must be one 2 x 2 block."""
  image = np.zeros((32, 48, 3), np.uint8)
  for row in range(4):
    for column in range(6):
      image[row * 8:row * 8 + 8, column * 8:column * 8 + 8] = 10 * row + column
  processor = ImageProcessor(8, 2, 2, (0, 0, 0), (1, 1, 1))
  patches = processor(Image.fromarray(image), WIDE).patches()
  places = np.rint(patches[:, 0] * 255).astype(int).tolist()
  assert places[:8] == [0, 1, 10, 11, 2, 3, 12, 13]
  assert places[12:16] == [20, 21, 30, 31]


def test_key_tells_pixels_and_sizes_apart():
  image = picture(32, 16)
  other = image.copy()
  other.putpixel((31, 15), (1, 2, 3))
  assert image_key(image) == image_key(image.copy())
  assert image_key(image) != image_key(other)
  same_bytes = Image.frombytes("RGB", (16, 32), image.tobytes())
  assert image_key(image) != image_key(same_bytes)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
  processed = ImageProcessor(8, 2, 2, MEAN, STD)(picture(32, 32, mode=mode), WIDE)
  assert processed.picture().mode == "RGB"
  assert processed.patches().shape == (16, 384)


def test_bad_images_and_limits_are_named():
  processor = ImageProcessor(8, 2, 2, MEAN, STD)
  with pytest.raises(ImageError, match="402 x 2"):
    processor(picture(402, 2), WIDE)
  with pytest.raises(ImageError, match="0 x 5"):
    processor(Image.new("RGB", (0, 5)), WIDE)
  for low, high in ((0, 10), (20, 10)):
    with pytest.raises(ValueError, match=f"min_pixels={low}, max_pixels={high}"):
      ImageLimits(low, high)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), factor=st.sampled_from((16, 32)),
       low=st.integers(1, 200_000), more=st.integers(0, 200_000))
def test_no_image_is_larger_than_its_limit(width, height, factor, low, more):
  """Or it is refused: `smart_resize` itself exceeds its limit for long images and for narrow limits."""
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

  limits = ImageLimits(low, low + more)
  try:
    size = fitted_size(width, height, factor, limits)
  except ImageError:
    ratio = max(width, height) / min(width, height)
    assert ratio > 200 or math.sqrt(limits.max_pixels * ratio) < factor * ratio * 1.1
    return
  assert math.prod(size) <= limits.max_pixels
  assert size[0] % factor == size[1] % factor == 0
  theirs = smart_resize(height, width, factor, limits.min_pixels, limits.max_pixels)
  assert size == theirs[::-1] or math.prod(theirs) > limits.max_pixels


def test_from_checkpoint(tmp_path):
  processor = ImageProcessor.from_checkpoint(ASSET)
  assert processor.format == PatchFormat(8, 2, 2, (0.5,) * 3, (0.5,) * 3)
  black = processor(Image.new("RGB", (16, 16)), WIDE)
  np.testing.assert_array_equal(black.patches(), -1)  # (0 - 0.5) / 0.5
  with pytest.raises(FileNotFoundError, match="preprocessor_config"):
    ImageProcessor.from_checkpoint(tmp_path)
  (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 8, "image_mean": [0]}')
  with pytest.raises(ValueError, match="temporal_patch_size, merge_size, image_std"):
    ImageProcessor.from_checkpoint(tmp_path)


def test_needs_neither_torch_nor_jax():
  code = """
import sys
for name in ("torch", "torchvision", "jax"):
  sys.modules[name] = None  # importing it raises ImportError
from PIL import Image
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor
processed = ImageProcessor.from_checkpoint(sys.argv[1])(Image.new("RGB", (50, 50)), ImageLimits(1, 4096))
assert processed.num_tokens == 9, processed.num_tokens
assert Chat.from_pretrained(sys.argv[1]).encode("<|im_end|>")
"""
  subprocess.run([sys.executable, "-c", code, str(ASSET)], check=True, cwd=ROOT, timeout=120)
