"""How the public benchmarks score an answer. Pure functions.

In: a question as a benchmark's reader made it, and the answer taken from a response. Out: right or
wrong by rule, a token F1, or the mean over a question's variants. Text, numbers, options and
mathematics are compared by `agent.rewards`, so that training and evaluation agree on what is equal.

Rules:
- options: the letter, the text of the option, or (where options are values) its value;
- numbers: within the question's tolerance (0.001 in DynaMath), expressions evaluated; in MathVision
  equal when rounded to two decimals, whatever the unit behind them;
- free text: exact match of the words with any gold answer (in DynaMath it is enough that they occur in
  the answer); beyond that a judge decides (`agent.judge`), or token F1 where there is none.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction

from axpo_jax.agent import mathematics, rewards
from axpo_jax.data.question import Question, plain_text

# How a score came about.
NO_ANSWER = "no_answer"  # nothing to score, or an answer of absurd length: wrong
RULE = "rule"  # decided without a judge
F1 = "f1"  # no judge was given: the value is the token F1
JUDGE = "judge"  # the judge decided
JUDGE_FAILED = "judge_failed"  # the judge could not be asked or understood: wrong, and counted


# What all points of a rubric are worth where the answer is wrong, as Math-VR counts.
WRONG_PROCESS = 0.7


@dataclasses.dataclass(frozen=True)
class Score:
  """What one answer is worth.

  Attributes:
    value: in [0, 1]; 0 or 1 unless `how` is "f1".
    how: one of the constants above.
    f1: token F1 against the best gold answer, of benchmarks that report it; else None.
    process: 1 if right, else WRONG_PROCESS of the points that a rubric gives the response; None where
      nobody graded it.
  """

  value: float
  how: str
  f1: float | None = None
  process: float | None = None


def is_scorable(answer: str | None) -> bool:
  """False for no answer, and for one so long that it can only be meant to fool a judge."""
  return answer is not None and bool(answer.strip()) and len(answer) < rewards.MAX_ANSWER


def right_by_rule(question: Question, answer: str) -> bool:
  """Whether the answer is right by the rules, by the question's kind and options."""
  if rewards.judge(question, answer):
    return True
  if question.options:
    return _right_value(question, answer)
  decimals = question.meta.get("decimals")
  if decimals is not None and any(same_rounded(answer, gold, decimals) for gold in question.answers):
    return True
  if question.meta.get("contained"):
    words = f" {plain_text(answer)} "
    return any(f" {plain_text(gold)} " in words for gold in question.answers if plain_text(gold))
  if question.kind == "number":
    tolerance = question.meta.get("tolerance") or 0
    return any(number_within(answer, gold, tolerance) for gold in question.answers)
  return False


def _right_value(question: Question, answer: str) -> bool:
  """Whether the answer is worth what the right option is worth, and no other option is.

  Letters are excluded: they name an option, whatever a variable of that name is worth.
  """
  if re.fullmatch(r"\W*[A-Za-z]\W*", answer):
    return False
  alone = dataclasses.replace(question, options=(), kind="auto", answers=("",))
  decimals = question.meta.get("decimals")
  same = {index for index, option in enumerate(question.options) if _is_value(option) and (
    rewards.judge(dataclasses.replace(alone, answers=(option,)), answer)
    or (decimals is not None and same_rounded(answer, option, decimals)))}
  gold = {ord(letter.strip()) - ord("A") for letter in question.answers
          if re.fullmatch(r"\s*[A-Z]\s*", letter)}
  return len(same) == 1 and same <= gold


def _is_value(option: str) -> bool:
  return any(character.isdigit() or character == "\\" for character in option)


def number_within(answer: str, gold: str, tolerance: float) -> bool:
  """Whether two numbers or numeric expressions are at most `tolerance` (absolute) apart."""
  given, right = numeric_value(answer), numeric_value(gold)
  if given is None or right is None:
    return False
  # Both ends of the interval belong to it, as they are written: |0.501 - 0.5| <= 0.001.
  return abs(given - right) <= Fraction(str(tolerance))


# "12 m^3", "5\\text{ km}", "60 degrees": units behind a number, which do not change it.
_UNIT = re.compile(r"(?<=[\d}])\s*\\?,?\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?:square |cubic )?"
                   r"(?:units?|degrees?|[kcdm]?m)\s*\}?\s*(?:\^\s*\{?[23]\}?)?\s*\.?$")


def same_rounded(answer: str, gold: str, decimals: int) -> bool:
  """Whether two numbers or numeric expressions are equal when rounded, units left aside. A ratio is
  worth its quotient."""
  given, right = (numeric_value(_UNIT.sub("", text.strip(" $"))) for text in (answer, gold))
  return given is not None and right is not None and round(given, decimals) == round(right, decimals)


def numeric_value(text: str) -> Fraction | None:
  """The value of a number or of an expression such as `\\frac{\\pi}{2}`; None where it has none."""
  plain = rewards.parse_number(text)
  if plain is not None:
    return plain / 100 if text.strip().endswith("%") else plain
  value = mathematics.value(text)
  return Fraction(value) if value is not None and math.isfinite(value) else None


# ---- token F1 ----

_ARTICLES = frozenset(("a", "an", "the"))


def tokens(text: str) -> list[str]:
  """Words without case, ASCII punctuation and articles, as MMSearch counts them. Other punctuation
  stays: that is how the official figures are made."""
  kept = "".join(character for character in text.lower() if character not in string.punctuation)
  return [word for word in kept.split() if word not in _ARTICLES]


def token_f1(answer: str, golds: Sequence[str]) -> float:
  """Harmonic mean of precision and recall of the words, against the gold answer it fits best."""
  return max((_f1(tokens(answer), tokens(gold)) for gold in golds), default=0.0)


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
  if not given or not right:
    return float(list(given) == list(right))
  common = sum((collections.Counter(given) & collections.Counter(right)).values())
  return 2 * common / (len(given) + len(right))


# ---- variants of one question ----


def all_variants_right(rates: Mapping[Hashable, Sequence[float]]) -> float:
  """Share of questions that are right in every variant (option cycles, DynaMath's worst case).

  Args:
    rates: share of right rollouts of each variant, by the question the variants belong to.
      Rollouts of different variants are independent, so the chance that one of each is right is the
      product of the shares; it needs no pairing of rollouts.

  Raises:
    ValueError: no question.
  """
  if not rates:
    raise ValueError("no question to average; evaluate at least one")
  return math.fsum(math.prod(variants) for variants in rates.values()) / len(rates)
