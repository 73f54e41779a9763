"""How records name their images, and which names are allowed.

In: a value of a record. Out: an `ImageSource` that `question.load_image` opens later: a path below one
folder, or encoded bytes.

An image is written as a path relative to that folder, as encoded bytes, as `{"bytes": ...}` or
`{"path": ...}` (Hugging Face data sets), as base64 text or as a data URI.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import PIL.Image
from etils import epath

from axpo_jax import paths
from axpo_jax.data.question import ImageError, ImageSource, check_header, load_image

# How base64 text of PNG, JPEG, WebP, GIF, BMP and TIFF files begins. Paths do not.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk0", "SUkq", "TU0AK")


def named(value: Any, folder: epath.Path, *, relocate: bool = False, anywhere: bool = False) -> ImageSource:
  """The source that a record's value names. Nothing is opened.

  Args:
    value: see the module.
    folder: where relative paths start, and where paths must stay.
    relocate: paths begin with folders of another machine; use the longest suffix that exists.
    anywhere: paths may leave the folder.

  Raises:
    ImageError: no such form, base64 that is none, or a path that leaves the folder.
  """
  if isinstance(value, Mapping):
    value = value.get("bytes") or value.get("path")
  if isinstance(value, (bytes, PIL.Image.Image)):
    return value
  if not isinstance(value, str) or not value:
    raise ImageError(f"expected a path, bytes, {{bytes}} or base64 text, got {type(value).__name__}")
  if value.startswith("data:"):
    return _from_base64(value.partition(",")[2])
  if value.startswith(_BASE64_STARTS) and len(value) >= 64:
    return _from_base64(value)
  path = _relocated(folder / value, folder) if relocate else folder / value
  if not anywhere:
    _check_inside(path, folder)
  return path


def check(source: ImageSource, how: str) -> None:
  """Checks an image: "none", "header" or "decode" (see `readers.ReaderConfig.image_check`).

  Raises:
    ImageError: it is missing, no image, or too large.
  """
  if how == "decode":
    load_image(source)
  elif how == "header":
    check_header(source)


def kept(image: bytes, folder: epath.Path) -> epath.Path:
  """Writes an image once, under the name of its content."""
  name = hashlib.sha256(image).hexdigest()
  path = folder / name[:2] / name[2:34]
  if not path.exists():
    paths.make(path.parent)
    paths.write_bytes(path, image)  # a run that dies here leaves no half image
  return path


def _relocated(source: epath.Path, folder: epath.Path) -> epath.Path:
  """The longest end of a path that exists below the folder; the path itself if none does."""
  if source.is_relative_to(folder) and source.exists():
    return source
  relative = source.relative_to(folder) if source.is_relative_to(folder) else source
  ends = (folder.joinpath(*relative.parts[start:]) for start in range(1, len(relative.parts)))
  return next((end for end in ends if end.exists()), source)


def _check_inside(source: pathlib.PurePath, folder: epath.Path) -> None:
  try:
    paths.within(folder, os.fspath(source))
  except ValueError as error:
    raise ImageError(f"path {error}; if you trust who wrote the file, set "
                     "config.data.image_anywhere=True, or name a folder that holds all images in "
                     "config.data.image_folder") from error


def _from_base64(text: str) -> bytes:
  try:
    return base64.b64decode("".join(text.split()), validate=True)
  except binascii.Error as error:
    raise ImageError(f"not base64: {error}") from error
