"""What only algorithm.py decides: cuts, early stops, what dynamic sampling keeps, updates; and the record of recoveries."""

import itertools
import json

import numpy as np
import pytest

from axpo_jax.rl.algorithm import (
  assign_credit,
  choose_cut,
  informative,
  needs_old_logprobs,
  next_continuations,
  plan_resamples,
  split_updates,
)
from axpo_jax.rl.credit import BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.recovery import Recovery, Tried
from axpo_jax.rl.resample import Cut, GroupView, ResampleConfig
from axpo_jax.rl.shaping import ShapingConfig

CUTS = (Cut(5, 0.9), Cut(20, 0.3), Cut(40, 0.6))


def view(rewards, confidences, index=0, family=""):
  """A question whose rollouts use a tool where a confidence is given."""
  tool = np.array([c is not None for c in confidences])
  return GroupView(np.array(rewards, float), tool, tool,
                   np.array([np.nan if c is None else c for c in confidences]), index, family=family)


@pytest.mark.parametrize(("cut", "want"), [("first", 0), ("last", 2), ("uncertain", 1)])
def test_a_rollout_is_cut_at_one_of_its_calls(cut, want):
  assert choose_cut(CUTS, ResampleConfig(cut=cut)) == CUTS[want]
  assert choose_cut([], ResampleConfig(cut=cut)) is None


def test_all_continuations_are_drawn_at_once():
  assert next_continuations([], 0, ResampleConfig()) == 4
  assert next_continuations([1, 0, 0], 4, ResampleConfig()) == 0  # one was lost


@pytest.mark.parametrize(("rewards", "drawn"), [("10", 2), ("110", 3), ("0001", 4), ("0000", 4), ("01", 2)])
def test_early_stop_ends_with_both_outcomes_or_k(rewards, drawn):
  seen, config = [], ResampleConfig(early_stop=True)
  coming = iter(map(float, rewards))
  while count := next_continuations(seen, len(seen), config):
    assert count == (2 if not seen else 1)
    seen += itertools.islice(coming, count)
  assert len(seen) == drawn


def test_early_stop_counts_lost_continuations():
  config = ResampleConfig(early_stop=True)
  assert next_continuations([0.0], 2, config) == 1
  assert next_continuations([], 3, config) == 1
  assert next_continuations([], 4, config) == 0


def test_dynamic_sampling_keeps_what_axpo_repairs():
  axpo, grpo = ResampleConfig(), ResampleConfig(ratio=0.0)
  cases = {"mixed": (view([1, 0], [None, None]), True, True),
           "all wrong, no tool": (view([0, 0], [None, None]), False, False),
           "all wrong, a tool": (view([0, 0], [0.5, None]), True, False),
           "all right": (view([1, 1], [0.5, None]), False, False)}
  for name, (group, with_axpo, without) in cases.items():
    assert informative(group, axpo) is with_axpo, name
    assert informative(group, grpo) is without, name


def test_leave_one_out_is_the_mean_of_the_others():
  rewards = np.array([1.0, 0, 0, 1, 1, 0.5, 0, 0])
  config = CreditConfig(normalise_std=False, leave_one_out=True)
  got = [c.advantage for c in assign_credit([GroupOutcome(rewards, [BranchOutcome(1, np.array([1.0, 0, 0]))])], config)]
  others = [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)]
  others[1] = 1.0 - np.delete(rewards, 1).mean()  # the prefix was recovered
  np.testing.assert_allclose(got, [*others, 1.0, -0.5, -0.5], atol=1e-12)
  with pytest.raises(ValueError, match=r"credit\.leave_one_out"):
    CreditConfig(leave_one_out=True)


def test_credit_reads_shaped_rewards():
  """A tool call costs a right answer its whole reward here; the K continuations are shaped as their group."""
  group = GroupOutcome(np.array([1.0, 1.0, 0.0]), [BranchOutcome(2, np.array([1.0, 0.0]), np.array([1, 0]))],
                       np.array([0, 9, 1]))
  plain = [c.advantage for c in assign_credit([group], CreditConfig())]
  shaped = [c.advantage for c in assign_credit([group], CreditConfig(), ShapingConfig(tool_penalty="otc"))]
  assert plain[0] == plain[1]
  assert shaped[0] > shaped[1]


def test_updates_share_the_sequences_of_every_question():
  assert split_updates([*range(7)], 3) == [[0, 3, 6], [1, 4], [2, 5]]
  assert split_updates([1, 2], 4) == [[1], [2]]


def test_only_a_ratio_that_can_differ_from_one_costs_a_pass():
  assert not needs_old_logprobs(LossConfig(), 1, "current")
  for config, updates, old in ((LossConfig(), 2, "current"), (LossConfig(), 1, "trainer"),
                               (LossConfig(tis_mask=2.0), 1, "current")):
    assert needs_old_logprobs(config, updates, old)


# ---- recovery


def test_what_was_recovered_goes_first():
  """Family a was recovered, b never was, both often; within a family and class, confidence decides nothing."""
  record = Recovery()
  for _ in range(20):
    record = record.after([Tried("a", 0.85, True), Tried("b", 0.55, False)])
  groups = [view([0, 0], [0.52, None], 0, "b"), view([0, 0], [0.88, None], 1, "a")]
  config = ResampleConfig(ratio=1.0, k=4, choice="recoverable")
  (only,) = plan_resamples(groups, config, num_rollouts=4, recovery=record)
  assert (only.group, only.confidence) == (1, 0.88)
  (paper,) = plan_resamples(groups, ResampleConfig(ratio=1.0, k=4), num_rollouts=4, recovery=record)
  assert paper.group == 0


def test_what_was_hardly_tried_comes_up_again():
  record = Recovery()
  for _ in range(30):
    record = record.after([Tried("a", 0.9, False)])
  assert record.chance("new", 0.9) > record.chance("a", 0.9)
  for _ in range(5):
    record = record.after([Tried("b", 0.9, True)])
  assert record.chance("b", 0.9) > record.chance("new", 0.9) > record.chance("a", 0.9)


def test_the_record_forgets_and_survives_a_checkpoint():
  record = Recovery().after([Tried("a", 0.9, True)] * 4)
  later = record.after([]).after([])
  assert later.chance("a", 0.9) < record.chance("a", 0.9) + 0.2  # fewer outcomes: more of its error
  assert sum(n for n, _ in later.counts.values()) == pytest.approx(4 * 0.98**2)
  stored = Recovery.from_json(json.loads(json.dumps(record.to_json())))
  assert stored == record and stored.chance("a", 0.2) == record.chance("a", 0.2)
