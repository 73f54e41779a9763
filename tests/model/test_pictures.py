"""Opening pictures: the pixels that `transformers` makes of the same files, for odd ones too."""

import io

import numpy as np
import PIL.Image
import pytest

from axpo_jax.model import pictures

SIZE = (7, 5)
WIDTH, HEIGHT = SIZE


def grey() -> np.ndarray:
  return np.linspace(0, 255, WIDTH * HEIGHT).round().astype(np.uint8).reshape(HEIGHT, WIDTH)


def colours() -> np.ndarray:
  return np.stack([grey(), grey()[::-1], grey()[:, ::-1]], -1)


def rgba() -> PIL.Image.Image:
  """Every colour at every degree of transparency, some of it wholly clear."""
  return PIL.Image.fromarray(np.concatenate([colours(), grey().T.reshape(HEIGHT, WIDTH, 1)], -1))


def rgb() -> PIL.Image.Image:
  return PIL.Image.fromarray(colours())


def palette(alpha: bytes | int | None = None) -> PIL.Image.Image:
  image = rgb().quantize(8)
  if alpha is not None:
    image.info["transparency"] = alpha
  return image


def encoded(image: PIL.Image.Image, format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def turned(orientation: int, format: str, image: PIL.Image.Image | None = None) -> bytes:
  exif = PIL.Image.Exif()
  exif[274] = orientation
  return encoded(image or rgb(), format, exif=exif.tobytes())


def black_on_clear() -> PIL.Image.Image:
  """What a formula or a diagram is often stored as."""
  image = PIL.Image.new("RGBA", SIZE, (0, 0, 0, 0))
  image.paste((0, 0, 0, 255), (2, 1, 5, 3))
  return image


ODD = {
  "rgb png": lambda: encoded(rgb(), "PNG"),
  "one bit": lambda: encoded(rgb().convert("1"), "PNG"),
  "one bit tiff, compressed": lambda: encoded(rgb().convert("1"), "TIFF", compression="group4"),
  "grey": lambda: encoded(rgb().convert("L"), "PNG"),
  "grey and alpha": lambda: encoded(rgba().convert("LA"), "PNG"),
  "grey with a clear value": lambda: encoded(rgb().convert("L"), "PNG", transparency=0),
  "rgba": lambda: encoded(rgba(), "PNG"),
  "black on clear": lambda: encoded(black_on_clear(), "PNG"),
  "black on clear, webp": lambda: encoded(black_on_clear(), "WEBP", lossless=True),
  "black on clear, gif": lambda: encoded(black_on_clear(), "GIF"),
  "black on clear, tiff": lambda: encoded(black_on_clear(), "TIFF"),
  "wholly clear": lambda: encoded(PIL.Image.new("RGBA", SIZE, (9, 9, 9, 0)), "PNG"),
  "rgb with a clear colour": lambda: encoded(rgb(), "PNG", transparency=tuple(colours()[2, 3].tolist())),
  "palette": lambda: encoded(palette(), "PNG"),
  "palette with a clear entry": lambda: encoded(palette(3), "PNG"),
  "palette with alphas": lambda: encoded(palette(bytes([0, 90, 180, 255])), "PNG"),
  "palette gif": lambda: encoded(palette(), "GIF"),
  "gif with a clear entry": lambda: encoded(palette(2), "GIF", transparency=2),
  "gif of two frames": lambda: encoded(rgb(), "GIF", save_all=True, append_images=[rgba()]),
  "png of two frames": lambda: encoded(rgba(), "PNG", save_all=True, append_images=[rgb()]),
  "webp of two frames": lambda: encoded(rgba(), "WEBP", save_all=True, append_images=[rgb()]),
  "tiff of two pages": lambda: encoded(rgb(), "TIFF", save_all=True, append_images=[rgba()]),
  "cmyk jpeg": lambda: encoded(rgb().convert("CMYK"), "JPEG"),
  "cmyk tiff": lambda: encoded(rgb().convert("CMYK"), "TIFF"),
  "ycbcr tiff": lambda: encoded(rgb().convert("YCbCr"), "TIFF"),
  "lab tiff": lambda: encoded(rgb().convert("LAB"), "TIFF"),
  "tiff with lzw": lambda: encoded(rgb(), "TIFF", compression="tiff_lzw"),
  "grey jpeg": lambda: encoded(rgb().convert("L"), "JPEG"),
  "progressive jpeg": lambda: encoded(rgb(), "JPEG", progressive=True),
  "jpeg of two pictures": lambda: encoded(rgb(), "MPO", save_all=True, append_images=[rgb()]),
  "lossy webp": lambda: encoded(rgb(), "WEBP", quality=50),
  "avif": lambda: encoded(rgb(), "AVIF"),
  "avif with alpha": lambda: encoded(rgba(), "AVIF"),
  "bmp": lambda: encoded(rgb(), "BMP"),
  "palette bmp": lambda: encoded(palette(), "BMP"),
  "ppm": lambda: encoded(rgb(), "PPM"),
  "pgm": lambda: encoded(rgb().convert("L"), "PPM"),
  **{f"jpeg turned {n}": lambda n=n: turned(n, "JPEG") for n in range(1, 9)},
  "rgba png turned": lambda: turned(6, "PNG", rgba()),
  "rgba webp turned": lambda: turned(5, "WEBP", rgba()),
  "tiff turned": lambda: turned(8, "TIFF"),
  "palette png turned": lambda: turned(3, "PNG", palette(1)),
  "an orientation that does not exist": lambda: turned(77, "JPEG"),
  "one pixel": lambda: encoded(PIL.Image.new("RGBA", (1, 1), (200, 10, 10, 128)), "PNG"),
}


def test_there_are_enough_of_them():
  assert len(ODD) >= 40


@pytest.mark.parametrize("name", ODD)
def test_pixels_of_transformers(name):
  """Its processor for PIL images composites on white; its loader turns the picture."""
  from transformers.image_transforms import convert_to_rgb
  data = ODD[name]()
  theirs = convert_to_rgb(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))),
                          return_numpy=True)
  ours = pictures.decode(data)
  assert ours.mode == "RGB" and not ours.info
  np.testing.assert_array_equal(np.asarray(ours), theirs)
  assert pictures.header_size(data) == ours.size
  again = pictures.upright_rgb(PIL.Image.open(io.BytesIO(data)))
  np.testing.assert_array_equal(np.asarray(again), theirs)


def test_black_on_clear_is_black_on_white():
  pixels = np.asarray(pictures.decode(ODD["black on clear"]()))
  assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 2].tolist() == [0, 0, 0]


DEEP = {
  # Values, format, and the 8 bits that they are.
  "16-bit png": (np.uint16, [0, 255, 256, 32768, 65535], "PNG", [0, 0, 1, 128, 255]),
  "16-bit tiff": (np.uint16, [0, 255, 256, 32768, 65535], "TIFF", [0, 0, 1, 128, 255]),
  "32-bit tiff with 16 bits": (np.int32, [-5, 0, 256, 32768, 65535], "TIFF", [0, 0, 1, 128, 255]),
  "32-bit tiff with 8 bits": (np.int32, [0, 1, 100, 254, 255], "TIFF", [0, 1, 100, 254, 255]),
  "32-bit tiff, large": (np.int32, [0, 1, 1000000, 500000, 0], "TIFF", [0, 0, 255, 128, 0]),
  "float tiff up to 1": (np.float32, [0, 0.25, 0.5, 0.75, 1], "TIFF", [0, 64, 128, 191, 255]),
  "float tiff up to 255": (np.float32, [-3, 0, 2, 99.6, 255], "TIFF", [0, 0, 2, 100, 255]),
  "float tiff with holes": (np.float32, [np.nan, np.inf, -np.inf, 0.5, 1], "TIFF",
                            [0, 0, 0, 128, 255]),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_keep_their_shades(name):
  kind, values, format, wanted = DEEP[name]
  image = pictures.decode(encoded(PIL.Image.fromarray(np.array([values], kind)), format))
  assert image.mode == "RGB"
  assert np.asarray(image)[0].tolist() == [[v, v, v] for v in wanted]


def test_a_16_bit_grey_is_the_16_bit_colour_picture_of_the_same_values():
  """PIL writes no 16-bit colours but reads them."""
  values = np.arange(0, 65536, 97, dtype=">u2")
  head = f"{len(values)} 1 65535\n".encode()
  grey = pictures.decode(b"P5 " + head + values.tobytes())
  colour = pictures.decode(b"P6 " + head + np.repeat(values, 3).tobytes())
  # Of a PPM it rounds where of a PNG it drops the lower byte.
  difference = np.asarray(grey).astype(int) - np.asarray(colour)
  assert abs(difference).max() <= 1
