"""Search family: questions of two hops over a made-up land, whose facts no policy can know.

In: (seed, split, index). Out: a `Question`, a pure function of them, and the corpus that answers it:
one sentence a document, for the local back end of the search tool.

  question   What is the colour of the teacher of K7?
  hop 1      "teacher of K7"   -> The teacher of K7 is M3.
  hop 2      "colour of M3"    -> The colour of M3 is red.

One search is not enough, whatever its query: no document holds both facts, the document with the colour does
not name the town, and a query without the name matches everyone's colour alike. A policy that guesses is right
once in six times, and so is one that stops after its first search.

Each split has names of its own, so facts that were memorised in training do not help. A name is two tokens of the
miniature tokenizer, a letter and a digit, which a policy can copy without spelling.

Besides `two_hop` (the family's question) there are two tasks for the warm start: `repeat` a line of
words, and `look_up` a fact in the question's own text, which reads like results of a search. They teach to find
and to copy, which each hop needs, and any answer from a tool's result. Their words are drawn anew for every
question, and are no facts of the land.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from axpo_jax.data.question import Question
from axpo_jax.miniworld import perception

T = TypeVar("T")

QUESTION_KINDS = ("two_hop", "repeat", "look_up")
TWO_HOP_MIX = (("two_hop", 1.0),)
OFFICES = ("teacher", "painter", "mayor", "author", "king", "queen")
COLOURS = tuple(perception.COLOURS)
NAMES = tuple(letter + digit for letter in "ABCDEFGHJKLMNPQRSTUVWXYZ" for digit in "123456789")
_FACTS = (1, 3)  # least and greatest number of facts in a look-up's text
_WORDS = (1, 5)  # and of words that a line to repeat has
_STREAM = 101  # keeps the family's random stream apart from the others'


@dataclasses.dataclass(frozen=True)
class Region:
  """The part of the land that one split asks about.

  Attributes:
    towns: their names.
    holders: who holds an office, by (town, office).
    colours: what each person wears.
  """

  towns: tuple[str, ...]
  holders: Mapping[tuple[str, str], str]
  colours: Mapping[str, str]


@functools.lru_cache(maxsize=4)
def land(seed: int) -> Mapping[str, Region]:
  """The regions of a seed's land by split; no two of them share a name."""
  rng = np.random.default_rng((seed, _STREAM))
  names = [NAMES[i] for i in rng.permutation(len(NAMES))]
  share = len(names) // (2 * len(perception.SPLITS))
  regions = {}
  for split in perception.SPLITS:
    towns, people, names = names[:share], names[share:2 * share], names[2 * share:]
    holders = {(town, office): people[rng.integers(share)] for town in towns for office in OFFICES}
    shades = rng.permutation(share) % len(COLOURS)  # as even as can be
    regions[split] = Region(tuple(towns), holders,
                            {person: COLOURS[i] for person, i in zip(people, shades, strict=True)})
  return regions


def make_question(seed: int, index: int, split: str = "train",
                  mix: Sequence[tuple[str, float]] = TWO_HOP_MIX) -> Question:
  """Makes question `index` of a split's stream.

  Args:
    seed: of the land and of the stream.
    index: of the question in the stream, from 0.
    split: "train", "rl" or "eval"; each has a region of its own.
    mix: (kind, weight) pairs, kinds of `QUESTION_KINDS`.

  Returns:
    A question of category "search" without an image. `meta` holds its `task` (its kind) and, of
    `two_hop`, the `town`, the `office` and the bridge `person`; the answer is the person's colour.

  Raises:
    ValueError: for an unknown split.
  """
  if split not in perception.SPLITS:
    raise ValueError(f"split {split!r} is not one of {tuple(perception.SPLITS)}")
  rng = np.random.default_rng((seed, perception.SPLITS[split], index, _STREAM))
  kinds, weights = zip(*mix)
  task = kinds[perception.weighted_index(rng, weights)]
  meta = {"task": task}
  if task == "repeat":
    text, answer = _repeat(rng)
  elif task == "look_up":
    text, answer = _look_up(rng)
  else:
    region = land(seed)[split]
    town = region.towns[rng.integers(len(region.towns))]
    office = OFFICES[rng.integers(len(OFFICES))]
    person = region.holders[town, office]
    text, answer = f"What is the colour of the {office} of {town}?", region.colours[person]
    meta |= {"town": town, "office": office, "person": person}
  return Question(
      id=f"search-{split}-{seed}-{index}", text=text, images=(), answers=(answer,), kind="text",
      category="search", source="miniworld", meta=meta)


def _repeat(rng: np.random.Generator) -> tuple[str, str]:
  """The text that asks for a line of names, numbers, offices and colours, and the line."""
  count = int(rng.integers(_WORDS[0], _WORDS[1], endpoint=True))
  kinds = (NAMES, NAMES, range(2000), range(2000), OFFICES, COLOURS)
  line = " ".join(str(_one(rng, _one(rng, kinds))) for _ in range(count))
  return f"Repeat: {line}", line


def _look_up(rng: np.random.Generator) -> tuple[str, str]:
  """A list of results that ends with a question, and what one of them answers."""
  count = int(rng.integers(_FACTS[0], _FACTS[1], endpoint=True))
  names = [NAMES[i] for i in rng.permutation(len(NAMES))[:2]]
  known: dict[tuple[str, str], str] = {}
  while len(known) < count:  # of two towns, so that neither name nor office alone finds the fact
    relation = _one(rng, (*OFFICES, "colour", "colour"))
    known[relation, _one(rng, names)] = _one(rng, COLOURS if relation == "colour" else NAMES)
  facts = "\n\n".join(f"[{number}] {relation} of {name}\n\n{_fact(relation, name, what)}"
                     for number, ((relation, name), what) in enumerate(known.items(), 1))
  relation, name = _one(rng, list(known))
  return f"{facts}\n\nWhat is the {relation} of {name}?", known[relation, name]


def _one(rng: np.random.Generator, things: Sequence[T]) -> T:
  return things[rng.integers(len(things))]


def _fact(relation: str, name: str, what: str) -> str:
  return f"The {relation} of {name} is {what}."


def office_fact(office: str, town: str, person: str) -> str:
  """What a document says of an office."""
  return _fact(office, town, person)


def colour_fact(person: str, colour: str) -> str:
  """What a document says of a person."""
  return _fact("colour", person, colour)


def documents(seed: int) -> list[dict[str, str]]:
  """The corpus of a seed's land as {"title", "text"}, all splits together, in random order."""
  found = []
  for region in land(seed).values():
    found += [(f"{office} of {town}", office_fact(office, town, person))
              for (town, office), person in region.holders.items()]
    found += [(f"colour of {person}", colour_fact(person, colour))
              for person, colour in region.colours.items()]
  rng = np.random.default_rng((seed, _STREAM, 1))
  return [{"title": found[i][0], "text": found[i][1]} for i in rng.permutation(len(found))]
