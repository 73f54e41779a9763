"""95 % intervals of shares.

Rollouts of one question are alike, so a share of rollouts has fewer independent observations than
rollouts: its interval comes from resampling whole questions. Where every question counts once, the
Wilson interval does, which is right at 0 and 1 too.
"""

import math
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054  # two-sided, of LEVEL
DRAWS = 1000


class Share(NamedTuple):
  """A share and its interval.

  Attributes:
    value: count / of.
    low: of the interval.
    high: of the interval.
    count: what was found.
    of: among how many.
    interval: "bootstrap" over questions, or "wilson".
  """

  value: float
  low: float
  high: float
  count: float
  of: float
  interval: str


def wilson(count: float, of: float, z: float = Z) -> tuple[float, float]:
  """Wilson's score interval of a share; `of` > 0."""
  share, spread = count / of, z * z / of
  middle = (share + spread / 2) / (1 + spread)
  half = z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
  # At 0 and at 1 the bound is exact, whatever rounding says.
  return (0.0 if count == 0 else max(0.0, middle - half),
          1.0 if count == of else min(1.0, middle + half))


def shares(counts_GxF: np.ndarray, ofs_GxF: np.ndarray, seed: int = 0) -> list[Share | None]:
  """Shares summed over questions, with intervals.

  Args:
    counts_GxF: per question (G) and figure (F), what was found.
    ofs_GxF: per question and figure, among how many.
    seed: of the bootstrap; the same data give the same intervals.

  Returns:
    One Share a figure; None where it is a share of nothing.
  """
  count_F, of_F, groups_F = counts_GxF.sum(0), ofs_GxF.sum(0), (ofs_GxF > 0).sum(0)
  clustered_F = (ofs_GxF > 1).any(0) & (groups_F > 1) & (count_F > 0) & (count_F < of_F)
  drawn = iter(_bootstrap(counts_GxF[:, clustered_F], ofs_GxF[:, clustered_F], seed))
  out: list[Share | None] = []
  for f, (count, of) in enumerate(zip(count_F.tolist(), of_F.tolist())):
    if of == 0:
      out.append(None)
    elif clustered_F[f]:
      out.append(Share(count / of, *next(drawn), count, of, "bootstrap"))
    else:
      # Nothing varies between questions that could be resampled: questions are the observations.
      independent = int(groups_F[f])
      out.append(Share(count / of, *wilson(count / of * independent, independent), count, of,
                       "wilson"))
  return out


def _bootstrap(counts_GxF: np.ndarray, ofs_GxF: np.ndarray, seed: int) -> list[list[float]]:
  """[low, high] of every figure. The figures share their draws."""
  groups, figures = counts_GxF.shape
  if not figures:
    return []
  both_Gx2F = np.concatenate([counts_GxF, ofs_GxF], 1).astype(float)
  rng = np.random.default_rng(seed)
  drawn_Dx2F = np.empty((DRAWS, 2 * figures))
  for i in range(DRAWS):
    times_G = np.bincount(rng.integers(groups, size=groups), minlength=groups)
    drawn_Dx2F[i] = times_G @ both_Gx2F
  # A draw may have none of what a rare share is of; it says nothing then.
  of_DxF = np.where(drawn_Dx2F[:, figures:] > 0, drawn_Dx2F[:, figures:], np.nan)
  tail = (1 - LEVEL) / 2
  return np.nanquantile(drawn_Dx2F[:, :figures] / of_DxF, [tail, 1 - tail], axis=0).T.tolist()
