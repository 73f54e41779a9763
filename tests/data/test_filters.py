"""Filters are pure functions of the recorded counts."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo_jax.data import filters
from axpo_jax.data.filters import Counts, Thresholds

rewards = st.lists(st.sampled_from((0.0, 0.3, 0.5, 0.7, 1.0)), max_size=8)
counts = st.builds(lambda values: Counts(tuple(values)), rewards)


def of(right, asked=4):
  return Counts((1.0,) * right + (0.0,) * (asked - right))


@pytest.mark.parametrize("policy, teacher, reason", [
  # The paper's: out what the SFT checkpoint solves 4/4, and what the teacher fails 4/4.
  (4, 4, filters.SOLVED), (3, 4, filters.KEPT), (0, 4, filters.KEPT),
  (0, 0, filters.HOPELESS), (3, 0, filters.HOPELESS), (3, 1, filters.KEPT), (4, 0, filters.SOLVED),
])
def test_filter_of_the_paper(policy, teacher, reason):
  assert filters.question(of(policy), of(teacher)) == reason


def test_who_was_not_asked_holds_nothing_against_a_question():
  assert filters.question(of(0), None) == filters.KEPT
  assert filters.question(None, of(0)) == filters.HOPELESS
  assert filters.question(None, of(1)) == filters.KEPT
  assert filters.question(of(1), Counts(())) == filters.KEPT  # all of the teacher's rollouts failed
  assert filters.question(Counts(()), of(4)) == filters.UNKNOWN


@pytest.mark.parametrize("reward, tokens, failed, reason", [
  (1.0, 100, False, filters.KEPT), (1.0, 101, False, filters.TOO_LONG), (0.5, 9, False, filters.WRONG),
  (0.0, 999, False, filters.WRONG), (1.0, 9, True, filters.FAILED)])
def test_only_right_trajectories_are_learnt_from(reward, tokens, failed, reason):
  assert filters.trajectory(reward, tokens, failed=failed, max_tokens=100) == reason


@given(reward=st.floats(0, 1), tokens=st.integers(1, 200), failed=st.booleans())
def test_keeping_wrong_ones_keeps_more_and_nothing_else(reward, tokens, failed):
  strict, loose = (filters.trajectory(reward, tokens, failed=failed, max_tokens=100, keep_wrong=wrong)
                   for wrong in (False, True))
  assert strict == (filters.WRONG if reward <= 0.5 and not failed else loose)
  assert (loose == filters.KEPT) == (not failed and tokens <= 100)


@given(policy=counts, teacher=counts, solved=st.floats(0, 1.1), tighter=st.floats(0, 1))
def test_a_tighter_threshold_keeps_no_more(policy, teacher, solved, tighter):
  wide = Thresholds(solved=solved, hopeless=0.25)
  narrow = Thresholds(solved=solved * tighter, hopeless=0.5)
  if filters.question(policy, teacher, narrow) == filters.KEPT:
    assert filters.question(policy, teacher, wide) == filters.KEPT


@given(policy=counts, teacher=counts)
def test_order_of_rollouts_does_not_matter(policy, teacher):
  reversed_ = (dataclasses.replace(c, rewards=c.rewards[::-1]) for c in (policy, teacher))
  assert filters.question(*reversed_) == filters.question(policy, teacher)


@given(policy=counts, teacher=counts)
def test_thresholds_can_keep_everything_judged(policy, teacher):
  reason = filters.question(policy, teacher, Thresholds(solved=1.1, hopeless=-0.1))
  assert reason == (filters.KEPT if policy.rewards else filters.UNKNOWN)


@given(st.lists(st.sampled_from((filters.KEPT, filters.SOLVED, filters.HOPELESS))))
def test_tally_loses_nobody(reasons):
  tally = filters.Tally.of("questions", reasons)
  record = tally.to_json()
  assert record["total"] == len(reasons) == sum(record["reasons"].values())
  assert tally.kept == reasons.count(filters.KEPT)
  for reason in set(reasons) - {filters.KEPT}:
    assert f"{reasons.count(reason)} {reason}" in str(tally)
