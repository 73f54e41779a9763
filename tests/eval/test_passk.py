"""Pass@k against enumeration, and its standard errors against known formulas."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.eval.passk import mean_and_error, pass_at_k, summarise


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
@settings(max_examples=60)
def test_unbiased_estimator_averages_over_all_choices(right, data):
  k = data.draw(st.integers(1, len(right)))
  choices = list(itertools.combinations(right, k))
  want = sum(any(choice) for choice in choices) / len(choices)
  assert pass_at_k(sum(right), len(right), k) == pytest.approx(want)


@pytest.mark.parametrize(
  ("right", "n", "k", "want"), [(1, 4, 4, 1.0), (0, 4, 4, 0.0), (1, 4, 1, 0.25), (2, 4, 2, 5 / 6)]
)
def test_values_by_hand(right, n, k, want):
  assert pass_at_k(right, n, k) == pytest.approx(want)


@pytest.mark.parametrize("bad", [(1, 4, 5), (5, 4, 1), (-1, 4, 1), (1, 4, 0)])
def test_impossible_counts(bad):
  with pytest.raises(ValueError, match="need 1 <= k <= n"):
    pass_at_k(*bad)


def test_summary_by_hand():
  got = summarise([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
  ones, anys = np.array([0.25, 1, 0]), np.array([1, 1, 0])
  assert got == {
    "eval/pass_at_1": pytest.approx(ones.mean()),
    "eval/pass_at_1_se": pytest.approx(ones.std(ddof=1) / math.sqrt(3)),
    "eval/pass_at_4": pytest.approx(anys.mean()),
    "eval/pass_at_4_se": pytest.approx(anys.std(ddof=1) / math.sqrt(3)),
  }


def test_pass_at_1_keeps_graded_rewards():
  assert summarise([[0.5, 0.25], [1.0, 0.25]], ks=(1,))["eval/pass_at_1"] == 0.5


def test_questions_with_fewer_than_k_rollouts_do_not_count_for_k():
  got = summarise([[1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], ks=(1, 4, 8))
  assert got["eval/pass_at_1"] == pytest.approx(1 / 3)
  assert got["eval/pass_at_4"] == 0.5
  assert "eval/pass_at_8" not in got
  lost = summarise([[1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], ks=(4,), clusters_Q="aab")
  assert lost["eval/pass_at_4_se"] == pytest.approx(np.std([1, 0], ddof=1) / np.sqrt(2))


def test_one_question_has_no_error():
  assert summarise([[1, 0]], ks=(1,), prefix="x") == {"x/pass_at_1": 0.5}


def test_variants_of_one_question_count_once():
  """Four identical copies of each question must not halve the error."""
  values = [0.0, 1.0, 1.0, 0.0, 1.0]
  mean, error = mean_and_error(values)
  copies, labels = np.repeat(values, 4), np.repeat(range(5), 4).tolist()
  assert mean_and_error(copies, labels) == (pytest.approx(mean), pytest.approx(error))
  assert mean_and_error(copies)[1] < 0.6 * error


def test_bad_evaluations():
  with pytest.raises(ValueError, match="no question"):
    summarise([])
  with pytest.raises(ValueError, match="rewards must be"):
    summarise([[1, 0], []])
  with pytest.raises(ValueError, match="zip"):
    mean_and_error([1.0, 0.0], [0])
