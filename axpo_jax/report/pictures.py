"""Images for the page: small enough to travel in it, each once.

In: the image folder beside a dump, or pictures inside a log. Out: data URIs by key. Coordinates are
kept apart from pixels, so a box on a smaller copy is where it was on the original.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable

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


IMAGE = "\ufffc"  # marks an image in a text: the object replacement character
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
    short = key[:16]
    if short not in self.found:
      self.found[short] = self._copy(lambda: paths.within(epath.Path(folder), f"{key}.png"))
    return short

  def add_text(self, text: str) -> str:
    """Takes a picture in that is base64 text or a data URI; returns its key."""
    key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    if key not in self.found:
      self.found[key] = self._copy(lambda: base64.b64decode(text.partition(",")[2] or text))
    return key

  def _copy(self, source: Callable[[], epath.Path | bytes]) -> Picture:
    try:
      image = load_image(source())
    # A dump that was moved without its images still shows its text; a link out of the folder, or what
    # is no picture, shows nothing.
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
