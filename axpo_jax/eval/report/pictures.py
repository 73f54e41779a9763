"""Images for the page: small enough to travel in it, each once.

In: the image folder beside a dump. Out: data URIs by key. Coordinates are kept apart from pixels, so
a box drawn on a smaller copy stands where it stood on the original.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import pathlib
import re

import PIL.Image
from etils import epath

from axpo_jax import paths
from axpo_jax.data.question import load_image


@dataclasses.dataclass(frozen=True)
class Picture:
  """Width and height of the original, and the copy that the page shows; "" if its file is missing."""

  width: int
  height: int
  uri: str


_KEY = re.compile(r"\w+", re.ASCII)
_MISSING = Picture(1, 1, "")


class Pictures:
  """Copies images into data URIs, each key once.

  Args:
    side: longest side of a copy in pixels.
  """

  def __init__(self, side: int):
    self._side = side
    self.found: dict[str, Picture] = {}

  def add(self, folder: pathlib.Path, key: str) -> str:
    """Takes folder/<key>.png in; returns the key's short form, by which the page knows it."""
    if not _KEY.fullmatch(key):  # a dump must not name any other file of this machine
      self.found[""] = _MISSING
      return ""
    short = key[:16]
    if short not in self.found:
      self.found[short] = self._copy(folder, key)
    return short

  def _copy(self, folder: pathlib.Path, key: str) -> Picture:
    try:
      image = load_image(paths.within(epath.Path(folder), f"{key}.png"))
    # A dump that was moved without its images still shows its text; a link out of the folder shows nothing.
    except ValueError:
      return _MISSING
    width, height = image.size
    image.thumbnail((self._side, self._side), PIL.Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # Few colours (drawings, screens of text) stay exact; photographs do not need to.
    few = image.getcolors(4096) is not None
    image.save(stream, "WEBP", lossless=few, quality=80, method=2)
    data = base64.b64encode(stream.getvalue()).decode()
    return Picture(width, height, f"data:image/webp;base64,{data}")
