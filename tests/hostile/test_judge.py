"""Replies of an LLM judge that are no verdict, and answers that try to speak to it."""

import json

import pytest

from axpo_jax.agent import judge
from tests.hostile import corpus


@pytest.mark.parametrize("case", corpus.cases("verdicts"))
def test_replies_that_are_no_verdict(case):
  with pytest.raises(judge.JudgeError):
    judge.verdict(case["reply"])


@pytest.mark.parametrize("reply", [
    "", "3", '{"correct": true}', '{"correct": "true", "score": 3}', '{"correct": true, "score": true}',
    '{"correct": false, "score": 6}', '{"correct": false, "score": -1}', '{"correct": false, "score": NaN}',
    '{"correct": true, "score": 5} no, wait', '<think>\n{"correct": true, "score": 5}', "[" * 100_000,
    '{"correct": false, "score": 1, "but": 2}'], ids=lambda reply: reply[:40])
def test_replies_that_are_no_grade(reply):
  with pytest.raises(judge.JudgeError):
    judge.grade(reply, 5.0)


def test_grades_and_verdicts():
  assert judge.grade('p1 is met.\n{"correct": false, "score": 2}', 5.0) == (False, 0.4)
  assert judge.grade('<think>so {</think>\n{\n "correct": true,\n "score": 5\n}\n', 5.0) == (True, 1.0)
  assert judge.verdict('{\n "verdict": "CORRECT"\n}') is True  # as structured output may break its lines
  assert judge.verdict('It differs.\n{"verdict":"INCORRECT"}') is False


@pytest.mark.parametrize("case", corpus.cases("quoted"))
def test_an_answer_stays_within_its_quotes(case):
  text = judge.prompt("Who?", ["Ada"], case["answer"])
  said = json.loads(text)
  assert said == {"question": "Who?", "references": ["Ada"],
                  "answer": case["answer"].encode("utf-8", "replace").decode()}
  assert not any(mark in text for mark in ("<|", "</", "<s", "<t"))
