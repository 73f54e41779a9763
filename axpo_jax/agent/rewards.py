"""Binary rewards: is the final answer right?

In: a question with its gold answers and the text of a response, or an answer taken from one. Out: 1
or 0, nothing between, no format term and no tool bonus. The order of the checks: normalised exact
match against any gold answer (it decides most cases in microseconds and never contradicts the
others), then multiple choice by letter or option text, then mathematics with math-verify, then
numbers with a tolerance. An answer of 1,000 characters or more is wrong whatever it says.

math-verify runs in processes of its own (`agent.mathematics`). An answer on which it runs out of time
or memory is wrong, and the verdict says so.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from axpo_jax.agent import mathematics
from axpo_jax.data.question import Question, leading_letter, named_option, normalise, plain_text

MAX_ANSWER = 1000  # characters; from here on an answer is wrong
# A decimal gold answer is met within this relative distance; an integer one must be met exactly.
# `question.meta["tolerance"]` sets an absolute distance instead.
RELATIVE_TOLERANCE = 1e-3


def score(question: Question, text: str, *, thinking: bool = True) -> tuple[float, str | None]:
  """Scores a whole response.

  Args:
    question: with gold answers.
    text: the response, or its last turn.
    thinking: the prompt opened `<think>`, so a text without `</think>` holds no answer.

  Returns:
    (reward, the answer that was found or None).
  """
  answer = extract_answer(text, thinking=thinking)
  return (0.0 if answer is None else judge(question, answer)), answer


def extract_answer(text: str, *, thinking: bool = True) -> str | None:
  """The answer: after the last `</think>` the last `<answer>`, and in it the last `\\boxed{}`.

  Without `<answer>` the last `\\boxed{}` counts; without both there is no answer (None).
  """
  _, closed, tail = text.rpartition("</think>")
  if thinking and not closed:
    return None
  tail = re.split(r"<\|im_end\|>|<\|endoftext\|>", tail)[0]
  _, marked, inside = tail.rpartition("<answer>")
  inside = inside.partition("</answer>")[0]
  boxed = last_boxed(inside)
  answer = boxed if boxed is not None else inside if marked else None
  return (answer.strip() or None) if answer is not None else None


def last_boxed(text: str) -> str | None:
  """Content of the last `\\boxed{...}` with balanced braces; None without one."""
  # One pass: a policy may write thousands of boxes that nobody closes.
  opened: list[int] = []  # positions of braces that are not closed yet
  last: tuple[int, int] | None = None
  for brace in re.finditer(r"[{}]", text):
    if brace[0] == "{":
      opened.append(brace.start())
    elif opened:
      start = opened.pop()
      if text.endswith("\\boxed", 0, start) and (last is None or start > last[0]):
        last = start, brace.start()
  return None if last is None else text[last[0] + 1:last[1]]


class Verdict(NamedTuple):
  """What an answer is worth: 1 or 0, and whether math-verify ran out of time or memory over it."""

  reward: float
  timed_out: bool = False


def judge(question: Question, answer: str) -> float:
  """1.0 if `answer` is right by any gold answer of `question`, else 0.0. May block for seconds.

  Raises:
    MathematicsError: only math-verify can decide, and it cannot be asked.
  """
  return _verdict([mathematics.same(answer, gold) if found is None else found
                   for gold, found in _by_rule(question, answer)]).reward


async def judge_soon(question: Question, answer: str) -> Verdict:
  """`judge` for an event loop. It waits only where math-verify must be asked."""
  return _verdict([await mathematics.same_soon(answer, gold) if found is None else found
                   for gold, found in _by_rule(question, answer)])


def _verdict(found: list[bool | None]) -> Verdict:
  return Verdict(float(any(found)), not any(found) and None in found)


def _by_rule(question: Question, answer: str) -> list[tuple[str, bool | None]]:
  """Each gold answer and whether it is met; None: math-verify must decide."""
  if len(answer) >= MAX_ANSWER:
    return []
  found = [(gold, _matches(question, answer, gold)) for gold in question.answers]
  # What one gold answer settles needs no others.
  return [pair for pair in found if pair[1]] or found


def _matches(question: Question, answer: str, gold: str) -> bool | None:
  if normalise(answer) == normalise(gold):
    return True
  kind = question.kind
  is_choice = bool(question.options) or _LETTER.fullmatch(gold.strip()) is not None
  if kind == "choice" or (kind == "auto" and is_choice):
    return _same_choice(answer, gold, question.options)
  if kind == "text":
    return plain_text(answer) == plain_text(gold) != ""
  if parse_number(gold) is not None and not _HAS_VALUE.search(answer):
    return False  # words: math-verify would multiply their letters, which takes it 50 ms
  if kind in ("auto", "number"):
    same = _same_number(answer, gold, question.meta.get("tolerance"))
    if same is not None:
      return same
  if kind == "auto" and not _MATHEMATICAL.search(gold):
    return False
  return None


# ---- multiple choice ----

_LETTER = re.compile(r"[A-Z]")


def _same_choice(answer: str, gold: str, options: tuple[str, ...]) -> bool:
  right, given = named_option(gold, options), named_option(answer, options)
  return right is not None and right == given and not _hedges(answer, right, options)


# Not a unit behind its number, and not the article.
_LONE_LETTER = re.compile(r"(?<![\w'\\])(?<!\d )(?!a \w\w)([a-h])(?![\w'])")
_HEDGE = re.compile(r"\b(?:or|nor|either|neither|not|no|wrong|incorrect|false)\b|n't\b", re.IGNORECASE)


def _hedges(answer: str, own: int, options: tuple[str, ...]) -> bool:
  """Whether an answer says more behind its letter than what the letter stands for: a second option, or
  that the first is wrong. `B. two cats` is fine, `A, B, C` and `A) wrong, it is B` are not."""
  letter, rest = leading_letter(answer)
  rest = normalise(rest.strip(" ).:,]"))
  texts = [normalise(option) for option in options]
  if letter != own or (own < len(texts) and rest == texts[own]):
    return False  # the text of the option, whatever words it has
  others = [re.escape(text) for index, text in enumerate(texts) if text and index != own]
  return (_HEDGE.search(rest) is not None
          or any(ord(other) - ord("a") != own for other in _LONE_LETTER.findall(rest))
          or any(re.search(rf"(?<!\w){text}(?!\w)", rest) for text in others))


# ---- numbers ----

_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|"
                     r"[-+]?\d{1,15}/\d{1,15}")


_HAS_VALUE = re.compile(r"[\d\\π∞√½⅓¼]")


def parse_number(text: str) -> Fraction | None:
  """The exact value of a plain number ("1,234.5", "-2e3", "3/4", "$5", "7%"); None otherwise."""
  text = text.strip(" \t\n\r$%.\\").replace("−", "-")
  if len(text) > 50 or not any(c.isdigit() for c in text) or not _NUMBER.fullmatch(text):
    return None
  try:
    return Fraction(text.replace(",", ""))
  except (ValueError, ZeroDivisionError):
    return None


def _same_number(answer: str, gold: str, tolerance: float | None) -> bool | None:
  """Whether two plain numbers agree; None when one of them is not a plain number."""
  right, given = parse_number(gold), parse_number(answer)
  if right is None or given is None:
    return None
  if ("%" in answer) != ("%" in gold) and right != given:
    return None  # 50% and 0.5: math-verify knows
  if tolerance is not None:
    return abs(right - given) <= Fraction(tolerance)
  if right.denominator == 1:
    return right == given
  return abs(right - given) <= abs(right) * Fraction(RELATIVE_TOLERANCE)


# ---- mathematics ----

_MATHEMATICAL = re.compile(r"[\\^=+*/(\[{√π∞°%]|\d\s*[-−]|^[-−\s]*[\d.,]+")
