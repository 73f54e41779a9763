"""Scoring rules: worked examples, F1 counted by hand, numbers and values against math-verify."""

import asyncio
import json
import math
from fractions import Fraction

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from axpo_jax.agent import judge as judges
from axpo_jax.data.question import Question
from axpo_jax.eval import scoring


def question(answer, **fields):
  return Question("q", "?", (), (answer,), **fields)


# (answer, gold, common words, words of the answer, words of the gold), counted by hand.
F1_EXAMPLES = [
    ("Paris", "Paris", 1, 1, 1),
    ("the city of Paris", "Paris", 1, 3, 1),
    ("Barack Hussein Obama", "Barack Obama", 2, 3, 2),
    ("July 21, 2024", "21 July 2024", 3, 3, 3),
    ("a dog and a dog", "the dog", 1, 3, 1),  # a word counts as often as both have it
    ("U.S. president", "US President", 2, 2, 2),
    ("“Paris”", "Paris", 0, 1, 1),  # punctuation beyond ASCII stays, as in the official figures
    ("London", "Paris", 0, 1, 1),
]


@pytest.mark.parametrize("answer, gold, common, given_words, gold_words", F1_EXAMPLES)
def test_token_f1_by_hand(answer, gold, common, given_words, gold_words):
  precision, recall = common / given_words, common / gold_words
  expected = 2 * precision * recall / (precision + recall) if common else 0.0
  assert scoring.token_f1(answer, [gold]) == pytest.approx(expected)


@pytest.mark.parametrize("answer, gold, right", [
    ("1/3", "0.33", True), ("0.336", "1/3", False), ("27.004 m^3", "27", True), ("5\\text{ km}", "5", True),
    ("60 degrees", "60", True), ("5 apples", "6", False), ("1:1", "1", True), ("2:1", "3", False), ("x", "3", False)])
def test_numbers_that_round_to_the_same_two_decimals(answer, gold, right):
  assert scoring.same_rounded(answer, gold, 2) is right


def test_token_f1_takes_the_best_gold_answer():
  assert scoring.token_f1("New York", ["Boston", "New York City"]) == pytest.approx(0.8)
  assert scoring.token_f1("the", ["Boston"]) == 0 and scoring.token_f1("x", []) == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_token_f1_is_symmetric_and_in_range(first, second):
  value = scoring.token_f1(first, [second])
  assert 0 <= value <= 1
  assert value == pytest.approx(scoring.token_f1(second, [first]))


@pytest.mark.parametrize("answer, gold, right", [
    ("0.501", "0.5", True), ("0.499", "0.5", True), ("0.5011", "0.5", False),
    ("1/3", "0.333", True), ("-2", "2", False), ("1,234.5", "1234.5", True),
    ("\\frac{\\pi}{2}", "1.571", True), ("\\frac{\\pi}{2}", "1.572", False), ("50%", "0.5", True),
    ("2^{0.5}", "1.414", True), ("about 3", "3", False), ("", "3", False), ("inf", "3", False)])
def test_numbers_within_a_thousandth(answer, gold, right):
  assert scoring.number_within(answer, gold, 0.001) is right


@pytest.mark.parametrize("text", ["\\sqrt{2}", "\\frac{7}{3}", "2\\pi", "3^{4}", "1.25", "-7"])
def test_values_agree_with_math_verify(text):
  import math_verify  # brings sympy

  expected = float(math_verify.parse(f"\\boxed{{{text}}}")[0])
  assert float(scoring.numeric_value(text)) == pytest.approx(expected)


def test_an_expression_that_would_run_for_minutes_has_no_value():
  assert scoring.numeric_value("9^{9^{9}}") is None


@given(st.fractions(-100, 100), st.integers(-3, 3))
def test_the_tolerance_is_exact_at_its_ends(number, thousandths):
  number = Fraction(round(number * 1000), 1000)
  other = number + Fraction(thousandths, 1000)
  assert scoring.number_within(f"{float(other):.3f}", f"{float(number):.3f}", 0.001) is (
      abs(thousandths) <= 1)


COLOURS = {"kind": "choice", "options": ("red", "blue", "green")}


@pytest.mark.parametrize("answer, right", [
    ("B", True), ("b", True), ("(B)", True), ("B.", True), ("B. blue", True), ("blue", True),
    ("Option B", True), ("\\text{B}", True), ("A", False), ("red", False), ("A or B", False),
    ("yellow", False), ("D", False)])
def test_options_by_letter_or_text(answer, right):
  assert scoring.right_by_rule(question("B", **COLOURS), answer) is right


@pytest.mark.parametrize("answer, right", [
    ("\\frac{1}{4}", True), ("0.25", True), ("1/4", True), ("25%", True), ("C", True),
    ("0.5", False), ("\\frac{1}{2}", False), ("A", False), ("0.75", False), ("x", False)])
def test_options_by_their_value(answer, right):
  values = {"kind": "choice", "options": ("$\\frac{1}{2}$", "2", "$\\frac14$")}
  assert scoring.right_by_rule(question("C", **values), answer) is right


def test_a_value_that_two_options_share_decides_nothing():
  values = {"kind": "choice", "options": ("0.5", "\\frac{1}{2}", "3")}
  assert not scoring.right_by_rule(question("A", **values), "50/100")
  assert scoring.right_by_rule(question("A", **values), "A")


def test_absurd_answers_are_not_scored():
  assert not scoring.is_scorable(None) and not scoring.is_scorable("  ")
  assert not scoring.is_scorable("B" * 1000) and scoring.is_scorable("B" * 999)


def test_all_variants_right():
  # (1 * 1 + 1 * 0.5 + 0 * 1) / 3
  rates = {"a": [1.0, 1.0], "b": [1.0, 0.5], "c": [0.0, 1.0]}
  assert scoring.all_variants_right(rates) == pytest.approx(0.5)
  assert scoring.all_variants_right({"a": [0.5] * 4}) == pytest.approx(math.pow(0.5, 4))
  with pytest.raises(ValueError, match="at least one"):
    scoring.all_variants_right({})


# ---- the judge behind an endpoint ----


@pytest.mark.parametrize("reply, right", [
    ('{"verdict": "CORRECT"}', True), (' {"verdict":"INCORRECT"}\n', False),
    ('It names Ada.\n{"verdict": "CORRECT"}', True),
    ('<think>is it {"verdict": "CORRECT"}?</think>\n{"verdict": "INCORRECT"}', False)])
def test_verdicts(reply, right):
  assert judges.verdict(reply) is right


def test_no_verdict():
  with pytest.raises(judges.JudgeError, match="no verdict in the last line of 'Perhaps'"):
    judges.verdict("Perhaps")


async def served(replies, ask):
  """Serves chat completions, one reply after the other (a number is a status), while asking."""
  seen, left = [], list(replies)

  async def complete(request):
    seen.append((await request.json(), request.headers.get("Authorization")))
    reply = left.pop(0)
    if isinstance(reply, int):
      return web.Response(status=reply, text="busy")
    return web.json_response({"choices": [{"message": {"content": reply}}]})

  app = web.Application()
  app.router.add_post("/v1/chat/completions", complete)
  runner = web.AppRunner(app)
  await runner.setup()
  site = web.TCPSite(runner, "127.0.0.1", 0)
  await site.start()
  port = runner.addresses[0][1]
  judge = judges.ChatJudge(f"http://127.0.0.1:{port}/v1/", "judge-7b", key="k", first_wait_s=0.001)
  try:
    return await ask(judge), seen
  finally:
    await judge.close()
    await runner.cleanup()


def test_the_judge_asks_a_chat_endpoint_and_again_where_it_is_busy():
  verdict, seen = asyncio.run(served(
      [503, "hm", '{"verdict": "CORRECT"}'], lambda judge: judge("<image>Who?", ["Ada", "A. L."], "Ada Lovelace")))
  assert verdict is True and len(seen) == 3
  body, key = seen[0]
  assert (body["model"], body["temperature"], key) == ("judge-7b", 0, "Bearer k")
  assert json.loads(body["messages"][1]["content"]) == {
      "question": "Who?", "references": ["Ada", "A. L."], "answer": "Ada Lovelace"}
  assert body["response_format"]["type"] == "json_schema"


def test_an_endpoint_without_structured_output_is_asked_for_a_last_line():
  verdict, seen = asyncio.run(served(
      [400, 'They differ.\n{"verdict": "INCORRECT"}'], lambda judge: judge("Who?", ["Ada"], "Bob")))
  assert verdict is False
  assert ["response_format" in body for body, _ in seen] == [True, False]


def test_a_judge_without_a_verdict_says_why():
  with pytest.raises(judges.JudgeError, match=r"after 3 attempts.*status 500: busy"):
    asyncio.run(served([500] * 3, lambda judge: judge("Who?", ["Ada"], "Bob")))


def test_a_judge_that_is_not_there():
  judge = judges.ChatJudge("http://127.0.0.1:9/v1", "m", attempts=1)

  async def ask():
    try:
      await judge("Who?", ["Ada"], "Bob")
    finally:
      await judge.close()
  with pytest.raises(judges.JudgeError, match=r"no verdict from http://127\.0\.0\.1:9/v1/chat"):
    asyncio.run(ask())
