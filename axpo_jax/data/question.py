"""The question record, which every data source yields and every later stage reads.

In: the fields of one question, from a reader or the miniature world. Out: a frozen `Question`. Its images may
still be on disk, so that a shuffled epoch holds names and not pixels.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import re
import threading
import unicodedata
from collections.abc import Mapping
from typing import Any

import PIL.Image
from etils import epath

from axpo_jax import paths
from axpo_jax.model import pictures
from axpo_jax.model.pictures import MAX_PIXELS, ImageError

# An image is opened only when it is needed: a path, the encoded bytes of a file, or pixels.
ImageSource = pathlib.PurePath | bytes | PIL.Image.Image

IMAGE_MARK = "<image>"
KINDS = ("auto", "choice", "math", "number", "text")
ACTING = ("either", "act", "decline")


@dataclasses.dataclass(frozen=True)
class Question:
  """One question with its images and its gold answers.

  Attributes:
    id: unique within its source.
    text: the question; may contain `<image>` marks. Images without a mark go first.
    images: sources in the order of their marks; open them with `load_image`.
    answers: any of them is right.
    kind: how the answer is judged: one of `KINDS`.
    options: for kind "choice"; an answer is a letter "A".. or the text of an option.
    category: e.g. "perception", "search", "reasoning".
    source: name of the data set.
    acting: whether one should act (call a tool) to answer it: one of `ACTING`. For reports alone:
      no reward depends on it.
    meta: anything else worth keeping (pass counts, the world's hidden state, ...).
  """

  id: str
  text: str
  images: tuple[ImageSource, ...]
  answers: tuple[str, ...]
  kind: str = "auto"
  options: tuple[str, ...] = ()
  category: str = ""
  source: str = ""
  acting: str = "either"
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"question {self.id!r}: kind {self.kind!r} is not one of {KINDS}")
    if self.acting not in ACTING:
      raise ValueError(f"question {self.id!r}: acting {self.acting!r} is not one of {ACTING}")
    if not self.answers:
      raise ValueError(f"question {self.id!r} has no gold answer; give at least one")
    if self.kind == "choice" and self.options and all(
        named_option(gold, self.options) is None for gold in self.answers):
      raise ValueError(f"question {self.id!r}: the gold answer {self.answers} is none of the options "
                       f"{self.options}, nor the letter of one")
    marks = self.text.count(IMAGE_MARK)
    if marks > len(self.images):
      raise ValueError(
          f"question {self.id!r} has {marks} {IMAGE_MARK} marks but {len(self.images)} images")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
  """Opens an image source as RGB pixels; `model.pictures` says how.

  Args:
    source: path, encoded bytes (PNG, JPEG, ...) or an image.
    max_pixels: width times height that a file may have.

  Returns:
    A fully decoded, upright RGB image at its original resolution.

  Raises:
    ImageError: the file is missing, too large or of another format, or its bytes do not decode.
  """
  if isinstance(source, PIL.Image.Image):
    return pictures.upright_rgb(source)
  return pictures.decode(_local(source), name=_name(source), max_pixels=max_pixels)


class _Decoded:
  """A cache of the images decoded last, limited in bytes: a question's rollouts share their images."""

  def __init__(self, limit: int):
    self._limit, self._size = limit, 0
    self._kept: collections.OrderedDict[pathlib.Path | bytes, PIL.Image.Image] = (
        collections.OrderedDict())
    self._lock = threading.Lock()

  def open(self, source: pathlib.Path | bytes) -> PIL.Image.Image:
    with self._lock:
      if source in self._kept:
        self._kept.move_to_end(source)
        return self._kept[source]
    image = load_image(source)
    with self._lock:
      if source not in self._kept:
        self._kept[source] = image
        self._size += _bytes(image)
      while self._size > self._limit and len(self._kept) > 1:
        self._size -= _bytes(self._kept.popitem(last=False)[1])
    return image


def _bytes(image: PIL.Image.Image) -> int:
  return 4 * image.width * image.height  # PIL keeps RGB in four bytes


_decoded = _Decoded(4 << 30)


def open_image(source: ImageSource) -> PIL.Image.Image:
  """`load_image` with a cache of at most 4 GiB, or one image. Do not change the returned image."""
  return load_image(source) if isinstance(source, PIL.Image.Image) else _decoded.open(source)


def check_header(source: ImageSource) -> None:
  """Reads an image's header alone.

  Raises:
    ImageError: the file is missing, is not an image, or is too large.
  """
  image_size(source)


def image_size(source: ImageSource) -> tuple[int, int]:
  """Width and height in pixels, from the header alone.

  Raises:
    ImageError: the file is missing, is not an image, or is too large.
  """
  if isinstance(source, PIL.Image.Image):
    return pictures.upright_size(source)
  return pictures.header_size(_local(source), name=_name(source))


def _local(source: pathlib.PurePath | bytes) -> pathlib.PurePath | bytes:
  """A source that PIL can open; a file on an object store is read into memory."""
  if isinstance(source, bytes):
    return source
  if not paths.is_remote(source):
    if pathlib.Path(source).exists() and not pathlib.Path(source).is_file():  # a pipe would never end
      raise ImageError(f"image {source} is no regular file")
    return source
  try:
    return epath.Path(source).read_bytes()
  except FileNotFoundError as error:
    raise ImageError(f"image file {source} does not exist") from error
  except Exception as error:
    raise ImageError(f"image ({source}) cannot be opened: {error}") from error


def _name(source: pathlib.PurePath | bytes) -> str:
  return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


_TEXT_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_EDGES = " \t\n\r.,;:!?\"'`$*"


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
  """Case, white space, LaTeX text wrappers, outer punctuation and a leading article removed."""
  text = unicodedata.normalize("NFKC", text)
  if "\\" in text:
    text = _TEXT_WRAPPER.sub(r"\1", text)
  text = " ".join(text.casefold().split()).strip(_EDGES)
  for article in ("the ", "a ", "an "):
    if text.startswith(article):
      return text[len(article):].strip()
  return text


# ASCII punctuation, but for what makes a number another one: 1.5, 3:2, 10/3, 2010-15, -4.
_PUNCTUATION = re.compile(r"(?!(?<=\d)[.:/-]\d)(?!(?<!\w)-\.?\d)[!-/:-@\[-`{-~]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@functools.lru_cache(maxsize=4096)
def plain_text(text: str) -> str:
  """The words of a text as search benchmarks compare them: without case, punctuation and articles,
  anywhere in the text. `The U.S. Army` is `us army`."""
  text = _PUNCTUATION.sub("", _THOUSANDS.sub("", normalise(text)))
  return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


# "B", "(b)", "B.", "option B", "B. red", "(B) red"; but not "A cat".
_CHOICE = re.compile(r"(?:option|choice|answer)?\s*[:\s]?\s*[(\[]?([A-Za-z])([)\].:,].*)?",
                     re.IGNORECASE | re.DOTALL)


def leading_letter(text: str) -> tuple[int | None, str]:
  """The option whose letter a text begins with (A is 0; None without one), and what follows it."""
  found = _CHOICE.fullmatch(_TEXT_WRAPPER.sub(r"\1", text).strip(" \t\n\r$*"))
  return (ord(found[1].upper()) - ord("A"), found[2] or "") if found else (None, "")


def named_option(text: str, options: tuple[str, ...]) -> int | None:
  """Which option a text names, by letter first and else by the option's text."""
  index, _ = leading_letter(text)
  if index is not None and (not options or index < len(options)):
    return index
  plain = normalise(text)
  for index, option in enumerate(options):
    if plain == normalise(option):
      return index
  return None
