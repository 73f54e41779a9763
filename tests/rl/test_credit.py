"""Recovery credit, continuation groups and masks: the worked values, and what must not change."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.rl.advantages import group_advantages
from axpo_jax.rl.algorithm import assign_credit, loss_mask
from axpo_jax.rl.credit import (
  BranchOutcome,
  Credit,
  CreditConfig,
  GroupOutcome,
  prefix_advantage,
  turn_advantages,
)

PAPER = CreditConfig()


def outcome(rewards, *branches):
  return GroupOutcome(np.array(rewards, float), branches)


def by_place(credits):
  return {(c.group, c.rollout, c.branch): c for c in credits}


@pytest.mark.parametrize(
  ("recovered", "others_right", "want"),
  [
    (True, 0, 2.475),
    (True, 3, 0.935),
    (True, 7, 0.0),
    (False, 1, -0.354),
    (False, 4, -0.935),
    (False, 0, 0.0),
  ],
)
def test_worked_prefix_advantages(recovered, others_right, want):
  rewards = np.array([0.0] + [1.0] * others_right + [0.0] * (7 - others_right))
  continuations = np.array([0.0, 0.0, float(recovered), 0.0])
  assert prefix_advantage(rewards, 0, continuations, PAPER) == pytest.approx(want, abs=5e-4)


@given(st.integers(0, 7), st.integers(0, 4))
def test_any_does_not_count_how_many(others_right, right):
  rewards = np.array([0.0] + [1.0] * others_right + [0.0] * (7 - others_right))
  continuations = np.array([1.0] * right + [0.0] * (4 - right))
  replaced = rewards.copy()
  replaced[0] = float(right > 0)
  assert prefix_advantage(rewards, 0, continuations, PAPER) == group_advantages(replaced)[0]


def test_one_group_in_full():
  """Eight rollouts; 2 used a tool wrongly and is the source; three no-tool ones are right."""
  branch = BranchOutcome(2, np.array([0, 1, 0, 0]))
  credits = assign_credit([outcome([1, 1, 0, 1, 0, 0, 0, 0], branch)], PAPER)
  plain = group_advantages([1, 1, 0, 1, 0, 0, 0, 0])
  want = [
    *(Credit(0, i, None, "all", plain[i]) for i in (0, 1)),
    Credit(0, 2, None, "prefix", pytest.approx(0.935, abs=5e-4)),
    *(Credit(0, i, None, "all", plain[i]) for i in range(3, 8)),
    *(
      Credit(0, k, 0, "continuation", pytest.approx(a, abs=5e-4))
      for k, a in enumerate([-0.5, 1.5, -0.5, -0.5])
    ),
  ]
  assert credits == want


def test_zero_advantage_sequences_stay():
  credits = assign_credit([outcome([0] * 8, BranchOutcome(0, np.zeros(4)))], PAPER)
  assert len(credits) == 12
  assert {c.advantage for c in credits} == {0.0}


groups = st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=8)
continuations = st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4).map(np.array)


@given(groups, continuations, continuations)
def test_two_sources_are_independent(rewards, first, second):
  alone_0 = by_place(assign_credit([outcome(rewards, BranchOutcome(0, first))], PAPER))
  alone_1 = by_place(assign_credit([outcome(rewards, BranchOutcome(1, second))], PAPER))
  both = by_place(assign_credit([outcome(rewards, BranchOutcome(0, first), BranchOutcome(1, second))], PAPER))
  assert both[0, 0, None] == alone_0[0, 0, None]
  assert both[0, 1, None] == alone_1[0, 1, None]
  for k in range(4):
    assert both[0, k, 0] == alone_0[0, k, 0]
    assert both[0, k, 1].advantage == alone_1[0, k, 0].advantage
  for i in range(2, len(rewards)):
    assert both[0, i, None] == alone_0[0, i, None] == alone_1[0, i, None]


@given(st.lists(groups, min_size=1, max_size=4))
def test_without_branches_it_is_grpo_bit_for_bit(many):
  credits = assign_credit([outcome(rewards) for rewards in many], PAPER)
  want = [
    Credit(g, i, None, "all", float(a))
    for g, rewards in enumerate(many)
    for i, a in enumerate(group_advantages(rewards))
  ]
  assert credits == want
  # The switches of AXPO touch nothing where nothing was resampled.
  for config in (CreditConfig(prefix_credit="none"), CreditConfig(merge_resamples=True)):
    assert assign_credit([outcome(rewards) for rewards in many], config) == want


@given(groups, continuations, st.randoms(), st.sampled_from(["any", "mean", "excess", "none"]))
@settings(max_examples=60)
def test_permuting_rollouts_and_continuations_permutes_credit(rewards, resampled, random, credit):
  config = CreditConfig(prefix_credit=credit)
  rewards = np.array(rewards)
  order = random.sample(range(len(rewards)), len(rewards))
  order_k = random.sample(range(4), 4)
  moved = by_place(
    assign_credit([outcome(rewards[order], BranchOutcome(order.index(1), resampled[order_k]))], config)
  )
  base = by_place(assign_credit([outcome(rewards, BranchOutcome(1, resampled))], config))
  for (_, rollout, branch), c in moved.items():
    source = order[rollout] if branch is None else order_k[rollout]
    same = base[0, source, branch]
    assert (c.region, c.advantage) == (same.region, same.advantage)


# ---- switches


def test_no_prefix_credit_leaves_the_source_as_grpo_does():
  rewards = [0, 1, 0, 0]
  credits = assign_credit(
    [outcome(rewards, BranchOutcome(0, np.array([1, 0, 0, 0])))], CreditConfig(prefix_credit="none")
  )
  assert credits[:4] == assign_credit([outcome(rewards)], PAPER)
  assert [c.region for c in credits[4:]] == ["continuation"] * 4


def test_merged_group_normalises_over_all():
  branch = BranchOutcome(0, np.array([1.0, 0, 0, 0]))
  config = CreditConfig(merge_resamples=True)
  credits = by_place(assign_credit([outcome([0, 1, 0, 0], branch)], config))
  merged = np.array([0, 1, 0, 0, 1, 0, 0, 0.0])
  want = (merged - merged.mean()) / (merged.std(ddof=1) + 1e-6)
  assert credits[0, 1, None].advantage == pytest.approx(want[1], rel=1e-12)
  for k in range(4):
    assert credits[0, k, 0].advantage == pytest.approx(want[4 + k], rel=1e-12)
  # The prefix keeps its own rule: this ablation is about the continuations' group.
  assert credits[0, 0, None].region == "prefix"
  alone = prefix_advantage(np.array([0, 1, 0, 0]), 0, branch.rewards_K, PAPER)
  assert credits[0, 0, None].advantage == alone


def test_mean_credit():
  rewards = np.array([0, 1, 1, 0, 0, 0, 0, 0.0])
  replaced = np.array([0.25, 1, 1, 0, 0, 0, 0, 0])
  want = (0.25 - replaced.mean()) / (replaced.std(ddof=1) + 1e-6)
  got = prefix_advantage(rewards, 0, np.array([1, 0, 0, 0]), CreditConfig(prefix_credit="mean"))
  assert got == pytest.approx(want, rel=1e-12)


def test_excess_credit():
  config = CreditConfig(prefix_credit="excess")
  rewards = np.array([0, 1, 1, 1, 1, 0, 0, 0.0])
  few, many = np.array([1, 0, 0, 0.0]), np.array([1, 1, 1, 0.0])
  for resampled in (few, many):
    pooled = np.concatenate([rewards[1:], resampled])
    want = (resampled.mean() - 4 / 7) / (pooled.std(ddof=1) + 1e-6)
    assert prefix_advantage(rewards, 0, resampled, config) == pytest.approx(want, rel=1e-12)
  # "any" rewards both alike; "excess" tells a prefix that beats its group from one that does not.
  assert prefix_advantage(rewards, 0, few, config) < 0 < prefix_advantage(rewards, 0, many, config)
  assert prefix_advantage(rewards, 0, few, PAPER) == prefix_advantage(rewards, 0, many, PAPER) > 0


def test_excess_grows_with_success_where_nothing_else_is_right():
  config = CreditConfig(prefix_credit="excess")
  rewards = [np.array([1.0] * c + [0.0] * (4 - c)) for c in range(5)]
  got = [prefix_advantage(np.zeros(8), 0, rewards_K, config) for rewards_K in rewards]
  assert got[0] == 0
  assert got == sorted(got)
  assert len(set(got)) == 5


def test_no_std_normalisation():
  config = CreditConfig(normalise_std=False)
  branch = BranchOutcome(0, np.array([1, 0, 0, 0]))
  credits = by_place(assign_credit([outcome([0, 0, 0, 1], branch)], config))
  assert credits[0, 0, None].advantage == 0.5
  assert credits[0, 3, None].advantage == 0.75
  assert credits[0, 0, 0].advantage == 0.75


# ---- masks


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_prefix_and_continuation_split_the_sampled_tokens(sampled, data):
  end = data.draw(st.integers(1, len(sampled)))
  prefix, rest = loss_mask(sampled, "prefix", end), loss_mask(sampled, "continuation", end)
  assert not (prefix & rest).any()
  np.testing.assert_array_equal(prefix | rest, loss_mask(sampled, "all"))
  assert not prefix[end:].any()
  assert not rest[:end].any()


def test_mask_by_hand():
  #          prompt   think  <tool_call>  call  observation  answer
  sampled = [0, 0, 1, 1, 1, 1, 0, 1]
  want = {"prefix": [0, 0, 1, 1, 1, 0, 0, 0], "continuation": [0, 0, 0, 0, 0, 1, 0, 1]}
  for region, mask in want.items():
    np.testing.assert_array_equal(loss_mask(sampled, region, 5), np.array(mask, bool))


@pytest.mark.parametrize(
  ("region", "end"), [("prefix", None), ("continuation", 9), ("prefix", 0), ("x", 1)]
)
def test_bad_mask_requests(region, end):
  with pytest.raises(ValueError):
    loss_mask([True, False], region, end)


# ---- errors


@pytest.mark.parametrize("sources", [(4,), (-1,), (1, 1)])
def test_bad_sources(sources):
  branches = [BranchOutcome(s, np.zeros(4)) for s in sources]
  with pytest.raises(ValueError, match="source"):
    assign_credit([outcome([0, 0, 0, 0], *branches)], PAPER)


def test_bad_config():
  with pytest.raises(ValueError, match=r"credit\.prefix_credit='all'"):
    CreditConfig(prefix_credit="all")
  with pytest.raises(ValueError, match=r"credit\.ddof=2"):
    CreditConfig(ddof=2)
  with pytest.raises(ValueError, match="no prefix advantage"):
    prefix_advantage(np.zeros(4), 0, np.ones(4), CreditConfig(prefix_credit="none"))


def test_turns_are_compared_with_the_same_turn_of_the_other_rollouts():
  config = CreditConfig(turn_weight=0.5)
  rewards = [[1.0, 0.0], [0.0], [0.0, 0.0, 9.0], []]
  first = np.array([1.0, 0.0, 0.0])
  want = 0.5 * (first - first.mean()) / (first.std(ddof=1) + 1e-6)
  found = turn_advantages(rewards, config)
  assert [len(own) for own in found] == [2, 1, 3, 0]
  np.testing.assert_allclose([own[0] for own in found[:3]], want, rtol=1e-12)
  assert found[0][1] == found[2][1] == 0 and found[2][2] == 0  # equal; and nothing to compare with


def test_turns_reach_the_credits_and_leave_the_rest_as_it_is():
  group = GroupOutcome(np.array([1.0, 0.0]), [BranchOutcome(1, np.array([1.0, 0.0]), turn_rewards_K=[[0.0], [1.0]])],
                       turn_rewards_N=[[1.0], [0.0]])
  plain = assign_credit([group], CreditConfig())
  turned = assign_credit([group], CreditConfig(turn_weight=1.0))
  assert [dataclasses.replace(credit, turns=()) for credit in turned] == plain
  assert [np.sign(credit.turns[0]) for credit in turned] == [1, -1, -1, 1]
  with pytest.raises(ValueError, match="no rewards of turns"):
    assign_credit([GroupOutcome(np.array([1.0, 0.0]))], CreditConfig(turn_weight=1.0))
