"""Answers that a policy writes to stop or to fool the rewards."""

import pytest

from axpo_jax.agent import rewards
from axpo_jax.data.question import Question
from tests.hostile import corpus


@pytest.mark.parametrize("case", corpus.cases("answers"))
def test_answers(case):
  answer = case.get("answer") or "9" * case["long"]
  with corpus.bounds(seconds=5):
    assert rewards.judge(Question("q", "?", (), (case.get("gold", "3"),)), answer) == 0.0
