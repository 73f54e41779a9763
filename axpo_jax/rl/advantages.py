"""Group-relative advantages (arXiv 2605.28774, section 2; GRPO's rule).

In: the rewards of one group. Out: one number per rollout, float64 on the host.

Legend: N rollouts of one question, K continuations of one prefix.
"""

import math
from collections.abc import Sequence

import numpy as np

# Rewards are 0 or 1. A caller with graded rewards (token F1) still gets a clear cut.
RIGHT = 0.5


def is_right(rewards_N: Sequence[float] | np.ndarray) -> np.ndarray:
  """Which rewards count as a right answer; bool [N]."""
  return np.asarray(rewards_N, dtype=np.float64) > RIGHT


def reward_vector(rewards_N: Sequence[float] | np.ndarray) -> np.ndarray:
  """Checked float64 copy of a group's rewards.

  Raises:
    ValueError: the vector is empty, not one-dimensional, or holds a non-finite reward.
  """
  rewards_N = np.array(rewards_N, dtype=np.float64)
  if rewards_N.ndim != 1 or rewards_N.size == 0:
    raise ValueError(
      f"rewards must be a non-empty vector, got shape {rewards_N.shape}; "
      "drop groups that lost every rollout before computing advantages."
    )
  if not np.isfinite(rewards_N).all():
    raise ValueError(
      f"rewards must be finite, got {rewards_N.tolist()}; judge every rollout "
      "(a failed episode has reward 0) before computing advantages."
    )
  return rewards_N


def mean_and_std(values_N: Sequence[float] | np.ndarray, ddof: int = 1) -> tuple[float, float]:
  """Mean and standard deviation that do not depend on the order of the values.

  `math.fsum` rounds once, so permuting a group's rollouts gives bit-identical advantages;
  NumPy's pairwise sum would not.

  Raises:
    ValueError: `ddof` leaves no degree of freedom.
  """
  values = [float(v) for v in values_N]
  if len(values) <= ddof:
    raise ValueError(f"std with ddof={ddof} needs more than {ddof} values, got {len(values)}.")
  mean = math.fsum(values) / len(values)
  return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def standardise(
  value: float | np.ndarray,
  reference: Sequence[float] | np.ndarray,
  *,
  ddof: int = 1,
  eps: float = 1e-6,
  normalise_std: bool = True,
  leave_one_out: bool = False,
) -> float | np.ndarray:
  """(value - mean(reference)) / (std(reference) + eps); zero when the reference is constant.

  `leave_one_out` (RLOO) compares the value, which is one of the reference, with the mean of the others.

  A constant reference carries no comparison. Without the rule, eps alone would turn the rounding
  error of its mean into an advantage.
  """
  reference = reward_vector(reference)
  if np.all(reference == reference[0]):
    return np.zeros_like(np.asarray(value, dtype=np.float64))[()]
  mean, std = mean_and_std(reference, ddof)
  centred = np.asarray(value, dtype=np.float64) - mean
  if leave_one_out:  # v - (n mean - v) / (n - 1)
    centred = centred * (len(reference) / (len(reference) - 1))
  return (centred / (std + eps) if normalise_std else centred)[()]


def group_advantages(
  rewards_N: Sequence[float] | np.ndarray,
  *,
  ddof: int = 1,
  eps: float = 1e-6,
  normalise_std: bool = True,
  leave_one_out: bool = False,
) -> np.ndarray:
  """A_i = (r_i - mean(r)) / (std(r) + eps) for one group.

  Args:
    rewards_N: rewards of the group's rollouts.
    ddof: 1 for the unbiased standard deviation (default), 0 for the population's.
    eps: added to the standard deviation.
    normalise_std: False leaves out the division (Dr.GRPO, arXiv 2503.20783).
    leave_one_out: True takes the mean of the other rollouts (RLOO, arXiv 2402.14740).

  Returns:
    Advantages, float64 [N]; all zero when the rewards are all equal.

  Raises:
    ValueError: rewards are empty or not finite.
  """
  rewards_N = reward_vector(rewards_N)
  return standardise(rewards_N, rewards_N, ddof=ddof, eps=eps, normalise_std=normalise_std,
                     leave_one_out=leave_one_out)
