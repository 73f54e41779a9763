"""Plan, credit and loss together: with r = 0 AXPO is GRPO bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.rl.advantages import group_advantages
from axpo_jax.rl.algorithm import assign_credit, loss_mask, plan_resamples
from axpo_jax.rl.credit import ALL, BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.losses import policy_loss
from axpo_jax.rl.resample import GroupView, ResampleConfig
from axpo_jax.rl.weights import sequence_weights

TOKENS, PREFIX_END = 9, 4


def rollouts(seed=0, questions=6, n=8):
  """Random rewards (wrong whenever a tool was used, so that every question triggers)."""
  rng = np.random.default_rng(seed)
  tool = rng.random((questions, n)) < 0.4
  tool[:, 0] = True
  rewards = (rng.random((questions, n)) < 0.4) & ~tool
  confidence = np.where(tool, rng.random((questions, n)), np.nan)
  return rewards.astype(float), tool, confidence


def outcomes(config, seed=0):
  rewards, tool, confidence = rollouts()
  views = [
    GroupView(r, t, t, c, index=q) for q, (r, t, c) in enumerate(zip(rewards, tool, confidence))
  ]
  rng = np.random.default_rng(seed)
  branches = [[] for _ in views]
  for chosen in plan_resamples(views, config):
    rewards_K = (rng.random(config.k) < 0.5).astype(float)
    branches[chosen.group].append(BranchOutcome(chosen.rollout, rewards_K))
  return [GroupOutcome(r, b) for r, b in zip(rewards, branches)]


def arrays(credits):
  """Every sequence has nine tokens: two of the prompt, then sampled ones; the cut is at four."""
  sampled = np.arange(TOKENS) >= 2
  masks = np.array([loss_mask(sampled, c.region, PREFIX_END) for c in credits])
  resampled_S = [c.region != ALL for c in credits]
  weights_S, divisor = sequence_weights(masks.sum(1), resampled_S, LossConfig(), questions=6)
  advantages = np.array([[c.advantage] for c in credits]) * masks
  return advantages.astype(np.float32), (weights_S[:, None] * masks).astype(np.float32), divisor


def loss_and_grad(credits):
  advantages, weights, divisor = arrays(credits)
  rng = np.random.default_rng(7)
  logp, old, ref = jnp.asarray(rng.uniform(-2, -0.1, (3, *advantages.shape)), jnp.float32)
  return jax.value_and_grad(
    lambda v: policy_loss(v, old, ref, old, advantages, weights, LossConfig())[0] / divisor
  )(logp)


def test_ratio_zero_is_grpo_bit_for_bit():
  axpo = assign_credit(outcomes(ResampleConfig(ratio=0.0)), CreditConfig())
  rewards, _, _ = rollouts()
  plain = np.concatenate([group_advantages(r) for r in rewards])
  assert [c.advantage for c in axpo] == plain.tolist()
  assert {(c.region, c.branch) for c in axpo} == {("all", None)}
  grpo = assign_credit(
    [GroupOutcome(r) for r in rewards],
    CreditConfig(prefix_credit="none", merge_resamples=True),
  )
  for a, b in zip(loss_and_grad(axpo), loss_and_grad(grpo)):
    np.testing.assert_array_equal(a, b)


def test_resampling_masks_the_sources_own_continuation_and_the_copied_prefixes():
  config = ResampleConfig()
  groups = outcomes(config)
  credits = assign_credit(groups, CreditConfig())
  sources = sum(len(g.branches) for g in groups)
  assert sources == 3  # floor(0.25 * 48 / 4)
  _, grad = loss_and_grad(credits)
  grad = np.array(grad)
  live = {"all": (2, TOKENS), "prefix": (2, PREFIX_END), "continuation": (PREFIX_END, TOKENS)}
  for credit, row in zip(credits, grad):
    start, stop = live[credit.region]
    assert (row[start:stop] != 0).any(), credit
    row[start:stop] = 0
    np.testing.assert_array_equal(row, np.zeros(TOKENS))


def test_resampling_only_touches_sources_and_adds_continuations():
  with_branches = assign_credit(outcomes(ResampleConfig()), CreditConfig())
  grpo = assign_credit(outcomes(ResampleConfig(ratio=0.0)), CreditConfig())
  ordinary = [c for c in with_branches if c.branch is None]
  assert len(ordinary) == len(grpo)
  changed = [a for a, b in zip(ordinary, grpo) if a != b]
  assert {c.region for c in changed} == {"prefix"}
  assert len(with_branches) - len(grpo) == 3 * 4


@pytest.mark.parametrize("seed", range(3))
def test_a_recovered_prefix_is_pushed_up_where_its_call_alone_was_pushed_down(seed):
  groups = [g for g in outcomes(ResampleConfig(), seed) if g.branches]
  for group, credits in ((g, assign_credit([g], CreditConfig())) for g in groups):
    for branch in group.branches:
      prefix = next(c for c in credits if c.branch is None and c.rollout == branch.source)
      plain = group_advantages(group.rewards_N)[branch.source]
      assert plain <= 0
      assert (prefix.advantage > 0) == bool(branch.rewards_K.any())
