"""The surrogates that a step can maximise, each beside its paper; `losses.policy_loss` adds KL and entropy.

A surrogate takes the tokens of a batch and returns its value at each of them, and which of them a bound silenced.
Those of a whole sequence (GSPO, GMPO) have one value at all tokens of it. `config.clip_low` and `clip_high` bound
each in its own unit; `recipes.RECIPES` has the papers' numbers. In the formulas rho = pi / pi_old of a token, A its
advantage, sg a constant (no gradient), mean_y the mean over the tokens of its sequence.

  grpo   min(rho A, clip(rho, 1 - low, 1 + high) A)                             arXiv 2402.03300
  gspo   the same of s = exp(mean_y log rho) in the place of rho                 arXiv 2507.18071
  gmpo   A exp(mean_y min(log rho, high)), for A < 0 max(log rho, -low)          arXiv 2507.20673
  cispo  sg(clip(rho)) A log pi                                                  arXiv 2506.13585
  sapo   A sigmoid(tau (rho - 1)) 4 / tau                                        arXiv 2511.20347
  dppo   sg(min(rho, 20)) A log pi; 0 once pi - pi_old left [-low, high]         arXiv 2602.04879
         in the direction of A

Where the ratio stays unbounded for A < 0 (the first three), `config.dual_clip` bounds the value from below
(arXiv 1912.09729). All arrays are float32 [B, T]: B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from axpo_jax.rl.loss_config import LossConfig

# exp(20) = 4.9e8: far beyond any clip or cap, far below float32's overflow.
MAX_LOG_RATIO = 20.0
# DPPO's cap of the ratio, beyond which large weights were found to hurt.
_DPPO_MAX_RATIO = 20.0
# Surrogates that need `sequence`: which tokens belong to one sequence.
BY_SEQUENCE = ("gspo", "gmpo")

_constant = jax.lax.stop_gradient


class Tokens(NamedTuple):
  """What a surrogate reads; 0 wherever a token is masked.

  ratio: pi / pi_old, exp of `log_ratio` within bounds.
  mean_y: of an array, its mean over the tokens of each token's sequence.
  """

  log_ratio: jax.Array
  ratio: jax.Array
  logp: jax.Array
  old_logp: jax.Array
  advantages: jax.Array
  mean_y: Callable[[jax.Array], jax.Array]


Surrogate = Callable[[Tokens, LossConfig], tuple[jax.Array, dict[str, jax.Array]]]


def _grpo(x: Tokens, config: LossConfig):
  return _clipped(x.ratio, x.advantages, config)


def _gspo(x: Tokens, config: LossConfig):
  # The token's own factor is one; it carries the gradient, sg(s) grad log pi, that of s in sum over y.
  sequence_ratio = jnp.exp(_constant(x.mean_y(x.log_ratio)) + x.logp - _constant(x.logp))
  return _clipped(sequence_ratio, x.advantages, config)


def _gmpo(x: Tokens, config: LossConfig):
  bounded = jnp.where(x.advantages < 0, jnp.maximum(x.log_ratio, -config.clip_low),
                      jnp.minimum(x.log_ratio, config.clip_high))
  metrics = _silenced(x.log_ratio, -config.clip_low, config.clip_high, x.advantages)
  return _floored(jnp.exp(x.mean_y(bounded)) * x.advantages, x.advantages, config, metrics)


def _cispo(x: Tokens, config: LossConfig):
  low, high = config.cispo_min_ratio, config.cispo_max_ratio
  bounded = jnp.clip(x.ratio, low, high)
  metrics = {"clip_low": x.ratio < low, "clip_high": x.ratio > high}
  return _constant(bounded) * x.advantages * x.logp, metrics


def _sapo(x: Tokens, config: LossConfig):
  tau = jnp.where(x.advantages > 0, config.sapo_tau_positive, config.sapo_tau_negative)
  return jax.nn.sigmoid(tau * (x.ratio - 1.0)) * (4.0 / tau) * x.advantages, {}


def _dppo(x: Tokens, config: LossConfig):
  metrics = _silenced(jnp.exp(x.logp) - jnp.exp(x.old_logp), -config.clip_low, config.clip_high, x.advantages)
  trusted = ~(metrics["clip_low"] | metrics["clip_high"])
  weight = _constant(jnp.minimum(x.ratio, _DPPO_MAX_RATIO) * trusted)
  return weight * x.advantages * x.logp, metrics


SURROGATES: Mapping[str, Surrogate] = {
  "grpo": _grpo, "gspo": _gspo, "gmpo": _gmpo, "cispo": _cispo, "sapo": _sapo, "dppo": _dppo}


def _clipped(ratio, advantages, config):
  """min(ratio A, clip(ratio) A), and which tokens the clip silenced."""
  low, high = 1 - config.clip_low, 1 + config.clip_high
  surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
  return _floored(surrogate, advantages, config, _silenced(ratio, low, high, advantages))


def _floored(surrogate, advantages, config, metrics):
  """The dual clip: for A < 0 no less than `dual_clip` A."""
  if config.dual_clip is None:
    return surrogate, metrics
  floor = config.dual_clip * advantages
  metrics = metrics | {"clip_dual": (advantages < 0) & (surrogate < floor)}
  return jnp.where(advantages < 0, jnp.maximum(surrogate, floor), surrogate), metrics


def _silenced(value, low, high, advantages):
  return {"clip_low": (value < low) & (advantages < 0), "clip_high": (value > high) & (advantages > 0)}


def mean_by_sequence(x: jax.Array, mask: jax.Array, sequence: jax.Array) -> jax.Array:
  """At each token the mean of `x` over the unmasked tokens of its sequence; 0 where there is none.

  Args:
    sequence: int [B, T], a number a token; neighbours of one number in a row are one sequence.
  """
  first = jnp.ones_like(sequence[:, :1], dtype=bool)
  starts = jnp.concatenate([first, sequence[:, 1:] != sequence[:, :-1]], axis=1)
  number = jnp.cumsum(starts, axis=1) - 1  # from 0 in each row, so that T of them are enough

  def row(x_T, mask_T, number_T):
    total = jax.ops.segment_sum(jnp.where(mask_T, x_T, 0.0), number_T, num_segments=x_T.shape[0])
    count = jax.ops.segment_sum(mask_T.astype(x_T.dtype), number_T, num_segments=x_T.shape[0])
    return (total / jnp.maximum(count, 1.0))[number_T]

  return jax.vmap(row)(x, mask, number)


def sampler_weight(gap: jax.Array, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Constant weight of a token for the gap between trainer and sampler, and what to count of it.

    cap   min(pi_old / pi_sampler, cap): truncated importance sampling
    mask  the ratio where it lies in [floor, cap], else 0: IcePop (arXiv 2510.18855)

  Args:
    gap: log pi_old - log pi_sampler.
  """
  raw = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  if config.tis_cap is None:
    return jnp.ones_like(raw), {"tis_capped": jnp.zeros_like(raw, bool), "tis_weight": jnp.ones_like(raw)}
  outside = raw > config.tis_cap
  if config.tis_rule == "mask":
    outside |= raw < config.tis_floor
    weight = jnp.where(outside, 0.0, raw)
  else:
    weight = jnp.minimum(raw, config.tis_cap)
  return _constant(weight), {"tis_capped": outside, "tis_weight": weight}
