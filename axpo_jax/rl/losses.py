"""The policy loss: a surrogate, the KL to a fixed reference, and an entropy bonus (arXiv 2605.28774, section 2).

GRPO and AXPO use the same loss; they differ only in advantages and masks (`algorithm.assign_credit`). All
results are *sums* over tokens, so that micro-batches add up; the caller divides once by the step's divisor
(`algorithm.loss_weights`). Everything is computed in float32.

Legend: B rows, T tokens of a row.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.surrogates import (
  BY_SEQUENCE,
  MAX_LOG_RATIO,
  SURROGATES,
  Tokens,
  mean_by_sequence,
  sampler_weight,
)


def policy_loss(
  logp: jax.Array,
  old_logp: jax.Array | None,
  ref_logp: jax.Array | None,
  behaviour_logp: jax.Array,
  advantages: jax.Array,
  weights: jax.Array,
  config: LossConfig,
  entropy: jax.Array | None = None,
  *,
  sequence: jax.Array | None = None,
  lag: jax.Array | None = None,
  max_lag: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum over tokens of weight * (-surrogate + beta * k3 - entropy bonus), to be minimised.

  All arrays have one shape, usually [B, T], aligned token by token.

  Args:
    logp: log-probability of each token under the policy being trained. The gradient flows here.
    old_logp: the same under the weights that began the step; None: `logp`, and the ratio is one.
    ref_logp: the same under the fixed reference; None, if kl_coef is 0, leaves the KL out.
    behaviour_logp: what the sampler reported.
    advantages: A of each token.
    weights: 0 masks a token: its loss and gradient are exactly zero whatever the other arrays hold (NaN too).
    config: see LossConfig.
    entropy: of the policy at each token, in nats; needed if entropy_coef is not 0, else logged.
    sequence: int; neighbours of one number in a row are one sequence. Surrogates of whole sequences need it.
    lag: int, versions by which the weights that drew the token were behind.
    max_lag: above 0, the gap to the sampler is also logged for every lag up to this.

  Returns:
    The summed loss (f32 scalar) and metric sums (f32 scalars; see `add_metrics` and `summarise`).

  Raises:
    ValueError: an array that the config needs is None.
  """
  _check_inputs(config, ref_logp, entropy, sequence)
  weights = weights.astype(jnp.float32)
  mask = weights != 0

  def clean(x):
    return jnp.where(mask, x.astype(jnp.float32), 0.0)

  logp, advantages = clean(logp), clean(advantages)
  old_logp = jax.lax.stop_gradient(logp if old_logp is None else clean(old_logp))
  behaviour_logp = clean(behaviour_logp)
  log_ratio = jnp.clip(logp - old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  tokens = Tokens(log_ratio, jnp.exp(log_ratio), logp, old_logp, advantages,
                  lambda x: mean_by_sequence(x, mask, sequence))
  surrogate, clipped = SURROGATES[config.variant](tokens, config)
  tis, corrected = sampler_weight(jnp.where(mask, old_logp - behaviour_logp, 0.0), config)
  sampler_metrics = _sampler_metrics(old_logp, behaviour_logp, corrected, mask, lag, max_lag)
  per_token = -tis * surrogate
  totals = {"tokens": mask, "weight": weights, "policy_loss": -tis * surrogate * weights}
  totals |= _ratio_metrics(tokens) | clipped
  totals |= {"advantage": advantages, "advantage_nonzero": advantages != 0}
  if ref_logp is not None:
    totals["kl"] = k3(logp, clean(ref_logp), config.kl_cap)
    per_token += config.kl_coef * totals["kl"]
  if entropy is not None:
    totals["entropy"] = clean(entropy)
    per_token -= config.entropy_coef * totals["entropy"]
  sums = _masked_sums(totals, mask) | sampler_metrics
  sums["ratio_max"] = jnp.max(jnp.where(mask, tokens.ratio, 0.0), initial=0.0)
  metrics = jax.lax.stop_gradient(sums)
  return jnp.sum(per_token * weights), metrics


def _ratio_metrics(tokens: Tokens) -> dict[str, jax.Array]:
  # Around 1, where the ratio is: the difference of two sums near 1 would lose its variance in float32.
  off_one = tokens.ratio - 1.0
  return {"ratio_off_one": off_one, "ratio_off_one_squared": off_one**2}


def k3(logp: jax.Array, ref_logp: jax.Array, cap: float) -> jax.Array:
  """KL(policy || reference) per token: exp(d) - d - 1 with d = logp_ref - logp, at most `cap`.

  Non-negative and, below the cap, unbiased under the policy's samples. Its gradient 1 - exp(d) flows
  through logp directly; where the cap holds it is zero.
  """
  # The outer bound only keeps exp from overflowing: an infinite slope times zero would be NaN.
  d = jnp.clip(ref_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  return jnp.minimum(jnp.expm1(d) - d, cap)


def _sampler_metrics(old_logp, behaviour_logp, corrected, mask, lag, max_lag):
  """`_gap_metrics` of all tokens and, with a `max_lag`, of those of each lag."""
  metrics = _gap_metrics(old_logp, behaviour_logp, corrected, mask)
  for k in range(max_lag + 1) if max_lag else ():
    of_lag = _gap_metrics(old_logp, behaviour_logp, corrected, mask & (lag == k))
    metrics |= {f"lag_{k}/{name}": value for name, value in of_lag.items()}
  return metrics


def _gap_metrics(old_logp, behaviour_logp, corrected, mask):
  """Sums over the tokens of `mask` that measure the gap between trainer and sampler.

  They compare the sampler with the old policy, not the current one. So at lag 0 the gap is numerical error
  alone; above it, the gap also shows how far the policy has moved.
  """
  gap = jnp.abs(old_logp - behaviour_logp)
  p, q = jnp.exp(old_logp), jnp.exp(behaviour_logp)
  totals = {
    "gap_tokens": mask,
    "gap": old_logp - behaviour_logp,
    "gap_abs": gap,
    "prob_trainer": p,
    "prob_sampler": q,
    "prob_trainer_squared": p * p,
    "prob_sampler_squared": q * q,
    "prob_product": p * q,
  }
  largest = {"gap_abs_max": jnp.max(jnp.where(mask, gap, 0.0), initial=0.0)}
  return _masked_sums(totals | corrected, mask) | largest


def _masked_sums(totals, mask):
  return {name: jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32) for name, x in totals.items()}


def _check_inputs(config, ref_logp, entropy, sequence):
  if config.variant in BY_SEQUENCE and sequence is None:
    raise ValueError(f"loss.variant={config.variant!r} needs to know which tokens are one sequence; pass it.")
  if config.kl_coef and ref_logp is None:
    raise ValueError(f"loss.kl_coef={config.kl_coef} needs ref_logp; pass it or set kl_coef=0.")
  if config.entropy_coef and entropy is None:
    raise ValueError(
      f"loss.entropy_coef={config.entropy_coef} needs the entropy; pass it or set entropy_coef=0."
    )


def add_metrics(a: Mapping, b: Mapping) -> dict:
  """Joins the metric sums of two micro-batches: adds, but names ending in _max take the maximum.

  Works on JAX arrays (inside jit) and on Python floats.
  """
  if a.keys() != b.keys():
    raise ValueError(f"metric sums differ in {sorted(a.keys() ^ b.keys())}.")
  larger = jnp.maximum if any(isinstance(v, jax.Array) for v in a.values()) else max
  return {n: larger(a[n], b[n]) if n.endswith("_max") else a[n] + b[n] for n in a}


# metric name -> (sum, unit divided by the token count)
_TOKEN_MEANS = {
  "train/clip_fraction_low": "clip_low",
  "train/clip_fraction_high": "clip_high",
  "train/clip_fraction_dual": "clip_dual",
  "train/kl": "kl",
  "train/entropy": "entropy",
  "train/advantage_mean": "advantage",
  "train/advantage_nonzero_share": "advantage_nonzero",
}
# The same of the gap between trainer and sampler: over all tokens, and over those of one lag.
_GAP_MEANS = {
  "train/tis_weight_mean": "tis_weight",
  "train/tis_capped_share": "tis_capped",
  "train/logp_gap_mean": "gap",
  "train/logp_gap_abs_mean": "gap_abs",
}


def summarise(sums: Mapping[str, float], divisor: float) -> dict[str, float]:
  """Logged metrics (docs/metrics.md, train/) from the accumulated sums, on the host.

  Args:
    sums: what `policy_loss` returned, joined by `add_metrics`.
    divisor: what the loss was divided by.
  """
  sums = {name: float(value) for name, value in sums.items()}
  tokens = sums["tokens"]
  out = {"train/loss_tokens": tokens}
  if tokens == 0:
    return out
  out["train/policy_loss"] = sums["policy_loss"] / divisor
  out |= {name: sums[key] / tokens for name, key in _TOKEN_MEANS.items() if key in sums}
  off_one = sums["ratio_off_one"] / tokens
  out["train/ratio_mean"] = 1.0 + off_one
  out["train/ratio_std"] = math.sqrt(max(sums["ratio_off_one_squared"] / tokens - off_one**2, 0.0))
  out["train/ratio_max"] = sums["ratio_max"]
  out |= _gap_summary(sums)
  for lag in sorted({name.partition("/")[0] for name in sums if "/" in name}):
    of_lag = {name.removeprefix(f"{lag}/"): x for name, x in sums.items() if name.startswith(f"{lag}/")}
    out |= {f"{name}/{lag}": value for name, value in _gap_summary(of_lag).items()}
  return out


def _gap_summary(sums: Mapping[str, float]) -> dict[str, float]:
  """Metrics from the sums of `_gap_metrics`; none if it saw no token."""
  tokens = sums["gap_tokens"]
  if not tokens:
    return {}
  out = {name: sums[key] / tokens for name, key in _GAP_MEANS.items() if key in sums}
  out["train/logp_gap_abs_max"] = sums["gap_abs_max"]
  correlation = _pearson(sums, tokens)
  return out if correlation is None else out | {"train/prob_pearson": correlation}


def _pearson(sums: Mapping[str, float], n: float) -> float | None:
  """Correlation of trainer and sampler probabilities; None where one of them is constant."""
  mean_p, mean_q = sums["prob_trainer"] / n, sums["prob_sampler"] / n
  var_p = sums["prob_trainer_squared"] / n - mean_p**2
  var_q = sums["prob_sampler_squared"] / n - mean_q**2
  # Below float32's resolution of the sums the quotient would be noise.
  if min(var_p, var_q) < 1e-6:
    return None
  return (sums["prob_product"] / n - mean_p * mean_q) / math.sqrt(var_p * var_q)
