"""The policy loss against a NumPy float64 reference, its gradient against finite differences."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.rl.algorithm import assign_credit
from axpo_jax.rl.credit import BranchOutcome, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.losses import add_metrics, k3, policy_loss, summarise

CONFIGS = {
  "paper": LossConfig(),
  "no_kl": LossConfig(kl_coef=0.0),
  "large_kl": LossConfig(kl_coef=0.5, kl_cap=0.1),
  "dual_clip": LossConfig(dual_clip=1.5),
  "entropy": LossConfig(entropy_coef=0.01),
  "no_tis": LossConfig(tis_cap=None),
  "low_cap": LossConfig(tis_cap=1.05),
  "cispo": LossConfig(variant="cispo", cispo_min_ratio=0.9, cispo_max_ratio=1.2),
}


def batch(seed=0, shape=(3, 7)):
  """Log-probabilities far enough apart that every clip, cap and clamp is met."""
  rng = np.random.default_rng(seed)
  old = rng.uniform(-3, -0.2, shape)
  arrays = {
    "logp": old + rng.normal(0, 0.5, shape),
    "old_logp": old,
    "ref_logp": old + rng.normal(0, 0.4, shape),
    "behaviour_logp": old + rng.normal(0, 0.4, shape),
    "advantages": rng.normal(0, 1.5, shape),
    "weights": (rng.random(shape) < 0.7) * rng.uniform(0.2, 1.0, shape),
    "entropy": rng.uniform(0, 3, shape),
  }
  return {name: x.astype(np.float32).astype(np.float64) for name, x in arrays.items()}


def reference_token(c, logp, fixed, old, ref, behaviour, a, entropy):
  """One token's loss, written from the formulas; `fixed` is the logp that constants come from."""
  rho = math.exp(logp - old)
  if c.variant == "cispo":
    weight = min(max(math.exp(fixed - old), c.cispo_min_ratio), c.cispo_max_ratio)
    objective = weight * a * logp
  else:
    objective = min(rho * a, min(max(rho, 1 - c.clip_low), 1 + c.clip_high) * a)
    if c.dual_clip and a < 0:
      objective = max(objective, c.dual_clip * a)
  if c.tis_cap:
    objective *= min(math.exp(old - behaviour), c.tis_cap)
  d = ref - logp
  return -objective + c.kl_coef * min(math.exp(d) - d - 1, c.kl_cap) - c.entropy_coef * entropy


def reference(config, x, logp):
  """Summed loss in float64."""
  total = 0.0
  for i in np.ndindex(x["weights"].shape):
    args = (x[n][i] for n in ("old_logp", "ref_logp", "behaviour_logp", "advantages", "entropy"))
    total += x["weights"][i] * reference_token(config, logp[i], x["logp"][i], *args)
  return total


def run(config, x, *, lag=None, max_lag=0, **changes):
  x = {n: None if v is None else jnp.asarray(v, jnp.float32) for n, v in (x | changes).items()}
  return policy_loss(**x, config=config, lag=lag, max_lag=max_lag)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_match_the_reference(name):
  config, x = CONFIGS[name], batch()
  loss, _ = run(config, x)
  np.testing.assert_allclose(loss, reference(config, x, x["logp"]), rtol=1e-5)
  grad = jax.grad(lambda logp: run(config, x, logp=logp)[0])(jnp.asarray(x["logp"], jnp.float32))
  for i in np.ndindex(x["logp"].shape):
    step = np.zeros_like(x["logp"])
    step[i] = 1e-6
    numeric = (
      reference(config, x, x["logp"] + step) - reference(config, x, x["logp"] - step)
    ) / 2e-6
    np.testing.assert_allclose(grad[i], numeric, rtol=2e-4, atol=2e-5, err_msg=f"{name} {i}")


def test_the_batch_meets_every_bound():
  """Otherwise the comparison above would prove less than it says."""
  _, sums = run(dataclasses.replace(CONFIGS["dual_clip"], tis_cap=1.05), batch())
  for name in ("clip_low", "clip_high", "clip_dual", "tis_capped"):
    assert float(sums[name]) > 0, name


@pytest.mark.parametrize(
  ("ratio", "advantage", "slope"),
  [
    (1.3, 1.0, 1.3),  # inside
    (1.41, 1.0, 0.0),  # above 1 + 0.4 with a good token: silenced
    (1.41, -1.0, -1.41),  # above, bad token: still pushed down
    (0.79, -1.0, 0.0),  # below 1 - 0.2 with a bad token: silenced
    (0.79, 1.0, 0.79),  # below, good token: still pulled up
    (1.0, 2.5, 2.5),
  ],
)
def test_asymmetric_clip_by_hand(ratio, advantage, slope):
  config = LossConfig(kl_coef=0.0, tis_cap=None)
  one = jnp.ones((1, 1))
  old = -2.0 * one
  grad = jax.grad(
    lambda logp: policy_loss(logp, old, None, old, advantage * one, one, config)[0]
  )(old + math.log(ratio))
  np.testing.assert_allclose(-grad, [[slope]], rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_tokens_have_exactly_zero_gradient_and_no_influence(config, poison):
  x = batch()
  masked = x["weights"] == 0
  assert masked.any()
  dirty = {n: v if n == "weights" else np.where(masked, poison, v) for n, v in x.items()}
  fields = ("logp", "old_logp", "ref_logp", "behaviour_logp", "entropy")
  grad = jax.grad(lambda free: run(config, dirty | free)[0])(
    {n: jnp.asarray(dirty[n], jnp.float32) for n in fields}
  )
  for name in fields:
    np.testing.assert_array_equal(np.asarray(grad[name])[masked], 0.0, err_msg=name)
    assert np.isfinite(grad[name]).all(), name
  assert (np.asarray(grad["logp"])[~masked] != 0).any()
  clean_loss, clean_sums = run(config, x)
  loss, sums = run(config, dirty)
  assert float(loss) == float(clean_loss)
  assert {n: float(v) for n, v in sums.items()} == {n: float(v) for n, v in clean_sums.items()}


def test_only_logp_and_entropy_carry_gradient():
  x = batch()
  grads = jax.grad(lambda free: run(CONFIGS["entropy"], x | free)[0])(
    {n: jnp.asarray(x[n], jnp.float32) for n in ("old_logp", "behaviour_logp")}
  )
  for name, grad in grads.items():
    np.testing.assert_array_equal(grad, np.zeros_like(grad), err_msg=name)


def test_first_update_needs_no_old_logp():
  """Without old_logp the ratio is 1 and the gradient that of A * logp (REINFORCE)."""
  x = batch()
  same = run(LossConfig(), x, old_logp=x["logp"])
  none = run(LossConfig(), x, old_logp=None)
  assert float(same[0]) == float(none[0])
  config = LossConfig(kl_coef=0.0, tis_cap=None)
  grad = jax.grad(lambda logp: run(config, x, logp=logp, old_logp=None)[0])(
    jnp.asarray(x["logp"], jnp.float32)
  )
  np.testing.assert_allclose(grad, -x["advantages"] * x["weights"], rtol=1e-6, atol=1e-7)


def test_zero_advantage_leaves_the_kl():
  x = batch()
  zero = run(LossConfig(kl_coef=0.1), x, advantages=np.zeros_like(x["advantages"]))[0]
  d = x["ref_logp"] - x["logp"]
  want = 0.1 * ((np.exp(d) - d - 1) * x["weights"]).sum()
  np.testing.assert_allclose(zero, want, rtol=1e-5)


def test_k3_is_unbiased_nonnegative_and_pulls_to_the_reference():
  rng = np.random.default_rng(1)
  logits, ref_logits = rng.normal(size=(2, 50))
  logp, ref = (np.asarray(jax.nn.log_softmax(v)) for v in (logits, ref_logits))
  values = np.asarray(k3(jnp.asarray(logp), jnp.asarray(ref), 1e4))  # unbiased below the cap
  assert (values >= 0).all()
  exact = (np.exp(logp) * (logp - ref)).sum()
  np.testing.assert_allclose((np.exp(logp) * values).sum(), exact, rtol=1e-5)
  slope = jax.grad(lambda v: k3(v, jnp.float32(-1.0), 10.0))
  assert float(slope(jnp.float32(-2.0))) < 0 < float(slope(jnp.float32(-0.5)))
  # Capped by value, as verl and slime do: the pull ends where k3 reaches 10, about 2.6 nats below the
  # reference and 11 above it, and an overflowing exp leaves no NaN.
  assert float(slope(jnp.float32(-1.0 - 2.5))) < 0.0 == float(slope(jnp.float32(-1.0 - 2.7)))
  assert float(slope(jnp.float32(9.5))) > 0.0 == float(slope(jnp.float32(10.5)))
  assert float(k3(jnp.float32(-200.0), jnp.float32(0.0), 10.0)) == 10.0
  assert float(slope(jnp.float32(-200.0))) == 0.0


def test_micro_batches_add_up():
  """Sums, and names ending in _max, joined over two halves equal the whole."""
  x = batch(shape=(4, 9))
  config = LossConfig()
  whole_loss, whole = run(config, x)
  halves = [run(config, {n: v[rows] for n, v in x.items()}) for rows in (slice(2), slice(2, 4))]
  total = add_metrics(*(sums for _, sums in halves))
  np.testing.assert_allclose(sum(float(h[0]) for h in halves), whole_loss, rtol=1e-5)
  assert total.keys() == whole.keys()
  for name in whole:
    np.testing.assert_allclose(total[name], whole[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_gap_by_lag():
  """The tokens of one lag have the metrics that they would have by themselves."""
  x = batch(shape=(8, 64))
  lag = np.arange(512).reshape(8, 64) % 2 * 2  # 0 or 2, never 1
  config = LossConfig(tis_cap=1.1)
  _, sums = run(config, x, lag=jnp.asarray(lag), max_lag=2)
  metrics = summarise(sums, 1.0)
  names = ("logp_gap_mean", "logp_gap_abs_mean", "logp_gap_abs_max", "prob_pearson",
           "tis_weight_mean", "tis_capped_share")
  for k in (0, 2):
    alone = summarise(run(config, x | {"weights": np.where(lag == k, x["weights"], 0)})[1], 1.0)
    assert 0 < alone["train/tis_capped_share"] < 1
    for name in names:
      np.testing.assert_allclose(metrics[f"train/{name}/lag_{k}"], alone[f"train/{name}"], rtol=1e-5)
  assert not [name for name in metrics if name.endswith("lag_1")]


def test_metrics_match_numpy():
  x = batch(shape=(8, 64))
  config = LossConfig(tis_cap=1.3)
  _, sums = run(config, x)
  mask = x["weights"] != 0
  v = {n: a[mask] for n, a in x.items()}
  ratio = np.exp(v["logp"] - v["old_logp"])
  gap = v["old_logp"] - v["behaviour_logp"]
  d = v["ref_logp"] - v["logp"]
  want = {
    "train/loss_tokens": mask.sum(),
    "train/ratio_mean": ratio.mean(),
    "train/ratio_std": ratio.std(),
    "train/ratio_max": ratio.max(),
    "train/clip_fraction_low": ((ratio < 0.8) & (v["advantages"] < 0)).mean(),
    "train/clip_fraction_high": ((ratio > 1.4) & (v["advantages"] > 0)).mean(),
    "train/clip_fraction_dual": ((ratio > 3) & (v["advantages"] < 0)).mean(),
    "train/kl": np.minimum(np.exp(d) - d - 1, 10).mean(),
    "train/entropy": v["entropy"].mean(),
    "train/tis_weight_mean": np.minimum(np.exp(gap), 1.3).mean(),
    "train/tis_capped_share": (np.exp(gap) > 1.3).mean(),
    "train/logp_gap_mean": gap.mean(),
    "train/logp_gap_abs_mean": np.abs(gap).mean(),
    "train/logp_gap_abs_max": np.abs(gap).max(),
    "train/prob_pearson": np.corrcoef(np.exp(v["old_logp"]), np.exp(v["behaviour_logp"]))[0, 1],
    "train/advantage_mean": v["advantages"].mean(),
    "train/advantage_nonzero_share": 1.0,
  }
  got = summarise(sums, divisor=10.0)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
  assert got.keys() - want.keys() == {"train/policy_loss"}
  policy = run(dataclasses.replace(config, kl_coef=0.0), x)[0]
  np.testing.assert_allclose(got["train/policy_loss"], float(policy) / 10, rtol=1e-5)


def test_the_spread_of_ratios_near_one_is_not_lost():
  """In float32 the difference of mean square and squared mean would be noise of 1e-7."""
  rng = np.random.default_rng(0)
  old = jnp.full((64, 64), -1.0)
  logp = old + jnp.asarray(rng.normal(0, 1e-4, old.shape), jnp.float32)
  ones = jnp.ones_like(old)
  _, sums = policy_loss(logp, old, None, old, ones, ones, LossConfig(kl_coef=0.0))
  ratio = np.exp(np.asarray(logp, np.float64) + 1.0)
  assert summarise(sums, 1.0)["train/ratio_std"] == pytest.approx(ratio.std(), rel=1e-2)


def test_a_bad_token_far_from_the_old_policy_has_a_bounded_gradient():
  """Without the dual clip, A = -0.35 at a log-ratio of 10 has a gradient of 7.7e3."""
  one = jnp.ones((1, 1))
  def slope(config):
    return float(jax.grad(lambda logp: policy_loss(
      logp, one * -12.0, None, one * -12.0, one * -0.35, one, config)[0])(one * -2.0)[0, 0])
  assert slope(LossConfig(kl_coef=0.0, dual_clip=None)) == pytest.approx(7.7e3, rel=0.01)
  assert slope(LossConfig(kl_coef=0.0)) == 0.0


def test_summary_of_an_empty_update():
  x = batch()
  _, sums = run(LossConfig(), x, weights=np.zeros_like(x["weights"]))
  assert summarise(sums, 1.0) == {"train/loss_tokens": 0.0}


def test_identical_probabilities_have_no_correlation_metric():
  x = batch()
  flat = np.full_like(x["logp"], -1.0)
  _, sums = run(LossConfig(), x, old_logp=flat, behaviour_logp=flat)
  assert "train/prob_pearson" not in summarise(sums, 1.0)


def test_half_precision_inputs_are_computed_in_float32():
  x = batch()
  half = {n: jnp.asarray(v, jnp.bfloat16) for n, v in x.items()}
  loss, sums = policy_loss(**half, config=LossConfig())
  wide, _ = policy_loss(**{n: v.astype(jnp.float32) for n, v in half.items()}, config=LossConfig())
  assert loss.dtype == jnp.float32
  assert {v.dtype for v in sums.values()} == {jnp.dtype(jnp.float32)}
  assert float(loss) == float(wide)


def test_jits_with_a_static_config():
  x = {n: jnp.asarray(v, jnp.float32) for n, v in batch().items()}
  jitted = jax.jit(policy_loss, static_argnames="config")
  np.testing.assert_allclose(
    jitted(**x, config=LossConfig())[0], policy_loss(**x, config=LossConfig())[0], rtol=1e-6
  )


def test_axpo_loss_is_the_sum_of_its_parts():
  """L = GRPO loss of the rest + L_clip(prefix) + sum_k L_clip(y_k), all in one token mean."""
  rng = np.random.default_rng(3)
  outcome = GroupOutcome(np.zeros(3), [BranchOutcome(1, np.array([1.0, 0, 0, 1]))])
  credits = assign_credit([outcome], CreditConfig())
  tokens = 5
  rows = len(credits)
  old = rng.uniform(-2, -0.1, (rows, tokens))
  x = {
    "logp": old + rng.normal(0, 0.2, old.shape),
    "old_logp": old,
    "ref_logp": old + rng.normal(0, 0.1, old.shape),
    "behaviour_logp": old,
    "advantages": np.broadcast_to([[c.advantage] for c in credits], old.shape),
    "weights": np.ones_like(old),
    "entropy": None,
  }
  whole = run(LossConfig(), x)[0]
  parts = [
    run(LossConfig(), {n: v if v is None else v[i : i + 1] for n, v in x.items()})[0]
    for i in range(rows)
  ]
  np.testing.assert_allclose(whole, sum(map(float, parts)), rtol=1e-5)


# ---- errors


@pytest.mark.parametrize(
  "field",
  [{"variant": "ppo"}, {"clip_low": 1.5}, {"clip_high": -0.1}, {"kl_coef": -1.0},
   {"kl_cap": 0.0}, {"dual_clip": 0.5}, {"tis_cap": -2.0}, {"tis_mask": 1.0}, {"cispo_min_ratio": 6.0},
   {"aggregation": "sum"}, {"sum_length": 0.0}, {"resampled_weight": -1.0}, {"kl_coef": math.nan},
   {"clip_high": math.inf}, {"entropy_coef": math.nan}, {"resampled_weight": math.nan}],
)  # fmt: skip
def test_bad_config_names_the_field(field):
  with pytest.raises(ValueError, match=f"loss.{next(iter(field))}="):
    LossConfig(**field)


def test_missing_inputs_are_named():
  x = batch()
  with pytest.raises(ValueError, match="ref_logp"):
    run(LossConfig(), x, ref_logp=None)
  with pytest.raises(ValueError, match="entropy"):
    run(LossConfig(entropy_coef=0.1), x, entropy=None)
  with pytest.raises(ValueError, match="differ in"):
    add_metrics({"a": 1.0}, {"b": 1.0})
