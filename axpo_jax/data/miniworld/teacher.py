"""The scripted teacher of the perception family: it writes assistant turns as text.

In: a question of the miniature world, the boxes it has looked at so far, a random stream. Out: one
assistant turn in the format of Qwen3-VL-Thinking, from just after `<think>\\n` up to, and without,
`<|im_end|>`. Its mistakes (another mark, a cell beside it, broken JSON, misread glyphs, guesses) are
there so that keeping only right answers has something to drop, and so that a policy trained on what
is left has seen how a failed call is mended.

`TeacherConfig.rates` says what to expect of it in closed form, so that a config can be chosen, and
the teacher tested, by calculation.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from axpo_jax.data.miniworld import perception
from axpo_jax.data.question import Question

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


class Rates(NamedTuple):
  """Expected shares of a teacher's `read` trajectories.

  `tool`: with at least one call; `right`: with the right answer; `tool_right`, `direct_right`:
  right answers among those with and without a call; `tool_of_right`: calls among the right ones,
  which is the tool share after the filter.
  """

  tool: float
  right: float
  tool_right: float
  direct_right: float
  tool_of_right: float


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """Probabilities of what the teacher does; see `rates` for what follows from them.

  Attributes:
    p_tool_small, p_tool_large: that it calls the tool when the glyph is small or large.
    p_wrong_mark, p_off_cell, p_malformed: that a call points at another mark, at a cell beside the
      right one, or cannot be parsed. Otherwise it points at the target.
    p_retry: that it calls again after a call that did not show the target.
    max_calls: calls in one trajectory; one less than the turns of an episode.
    p_misread_crop, p_misread_large: that it misreads a glyph it can see. A small glyph without a
      crop it guesses, uniformly over the alphabet.
  """

  p_tool_small: float = 0.45
  p_tool_large: float = 0.10
  p_wrong_mark: float = 0.06
  p_off_cell: float = 0.08
  p_malformed: float = 0.03
  p_retry: float = 0.6
  max_calls: int = 2
  p_misread_crop: float = 0.04
  p_misread_large: float = 0.06

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.startswith("p_") and not 0 <= value <= 1:
        raise ValueError(f"{field.name}={value} is not a probability")
    if self.max_calls < 1:
      raise ValueError(f"max_calls={self.max_calls} must be at least 1")
    if self.p_point < 0:
      raise ValueError("p_wrong_mark + p_off_cell + p_malformed exceed 1")

  @property
  def p_point(self) -> float:
    """Probability that a call points at the target."""
    return 1 - self.p_wrong_mark - self.p_off_cell - self.p_malformed

  def rates(self, large_share: float) -> Rates:
    """What to expect over questions of which `large_share` have a large glyph."""
    tool = tool_right = direct_right = 0.0
    for share, p_tool, blind in (
        (large_share, self.p_tool_large, 1 - self.p_misread_large),
        (1 - large_share, self.p_tool_small, 1 / len(perception.GLYPHS))):
      tool += share * p_tool
      tool_right += share * p_tool * self._right_after_call(blind)
      direct_right += share * (1 - p_tool) * blind
    right = tool_right + direct_right
    return Rates(tool, right, _ratio(tool_right, tool), _ratio(direct_right, 1 - tool),
                 _ratio(tool_right, right))

  def _right_after_call(self, blind: float) -> float:
    """Probability of a right answer once it calls; `blind` is the one without any crop."""
    right = blind
    for _ in range(self.max_calls):
      missed = self.p_retry * right + (1 - self.p_retry) * blind
      right = self.p_point * (1 - self.p_misread_crop) + (1 - self.p_point) * missed
    return right


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0


def turn(question: Question, looks: Sequence[Box | None], rng: random.Random,
         config: TeacherConfig = TeacherConfig()) -> str:
  """Writes the next assistant turn.

  Args:
    question: one of the perception family, of any task.
    looks: the box of every call so far, in order; None for a call that failed.
    rng: the turn's random stream; all choices come from it.
    config: the teacher's habits.

  Returns:
    The text after `<think>\\n`: a thought, `</think>`, then a tool call or the answer.

  Raises:
    ValueError: the question is not one of the perception family.
  """
  task = question.meta.get("task")
  if task in _DENSE:
    return _answer(rng, _DENSE[task], question, question.answers[0])
  if task != "read":
    raise ValueError(f"the teacher does not know the task {task!r} of question {question.id!r}")
  if looks and looks[-1] is not None and hit(question, looks[-1]):
    return _answer(rng, _SHOWN, question, _reading(question, rng, config.p_misread_crop))
  if _wants_call(question, looks, rng, config):
    thoughts = _thoughts_of_call(question, looks)
    return f"{_thought(rng, thoughts, question)}\n</think>\n\n<tool_call>{call(question, rng, config)}"
  return _answer_unseen(question, looks, rng, config)


def call(question: Question, rng: random.Random, config: TeacherConfig = TeacherConfig()) -> str:
  """Writes a call from just after `<tool_call>` to `</tool_call>`; also ends a cut prefix."""
  box, malformed = _aim(question, rng, config)
  arguments = {"bbox_2d": list(box), "label": _name(question), "img_idx": 0}
  text = json.dumps({"name": TOOL, "arguments": arguments})
  if malformed:
    text = rng.choice((text[:-1], text.replace(", ", " ", 1), text.replace("]", "", 1)))
  return f"\n{text}\n</tool_call>"


def hit(question: Question, box: Sequence[float]) -> bool:
  """Whether a box shows the target well: intersection over union with its cell of at least 1/2."""
  target = question.meta["bbox_2d"]
  width = min(box[2], target[2]) - max(box[0], target[0])
  height = min(box[3], target[3]) - max(box[1], target[1])
  overlap = max(width, 0) * max(height, 0)
  return 2 * overlap >= _area(box) + _area(target) - overlap


def _area(box: Sequence[float]) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


_ASSISTANT = "<|im_start|>assistant\n"
_CALL_PATTERN = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def read_history(text: str) -> tuple[list[Box | None], str]:
  """Reads a conversation's text.

  Args:
    text: all of it, with special tokens, ending where the teacher is to go on.

  Returns:
    The box of every past call (None where it failed or looked at another image), and the text of
    the turn that is open, after `<think>\\n`.
  """
  _, *turns = text.split(_ASSISTANT)
  if not turns:
    raise ValueError(f"the text has no assistant turn to write: ...{text[-80:]!r}")
  return [_looked_at(past) for past in turns[:-1]], turns[-1].removeprefix("<think>\n")


def _looked_at(turn_text: str) -> Box | None:
  found = _CALL_PATTERN.search(turn_text.rpartition("</think>")[2])
  try:
    arguments = json.loads(found[1])["arguments"]
    x1, y1, x2, y2 = (float(value) for value in arguments["bbox_2d"])
  except (TypeError, ValueError, KeyError):
    return None
  usable = arguments.get("img_idx", 0) == 0 and x1 < x2 and y1 < y2
  return (x1, y1, x2, y2) if usable else None


def corpus(seed: int, n: int) -> Iterator[str]:
  """Yields the texts of `n` questions: the question, and every turn of one trajectory each."""
  mix = (*perception.READ_MIX, *perception.WARM_START_MIX)
  config = perception.PerceptionConfig(mix=mix)
  for index in range(n):
    question = perception.make_question(seed, index, config)
    rng = random.Random(f"{seed}/{index}")
    yield question.text
    looks: list[Box | None] = []
    while True:
      text = turn(question, looks, rng)
      yield text
      if "<tool_call>" not in text:
        break
      looks.append(_looked_at(text))


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
  thought = _thought(rng, thoughts, question, answer)
  return f"{thought}\n</think>\n\n<answer>\n\\boxed{{{answer}}}\n</answer>"


def _thought(
    rng: random.Random, thoughts: Sequence[str], question: Question, glyph: str = "") -> str:
  return rng.choice(thoughts).format(
      mark=_name(question), glyph=glyph, colour=question.meta["colour"],
      count=len(question.meta["marks"]))


def _name(question: Question) -> str:
  return f"{question.meta['colour']} {question.meta['shape']}"
