"""Trigger, confidence, budget and the breadth-first plan."""

import collections
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.rl import resample
from axpo_jax.rl.algorithm import plan_resamples, triggered
from axpo_jax.rl.resample import GroupView, ResampleConfig, Selection


def group(confidences, *, rewards=None, index=0, tool=None, keys=None):
  """A question whose rollouts use a tool where a confidence is given."""
  tool = [c is not None for c in confidences] if tool is None else tool
  return GroupView(
    rewards_N=np.zeros(len(confidences)) if rewards is None else np.array(rewards, float),
    used_tool_N=np.array(tool),
    candidate_N=np.array([c is not None for c in confidences]),
    confidence_N=np.array([np.nan if c is None else c for c in confidences]),
    index=index,
    key_N=keys,
  )


@st.composite
def steps(draw, distinct=False):
  """A step: 1..6 questions of 2..6 rollouts, with random rewards, tools, cuts and keys."""
  size = draw(st.integers(2, 6))
  count = draw(st.integers(1, 6))
  cells = count * size
  if distinct:
    ranks = draw(st.permutations(range(1, cells + 1)))
    values = [rank / (cells + 1) for rank in ranks]
  else:
    values = draw(st.lists(st.sampled_from([0.2, 0.5, 0.9]), min_size=cells, max_size=cells))
  flag = st.lists(st.booleans(), min_size=size, max_size=size)
  groups = []
  for q in range(count):
    rewards = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=size, max_size=size))
    tool, can_cut = draw(flag), draw(flag)
    confidences = [
      values[q * size + i] if tool[i] and (can_cut[i] or draw(st.booleans())) else None
      for i in range(size)
    ]
    keys = draw(st.permutations(range(100, 100 + size)))
    groups.append(
      group(confidences, rewards=rewards, index=q * 7 % 11, tool=tool, keys=tuple(keys))
    )
  return groups


configs = st.builds(
  ResampleConfig,
  ratio=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0]),
  k=st.integers(2, 5),
  choice=st.sampled_from(["uncertain", "random"]),
  round_order=st.sampled_from(["confidence", "index"]),
)


# ---- trigger


@pytest.mark.parametrize(
  ("rewards", "tool", "want"),
  [
    ([0, 0, 0, 0], [1, 1, 0, 0], True),
    ([0, 0, 1, 1], [1, 1, 0, 0], True),  # no-tool rollouts may be right
    ([0, 1, 0, 0], [1, 1, 0, 0], False),  # one right tool-using rollout
    ([0, 0, 0, 0], [0, 0, 0, 0], False),  # nobody used a tool
    ([0, 0, 0, 0], [1, 1, 1, 1], True),
    ([1, 1, 1, 1], [1, 1, 1, 1], False),
  ],
)
def test_trigger(rewards, tool, want):
  assert triggered(np.array(rewards), np.array(tool, bool)) is want


def test_trigger_of_the_no_tool_ablation_looks_at_the_other_subgroup():
  rewards, tool = np.array([1, 0, 0]), np.array([True, False, False])
  assert triggered(rewards, tool, subgroup="no_tool")
  assert not triggered(rewards, tool, subgroup="tool")


# ---- confidence


def test_confidence_is_the_mean_of_probabilities_not_of_logarithms():
  logprobs = np.log([0.9, 0.1])
  assert resample.confidence(logprobs) == pytest.approx(0.5)
  assert math.exp(logprobs.mean()) == pytest.approx(0.3)  # what it is not


def test_confidence_without_tags():
  logprobs = np.log([1.0, 0.2, 0.4, 1.0])
  assert resample.confidence(logprobs, span="call_body") == pytest.approx(0.3)
  assert resample.confidence(logprobs[:3], span="call_body", closed=False) == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [[], [np.nan, -1.0]])
def test_confidence_refuses_what_was_not_sampled(bad):
  with pytest.raises(ValueError, match="finite log-probabilities"):
    resample.confidence(bad)


# ---- budget


@pytest.mark.parametrize(
  ("ratio", "rollouts", "k", "want"),
  [
    (0.25, 128 * 8, 4, 64),  # the paper's step
    (0.25, 8 * 8, 4, 4),
    (0.25, 3 * 8, 4, 1),  # floor(1.5)
    (0.29, 100, 2, 14),  # 0.29 * 100 is 28.999999999999996 in binary
    (0.29, 100, 29, 1),
    (0.0, 1000, 4, 0),
  ],
)
def test_budget(ratio, rollouts, k, want):
  assert resample.prefix_budget(rollouts, ResampleConfig(ratio=ratio, k=k)) == want


@given(steps(), configs, st.integers(0, 5))
@settings(max_examples=100)
def test_budget_is_never_exceeded_and_only_valid_prefixes_are_taken(groups, config, seed):
  plan = plan_resamples(groups, config, seed)
  total = sum(len(g.rewards_N) for g in groups)
  assert len(plan) * config.k <= config.ratio * total + 1e-9
  assert len({(s.group, s.rollout) for s in plan}) == len(plan)
  by_index = {g.index: g for g in groups}
  for s in plan:
    g = by_index[s.group]
    assert g.candidate_N[s.rollout] and g.used_tool_N[s.rollout]
    assert not (g.rewards_N[g.used_tool_N] == 1).any()
    assert s.confidence == g.confidence_N[s.rollout]


@given(steps(), configs)
@settings(max_examples=50)
def test_the_budget_is_spent_while_candidates_last(groups, config):
  plan = plan_resamples(groups, config)
  eligible = sum(
    int((g.candidate_N & g.used_tool_N).sum())
    for g in groups
    if triggered(g.rewards_N, g.used_tool_N)
  )
  budget = resample.prefix_budget(sum(len(g.rewards_N) for g in groups), config)
  assert len(plan) == min(budget, eligible)


# ---- order


@given(steps(), configs)
@settings(max_examples=100)
def test_breadth_first(groups, config):
  """No question gets its (n+1)-th prefix before every question with one left has its n-th."""
  available = {
    g.index: int((g.candidate_N & g.used_tool_N).sum())
    for g in groups
    if triggered(g.rewards_N, g.used_tool_N)
  }
  served = collections.Counter()
  for s in plan_resamples(groups, config):
    behind = [q for q, n in available.items() if served[q] < min(n, served[s.group])]
    assert not behind
    served[s.group] += 1


@given(steps(), configs, st.integers(0, 5), st.randoms())
@settings(max_examples=200)
def test_what_is_certain_before_all_have_ended_is_what_is_chosen_then(groups, config, seed, random):
  """Whichever order questions end in, what is certain is never taken back, and it grows to the whole plan."""
  sizes = {g.index: len(g.rewards_N) for g in groups}
  total = sum(sizes.values())
  whole = plan_resamples(groups, config, seed, num_rollouts=total)
  begun, ended = set(), []
  for g in random.sample(groups, len(groups)):
    ended.append(g)
    del sizes[g.index]
    certain = plan_resamples(ended, config, seed, num_rollouts=total, unfinished=sizes)
    assert begun <= set(certain) <= set(whole)
    begun = set(certain)
  assert begun == set(whole)


def test_what_is_certain_by_hand():
  groups = [group([0.30, 0.10, None, None], index=0), group([0.20, None, None, None], index=1)]
  def certain(budget, unfinished):
    config = ResampleConfig(ratio=budget * 4 / 100, k=4)
    return [(s.group, s.rollout) for s in plan_resamples(groups, config, num_rollouts=100, unfinished=unfinished)]
  # The queue is ?, 0.10, 0.20 | ?, 0.30 with a question that may turn out to be less certain than all others.
  assert certain(1, {2: 4}) == []
  assert certain(2, {2: 4}) == [(0, 1)]
  assert certain(4, {2: 4}) == [(0, 1), (1, 0)]
  assert certain(5, {2: 4}) == [(0, 1), (1, 0), (0, 0)]
  assert certain(4, {2: 4, 3: 4}) == [(0, 1), (1, 0)]
  assert certain(1, {}) == [(0, 1)]


def test_order_by_hand():
  groups = [
    group([0.30, 0.10, None, None], index=0),
    group([0.20, 0.90, None, None], index=1),
    group([0.01, 0.01, None, None], index=2, rewards=[0, 1, 0, 0]),  # not triggered
    group([None, 0.05, None, None], index=3),
  ]
  plan = plan_resamples(groups, ResampleConfig(ratio=1.0, k=4))
  # 16 rollouts, K = 4: four prefixes; round 0 in ascending confidence, then the best of round 1.
  assert plan == [
    Selection(3, 1, 0.05), Selection(0, 1, 0.10), Selection(1, 0, 0.20), Selection(0, 0, 0.30)
  ]  # fmt: skip


def test_greedy_order_without_breadth_first():
  groups = [group([0.1, 0.2, None, None], index=0), group([0.3, None, None, None], index=1)]
  config = ResampleConfig(ratio=1.0, k=4, breadth_first=False)
  assert [(s.group, s.rollout) for s in plan_resamples(groups, config)] == [(0, 0), (0, 1)]


def test_rounds_served_by_index_on_request():
  groups = [group([0.1, None], index=5), group([0.9, None], index=2)]
  config = ResampleConfig(ratio=1.0, k=2, round_order="index")
  assert [s.group for s in plan_resamples(groups, config)] == [2, 5]


@given(steps(), configs, st.randoms())
@settings(max_examples=100)
def test_permuting_questions_and_rollouts_permutes_the_plan(groups, config, random):
  """With keys this holds for exact ties too (the steps are full of them)."""
  shuffled, places = [], {}
  for g in random.sample(groups, len(groups)):
    order = random.sample(range(len(g.rewards_N)), len(g.rewards_N))
    places[g.index] = order
    vectors = ("rewards_N", "used_tool_N", "candidate_N", "confidence_N")
    moved = {name: getattr(g, name)[order] for name in vectors}
    shuffled.append(dataclasses.replace(g, **moved, key_N=[g.key_N[i] for i in order]))
  back = [
    Selection(s.group, places[s.group][s.rollout], s.confidence)
    for s in plan_resamples(shuffled, config, 3)
  ]
  assert back == plan_resamples(groups, config, 3)


@given(steps(distinct=True), st.randoms())
@settings(max_examples=30)
def test_without_ties_no_keys_are_needed(groups, random):
  config = ResampleConfig(ratio=1.0, k=2)
  plain = [dataclasses.replace(g, key_N=None) for g in groups]
  assert plan_resamples(plain, config) == plan_resamples(groups, config)


def test_random_choice_ignores_confidence_and_follows_the_seed():
  groups = [group(np.linspace(0.1, 0.9, 8), index=q) for q in range(12)]
  config = ResampleConfig(ratio=0.5, k=4, choice="random")
  flat = [dataclasses.replace(g, confidence_N=np.full(8, 0.5)) for g in groups]

  def pick(groups, seed):
    return [(s.group, s.rollout) for s in plan_resamples(groups, config, seed)]

  assert pick(groups, 1) == pick(flat, 1) == pick(groups, 1)
  assert pick(groups, 1) != pick(groups, 2)
  firsts = [rollout for seed in range(60) for _, rollout in pick(groups, seed)]
  assert set(firsts) == set(range(8))
  assert np.mean(firsts) == pytest.approx(3.5, abs=0.4)


def test_no_tool_ablation_takes_no_tool_candidates():
  view = GroupView(
    rewards_N=np.array([1.0, 0.0, 0.0, 0.0]),
    used_tool_N=np.array([True, False, False, False]),
    candidate_N=np.array([True, True, True, False]),
    confidence_N=np.array([0.1, 0.6, 0.5, np.nan]),
    index=0,
  )
  config = ResampleConfig(ratio=1.0, k=2, subgroup="no_tool")
  assert plan_resamples([view], config) == [Selection(0, 2, 0.5), Selection(0, 1, 0.6)]


def test_ratio_zero_selects_nothing():
  assert plan_resamples([group([0.1] * 8)], ResampleConfig(ratio=0.0)) == []
  assert plan_resamples([], ResampleConfig()) == []


# ---- errors


@pytest.mark.parametrize(
  "field",
  [{"choice": "best"}, {"subgroup": "all"}, {"prefix": "answer"}, {"round_order": "x"},
   {"confidence_span": "x"}, {"ratio": -0.1}, {"ratio": math.nan}, {"k": 1}],
)  # fmt: skip
def test_bad_config_names_the_field(field):
  with pytest.raises(ValueError, match=f"resample.{next(iter(field))}="):
    ResampleConfig(**field)


def test_candidate_without_confidence_is_an_error():
  view = dataclasses.replace(group([0.5, 0.5], index=4), confidence_N=np.array([0.5, np.nan]))
  with pytest.raises(ValueError, match="group 4, rollout 1"):
    plan_resamples([view], ResampleConfig())


def test_repeated_index_is_an_error():
  with pytest.raises(ValueError, match="unique"):
    plan_resamples([group([0.5, 0.5]), group([0.5, 0.5])], ResampleConfig())


def test_ragged_group_and_repeated_keys_are_errors():
  with pytest.raises(ValueError, match="differ in length"):
    dataclasses.replace(group([0.5, 0.5]), rewards_N=np.zeros(3))
  with pytest.raises(ValueError, match="unique"):
    group([0.5, 0.5], keys=(1, 1))
