"""The census against counts made by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rollouts import census as census_lib
from axpo_jax.rollouts.census import (
  BranchStats,
  GroupStats,
  RolloutStats,
  census,
  census_by_family,
  resample_census,
  resample_census_by_family,
)


def rollout(reward, tool=False, **fields):
  base = {
    "reward": float(reward),
    "used_tool": tool,
    "num_calls": int(tool),
    "turns": 2 if tool else 1,
    "sampled_tokens": 20 if tool else 10,
    "stop": "answer",
    "confidence": 0.5 if tool else None,
  }
  return RolloutStats(**(base | fields))


def continuations(*rewards):
  return [rollout(r, tool=True, confidence=None) for r in rewards]


@pytest.fixture
def step():
  """Four questions: repaired, not repaired, left alone, no tool at all."""
  return [
    GroupStats(
      [rollout(0, True, confidence=0.2), rollout(0, True, confidence=0.8), rollout(1), rollout(0)],
      [BranchStats(0, continuations(0, 1), prefix_tokens=60, cached_tokens=58)],
      triggered=True,
    ),
    GroupStats(
      [rollout(0, True, confidence=0.4), rollout(0), rollout(0), rollout(0)],
      [BranchStats(0, continuations(0, 0), prefix_tokens=40, cached_tokens=22)],
      triggered=True,
    ),
    GroupStats([rollout(1, True), rollout(0, True), rollout(1), rollout(1)]),
    GroupStats([rollout(1), rollout(1), rollout(0), rollout(0, mentions_tool_without_call=True)]),
  ]


def test_rates_by_hand(step):
  got = census(step)
  want = {
    "questions": 4,
    "rollouts": 16,
    "reward_mean": 6 / 16,
    "tool_attempt_rate": 5 / 16,
    "tool_success_rate": 1 / 5,
    "no_tool_success_rate": 6 / 11 - 1 / 11,
    "tool_all_wrong_rate": 2 / 3,
    "tool_all_wrong_rate_after": 1 / 3,
    "no_tool_all_wrong_rate": 1 / 4,
    "no_tool_all_wrong_rate_after": 1 / 4,
    "tool_all_wrong_rate_at_2": 1 / 2,
    "mention_without_call_rate": 1 / 16,
    "calls_mean": 5 / 16,
    "calls_per_tool_rollout": 1.0,
    "stop_after_first_call_rate": 1.0,
    "length_mean": (5 * 20 + 11 * 10) / 16,
    "length_max": 20,
    "length_tool_mean": 20,
    "length_no_tool_mean": 10,
    "turns_mean": 21 / 16,
    "truncated_rate": 0.0,
    "stop/answer": 1.0,
    "no_signal_share": 1 / 4,
  }
  for name, value in want.items():
    assert got[f"rollout/{name}"] == pytest.approx(value), name
  assert "rollout/tool_all_wrong_rate_at_4" not in got  # no question has four tool rollouts


def test_census_table(step):
  got = census(step)
  table = {
    "tool": {"absent": 0.25, "all_wrong": 0.5, "mixed": 0.25, "all_right": 0.0},
    "no_tool": {"absent": 0.0, "all_wrong": 0.25, "mixed": 0.5, "all_right": 0.25},
  }
  for subgroup, states in table.items():
    for state, share in states.items():
      assert got[f"rollout/census_{subgroup}_{state}"] == share, (subgroup, state)


def test_resampling_by_hand(step):
  got = resample_census(step, budget=4)
  want = {
    "triggered": 2,
    "triggered_share": 0.5,
    "served_share": 1.0,
    "prefixes": 2,
    "budget": 4,
    "budget_used": 0.5,
    "continuations": 4,
    "recovered": 1,
    "recovered_share": 0.5,
    "prefix_recovered_share": 0.5,
    "prefix_mixed_share": 0.5,
    "continuation_success_rate": 0.25,
    "continuation_length_mean": 20,
    "continuation_truncated_rate": 0.0,
    "continuation_tool_error_rate": 0.0,
    "prefix_cached_share": 0.8,
    "confidence_selected": 0.3,
    "confidence_other": (0.8 + 0.5 + 0.5) / 3,
  }
  assert got == {f"axpo/{name}": pytest.approx(value) for name, value in want.items()}


def test_a_question_recovers_once_however_many_prefixes_do(step):
  twice = dataclasses.replace(
    step[0], branches=[BranchStats(0, continuations(1, 0)), BranchStats(1, continuations(1, 1))]
  )
  got = resample_census([twice, step[1]], budget=4)
  assert got["axpo/recovered"] == 1
  assert got["axpo/recovered_share"] == 0.5
  assert got["axpo/prefix_recovered_share"] == pytest.approx(2 / 3)


def test_undefined_rates_are_left_out():
  silent = [GroupStats([rollout(0), rollout(1)])]
  got = census(silent)
  assert not [n for n in got if n.startswith(("rollout/tool_success", "rollout/tool_all_wrong"))]
  assert got["rollout/tool_attempt_rate"] == 0
  assert resample_census(silent, budget=0) == {
    "axpo/triggered": 0.0,
    "axpo/triggered_share": 0.0,
    "axpo/prefixes": 0.0,
    "axpo/budget": 0.0,
    "axpo/continuations": 0.0,
    "axpo/recovered": 0.0,
  }
  assert census([]) == {}


def test_errors_stops_and_cache():
  group = GroupStats(
    [
      rollout(0, True, num_calls=3, tool_errors={"bad_json": 2, "bad_box": 1}, stop="turn_limit"),
      rollout(
        0, True, num_calls=2, tool_errors={"bad_json": 1}, prompt_tokens=30, cached_tokens=10
      ),
      rollout(0, stop="engine_error", prompt_tokens=10),
      rollout(1, total_tokens=90),
    ]
  )
  got = census([group])
  assert got["rollout/tool_errors/bad_json"] == 3
  assert got["rollout/tool_errors/bad_box"] == 1
  assert got["rollout/tool_error_rate"] == pytest.approx(4 / 5)
  assert got["rollout/stop_after_first_call_rate"] == 0
  assert got["rollout/truncated_rate"] == 0.25
  assert got["rollout/stop/engine_error"] == 0.25
  assert got["rollout/prompt_cached_share"] == 0.25
  assert got["rollout/total_length_max"] == 90


def test_evaluation_uses_the_same_names_under_its_own_prefix(step):
  assert {n.replace("eval/", "rollout/") for n in census(step, prefix="eval")} == set(census(step))


@given(st.lists(st.booleans(), min_size=4, max_size=8), st.integers(1, 4))
@settings(max_examples=40)
def test_all_wrong_at_a_fixed_count_is_the_average_over_all_choices(right, count):
  members = [rollout(r, True) for r in right]
  subsets = list(itertools.combinations(right, count))
  want = sum(not any(s) for s in subsets) / len(subsets)
  got = census([GroupStats(members)], fixed_counts=(count,))
  assert got[f"rollout/tool_all_wrong_rate_at_{count}"] == pytest.approx(want)


@given(st.randoms())
@settings(max_examples=20)
def test_order_of_rollouts_does_not_matter(random):
  rollouts = [rollout(i % 3 == 0, i % 2 == 0, sampled_tokens=i) for i in range(8)]
  shuffled = random.sample(rollouts, 8)
  assert census([GroupStats(shuffled)]) == census([GroupStats(rollouts)])


def test_credit_metrics():
  outcome = GroupOutcome(np.zeros(8), [BranchOutcome(0, np.array([1, 0, 0, 0]))])
  credits = assign_credit([outcome, GroupOutcome(np.zeros(8))], CreditConfig())
  got = census_lib.credit_census(credits)
  assert got["train/sequences"] == 20
  assert got["train/sequences_nonzero_share"] == 5 / 20  # the prefix and its 4 continuations
  assert got["axpo/prefix_advantage_mean"] == pytest.approx(2.475, abs=5e-4)
  assert got["axpo/prefix_advantage_positive_share"] == 1.0


def test_truncated_stops_are_the_episode_loops():
  from axpo_jax.agent import rollout as rollout_lib

  assert set(rollout_lib.STOPS) >= census_lib.TRUNCATED_STOPS


def test_a_continuation_does_not_make_a_tool_subgroup_where_there_was_none():
  """The no-tool ablation can do that; both rates must be over the same questions."""
  branch = BranchStats(1, continuations(0, 0))
  groups = [
    GroupStats([rollout(1), rollout(0)], [branch], triggered=True),
    GroupStats([rollout(1, True), rollout(0)]),
  ]
  got = census(groups)
  assert got["rollout/tool_all_wrong_rate"] == got["rollout/tool_all_wrong_rate_after"] == 0.0


def test_by_family(step):
  """Each family's figures are those of a step that has only its groups."""
  families = ("search", "a b/c", "search", "")
  groups = [dataclasses.replace(group, family=family) for group, family in zip(step, families)]
  found = census_by_family(groups, prefix="eval")
  for family, members in (("search", [step[0], step[2]]), ("a_b_c", [step[1]])):
    alone = census(members, prefix="eval")
    for name in census_lib.BY_FAMILY:
      assert found.pop(f"eval/{family}/{name}", None) == alone.get(f"eval/{name}"), (family, name)
  assert not found  # nothing of the group without a family

  found = resample_census_by_family(groups)
  alone = resample_census([step[0], step[2]], budget=1)
  assert found["axpo/search/recovered_share"] == alone["axpo/recovered_share"]
  assert found["axpo/search/continuation_success_rate"] == alone["axpo/continuation_success_rate"]
  assert {name.split("/")[1] for name in found} == {"search", "a_b_c"}
