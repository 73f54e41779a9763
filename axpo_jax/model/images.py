"""Images: from a PIL image of any size to the pixels that the policy is shown, and their patches.

An image is resized exactly once, here, and kept as the uint8 pixels of the resized picture
(`ProcessedImage`), so the sampler, the trainer and a remote engine all see the same pixels and count
the same tokens. The float32 patches that the vision tower takes hold 8 times as many bytes: they are
made only where a batch is packed, and are the bits that the `transformers` processor of Qwen2-VL and
Qwen3-VL makes in its PIL variant (which needs neither torch nor torchvision).

Shapes: H x W pixels, P patches of one image, C = channels * temporal_patch * patch * patch values.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from axpo_jax.model.pictures import to_rgb

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


@dataclass(frozen=True)
class PatchFormat:
  """How pixels become patches.

  Attributes:
    patch_size: side of a patch in pixels.
    temporal_patch_size: frames in a patch; a still image is repeated this many times.
    merge_size: side, in patches, of the block that is merged into one token.
    mean: one value a channel, subtracted after scaling pixels to [0, 1].
    std: one value a channel, divided by after that.
  """

  patch_size: int
  temporal_patch_size: int
  merge_size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def factor(self) -> int:
    """Height and width of a shown image are multiples of this many pixels."""
    return self.patch_size * self.merge_size

  @property
  def patch_dim(self) -> int:
    """C, values of a patch."""
    return len(self.mean) * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, eq=False)
class ProcessedImage:
  """An image as the model sees it. What is stored, sent and kept is its pixels: 3 bytes each.

  Attributes:
    size: width and height in pixels, as PIL gives them.
    key: SHA-256 of the picture's size and pixels. Equal keys mean equal pixels.
    format: how its patches are made.
    pixels_HxWx3: uint8 RGB, after resizing; read-only. None in a process that needs the size alone,
      see `train.pictures`.
  """

  size: tuple[int, int]
  key: str
  format: PatchFormat
  pixels_HxWx3: np.ndarray | None

  @classmethod
  def of(cls, image: Image.Image, format: PatchFormat) -> ProcessedImage:
    """From an RGB picture whose sides are multiples of `format.factor`."""
    pixels = np.asarray(image)  # PIL itself takes 4 bytes a pixel
    return cls(image.size, image_key(image), format, pixels)

  @property
  def grid_hw(self) -> tuple[int, int]:
    """Rows and columns of the patch grid; their product is P."""
    width, height = self.size
    return height // self.format.patch_size, width // self.format.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid_hw[0] * self.grid_hw[1]

  @property
  def num_tokens(self) -> int:
    """Tokens that this image takes in the text model."""
    return self.num_patches // self.format.merge_size**2

  @property
  def merged_hw(self) -> tuple[int, int]:
    """Rows and columns of its tokens."""
    rows, columns = self.grid_hw
    return rows // self.format.merge_size, columns // self.format.merge_size

  @property
  def patch_dim(self) -> int:
    return self.format.patch_dim

  def patches(self) -> np.ndarray:
    """Normalised float32 patches [P, C], made anew: (channel, time, row, column) flattened, in
    merge-block order, where the merge x merge patches that become one token follow each other."""
    (rows, columns), form = self.grid_hw, self.format
    merge, side = form.merge_size, form.patch_size
    pixels = self.pixels_HxWx3.reshape(
      rows // merge, merge, side, columns // merge, merge, side, len(form.mean))
    pixels_PxCxS = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, len(form.mean), -1)
    out = np.empty((rows * columns, len(form.mean), form.temporal_patch_size, side * side), np.float32)
    for channel, levels in enumerate(_levels(form.mean, form.std)):
      out[:, channel] = levels[pixels_PxCxS[:, channel, None]]
    return out.reshape(rows * columns, form.patch_dim)

  def picture(self) -> Image.Image:
    """The pixels as a PIL image (a copy)."""
    return Image.fromarray(self.pixels_HxWx3)


@functools.lru_cache
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """float32 [channels, 256]: what the processor makes of every value that a pixel can have."""
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
  processor = Qwen2VLImageProcessorPil()
  pixels = np.tile(np.arange(256, dtype=np.uint8), (len(mean), 1, 1))
  scaled = processor.rescale(pixels, processor.rescale_factor)
  return processor.normalize(scaled, mean, std)[:, 0]


def fitted_size(width: int, height: int, factor: int, limits: ImageLimits) -> tuple[int, int]:
  """Width and height after resizing: multiples of `factor`, close to the aspect ratio, as Qwen's
  `smart_resize` has them. That may exceed its own upper limit; here no image does, so that the largest
  image of a run is known from its config.

  Raises:
    ImageError: an empty image, sides that differ by a factor of more than 200, or an image so long
      that even `factor` pixels beside its length are too many.
  """
  if min(width, height) < 1:
    raise ImageError(f"image of {width} x {height} pixels is empty")
  if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
    raise ImageError(
      f"image of {width} x {height} pixels is too long: one side may be at most "
      f"{MAX_ASPECT_RATIO} times the other; crop it or pad it"
    )
  for least in (limits.min_pixels, 1):  # enlarging rounds up, perhaps beyond max_pixels
    # Loads slowly where torch is installed, and checks of a config need none of it.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    new_height, new_width = smart_resize(height, width, factor, least, limits.max_pixels)
    if new_height * new_width <= limits.max_pixels:
      return new_width, new_height
  raise ImageError(
    f"image of {width} x {height} pixels is too long to be shown within {limits.max_pixels} pixels: "
    "crop it"
  )


class ImageProcessor:
  """Resizes an image once. The arguments are those of `PatchFormat`."""

  def __init__(
    self,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
  ):
    self.format = PatchFormat(patch_size, temporal_patch_size, merge_size, tuple(mean), tuple(std))
    self.factor = self.format.factor

  @classmethod
  def from_checkpoint(cls, path: str | Path) -> ImageProcessor:
    """Reads `preprocessor_config.json` of a Hugging Face folder. The folder's pixel limits are
    not used: `ImageLimits` come from the run's config.

    Raises:
      FileNotFoundError: the folder has no `preprocessor_config.json`.
      ValueError: the file is no JSON or lacks a field.
    """
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file():
      raise FileNotFoundError(f"{file} is missing: copy it from the model that this folder is based on")
    try:
      fields = json.loads(file.read_bytes())
    except ValueError as error:
      raise ValueError(f"{file} is not JSON: {error}") from error
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    if missing := [name for name in names if name not in fields]:
      raise ValueError(f"{file} lacks {', '.join(missing)}")
    return cls(*(fields[name] for name in names))

  def resize(self, image: Image.Image, limits: ImageLimits) -> Image.Image:
    """RGB copy whose sides are multiples of `factor` and whose area lies within `limits`, close to
    the original aspect ratio (bicubic). An image that is legal already keeps its pixels.

    Raises:
      ImageError: see `fitted_size`.
    """
    image = to_rgb(image)
    size = fitted_size(*image.size, self.factor, limits)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

  def __call__(self, image: Image.Image, limits: ImageLimits) -> ProcessedImage:
    """Resizes `image` into `limits` and processes it.

    Raises:
      ImageError: see `fitted_size`.
    """
    return ProcessedImage.of(self.resize(image, limits), self.format)


def image_key(image: Image.Image) -> str:
  """SHA-256 of an image's mode, size and pixels, in hexadecimal."""
  digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
  digest.update(image.tobytes())
  return digest.hexdigest()
