"""What a token weighs: both readings of the paper's sum, against the formulas written out."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import ALL, CONTINUATION, PREFIX, BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.weights import advantage_shares, drifted, sequence_weights

SEQUENCES = st.lists(
  st.tuples(st.integers(0, 6), st.sampled_from([ALL, PREFIX, CONTINUATION])), min_size=1, max_size=12)
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


def grpo(losses, aggregation, length):
  """The mean over token losses of sequences, as a formula says it; `losses`: a list a sequence."""
  losses = [tokens for tokens in losses if len(tokens)]
  if not losses:
    return 0.0
  if aggregation == "token_mean":
    return sum(map(sum, losses)) / sum(map(len, losses))
  if aggregation == "sequence_mean":
    return sum(sum(tokens) / len(tokens) for tokens in losses) / len(losses)
  return sum(sum(tokens) / length for tokens in losses) / len(losses)


@hypothesis.given(
  SEQUENCES, st.sampled_from(AGGREGATIONS), st.sampled_from([None, 0.0, 0.125, 1.0]),
  st.sampled_from([1.0, 16.0]), st.integers(1, 5), st.integers(1, 16), st.integers(0, 99))
def test_sums_over_micro_batches_are_the_formula(
    sequences, aggregation, weight, length, questions, parts, seed):
  """Any split of the sequences over micro-batches adds up to the written-out loss."""
  rng = np.random.default_rng(seed)
  losses = [rng.normal(size=tokens) for tokens, _ in sequences]
  resampled = [region != ALL for _, region in sequences]
  config = LossConfig(aggregation=aggregation, sum_length=length, resampled_weight=weight)
  weights_S, divisor = sequence_weights([len(x) for x in losses], resampled, config, questions)
  assert weights_S.dtype == np.float32 and divisor > 0
  micro_batches = [range(part, len(losses), parts) for part in range(parts)]
  got = sum(sum(float(weights_S[s]) * losses[s].sum() for s in part) for part in micro_batches) / divisor
  if weight is None:
    want = grpo(losses, aggregation, length)
  else:
    want = grpo([x for x, r in zip(losses, resampled, strict=True) if not r], aggregation, length)
    want += weight / questions * sum(
      x.mean() for x, r in zip(losses, resampled, strict=True) if r and len(x))
  assert got == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_step_of_the_papers_shape_by_hand():
  """One question, eight rollouts of 10 tokens, one prefix of 4 with four continuations of 5."""
  outcome = GroupOutcome(np.array([0, 1, 1, 0, 0, 0, 0, 0]),
                         [BranchOutcome(0, np.array([1, 0, 0, 0]))])
  credits = assign_credit([outcome], CreditConfig())
  regions = [c.region for c in credits]
  tokens_S = np.array([{ALL: 10, PREFIX: 4, CONTINUATION: 5}[region] for region in regions])
  resampled = [region != ALL for region in regions]
  weights_S, divisor = sequence_weights(tokens_S, resampled, LossConfig(), 1)
  assert divisor == 70 + 4 + 20 and set(weights_S.tolist()) == {1.0}
  added = LossConfig(resampled_weight=1.0)
  weights_S, divisor = sequence_weights(tokens_S, resampled, added, 1)
  assert divisor == 70
  assert weights_S[0] * 4 / divisor == pytest.approx(1)  # the prefix counts as L_clip does: whole
  np.testing.assert_allclose(weights_S[8:] * 5 / divisor, 1, rtol=1e-6)
  # lambda = 1 / N weighs a continuation like a rollout of the GRPO loss, up to lengths.
  weights_S, divisor = sequence_weights(tokens_S, resampled, LossConfig(resampled_weight=1 / 8), 1)
  np.testing.assert_allclose(weights_S[8:] * 5 / divisor, 1 / 8, rtol=1e-6)


def test_shares_of_two_updates_are_one_objective():
  """Every update of a step that has a like share of all kinds gives the loss of the whole step."""
  tokens, resampled = [5] * 16, [False] * 8 + [True] * 8
  config = LossConfig(resampled_weight=1.0)
  whole, divisor = sequence_weights(tokens, resampled, config, 4)
  half, half_divisor = sequence_weights(tokens[::2], resampled[::2], config, 4 * 8 / 16)
  total = whole.sum() * 5 / divisor
  assert half.sum() * 5 / half_divisor == pytest.approx(total, rel=1e-6)


def test_advantage_shares_of_the_two_readings():
  """The share of what is resampled grows from tokens' share to the formula's."""
  regions = [ALL] * 7 + [PREFIX] + [CONTINUATION] * 4
  tokens_S = np.array([1000] * 7 + [100] + [100] * 4)
  advantages_S = np.array([1.0] * 12)
  resampled = [region != ALL for region in regions]
  shares = {}
  for weight in (None, 1.0):
    weights_S, _ = sequence_weights(tokens_S, resampled, LossConfig(resampled_weight=weight), 1)
    shares[weight] = advantage_shares(weights_S, tokens_S, advantages_S, regions)
    assert sum(shares[weight].values()) == pytest.approx(1)
  assert shares[None]["axpo/advantage_share_rollouts"] == pytest.approx(7000 / 7500)
  # GRPO's part has mass 1, each of the five L_clip too.
  assert shares[1.0]["axpo/advantage_share_prefixes"] == pytest.approx(1 / 6)
  assert shares[1.0]["axpo/advantage_share_continuations"] == pytest.approx(4 / 6)
  assert advantage_shares(np.ones(12), tokens_S, np.zeros(12), regions) == {}


def test_sequences_that_drifted_apart():
  gaps = np.array([0.0, 0.5, -0.5, 0.1, 0.0])
  tokens = np.array([3, 1, 1, 10, 0])
  np.testing.assert_array_equal(drifted(gaps, tokens, 1.2), [False, True, True, False, False])


def test_a_sequence_that_is_left_out_leaves_the_divisor():
  """As if it had not been sampled: the others weigh what they would weigh without it."""
  for aggregation in AGGREGATIONS:
    config = LossConfig(aggregation=aggregation, resampled_weight=1.0)
    with_it, divisor = sequence_weights([5, 0, 4, 2], [False, False, False, True], config, 1)
    without, alone = sequence_weights([5, 4, 2], [False, False, True], config, 1)
    np.testing.assert_array_equal(np.delete(with_it, 1), without)
    assert with_it[1] == 0 and divisor == alone


def test_nothing_to_learn_has_a_divisor():
  for aggregation, weight in itertools.product(AGGREGATIONS, (None, 1.0)):
    config = LossConfig(aggregation=aggregation, resampled_weight=weight)
    weights_S, divisor = sequence_weights([0, 0], [False, True], config, 1)
    assert divisor > 0 and not weights_S.any()
