"""`image_zoom_in`: look closer at a region of one of the episode's images.

The crop is taken from the full-resolution image, not from what the policy was shown, and becomes
the next image of the episode. Geometry as in Qwen-Agent's zoom tool for Qwen3-VL: coordinates from
0 to 1000 relative to the image, clamped to it; a side shorter than 32 pixels grows about its centre
to 32; then bicubic resizing to multiples of the vision tower's factor between two pixel counts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import PIL.Image

from axpo_jax.agent.tools.base import BAD_ARGUMENTS, EpisodeState, Observation, Tool, failure
from axpo_jax.model.images import ImageError, ImageLimits, fitted_size

SCALE = 1000  # relative coordinates run from 0 to this
QWEN_LIMITS = ImageLimits(min_pixels=262_144, max_pixels=12_845_056)

SCHEMA = {
    "type": "function",
    "function": {
        "name": "image_zoom_in",
        "description": "Crops a region from the full-resolution image, magnifies it and returns "
                       "it as a new image.",
        "parameters": {
            "type": "object",
            "properties": {
                "bbox_2d": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 4,
                    "maxItems": 4,
                    "description": "The region [x1, y1, x2, y2], relative: 0 to 1000 from the "
                                   "left or top edge to the right or bottom one.",
                },
                "label": {"type": "string", "description": "What the region shows."},
                "img_idx": {
                    "type": "number",
                    "description": "Which image, from 0, earlier crops included.",
                    "default": 0,
                },
            },
            "required": ["bbox_2d", "label"],
        },
    },
}


class ImageZoomIn(Tool):
  """The zoom tool.

  Args:
    limits: pixels of the magnified crop.
    factor: sides of the crop are multiples of this many pixels (patch size times merge size).
    min_side: a shorter side of the region grows to this, in pixels of the original image.
  """

  name = "image_zoom_in"
  schema = SCHEMA
  scope = "read_image"
  aliases = ("image_zoom_in_tool",)
  argument_aliases: ClassVar = {"bbox": "bbox_2d", "image_index": "img_idx"}

  def __init__(self, limits: ImageLimits = QWEN_LIMITS, *, factor: int = 32, min_side: int = 32):
    self.factor = factor
    self.limits = limits
    self.min_side = min_side

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Returns the crop, and its index among the episode's images."""
    index = arguments["img_idx"]
    if index != int(index) or not 0 <= index < len(episode.images):
      have = f"0 to {len(episode.images) - 1}" if episode.images else "none"
      return failure(BAD_ARGUMENTS, f"img_idx {index} is out of range; images: {have}")
    image = episode.images[int(index)]
    try:
      crop = self.magnify(image, arguments["bbox_2d"])
    except BoxError as error:
      return failure(BAD_ARGUMENTS, str(error))
    return Observation(f"Image {len(episode.images)}: zoomed from image {int(index)}.", (crop,))

  def magnify(self, image: PIL.Image.Image, box: list[float]) -> PIL.Image.Image:
    """Crops and resizes.

    Raises:
      BoxError: the box is empty, lies outside, or is too long and thin.
    """
    left, top, right, bottom = pixel_box(box, image.width, image.height, self.min_side)
    width, height = right - left, bottom - top
    try:
      size = fitted_size(width, height, self.factor, self.limits)
    except ImageError as error:
      raise BoxError(f"the region of {width} x {height} pixels is too long and thin") from error
    crop = image.crop((left, top, right, bottom))
    return crop if crop.size == size else crop.resize(size, PIL.Image.Resampling.BICUBIC)


class BoxError(ValueError):
  """A region that cannot be cropped; the message is shown to the policy."""


def pixel_box(box: list[float], width: int, height: int,
              min_side: int = 32) -> tuple[int, int, int, int]:
  """From relative coordinates to whole pixels (left, top, right, bottom) inside the image.

  Args:
    box: x1, y1, x2, y2 from 0 to 1000; values outside are clamped.
    width: of the image, pixels.
    height: of the image, pixels.
    min_side: shorter sides grow about their centre to this, shifted to stay inside the image; an
      image that is itself shorter gives its whole side.

  Raises:
    BoxError: x1 >= x2 or y1 >= y2, or nothing is left inside the image.
  """
  x1, y1, x2, y2 = box
  if x1 >= x2 or y1 >= y2:
    raise BoxError(f"bbox_2d {box} is empty: it needs x1 < x2 and y1 < y2")
  left, right = _pixel_range(x1, x2, width, min_side)
  top, bottom = _pixel_range(y1, y2, height, min_side)
  return left, top, right, bottom


def _pixel_range(low: float, high: float, size: int, min_side: int) -> tuple[int, int]:
  low, high = max(0.0, low), min(float(SCALE), high)
  if low >= high:
    raise BoxError(f"bbox_2d lies outside the image: coordinates run from 0 to {SCALE}")
  low, high = low / SCALE * size, high / SCALE * size
  side = min(min_side, size)
  if high - low < side:
    low = min(max((low + high - side) / 2, 0.0), size - side)
    high = low + side
  return round(low), round(high)
