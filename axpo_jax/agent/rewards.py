"""Binary rewards: is the final answer right?

In: a question with its gold answers and the text of a response, or an answer taken from one. Out: 1
or 0, nothing between, no format term and no tool bonus. The order of the checks: normalised exact
match against any gold answer (it decides most cases in microseconds and never contradicts the
others), then multiple choice by letter or option text, then mathematics with math-verify, then
numbers with a tolerance. An answer of 1,000 characters or more is wrong whatever it says.

math-verify's own time limits use signals, which work on the main thread only; they are off here.
Instead it never sees an expression that is long or whose powers and factorials could run for
minutes. Such an answer is right only if it matches exactly.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction

from axpo_jax.data.question import Question, named_option, normalise

MAX_ANSWER = 1000  # characters; from here on an answer is wrong
MAX_MATH = 200  # characters; longer answers are not handed to math-verify
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
  start = text.rfind("\\boxed{")
  while start >= 0:
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
      depth += (text[i] == "{") - (text[i] == "}")
      if depth == 0:
        return text[start + len("\\boxed{"):i]
    start = text.rfind("\\boxed{", 0, start)
  return None


def judge(question: Question, answer: str) -> float:
  """1.0 if `answer` is right by any gold answer of `question`, else 0.0. Never raises."""
  if len(answer) >= MAX_ANSWER:
    return 0.0
  return float(any(_matches(question, answer, gold) for gold in question.answers))


def _matches(question: Question, answer: str, gold: str) -> bool:
  if normalise(answer) == normalise(gold):
    return True
  kind = question.kind
  is_choice = bool(question.options) or _LETTER.fullmatch(gold.strip()) is not None
  if kind == "choice" or (kind == "auto" and is_choice):
    return _same_choice(answer, gold, question.options)
  if kind == "text":
    return False
  if kind in ("auto", "number"):
    same = _same_number(answer, gold, question.meta.get("tolerance"))
    if same is not None:
      return same
  if kind == "auto" and not _MATHEMATICAL.search(gold):
    return False
  return _same_mathematics(answer, gold)


# ---- multiple choice ----

_LETTER = re.compile(r"[A-Z]")


def _same_choice(answer: str, gold: str, options: tuple[str, ...]) -> bool:
  right, given = named_option(gold, options), named_option(answer, options)
  return right is not None and right == given


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
  if right is not None and given is None and not _HAS_VALUE.search(answer):
    return False  # words: no need to ask math-verify
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
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*[-+]?\s*(\d+)")
MAX_POWER = 10_000  # product of all numeric exponents of an expression


def is_safe_mathematics(text: str) -> bool:
  """False for expressions that could take math-verify more than moments to evaluate."""
  if len(text) > MAX_MATH or text.count("!") > 1 or re.search(r"\d{4,}\s*!", text):
    return False
  if re.search(r"\\?binom|\d{16,}|\d[eE]\d{4,}", text):
    return False
  exponents = [int(digits[:6]) for digits in _EXPONENT.findall(text)]
  if math.prod(max(1, e) for e in exponents) > MAX_POWER:
    return False
  return not _has_power_tower(text)


def _has_power_tower(text: str) -> bool:
  """True when an exponent itself holds a power, as in 9^{9^9} or 2**3**4."""
  text = text.replace("**", "^").replace(" ", "")
  for i, character in enumerate(text):
    if character == "^" and "^" in _exponent_text(text, i + 1):
      return True
  return False


_EXPONENT_HEAD = re.compile(r"[-+]*(?:\\[A-Za-z]+|[\d.]+|[A-Za-z])?")


def _exponent_text(text: str, start: int) -> str:
  """The exponent that begins at `start`, and one character more: a ^ there binds to it."""
  i = _EXPONENT_HEAD.match(text, start).end()
  depth = 0
  while i < len(text) and (depth or text[i] in "{(["):
    depth += (text[i] in "{([") - (text[i] in "})]")
    i += 1
  return text[start:i + 1]


@functools.lru_cache(maxsize=4096)
def _same_mathematics(answer: str, gold: str) -> bool:
  if not (is_safe_mathematics(answer) and is_safe_mathematics(gold)):
    return False
  parse, verify = _math_verify()
  try:
    right, given = (parse(f"\\boxed{{{text.strip(' $')}}}", parsing_timeout=None)
                    for text in (gold, answer))
    return bool(verify(right, given, timeout_seconds=None))
  except Exception:  # sympy raises nearly anything on odd input; what cannot be read is not right
    return False


@functools.cache
def _math_verify():
  """(parse, verify), imported on first use: sympy takes a while."""
  import math_verify

  # It warns that its time limits are off, which is what we want.
  for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(name).setLevel(logging.ERROR)
  return math_verify.parse, math_verify.verify
