"""Pictures that cost more than they show, or that reach programs which nobody asked for."""

import io
import struct
import zlib

import PIL.Image
import pytest

from axpo_jax.data import question as question_lib
from axpo_jax.model import pictures
from tests.hostile import corpus


def png(width: int, height: int, bits: int = 1) -> bytes:
  """A whole PNG of zeros that never was in memory."""
  def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  packer, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
  body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
          + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def tiff_with_a_large_tile(side: int) -> bytes:
  """One pixel, in a tile of side x side."""
  data = zlib.compress(bytes(side * side), 9)
  entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
             (277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8),
             (325, 4, 1, len(data))]
  tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
  return (struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
          + struct.pack("<H", len(entries)) + tags + struct.pack("<I", 0))


EPS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
       b"(/tmp/owned) (w) file closefile showpage\n%%EOF\n")


def icon() -> bytes:
  buffer = io.BytesIO()
  PIL.Image.new("RGBA", (16, 16)).save(buffer, "ICO")
  return buffer.getvalue()


FILES = {
  "13,000 x 13,000 pixels of one bit in 20 kB": (lambda: png(13_000, 13_000), "allowed: shrink"),
  "a row of 300 million pixels": (lambda: png(300_000_000, 1), "pixels: shrink it"),
  "no size at all": (lambda: png(0, 0), "no known format|cannot be"),
  "one pixel in a tile of 81 million": (lambda: tiff_with_a_large_tile(9_000), "allowed: shrink"),
  "PostScript": (lambda: EPS, "no known format"),
  "an icon, whose parts are pictures": (icon, "no known format"),
  "a PNG that ends early": (lambda: png(500, 500)[:60], "cannot be decoded"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
  make, message = FILES[case]
  path = tmp_path / "picture"
  path.write_bytes(make())
  for source in (path, path.read_bytes()):
    with corpus.bounds(seconds=5, megabytes=64), pytest.raises(pictures.ImageError, match=message):
      question_lib.load_image(source)


def test_the_header_alone_refuses_a_large_picture(tmp_path):
  """Readers look no further, so such a record is refused before a run begins."""
  path = tmp_path / "large.png"
  path.write_bytes(png(13_000, 13_000))
  with pytest.raises(pictures.ImageError, match="13000 x 13000"):
    question_lib.check_header(path)


def test_ghostscript_is_never_started(tmp_path, monkeypatch):
  import PIL.EpsImagePlugin
  monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("started"))
  with pytest.raises(pictures.ImageError):
    pictures.decode(EPS)


def test_damaged_exif_costs_the_orientation_alone():
  buffer = io.BytesIO()
  PIL.Image.new("RGB", (6, 4), (9, 8, 7)).save(buffer, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
  assert pictures.decode(buffer.getvalue()).size == (6, 4)
  buffer = io.BytesIO()
  PIL.Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=b"Exif\0\0garbage")
  assert pictures.decode(buffer.getvalue()).size == (6, 4)
