"""What several data sets' layouts have in common: needed fields, options in texts, numbered images.

In: raw records and texts. Out: parts of a record of the project's own columns, or a RecordError that
names the data set's own column.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.data.files import RecordError
from axpo_jax.data.question import IMAGE_MARK

LETTERS = "ABCDEFGHIJ"
# "(A) red", and "A. red" or "A: red" at the start of a line or after white space.
_MARKS = (re.compile(r"(?<![\w\\)])\(([A-J])\)"), re.compile(r"(?:(?<=\s)|^)([A-J])[.:)]"))
_NUMBERED = re.compile(r"<image(\d+)>")


def text(record: Mapping[str, Any], column: str) -> str:
  """A text that must be there. Raises RecordError."""
  value = record.get(column)
  if not isinstance(value, str) or not value.strip():
    raise RecordError(f"{column!r} is missing or empty")
  return value


def answer(record: Mapping[str, Any], column: str) -> str:
  """A gold answer that must be there, as text. Raises RecordError."""
  value = record.get(column)
  if value is None or isinstance(value, (Mapping, list)) or not str(value).strip():
    raise RecordError(f"{column!r} (the gold answer) is missing, empty or not a text")
  return str(value).strip()


def items(value: Any) -> list[str]:
  """Texts of a list, or of a text that holds a list as JSON or Python writes it."""
  if isinstance(value, str):
    try:
      value = json.loads(value) if value.strip().startswith("[") else [value]
    except ValueError:
      try:
        value = ast.literal_eval(value)
      except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = [value]  # an answer that happens to begin with a bracket
  return [str(entry) for entry in (value if isinstance(value, (list, tuple)) else [])
          if entry is not None and str(entry).strip()]


def letter(value: str, options: Sequence[str]) -> str:
  """A gold answer as the letter of its option. Raises RecordError where it names none."""
  value = value.strip()
  if re.fullmatch(r"\(?[A-J]\)?\.?", value) and LETTERS.index(value.strip("(). ")) < len(options):
    return value.strip("(). ")
  if value in options:
    return LETTERS[list(options).index(value)]
  raise RecordError(f"the gold answer {value!r} is none of {len(options)} options")


def options_in(question: str) -> tuple[str, ...]:
  """The options that a question's text lists as "(A) ..." or "A. ...", from A on; () without. One
  without text is in the picture, and gets its letter as its text."""
  for mark in _MARKS:
    found = list(mark.finditer(question))
    run = max((_run(found, i) for i in range(len(found))), key=len, default=[])
    if len(run) < 2:
      continue
    stops = [*(place.start() for place in found), len(question)]
    texts = [question[place.end():min(stop for stop in stops if stop >= place.end())]
             .strip().partition("\n")[0].strip() for place in run]
    return tuple(text or letter for text, letter in zip(texts, LETTERS))
  return ()


def _run(found: Sequence[re.Match], start: int) -> list[re.Match]:
  """The marks from `start` on, as far as they are A, B, C and so on."""
  pairs = zip(found[start:], LETTERS)
  return [place for place, _ in itertools.takewhile(lambda pair: pair[0][1] == pair[1], pairs)]


def choice_of(question: str, gold: str) -> dict[str, Any]:
  """Kind and options of a question whose text lists options and whose answer is a letter."""
  options = options_in(question)
  if re.fullmatch(r"[A-J]", gold) and LETTERS.index(gold) < len(options):
    return {"kind": "choice", "options": list(options)}
  return {}


def with_options(question: str, options: Sequence[str]) -> str:
  """The question followed by a line for every option."""
  return "\n".join([question.rstrip(), *(
      f"{name}. {option}" for name, option in zip(LETTERS, options))])


def number_images(question: str, count: int) -> str:
  """`<image1>` marks as plain marks, as far as there are images; later ones as words.

  Some questions point several times at one picture that holds all of them.
  """
  seen: set[str] = set()

  def plain(found: re.Match) -> str:
    if found[1] in seen or len(seen) >= count:
      return f"(picture {found[1]})"
    seen.add(found[1])
    return IMAGE_MARK
  return _NUMBERED.sub(plain, question)


def numbered(question: str) -> list[str]:
  """Numbers of the `<image1>` marks in the order of their first occurrence."""
  return list(dict.fromkeys(_NUMBERED.findall(question)))


def last_user_text(messages: Any) -> str:
  """Text of the last user message of a chat. Raises RecordError."""
  for message in reversed(messages if isinstance(messages, list) else []):
    if isinstance(message, Mapping) and message.get("role") == "user":
      return text(message, "content")
  raise RecordError("'prompt' holds no message of role user")
