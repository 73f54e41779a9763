"""What an LLM as judge may say, and what it may be told by the answer that it judges."""

import json

import pytest

from axpo_jax.agent import judge
from tests.hostile import corpus


@pytest.mark.parametrize("case", corpus.cases("verdicts"))
def test_replies_that_are_no_verdict(case):
  with pytest.raises(judge.JudgeError):
    judge.verdict(case["reply"])


@pytest.mark.parametrize("case", corpus.cases("quoted"))
def test_an_answer_stays_within_its_quotes(case):
  text = judge.prompt("Who?", ["Ada"], case["answer"])
  said = json.loads(text)
  assert said == {"question": "Who?", "references": ["Ada"],
                  "answer": case["answer"].encode("utf-8", "replace").decode()}
  assert not any(mark in text for mark in ("<|", "</", "<s", "<t"))
