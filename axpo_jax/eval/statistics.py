"""Means over seeds and paired differences, with 95 % intervals.

In: one number a seed. Out: estimates. Intervals over seeds are Student's: with one seed there is none.
A difference pairs runs of one seed (the same questions in the same order, the same first rollouts),
and its test flips the signs of the pairs, all 2^n ways: five pairs cannot give less than p = 0.0625.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 5000


class Estimate(NamedTuple):
  """A mean and its interval.

  Attributes:
    mean: over n.
    low, high: of the 95 % interval; NaN if there is none.
    n: how many numbers.
    p: of the hypothesis that the mean is 0; NaN where that was not tested.
  """

  mean: float
  low: float
  high: float
  n: int
  p: float = math.nan


def over_seeds(values: Sequence[float]) -> Estimate | None:
  """Mean over independent runs, with Student's interval; None of nothing."""
  n = len(values)
  if not n:
    return None
  mean = math.fsum(values) / n
  if n == 1:
    return Estimate(mean, math.nan, math.nan, 1)
  half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
  return Estimate(mean, float(mean - half), float(mean + half), n)


def paired(base: Mapping, other: Mapping) -> Estimate | None:
  """other - base over the keys that both have (seeds), with the sign-flip test; None of no pair."""
  differences = [other[key] - base[key] for key in base if key in other]
  found = over_seeds(differences)
  return found and found._replace(p=sign_flip(differences))


def sign_flip(differences: Sequence[float]) -> float:
  """Two-sided p of the mean under all flips of signs; NaN of fewer than two differences."""
  if len(differences) < 2:
    return math.nan
  test = stats.permutation_test(
    (np.asarray(differences, float),), lambda x, axis: np.mean(x, axis=axis),
    permutation_type="samples", vectorized=True, n_resamples=np.inf)
  return float(test.pvalue)


def bootstrapped(differences: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Estimate | None:
  """Mean of paired differences with a percentile bootstrap interval over them; None of fewer than two.

  Over questions it says how sure the difference between these very policies is, and knows nothing of
  other seeds; over runs it says what other seeds would give.
  """
  values = np.asarray(differences, float)
  if len(values) < 2:
    return None
  if np.ptp(values) == 0:  # nothing varies that could be resampled
    return Estimate(float(values[0]), float(values[0]), float(values[0]), len(values))
  found = stats.bootstrap((values,), np.mean, confidence_level=LEVEL, n_resamples=draws,
                          method="percentile", rng=np.random.default_rng(seed))
  low, high = found.confidence_interval
  return Estimate(float(values.mean()), float(low), float(high), len(values))


def holm(ps: Sequence[float]) -> list[float]:
  """Holm's correction: p values of a family of tests, in their order, such that any at most 0.05 is still
  wrong in at most 5 % of the families in which nothing is true. NaN stays and counts as no test."""
  tested = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
  corrected, largest = [math.nan] * len(ps), 0.0
  for rank, (p, i) in enumerate(tested):
    largest = max(largest, min(1.0, (len(tested) - rank) * p))
    corrected[i] = largest
  return corrected
