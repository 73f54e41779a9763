"""MathVision's official rules, read independently, on a corpus whose values are known by how it is made.

The official script lower-cases, takes equal texts for equal, and else evaluates both and compares them rounded
to two decimals; of a multiple choice, the answer may be the letter or what the option is worth. Here nothing
is parsed: every spelling is written from its value.
"""

import itertools
import math

import pytest

from axpo_jax.data.question import Question
from axpo_jax.eval import scoring

# Spellings and their values; those of one list are worth the same.
SPELLINGS = [
  (12, ["12", "12.0", "\\frac{24}{2}", "2 \\cdot 6", "12^{\\circ}", "12 \\text{ km}", "$12$", "12 units"]),
  (12.004, ["12.004"]), (12.006, ["12.006"]), (-12, ["-12", "-\\frac{36}{3}"]),
  (0.75, ["0.75", ".75", "\\frac{3}{4}", "3/4", "3:4", "\\dfrac{3}{4}"]), (0.7512, ["0.7512"]), (0.76, ["0.76"]),
  (4 / 3, ["\\frac{4}{3}", "4:3", "1.33", "1.3333"]), (1.34, ["1.34"]),
  (2 * math.sqrt(3), ["2\\sqrt{3}", "\\sqrt{12}", "3.46"]), (math.sqrt(3), ["\\sqrt{3}", "1.73"]),
  (math.pi / 2, ["\\frac{\\pi}{2}", "1.57"]), (25 * math.pi, ["25\\pi", "78.54"]),
  (1000, ["1000", "10^3", "1000 \\text{ m}^3"]), (0, ["0", "0.001"]),
]
FLAT = [(value, text) for value, texts in SPELLINGS for text in texts]


def official(value: float, gold: float) -> bool:
  return round(value, 2) == round(gold, 2)


def right(question: Question, answer: str) -> bool:
  return scoring.right_by_rule(question, answer)


def free(gold: str) -> Question:
  return Question("q", "?", (), (gold,), kind="math", meta={"decimals": 2})


@pytest.mark.parametrize("gold", ["12", "\\frac{3}{4}", "\\frac{4}{3}", "2\\sqrt{3}", "25\\pi", "0"])
def test_free_answers(gold):
  worth = next(value for value, text in FLAT if text == gold)
  found = {text: right(free(gold), text) for _, text in FLAT}
  assert found == {text: official(value, worth) for value, text in FLAT}


OPTIONS = ("12", "\\frac{3}{4}", "2\\sqrt{3}", "\\frac{4}{3}", "10^3")


@pytest.mark.parametrize("gold", "ABCDE")
def test_choices(gold):
  question = Question("q", "?", (), (gold,), kind="choice", options=OPTIONS, meta={"decimals": 2})
  worth = next(value for value, text in FLAT if text == OPTIONS[ord(gold) - ord("A")])
  found = {text: right(question, text) for _, text in FLAT}
  assert found == {text: official(value, worth) for value, text in FLAT}
  letters = {form.format(letter): right(question, form.format(letter))
             for form, letter in itertools.product(("{}", "({})"), "ABCDE")}
  assert letters == {form.format(letter): letter == gold
                     for form, letter in itertools.product(("{}", "({})"), "ABCDE")}


def test_where_two_options_round_alike_we_want_the_right_one():
  """The official script takes either, by its rounding: 6 of 15,200 published verdicts."""
  question = Question("q", "?", (), ("B",), kind="choice", options=("2018", "\\sqrt{2018^2+2}"), meta={"decimals": 2})
  assert official(2018, math.sqrt(2018**2 + 2)) and not right(question, "2018") and right(question, "B")
