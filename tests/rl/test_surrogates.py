"""Each surrogate against a second implementation: PyTorch in float64, sequence by sequence, from the papers' formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from axpo_jax.rl.loss_config import VARIANTS, LossConfig
from axpo_jax.rl.losses import policy_loss
from axpo_jax.rl.recipes import RECIPES
from axpo_jax.rl.surrogates import SURROGATES, mean_by_sequence

ROWS, TOKENS = 3, 24


def config(variant, **changes):
  """The surrogate alone, with the bounds of its paper (some made narrow, so that they are met)."""
  named = RECIPES.get(variant, {})
  own = {name.removeprefix("loss."): value for name, value in named.items() if name.startswith("loss.clip")}
  if variant == "gspo":
    own = {"clip_low": 0.05, "clip_high": 0.08}
  return LossConfig(variant=variant, kl_coef=0.0, tis_cap=None, **own | changes)


@pytest.fixture(scope="module")
def batch():
  """Rows of several sequences side by side; a sequence has one advantage, some of its tokens no weight."""
  rng = np.random.default_rng(0)
  sequence = np.sort(rng.integers(0, 4, (ROWS, TOKENS)), axis=1)
  old = rng.uniform(-3, -0.05, (ROWS, TOKENS))
  advantages = rng.normal(0, 1.5, (ROWS, 4))
  arrays = {
    "logp": np.minimum(old + rng.normal(0, 0.6, old.shape), -0.01), "old_logp": old,
    "behaviour_logp": old + rng.normal(0, 0.9, old.shape),
    "advantages": np.take_along_axis(advantages, sequence, axis=1),
    "weights": (rng.random(old.shape) < 0.8) / np.maximum(1, sequence)}
  return {name: x.astype(np.float32) for name, x in arrays.items()} | {"sequence": sequence}


def sequences(batch):
  """(row, positions) of the tokens of each sequence that carry loss."""
  for row in range(ROWS):
    for number in np.unique(batch["sequence"][row]):
      at = np.flatnonzero((batch["sequence"][row] == number) & (batch["weights"][row] != 0))
      if len(at):
        yield row, at


def objective(c, logp, old, advantage):
  """What a sequence contributes, token by token: torch [T], to be maximised."""
  rho = torch.exp(logp - old)
  low, high = c.clip_low, c.clip_high

  def ppo(ratio):
    value = torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
    if c.dual_clip and advantage < 0:
      value = torch.maximum(value, torch.tensor(c.dual_clip * advantage))
    return value

  if c.variant == "grpo":
    return ppo(rho)
  if c.variant == "gspo":  # the ratio of the likelihoods, to the power of one over the length
    likelihood = torch.exp(logp.sum()) / torch.exp(old.sum())
    return ppo(likelihood ** (1 / len(logp))).expand(len(logp))
  if c.variant == "gmpo":  # the geometric mean of |min(rho A, clip(rho) A)|, with the sign of A
    clipped = torch.clamp(rho, np.exp(-low), np.exp(high))
    sign = 1.0 if advantage > 0 else -1.0
    inner = torch.minimum(sign * rho, sign * clipped) * sign
    value = torch.prod(inner) ** (1 / len(logp)) * advantage
    if c.dual_clip and advantage < 0:
      value = torch.maximum(value, torch.tensor(c.dual_clip * advantage))
    return value.expand(len(logp))
  if c.variant == "cispo":
    return torch.clamp(rho, c.cispo_min_ratio, c.cispo_max_ratio).detach() * advantage * logp
  if c.variant == "sapo":
    tau = c.sapo_tau_positive if advantage > 0 else c.sapo_tau_negative
    return 4 / tau / (1 + torch.exp(-tau * (rho - 1))) * advantage
  moved = torch.exp(logp) - torch.exp(old)
  valid = moved <= high if advantage > 0 else moved >= -low
  return torch.clamp(rho, max=20.0).detach() * valid.detach() * advantage * logp


def reference(c, batch, token_weight=None):
  """Loss and gradient of the whole batch."""
  logp = torch.tensor(batch["logp"], dtype=torch.float64, requires_grad=True)
  old = torch.tensor(batch["old_logp"], dtype=torch.float64)
  loss = torch.zeros((), dtype=torch.float64)
  for row, at in sequences(batch):
    weights = torch.tensor(batch["weights"][row, at], dtype=torch.float64)
    if token_weight is not None:
      weights = weights * torch.tensor(token_weight[row, at])
    loss -= (weights * objective(c, logp[row, at], old[row, at], float(batch["advantages"][row, at[0]]))).sum()
  (grad,) = torch.autograd.grad(loss, logp)
  return loss.item(), grad.numpy()


def ours(c, batch):
  def loss(logp):
    return policy_loss(logp, batch["old_logp"], None, batch["behaviour_logp"], batch["advantages"],
                       batch["weights"], c, sequence=batch["sequence"])
  (value, sums), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(batch["logp"]))
  return float(value), np.asarray(grad), {name: float(x) for name, x in sums.items()}


def test_the_table_has_every_variant():
  assert tuple(SURROGATES) == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradient_are_those_of_the_formula(variant, batch):
  c = config(variant, **({"cispo_max_ratio": 1.3} if variant == "cispo" else {}),
             **({"dual_clip": 1.2} if variant in ("grpo", "gspo", "gmpo") else {}))
  value, grad, sums = ours(c, batch)
  want, want_grad = reference(c, batch)
  assert value == pytest.approx(want, rel=1e-5)
  np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)
  met = {"grpo": ("clip_low", "clip_high", "clip_dual"), "gspo": ("clip_low", "clip_high", "clip_dual"),
         "gmpo": ("clip_low", "clip_high"), "cispo": ("clip_high",), "sapo": (),
         "dppo": ("clip_low", "clip_high")}[variant]
  assert all(sums[name] > 0 for name in met), sums  # otherwise the comparison would prove less


def test_icepop_leaves_out_tokens_on_which_sampler_and_trainer_differ(batch):
  named = {name.removeprefix("loss."): x for name, x in RECIPES["icepop"].items() if name.startswith("loss.")}
  c = LossConfig(kl_coef=0.0, **named)
  ratio = np.exp(np.float64(batch["old_logp"]) - batch["behaviour_logp"])
  kept = (ratio >= 0.5) & (ratio <= 5.0)
  assert 0.2 < kept.mean() < 0.9
  value, grad, sums = ours(c, batch)
  want, want_grad = reference(config("grpo"), batch, np.where(kept, ratio, 0.0))
  assert value == pytest.approx(want, rel=1e-5)
  np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)
  assert not grad[~kept].any()
  assert sums["tis_capped"] == (~kept & (batch["weights"] != 0)).sum()


def test_with_a_ratio_of_one_all_have_the_gradient_of_the_policy_gradient(batch):
  """The first update of a step: A grad log pi, whatever the surrogate."""
  first = batch | {"old_logp": batch["logp"]}
  for variant in VARIANTS:
    _, grad, _ = ours(config(variant), first)
    # GMPO and GSPO share a sequence's gradient among its tokens: equal weights in it make that no matter.
    np.testing.assert_allclose(grad, -first["advantages"] * first["weights"], rtol=1e-4, atol=1e-6,
                               err_msg=variant)


def test_mean_by_sequence_counts_unmasked_neighbours():
  x = jnp.arange(6.0)[None]
  mask = jnp.array([[True, True, False, True, False, True]])
  sequence = jnp.array([[7, 7, 7, 2, -1, 7]])  # the last 7 is not a neighbour of the first ones
  np.testing.assert_allclose(mean_by_sequence(x, mask, sequence), [[0.5, 0.5, 0.5, 3, 0, 5]])


def test_surrogates_of_sequences_ask_for_them(batch):
  with pytest.raises(ValueError, match="which tokens are one sequence"):
    ours(config("gspo"), batch | {"sequence": None})


@pytest.mark.parametrize("field", [
  {"tis_rule": "drop"}, {"tis_rule": "mask", "tis_floor": 2.0}, {"sapo_tau_negative": 0.0}])
def test_bad_values_are_named(field):
  with pytest.raises(ValueError, match=f"loss.{list(field)[-1]}="):
    dataclasses.replace(LossConfig(), **field)
