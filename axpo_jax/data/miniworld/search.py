"""Search family: two hops over a made-up land that no policy can know by heart.

In: (seed, split, index). Out: a `Question`, a pure function of them, and the corpus that answers it:
one sentence a document, for the local back end of the search tool.

Every town has people in its offices, and every person wears a colour. "What is the colour of the
teacher of Karlow?" takes two searches: "teacher of Karlow" finds a name, "colour of" that name the
answer. One search stops short whatever it asks: no document says more than one of the two facts, the
document with the colour does not name the town, and a query without the name ties with every
person's colour. A policy that guesses is right once in six times, as is one that stops after its
first search.

Each split has towns and people of its own, so nothing that was learnt by heart in training helps.
Names are two tokens of the miniature tokenizer (an initial and an ending), to be copied and not to
be spelled.

Besides `two_hop` (the family's question) there is `look_up` for the warm start: who holds an office,
where the question itself says it. It teaches to find a name in a text and to copy it, which is what
each hop rests on. Its facts are drawn anew for every question and are not the land's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from axpo_jax.data.miniworld import perception
from axpo_jax.data.question import Question

QUESTION_KINDS = ("two_hop", "look_up")
TWO_HOP_MIX = (("two_hop", 1.0),)
OFFICES = ("teacher", "painter", "mayor", "author", "king", "queen")
COLOURS = tuple(perception.COLOURS)
_INITIALS = "BCDFGHJKLMNPRSTVWXYZ"
_ENDINGS = ("arden", "orun", "unmere", "arlow", "uill", "ian", "orn", "und", "uth", "ult", "umn",
            "erence", "ount", "ange", "oom", "edge", "ur", "il")
_NOT_TWO_TOKENS = ("Forun", "Runmere", "Zoom")  # the tokenizer splits these otherwise
NAMES = tuple(name for initial in _INITIALS for ending in _ENDINGS
              if (name := initial + ending) not in _NOT_TWO_TOKENS)
_FACTS = (2, 4)  # least and greatest number that a look-up's text tells
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
  """The regions of a seed's land by split; no name stands in two of them."""
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
    index: place in the stream, from 0.
    split: "train", "rl" or "eval"; each has a region of its own.
    mix: (kind, weight) pairs, kinds of `QUESTION_KINDS`.

  Returns:
    A question of category "search" without an image. `meta` holds its `task` (its kind), `town` and
    `office`, and the `person` who holds it: the answer of `look_up`, and the bridge of `two_hop`,
    whose answer is the person's colour.

  Raises:
    ValueError: for an unknown split.
  """
  if split not in perception.SPLITS:
    raise ValueError(f"split {split!r} is not one of {tuple(perception.SPLITS)}")
  rng = np.random.default_rng((seed, perception.SPLITS[split], index, _STREAM))
  kinds, weights = zip(*mix)
  task = kinds[perception.weighted_index(rng, weights)]
  if task == "look_up":
    town, office, person, text = _look_up(rng)
    answer = person
  else:
    region = land(seed)[split]
    town = region.towns[rng.integers(len(region.towns))]
    office = OFFICES[rng.integers(len(OFFICES))]
    person = region.holders[town, office]
    text, answer = f"What is the colour of the {office} of {town}?", region.colours[person]
  return Question(
      id=f"search-{split}-{seed}-{index}", text=text, images=(), answers=(answer,), kind="text",
      category="search", source="miniworld",
      meta={"task": task, "town": town, "office": office, "person": person})


def _look_up(rng: np.random.Generator) -> tuple[str, str, str, str]:
  """Town, office and person of the fact that is asked for, and the text with it among others."""
  count = int(rng.integers(_FACTS[0], _FACTS[1], endpoint=True))
  names = [NAMES[i] for i in rng.permutation(len(NAMES))[:2 * count]]
  facts = [(names[2 * i], OFFICES[rng.integers(len(OFFICES))], names[2 * i + 1])
           for i in range(count)]
  town, office, person = facts[rng.integers(count)]
  told = " ".join(office_fact(office, town, person) for town, office, person in facts)
  return town, office, person, f"{told} Who is the {office} of {town}?"


def office_fact(office: str, town: str, person: str) -> str:
  """What a document says of an office."""
  return f"The {office} of {town} is {person}."


def colour_fact(person: str, colour: str) -> str:
  """What a document says of a person."""
  return f"The colour of {person} is {colour}."


def documents(seed: int) -> list[dict[str, str]]:
  """The corpus of a seed's land as {"title", "text"}, all splits together, in an order that tells nothing."""
  found = []
  for region in land(seed).values():
    found += [(f"{office} of {town}", office_fact(office, town, person))
              for (town, office), person in region.holders.items()]
    found += [(f"colour of {person}", colour_fact(person, colour))
              for person, colour in region.colours.items()]
  rng = np.random.default_rng((seed, _STREAM, 1))
  return [{"title": found[i][0], "text": found[i][1]} for i in rng.permutation(len(found))]
