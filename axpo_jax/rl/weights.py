"""Weights of tokens in the loss of a step, and the divisor of the step's sum.

In: how many tokens of every sequence carry loss, and which sequences were resampled. Out: the weight of a
token of each sequence, and one divisor. So sums over tokens add up over rows and micro-batches, and the learner
divides once.

The paper (arXiv 2605.28774, section 3) adds the loss of the selected prefixes and their continuations
to the GRPO loss of all other rollouts and leaves open how the sums are normalised:

  one mean   every token in one mean: resampled_weight=None
  added      GRPO's loss by its own divisor
             + (lambda / B) * sum over prefixes of [L_clip(prefix) + sum_k L_clip(y_k)],
             where each L_clip is the mean over its own tokens: resampled_weight=lambda

Legend: S sequences of an update, B questions of a step.
"""

from collections.abc import Sequence

import numpy as np

from axpo_jax.rl.loss_config import LossConfig


def sequence_weights(
  tokens_S: Sequence[int] | np.ndarray,
  resampled_S: Sequence[bool] | np.ndarray,
  config: LossConfig,
  questions: float,
) -> tuple[np.ndarray, float]:
  """Weight of one token of each sequence, and the divisor of the summed loss.

  Args:
    tokens_S: tokens of each sequence that carry loss. A sequence is one Credit: a rollout, a source's prefix,
      or a continuation. One without such tokens is not counted.
    resampled_S: whether the sequence is a selected prefix or a continuation of one.
    config: `aggregation` and `resampled_weight` are read.
    questions: B; for one of several updates of a step, its share of B.

  Returns:
    float32 [S], and the divisor: > 0, also where there is nothing to divide.
  """
  tokens_S = np.asarray(tokens_S, np.float64)
  resampled_S = np.asarray(resampled_S, bool)
  if config.resampled_weight is None:
    weights_S, divisor = _aggregated(tokens_S, config)
    return weights_S.astype(np.float32), divisor
  weights_S, divisor = _aggregated(np.where(resampled_S, 0, tokens_S), config)
  # The learner divides everything by the divisor of the ordinary rollouts: multiply by it here.
  own_mean_S = np.where(tokens_S > 0, divisor / np.maximum(tokens_S, 1), 0.0)
  added_S = config.resampled_weight / questions * own_mean_S
  return np.where(resampled_S, added_S, weights_S).astype(np.float32), divisor


def _aggregated(tokens_S: np.ndarray, config: LossConfig) -> tuple[np.ndarray, float]:
  """Weights and divisor by `config.aggregation`, for sequences of one kind."""
  some_S = tokens_S > 0
  sequences = float(max(some_S.sum(), 1))
  if config.aggregation == "token_mean":
    return some_S.astype(np.float64), float(max(tokens_S.sum(), 1))
  if config.aggregation == "sequence_mean":
    return np.where(some_S, 1.0 / np.maximum(tokens_S, 1), 0.0), sequences
  return some_S.astype(np.float64), sequences * config.sum_length


def drifted(gap_sums_S: np.ndarray, tokens_S: np.ndarray, factor: float) -> np.ndarray:
  """Sequences on which the probabilities of sampler and trainer differ too much: bool [S].

  Args:
    gap_sums_S: sum over a sequence's tokens of (trainer's - sampler's log-probability), in nats.
    tokens_S: how many tokens that is.
    factor: `LossConfig.tis_mask`: the largest geometric mean of the ratio, or of one over it.
  """
  mean_S = np.divide(gap_sums_S, tokens_S, out=np.zeros(len(tokens_S)), where=tokens_S > 0)
  return np.abs(mean_S) > np.log(factor)


def advantage_shares(
  weights_S: np.ndarray, tokens_S: np.ndarray, advantages_S: np.ndarray, regions: Sequence[str]
) -> dict[str, float]:
  """Share of the sum of |weight * advantage| that each kind of sequence holds; {} if it is zero.

  Args:
    regions: `Credit.region` of each sequence.
  """
  mass_S = np.abs(np.asarray(weights_S, np.float64) * tokens_S * advantages_S)
  total = mass_S.sum()
  if not total:
    return {}
  named = {"all": "rollouts", "prefix": "prefixes", "continuation": "continuations"}
  regions = np.asarray(regions)
  return {f"axpo/advantage_share_{name}": float(mass_S[regions == region].sum() / total)
          for region, name in named.items()}
