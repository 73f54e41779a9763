"""How often prefixes like this one were recovered, learned from the run's own record.

In: the prefixes of past steps, each with its question's family, the confidence of its call, and whether a
continuation was right. Out: an optimistic estimate of the chance that another prefix is recovered, by which
`resample.choice="recoverable"` ranks. Pure: a record is never changed, and it is plain JSON, so a checkpoint holds it.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Bounds of the classes of confidence. Most calls are nearly certain, so the classes narrow towards one.
_BOUNDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# A step's outcomes weigh this much of the next step's: the policy that they describe moves on.
_MEMORY = 0.98
# Prefixes that the average over all classes counts for in each: a class of few outcomes is not believed alone.
_PRIOR = 4.0


class Tried(NamedTuple):
  """One resampled prefix."""

  family: str
  confidence: float
  recovered: bool


@dataclasses.dataclass(frozen=True)
class Recovery:
  """Counts of tried and recovered prefixes, by class of family and confidence; older ones weigh less."""

  counts: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

  def chance(self, family: str, confidence: float) -> float:
    """Chance of a recovery, plus its standard error: classes that were hardly tried come up again."""
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
