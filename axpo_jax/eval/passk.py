"""Pass@k from the rewards of n rollouts per question, with standard errors.

Legend: Q questions, N rollouts of one question (may differ between questions).
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from axpo_jax.rl.advantages import is_right, reward_vector


def pass_at_k(num_right: int, num_rollouts: int, k: int) -> float:
  """Chance that at least one of k rollouts, drawn without replacement, is right.

  The unbiased estimator 1 - C(n - c, k) / C(n, k) of arXiv 2107.03374. With k = n it is "any of n".

  Raises:
    ValueError: not 1 <= k <= n, or not 0 <= c <= n.
  """
  if not (1 <= k <= num_rollouts and 0 <= num_right <= num_rollouts):
    raise ValueError(
      f"pass@{k} of {num_right} right among {num_rollouts} rollouts: need 1 <= k <= n and "
      "0 <= right <= n; sample at least k rollouts per question."
    )
  return 1.0 - math.comb(num_rollouts - num_right, k) / math.comb(num_rollouts, k)


class Mean(NamedTuple):
  """A mean and its standard error (NaN if not known)."""

  mean: float
  error: float = math.nan


def mean_and_error(values_Q: Sequence[float], clusters_Q: Sequence[Hashable] | None = None) -> Mean:
  """Mean over questions and its standard error.

  Args:
    values_Q: one number per question.
    clusters_Q: questions that are variants of each other (the option cycles of HR-Bench) share a
      cluster; their errors are then not taken for independent. None: every question its own.

  Returns:
    Both; the error is NaN with fewer than two clusters.

  Raises:
    ValueError: no question, or not one cluster per question.
  """
  if len(values_Q) == 0:
    raise ValueError("no question to average; evaluate at least one.")
  values_Q = np.asarray(values_Q, dtype=np.float64)
  mean = math.fsum(values_Q) / len(values_Q)
  labels_Q = range(len(values_Q)) if clusters_Q is None else clusters_Q
  residuals = {}
  for label, value in zip(labels_Q, values_Q, strict=True):
    residuals[label] = residuals.get(label, 0.0) + (value - mean)
  groups = len(residuals)
  if groups < 2:
    return Mean(mean)
  # With every question its own cluster this is std(ddof=1) / sqrt(Q).
  squares = math.fsum(r**2 for r in residuals.values()) * groups / (groups - 1)
  return Mean(mean, math.sqrt(squares) / len(values_Q))


def summarise(
  rewards_QxN: Sequence[Sequence[float]],
  ks: Sequence[int] = (1, 4),
  *,
  clusters_Q: Sequence[Hashable] | None = None,
  prefix: str = "eval",
) -> dict[str, float]:
  """Pass@k metrics of an evaluation.

  Pass@1 is the mean reward over rollouts, averaged over questions (so graded rewards keep their
  grades); Pass@k for k > 1 asks for one right answer. It is taken over the questions that have at
  least k rollouts (one lost to a failed tool server must not cost the whole number), and left out
  where there is none.

  Args:
    rewards_QxN: rewards of every question's rollouts.
    ks: which k.
    clusters_Q: see `mean_and_error`.
    prefix: first part of the names.

  Returns:
    {prefix}/pass_at_{k} and {prefix}/pass_at_{k}_se (the latter from two clusters on).

  Raises:
    ValueError: no question, an empty question, or a non-finite reward.
  """
  rewards_QxN = [reward_vector(rewards_N) for rewards_N in rewards_QxN]
  if not rewards_QxN:
    raise ValueError("no question to average; evaluate at least one.")
  labels_Q = list(range(len(rewards_QxN)) if clusters_Q is None else clusters_Q)
  out = {}
  for k in ks:
    enough = [q for q, rewards_N in enumerate(rewards_QxN) if len(rewards_N) >= k]
    if not enough:
      continue
    values_Q = [of_rewards(rewards_QxN[q], k) for q in enough]
    mean, error = mean_and_error(values_Q, [labels_Q[q] for q in enough])
    out[f"{prefix}/pass_at_{k}"] = mean
    if not math.isnan(error):
      out[f"{prefix}/pass_at_{k}_se"] = error
  return out


def of_rewards(rewards_N: Sequence[float], k: int) -> float:
  """Pass@k of one question: for k = 1 the mean reward, else the chance of one right answer."""
  if k == 1:
    return math.fsum(rewards_N) / len(rewards_N)
  return pass_at_k(int(is_right(rewards_N).sum()), len(rewards_N), k)
