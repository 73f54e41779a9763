"""Estimates how likely a prefix is recovered, from the prefixes that the run has resampled so far.

In: the prefixes of past steps, each with its question's family, the confidence of its call, and whether a
continuation was right. Out: an optimistic estimate for another prefix; `resample.choice="recoverable"` ranks by
it. A record is immutable and plain JSON, so that a checkpoint can hold it.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Bounds of the confidence bins. Most calls are nearly certain, so the bins narrow towards one.
_BOUNDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Decay of older outcomes per step: the policy that they describe has changed.
_MEMORY = 0.98
# Weight of the average over all bins in each bin, in prefixes: a bin with few outcomes is unreliable.
_PRIOR = 4.0


class Tried(NamedTuple):
  """One resampled prefix."""

  family: str
  confidence: float
  recovered: bool


@dataclasses.dataclass(frozen=True)
class Recovery:
  """Decayed counts of tried and recovered prefixes, by family and confidence bin."""

  counts: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

  def chance(self, family: str, confidence: float) -> float:
    """Estimated chance of a recovery plus its standard error, so that bins with few outcomes are tried again."""
    tried = sum(n for n, _ in self.counts.values())
    overall = (1.0 + sum(hits for _, hits in self.counts.values())) / (2.0 + tried)
    n, hits = self.counts.get(_class(family, confidence), (0.0, 0.0))
    mean = (hits + _PRIOR * overall) / (n + _PRIOR)
    return mean + math.sqrt(mean * (1.0 - mean) / (n + _PRIOR))

  def after(self, step: Iterable[Tried]) -> "Recovery":
    """The record with one more step's prefixes."""
    counts = {name: (_MEMORY * n, _MEMORY * hits) for name, (n, hits) in self.counts.items()}
    for family, confidence, recovered in step:
      n, hits = counts.get(_class(family, confidence), (0.0, 0.0))
      counts[_class(family, confidence)] = (n + 1.0, hits + recovered)
    return Recovery(counts)

  def to_json(self) -> dict[str, list[float]]:
    return {name: list(counted) for name, counted in self.counts.items()}

  @classmethod
  def from_json(cls, record: Mapping[str, Iterable[float]]) -> "Recovery":
    return cls({name: tuple(counted) for name, counted in record.items()})


def _class(family: str, confidence: float) -> str:
  return f"{family}|{bisect.bisect(_BOUNDS, confidence)}"
