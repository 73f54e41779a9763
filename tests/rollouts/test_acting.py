"""Declined rightly, or avoided because acting is hard: counted by hand."""

import pytest

from axpo_jax.rollouts.acting import acting_census
from axpo_jax.rollouts.census import GroupStats, RolloutStats


def rollouts(*letters):
  """T/t: used a tool and was right/wrong; N/n: used none and was right/wrong."""
  return [RolloutStats(reward=float(c.isupper()), used_tool=c in "Tt", num_calls=int(c in "Tt"),
                       turns=1, sampled_tokens=1, stop="answer") for c in letters]


def group(letters, acting="either"):
  return GroupStats(rollouts(*letters), acting=acting)


def test_every_rollout_is_counted_once():
  groups = [group("NNnT", "decline"), group("ntnt", "act"), group("nTNt", "act"), group("nnnn", "act"),
            group("TnTn")]
  assert acting_census(groups) == pytest.approx({
      "rollout/should_decline/declined": 3 / 4,
      "rollout/should_decline/declined_and_right": 2 / 4,
      "rollout/should_decline/acted": 1 / 4,
      "rollout/should_act/acted_right": 1 / 12,
      "rollout/should_act/acted_wrong": 3 / 12,
      "rollout/should_act/avoided_hard": 2 / 12,
      "rollout/should_act/avoided_able": 2 / 12,
      "rollout/should_act/avoided_untried": 4 / 12})


def test_declining_rightly_is_never_taken_for_failing_to_act():
  """The same rollouts under the two labels: no metric of one speaks of the other."""
  declined = acting_census([group("nntt", "decline")])
  avoided = acting_census([group("nntt", "act")])
  assert not declined.keys() & avoided.keys()
  assert declined["rollout/should_decline/declined"] == 0.5
  assert avoided["rollout/should_act/avoided_hard"] == 0.5


def test_without_labels_there_is_nothing_to_say():
  assert acting_census([group("TnNt")]) == {}
  assert acting_census([]) == {}


def test_the_prefix_of_the_names():
  assert set(acting_census([group("N", "decline")], prefix="eval")) == {
      f"eval/should_decline/{name}" for name in ("declined", "declined_and_right", "acted")}
