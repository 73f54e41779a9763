"""The families of the miniature world as one stream of questions.

In: (seed, split, index, WorldConfig). Out: a `Question`, a pure function of them. The family of an index is
drawn first, and the question is the one that this family has at the same index. So a stream of perception
alone is the perception family's stream.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping

import numpy as np

from axpo_jax.data.question import Question
from axpo_jax.miniworld import perception, reasoning, search

KINDS = {"perception": perception.QUESTION_KINDS, "search": search.QUESTION_KINDS,
         "reasoning": reasoning.QUESTION_KINDS}
_STREAM = 100  # keeps the choice of families apart from the families' random streams


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """The mix of families and their numbers.

  Attributes:
    families: (name, weight) pairs.
    perception, reasoning: numbers of these families.
    search_mix: (kind, weight) pairs of the search family, which has no other numbers.
  """

  families: tuple[tuple[str, float], ...] = (("perception", 1.0),)
  perception: perception.PerceptionConfig = dataclasses.field(
      default_factory=perception.PerceptionConfig)
  reasoning: reasoning.ReasoningConfig = dataclasses.field(
      default_factory=reasoning.ReasoningConfig)
  search_mix: tuple[tuple[str, float], ...] = search.TWO_HOP_MIX

  def __post_init__(self):
    if unknown := sorted({name for name, _ in self.families} - set(KINDS)):
      raise ValueError(f"families names {unknown}; there are {tuple(KINDS)}")
    if any(weight < 0 for _, weight in self.families) or not sum(w for _, w in self.families):
      raise ValueError(f"families={self.families}: weights are 0 or more, and one is above 0")
    mixes = {"perception": self.perception.mix, "search": self.search_mix,
             "reasoning": self.reasoning.mix}
    if empty := [name for name, weight in self.families if weight and not mixes[name]]:
      raise ValueError(f"no kind of question is named for the families {empty}; see KINDS")


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
    return search.make_question(seed, index, split, config.search_mix)
  return reasoning.make_question(seed, index, config.reasoning, split)


def kinds_by_family(kinds: Mapping[str, float]) -> dict[str, tuple[tuple[str, float], ...]]:
  """A mix of kinds of questions as one mix for each family.

  Raises:
    ValueError: a kind that no family has.
  """
  if unknown := sorted(set(kinds) - {kind for known in KINDS.values() for kind in known}):
    raise ValueError(f"there are no questions of the kinds {unknown}; there are {KINDS}")
  return {family: tuple((kind, kinds[kind]) for kind in known if kind in kinds)
          for family, known in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class MiniWorldSource:
  """The first `size` questions of a split of the miniature world, made when they are asked for."""

  size: int
  seed: int
  split: str = "train"
  config: WorldConfig = dataclasses.field(default_factory=WorldConfig)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Question:
    index = operator.index(index)
    if not 0 <= index < self.size:
      raise IndexError(f"question {index} of a split of {self.size}")
    return make_question(self.seed, index, self.config, self.split)
