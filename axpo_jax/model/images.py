"""Images: from a PIL image of any size to the patches that the vision tower eats.

An image is resized exactly once, here. The resized picture travels with its patches
(`ProcessedImage.image`), so the sampler, the trainer and a remote engine all see the same pixels
and count the same tokens. Patch values come from the `transformers` processor of Qwen2-VL and
Qwen3-VL in its PIL variant, which needs neither torch nor torchvision. (Its overhead is about
0.1 ms a call on an 80 x 80 image, so there is no reason to write the arithmetic a second time.)

Shapes: P patches of one image, C = channels * temporal_patch * patch * patch values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
  Qwen2VLImageProcessorPil,
  smart_resize,
)

MAX_ASPECT_RATIO = 200  # the processor's own limit


class ImageError(ValueError):
  """An image that cannot be shown to the model."""


@dataclass(frozen=True)
class ImageLimits:
  """How many pixels an image may have after resizing, height times width."""

  min_pixels: int
  max_pixels: int

  def __post_init__(self):
    if not 0 < self.min_pixels <= self.max_pixels:
      raise ValueError(
        f"image limits must satisfy 0 < min_pixels <= max_pixels, got min_pixels={self.min_pixels}, "
        f"max_pixels={self.max_pixels}"
      )


@dataclass(frozen=True, eq=False)
class ProcessedImage:
  """An image as the model sees it.

  Attributes:
    patches_PxC: float32 patch values, in merge-block order: the merge x merge patches that become
      one token follow each other.
    grid_hw: rows and columns of the patch grid; their product is P.
    image: the RGB picture that the patches were made from, after resizing.
    key: SHA-256 of the picture's size and pixels. Equal keys mean equal pixels.
    merge_size: side of the square of patches that is merged into one token.
  """

  patches_PxC: np.ndarray
  grid_hw: tuple[int, int]
  image: Image.Image
  key: str
  merge_size: int = 2

  @property
  def num_tokens(self) -> int:
    """Tokens that this image takes in the text model."""
    return self.grid_hw[0] * self.grid_hw[1] // self.merge_size**2


class ImageProcessor:
  """Resizes an image once and cuts it into normalised patches.

  Args:
    patch_size: side of a patch in pixels.
    temporal_patch_size: frames in a patch; a still image is repeated this many times.
    merge_size: side, in patches, of the block that is merged into one token.
    mean: one value a channel, subtracted after scaling pixels to [0, 1].
    std: one value a channel, divided by after that.
  """

  def __init__(
    self,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
  ):
    self.patch_size = patch_size
    self.temporal_patch_size = temporal_patch_size
    self.merge_size = merge_size
    self.factor = patch_size * merge_size  # height and width are multiples of this
    self._processor = Qwen2VLImageProcessorPil(
      patch_size=patch_size,
      temporal_patch_size=temporal_patch_size,
      merge_size=merge_size,
      image_mean=list(mean),
      image_std=list(std),
      do_resize=False,  # resizing happens in `resize`, once
    )

  @classmethod
  def from_checkpoint(cls, path: str | Path) -> ImageProcessor:
    """Reads `preprocessor_config.json` of a Hugging Face folder. The folder's pixel limits are
    not used: `ImageLimits` come from the run's config.

    Raises:
      FileNotFoundError: the folder has no `preprocessor_config.json`.
      ValueError: the file lacks a field.
    """
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file():
      raise FileNotFoundError(f"{file} is missing: copy it from the model that this folder is based on")
    fields = json.loads(file.read_text())
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    if missing := [name for name in names if name not in fields]:
      raise ValueError(f"{file} lacks {', '.join(missing)}")
    return cls(*(fields[name] for name in names))

  def resize(self, image: Image.Image, limits: ImageLimits) -> Image.Image:
    """RGB copy whose sides are multiples of `factor` and whose area lies within `limits`, close to
    the original aspect ratio (bicubic). An image that is legal already keeps its pixels.

    Raises:
      ImageError: an empty image, or sides that differ by a factor of more than 200.
    """
    image = image.convert("RGB")
    width, height = image.size
    if min(width, height) < 1:
      raise ImageError(f"image of {width} x {height} pixels is empty")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
      raise ImageError(
        f"image of {width} x {height} pixels is too long: one side may be at most "
        f"{MAX_ASPECT_RATIO} times the other; crop it or pad it"
      )
    new_height, new_width = smart_resize(
      height, width, self.factor, limits.min_pixels, limits.max_pixels
    )
    if (new_width, new_height) == (width, height):
      return image
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC)

  def __call__(self, image: Image.Image, limits: ImageLimits) -> ProcessedImage:
    """Resizes `image` into `limits` and processes it.

    Raises:
      ImageError: see `resize`.
    """
    image = self.resize(image, limits)
    outputs = self._processor(image)
    _, rows, columns = (int(n) for n in outputs["image_grid_thw"][0])
    return ProcessedImage(
      patches_PxC=outputs["pixel_values"],
      grid_hw=(rows, columns),
      image=image,
      key=image_key(image),
      merge_size=self.merge_size,
    )


def image_key(image: Image.Image) -> str:
  """SHA-256 of an image's mode, size and pixels, in hexadecimal."""
  header = f"{image.mode} {image.width}x{image.height}\n".encode()
  return hashlib.sha256(header + image.tobytes()).hexdigest()
