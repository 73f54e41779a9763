"""Opens untrusted pictures: from an encoded file to RGB pixels, within bounds of memory.

In: a path, an open file or encoded bytes. Out: a PIL image in RGB. The pictures of data sets, tools and dumps
are all opened here. A file of another format than `FORMATS` is never given to a decoder (PIL would hand EPS to
Ghostscript). A picture of more than `max_pixels` is refused by its header, since a few kilobytes can decode to a
gigabyte.

Pixels are those of `transformers`: the EXIF orientation of `image_utils.load_image`, then
`image_transforms.convert_to_rgb`, which the image processors of Qwen apply and which shows transparent
pictures on white. One thing differs knowingly: 16-bit, 32-bit and float greys are scaled to 8 bits,
where `transformers` clips them, so that a 16-bit scan would be white and a float picture black.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 1 << 26  # 8192 x 8192; decoded, it takes 256 MiB

_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH = 274, 322, 323  # tags of EXIF and TIFF


class ImageError(ValueError):
  """An image that is missing, cannot be decoded, or is larger than what is allowed."""


def decode(source: bytes | str | os.PathLike | BinaryIO, *, name: str = "",
           max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
  """Opens and decodes a picture, upright, in RGB and without the file's metadata.

  Args:
    source: encoded bytes, a path or a file that is open for reading.
    name: what to call it in errors; by default its path or its number of bytes.
    max_pixels: width times height that is allowed.

  Raises:
    ImageError: of no allowed format, damaged, or too large.
  """
  name = name or _name(source)
  with _opened(source, name, max_pixels) as opened:
    try:
      opened.load()  # decodes all of it: a file that was cut fails here
      image = upright_rgb(opened)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
      raise ImageError(f"image ({name}) cannot be decoded: {error}") from error
  image = image.copy() if image is opened else image
  image.info = {}  # profiles and comments would be in every file that is written from it
  return image


def header_size(source: bytes | str | os.PathLike | BinaryIO, *, name: str = "",
                max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Width and height of the upright picture, from its header alone. Arguments and errors: `decode`."""
  with _opened(source, name or _name(source), max_pixels) as opened:
    return upright_size(opened)


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
  """Width and height of the picture turned as its EXIF data say."""
  turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # PIL turns TIFF itself
  return image.size[::-1] if turned else image.size


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """`to_rgb` of the picture turned as its EXIF data say; a plain RGB picture is returned as it is."""
  if _orientation(image) != 1:
    image = PIL.ImageOps.exif_transpose(image)
  return to_rgb(image)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """The picture in RGB, transparent parts on white; a plain RGB picture is returned as it is."""
  if image.mode in _DEEP:
    image = PIL.Image.fromarray(_eight_bits(np.asarray(image)))
  if "A" in image.getbands() or image.info.get("transparency") is not None:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = PIL.Image.alpha_composite(white, image)
  return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values_HxW: np.ndarray) -> np.ndarray:
  """uint8 [H, W] of a grey picture. White is the first of 1 (floats), 255 and 65535 that no value
  exceeds, or the largest value; 16 bits lose their lower byte, as in PIL's 16-bit colours."""
  if values_HxW.dtype.kind == "u":
    return (values_HxW >> 8).astype(np.uint8)
  floats = values_HxW.dtype.kind == "f"
  if floats:
    values_HxW = np.nan_to_num(values_HxW, nan=0.0, posinf=0.0, neginf=0.0)
  most = values_HxW.max(initial=0)
  white = next((white for white in ((1.0, 255.0, 65535.0) if floats else (255, 65535))
                if most <= white), most)
  if white == 65535 and not floats:
    return (values_HxW.clip(0, white) >> 8).astype(np.uint8)
  return np.rint(values_HxW.clip(0, white) * (255.0 / white)).astype(np.uint8)


@contextlib.contextmanager
def _opened(source, name: str, max_pixels: int) -> Iterator[PIL.Image.Image]:
  try:
    image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source,
                           formats=FORMATS)
    width, height = _largest(image)
  except FileNotFoundError as error:
    raise ImageError(f"image file {name} does not exist") from error
  except PIL.UnidentifiedImageError as error:
    raise ImageError(f"image ({name}) is of no known format; known are {', '.join(FORMATS)}"
                     ) from error
  except PIL.Image.DecompressionBombError as error:
    raise ImageError(f"image ({name}) has more than {max_pixels} pixels: shrink it") from error
  except Exception as error:
    raise ImageError(f"image ({name}) cannot be opened: {error}") from error
  with image:
    if width * height > max_pixels:
      raise ImageError(f"image ({name}) has {width} x {height} pixels, more than the {max_pixels} "
                       "that are allowed: shrink it")
    yield image


def _largest(image: PIL.Image.Image) -> tuple[int, int]:
  """Width and height of the largest array that decoding fills: of TIFF perhaps a tile."""
  tags = getattr(image, "tag_v2", {})
  tile = int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1))
  return max(image.size, tile, key=lambda size: size[0] * size[1])


def _orientation(image: PIL.Image.Image) -> int:
  """1 to 8; damaged EXIF data count as none."""
  try:
    found = image.getexif().get(_ORIENTATION, 1)
  except Exception:  # struct.error, SyntaxError, ...
    return 1
  return found if found in range(1, 9) else 1


def _name(source) -> str:
  return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
