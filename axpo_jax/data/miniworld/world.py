"""The families of the miniature world as one stream of questions.

In: (seed, split, index, WorldConfig). Out: a `Question`, a pure function of them. Which family a
place in the stream belongs to is drawn from the place alone; the question is then the one that the
family has at this place. So a stream of perception alone is the perception family's stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from axpo_jax.data.miniworld import perception, reasoning, search
from axpo_jax.data.question import Question

FAMILIES = ("perception", "search", "reasoning")
_STREAM = 100  # keeps the choice of families apart from the families' random streams


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """The mix of families and their numbers.

  Attributes:
    families: (name, weight) pairs.
    perception: numbers of the perception family.
    reasoning: numbers of the reasoning family. The search family has none.
  """

  families: tuple[tuple[str, float], ...] = (("perception", 1.0),)
  perception: perception.PerceptionConfig = dataclasses.field(
      default_factory=perception.PerceptionConfig)
  reasoning: reasoning.ReasoningConfig = dataclasses.field(
      default_factory=reasoning.ReasoningConfig)

  def __post_init__(self):
    if unknown := sorted({name for name, _ in self.families} - set(FAMILIES)):
      raise ValueError(f"families names {unknown}; there are {FAMILIES}")
    if any(weight < 0 for _, weight in self.families) or not sum(w for _, w in self.families):
      raise ValueError(f"families={self.families}: weights are 0 or more, and one is above 0")


def make_question(seed: int, index: int, config: WorldConfig, split: str = "train") -> Question:
  """Makes question `index` of a split's stream.

  Raises:
    ValueError: for an unknown split.
  """
  if split not in perception.SPLITS:
    raise ValueError(f"split {split!r} is not one of {tuple(perception.SPLITS)}")
  names, weights = zip(*config.families)
  rng = np.random.default_rng((seed, perception.SPLITS[split], index, _STREAM))
  family = names[perception.weighted_index(rng, weights)]
  if family == "perception":
    return perception.make_question(seed, index, config.perception, split)
  if family == "search":
    return search.make_question(seed, index, split)
  return reasoning.make_question(seed, index, config.reasoning, split)
