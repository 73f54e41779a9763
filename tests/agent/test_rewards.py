"""Binary rewards: where the answer is taken from, and when it is right."""

import asyncio
import threading
import time

import pytest

from axpo_jax.agent import mathematics, rewards
from axpo_jax.data.question import Question


def right(answer, *golds, kind="auto", options=(), **meta):
  question = Question("q", "?", (), golds, kind=kind, options=options, meta=meta)
  reward = rewards.judge(question, answer)
  assert reward in (0.0, 1.0)
  return bool(reward)


@pytest.mark.parametrize("text, answer", [
    ("hm</think>\n\n<answer>\n\\boxed{7}\n</answer><|im_end|>", "7"),
    ("hm</think><answer>7</answer>", "7"),
    ("hm</think><answer>7", "7"),
    ("hm</think><answer>7<|im_end|>", "7"),
    ("hm</think><answer>1</answer> no <answer>\\boxed{2}</answer>", "2"),
    ("hm</think><answer>\\boxed{1} or \\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
    ("hm</think>so \\boxed{3}", "3"),
    ("\\boxed{9}<answer>8</answer></think>none", None),  # only in the thinking
    ("</think><answer>1</answer> wait</think>\\boxed{2}", "2"),  # after the LAST </think>
    ("hm</think><answer>  </answer>", None),
    ("hm</think>just seven", None),
    ("<answer>7</answer>", None),  # still thinking
    ("hm</think>\\boxed{7", None),
    ("hm</think>\\boxed{7} and \\boxed{8", "7"),
])
def test_extract_answer(text, answer):
  assert rewards.extract_answer(text) == answer


def test_a_prompt_that_opened_no_thinking():
  assert rewards.extract_answer("<answer>7</answer>", thinking=False) == "7"


def test_score():
  question = Question("q", "?", (), ("7",))
  assert rewards.score(question, "hm</think>\\boxed{7}") == (1.0, "7")
  assert rewards.score(question, "hm</think>\\boxed{8}") == (0.0, "8")
  assert rewards.score(question, "hm \\boxed{7}") == (0.0, None)


OPTIONS = ("red", "a cat", "42")


@pytest.mark.parametrize("answer, gold, same", [
    ("B", "B", True), ("b", "B", True), ("(B)", "B", True), ("B.", "B", True),
    ("B. a cat", "B", True), ("(B) a cat", "B", True), ("option B", "B", True),
    ("\\text{B}", "B", True), ("a cat", "B", True), ("A cat", "B", True), ("B", "a cat", True),
    ("42", "C", True), ("C", "42", True), ("C: 42", "42", True),
    ("A", "B", False), ("D", "B", False), ("red", "B", False), ("Banana", "B", False),
    ("A or B", "B", False), ("", "B", False),
])
@pytest.mark.parametrize("kind", ["auto", "choice"])
def test_choice(answer, gold, same, kind):
  assert right(answer, gold, kind=kind, options=OPTIONS) == same


def test_a_letter_without_options():
  assert right("(B)", "B") and right("B. red", "B") and not right("C. red", "B")


@pytest.mark.parametrize("answer, gold, same", [
    ("7", "7", True), ("7.0", "7", True), ("+7", "7", True), ("$7$", "7", True),
    ("1,234", "1234", True), ("-2e3", "-2000", True), ("3/4", "0.75", True), ("7%", "7", True),
    ("3.1416", "3.14", True),  # within 0.1 % of a decimal gold
    ("3.15", "3.14", False), ("2025", "2024", False), ("2024.5", "2024", False),
    ("-7", "7", False), ("seven", "7", False), ("0.75.1", "0.75", False), ("1/0", "1", False),
])
@pytest.mark.parametrize("kind", ["auto", "number"])
def test_numbers(answer, gold, same, kind):
  assert right(answer, gold, kind=kind) == same


def test_an_absolute_tolerance():
  """DynaMath's rule for floats: within 0.001."""
  assert right("0.3331", "0.3325", tolerance=0.001)
  assert not right("0.3340", "0.3325", tolerance=0.001)


@pytest.mark.parametrize("answer, gold, same", [
    ("0.5", "\\frac{1}{2}", True), ("\\frac{2}{4}", "1/2", True), ("x^2+2x+1", "(x+1)^2", True),
    ("2^{1/2}", "\\sqrt{2}", True), ("\\{2,1\\}", "\\{1,2\\}", True), ("x=3", "3", True),
    ("50\\%", "0.5", True),
    ("\\frac{1}{3}", "\\frac{1}{2}", False), ("(2, 1)", "(1, 2)", False), ("\\frac{", "1/2", False),
])
def test_mathematics(answer, gold, same):
  assert right(answer, gold, kind="math") == same
  assert right(answer, gold) == same


@pytest.mark.parametrize("answer, gold, same", [
    ("The  Eiffel tower.", "eiffel Tower", True), ("\\text{Paris}", "paris", True),
    ("Ｋ７", "K7", True), ("'K7'", "K7", True),
    ("K8", "K7", False), ("Eiffel", "eiffel tower", False),
])
def test_text(answer, gold, same):
  assert right(answer, gold, kind="text") == same
  assert right(answer, gold) == same


def test_any_gold_counts():
  assert right("NYC", "New York", "NYC") and right("new york", "New York", "NYC")


def test_a_very_long_answer_is_wrong_even_if_it_matches():
  assert right("x" * 999, "x" * 999) and not right("x" * 1000, "x" * 1000)


@pytest.mark.parametrize("answer, gold, same", [
    ("e^{-x^2}", "e^{-x^{2}}", True), ("5!", "120", True), ("2^{10}", "1024", True),
    ("\\binom{5}{2}", "10", True), ("2^{2^3}", "256", True), ("e^{-x^2}", "e^{-x^3}", False),
])
def test_powers_and_factorials_reach_math_verify(answer, gold, same):
  assert right(answer, gold, kind="math") == same


def test_math_verify_works_off_the_main_thread_and_inside_a_loop():
  results = []
  thread = threading.Thread(target=lambda: results.append(right("\\frac{3}{6}", "\\frac12")))
  thread.start()
  thread.join()

  async def main():
    return await rewards.judge_soon(Question("q", "?", (), ("\\frac12",)), "\\frac{4}{8}")

  assert results == [True] and asyncio.run(main()) == (1.0, False)


def test_plain_answers_never_reach_math_verify(monkeypatch):
  def refuse(*_):
    raise AssertionError("slow path")
  monkeypatch.setattr(mathematics, "_asked", refuse)
  for kind in ("auto", "text"):
    for gold in ("K", "K7", "7", "red", "Mount Orla"):
      for answer in ("K", "M", "7", "8", "red", "blue", "Mount Orla"):
        assert right(answer, gold, kind=kind) == (answer == gold)


def test_plain_answers_are_fast():
  """About 5 to 30 microseconds each."""
  question = Question("q", "?", (), ("K",), kind="text")
  begin = time.process_time()  # not the clock on the wall, which runs for others too
  for _ in range(1000):
    rewards.judge(question, "M")
  assert time.process_time() - begin < 0.5
