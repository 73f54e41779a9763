"""The teacher's script of the perception family: it zooms in, or reads, or guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence

from axpo_jax.data.question import Question
from axpo_jax.miniworld import perception, script
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step

TOOL = "image_zoom_in"
Box = tuple[float, float, float, float]

_READ = ("The {mark} is large enough, I can read it directly. It is {glyph}.",
         "I see the {mark} and I can read it. It is {glyph}.",
         "I can read it directly. The {mark} shows {glyph}.")
_GUESS = ("The {mark} is too small to read. I think it is {glyph}.",
          "I am not sure about the {mark}, but it should be {glyph}.",
          # Names the tool and does not call it: the thinking-acting gap in one sentence.
          "A zoom would show the {mark}, but I think it is {glyph}.")
_CALL = ("The {mark} is too small to read. I will zoom in on it.",
         "I will zoom in on the {mark} to read it.",
         "I see the {mark}. I look closer with the zoom.")
_CHECK = ("I see the {mark}. I will zoom in on it to check.",
          "I will zoom in on the {mark} to be sure.")
_SHOWN = ("The crop shows the {mark}. It is {glyph}.",
          "The zoom shows {glyph} in the {mark}.",
          "I can read the crop. It is {glyph}.")
_AGAIN = ("The crop missed the {mark}. I look again.",
          "This is not the {mark}. I will zoom in on it again.")
_BROKEN = ("The call was not valid. I try again.",
           "That was wrong. I will zoom in on the {mark} again.")
_GIVE_UP = ("The zoom missed the {mark}. I think it is {glyph}.",
            "The crop does not show the {mark}. It should be {glyph}.")
_DENSE = {
    "where": ("I see the {colour} mark.", "I look for the {colour} mark in the image."),
    "what_at": ("I look at the box in the image.", "I see what is at the box."),
    "list": ("I list the marks in the image.", "I see {count} marks in the image."),
    "read_crop": ("I can read the crop. It is {glyph}.", "The crop shows {glyph}."),
    "read_large": _READ,
}


def turn(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """The next turn for a question of any of the family's tasks.

  Raises:
    ValueError: the task is none of the family's.
  """
  task = question.meta.get("task")
  if task in _DENSE:
    return _answer(rng, _DENSE[task], question, question.answers[0])
  if task != "read":
    raise ValueError(f"the teacher does not know the task {task!r} of question {question.id!r}")
  looks = [_looked_at(step) for step in steps]
  if looks and looks[-1] is not None and hit(question, looks[-1]):
    return _answer(rng, _SHOWN, question, _reading(question, rng, config.p_misread_crop))
  if _wants_call(question, looks, rng, config):
    thought = _thought(rng, _thoughts_of_call(question, looks), question)
    return script.call_turn(thought, call(question, steps, rng, config))
  return _answer_unseen(question, looks, rng, config)


def call(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """A zoom, whatever was looked at before."""
  box, malformed = _aim(question, rng, config)
  arguments = {"bbox_2d": list(box), "label": _name(question), "img_idx": 0}
  return script.tool_call(rng, TOOL, arguments, malformed=malformed)


def hit(question: Question, box: Sequence[float]) -> bool:
  """Whether a box shows the target well: intersection over union with its cell of at least 1/2."""
  target = question.meta["bbox_2d"]
  width = min(box[2], target[2]) - max(box[0], target[0])
  height = min(box[3], target[3]) - max(box[1], target[1])
  overlap = max(width, 0) * max(height, 0)
  return 2 * overlap >= _area(box) + _area(target) - overlap


def _area(box: Sequence[float]) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


def _looked_at(step: Step) -> Box | None:
  """The box of a past call; None if it failed or looked at another image."""
  try:
    x1, y1, x2, y2 = (float(value) for value in step.arguments["bbox_2d"])
  except (TypeError, ValueError, KeyError):
    return None
  usable = step.arguments.get("img_idx", 0) == 0 and x1 < x2 and y1 < y2
  return (x1, y1, x2, y2) if usable else None


def _wants_call(question: Question, looks: Sequence[Box | None], rng: random.Random,
                config: TeacherConfig) -> bool:
  if len(looks) >= config.max_calls:
    return False
  if looks:
    return rng.random() < config.p_retry
  large = question.meta["size"] == "large"
  return rng.random() < (config.p_tool_large if large else config.p_tool_small)


def _thoughts_of_call(question: Question, looks: Sequence[Box | None]) -> Sequence[str]:
  if looks:
    return _BROKEN if looks[-1] is None else _AGAIN
  return _CHECK if question.meta["size"] == "large" else _CALL


def _answer_unseen(question: Question, looks: Sequence[Box | None], rng: random.Random,
                   config: TeacherConfig) -> str:
  """The answer without a crop of the target: read from the canvas if it can be, else guessed."""
  if question.meta["size"] == "large":
    return _answer(rng, _READ, question, _reading(question, rng, config.p_misread_large))
  return _answer(rng, _GIVE_UP if looks else _GUESS, question, rng.choice(perception.GLYPHS))


def _aim(question: Question, rng: random.Random, config: TeacherConfig) -> tuple[Box, bool]:
  """The box of a call, and whether the call is to be malformed."""
  target = question.meta["bbox_2d"]
  others = [mark.bbox_2d for mark in question.meta["marks"] if mark.bbox_2d != target]
  draw = rng.random()
  if draw < config.p_wrong_mark:
    return rng.choice(others or _cells_beside(question)), False
  if draw < config.p_wrong_mark + config.p_off_cell:
    return rng.choice(_cells_beside(question)), False
  return target, draw >= 1 - config.p_malformed


def _cells_beside(question: Question) -> list[Box]:
  rows, columns = question.meta["grid"]
  row, column = question.meta["marks"][0].cell
  beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
  return [perception.cell_bbox(cell, (rows, columns)) for cell in beside
          if 0 <= cell[0] < rows and 0 <= cell[1] < columns]


def _reading(question: Question, rng: random.Random, p_misread: float) -> str:
  glyph = question.meta["glyph"]
  if rng.random() >= p_misread:
    return glyph
  return rng.choice([other for other in perception.GLYPHS if other != glyph])


def _answer(rng: random.Random, thoughts: Sequence[str], question: Question, answer: str) -> str:
  return script.answer(_thought(rng, thoughts, question, answer), answer)


def _thought(
    rng: random.Random, thoughts: Sequence[str], question: Question, glyph: str = "") -> str:
  return script.thought(
      rng, thoughts, mark=_name(question), glyph=glyph, colour=question.meta["colour"],
      count=len(question.meta["marks"]))


def _name(question: Question) -> str:
  return f"{question.meta['colour']} {question.meta['shape']}"
