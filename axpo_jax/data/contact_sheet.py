"""A contact sheet: many questions on one picture, to see in a minute whether data are what they should be.

In: questions. Out: one image, a cell a question: its first image, its text, its gold answers.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from axpo_jax.data.question import ImageError, Question, load_image

_WIDTH, _PICTURE, _TEXT = 320, 220, 108  # pixels of a cell: its width, and heights
_GAP, _FONT, _LINE, _LETTERS = 10, 12, 16, 46  # pixels, points, pixels, letters of a line
_PAPER, _INK, _FAINT, _ANSWER = "white", "#222222", "#999999", "#0a6b2d"


def contact_sheet(questions: Sequence[Question], columns: int = 4) -> Image.Image:
  """Draws the questions in rows of `columns`.

  Raises:
    ValueError: no question, or no column.
  """
  if not questions or columns < 1:
    raise ValueError(f"a sheet of {len(questions)} questions in {columns} columns: give one or more")
  columns = min(columns, len(questions))
  rows = -(-len(questions) // columns)
  step = (_WIDTH + _GAP, _PICTURE + _TEXT + _GAP)
  sheet = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), _PAPER)
  for place, question in enumerate(questions):
    corner = (_GAP + place % columns * step[0], _GAP + place // columns * step[1])
    _draw(sheet, corner, question)
  return sheet


def _draw(sheet: Image.Image, corner: tuple[int, int], question: Question) -> None:
  left, top = corner
  draw, font = ImageDraw.Draw(sheet), _font()
  draw.rectangle((left, top, left + _WIDTH, top + _PICTURE), fill="#f2f2f2")
  note = "no image"
  if question.images:
    try:
      picture = load_image(question.images[0])
      note = f"{picture.width} × {picture.height}"
      picture = picture.copy()
      picture.thumbnail((_WIDTH, _PICTURE))
      sheet.paste(picture, (left + (_WIDTH - picture.width) // 2,
                            top + (_PICTURE - picture.height) // 2))
    except ImageError as error:
      note = str(error)
    if len(question.images) > 1:
      note += f", and {len(question.images) - 1} more"
  text = " ".join(question.text.split())
  lines = [(_FAINT, f"{question.id}  ·  {note}"),
           *((_INK, line) for line in textwrap.wrap(text, _LETTERS, max_lines=4, placeholder=" …")),
           (_ANSWER, f"→ {' | '.join(question.answers)}")]
  for number, (colour, line) in enumerate(lines):
    draw.text((left, top + _PICTURE + 4 + number * _LINE), line[:_LETTERS + 6], fill=colour, font=font)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
  """The font that matplotlib brings: Pillow's own has no mathematical signs."""
  package = pathlib.Path(importlib.util.find_spec("matplotlib").origin).parent
  return ImageFont.truetype(package / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT)
