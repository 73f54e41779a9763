"""Reasoning family: a small table of prices as a picture, and a sum that needs a calculator.

In: (seed, split, index, ReasoningConfig). Out: a `Question`, a pure function of them. The picture is
a column of coloured cells with a number in each, large enough to be read as shown: this family does not test
seeing. "What is the total of 38 red and 17 blue?" asks for 38 times one price plus 17 times another. A policy
solves it by reading the two prices and writing one line of `python`. Without the tool it needs two products
of up to three digits and their sum. A part of the questions asks for one of each (`easy`): a sum of two
digits, of which there are few enough to memorise.

A policy that guesses is right two times in nine where the question is easy (6, 9 and 11 come up that
often) and never elsewhere. One that calculates with guessed prices is right once in nine times.

Besides `total` (the family's question) there are two tasks for the warm start: `prices` asks for all
of the table, `formula` for the sum to be computed and not for its value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from axpo_jax.data.question import Question
from axpo_jax.miniworld import perception
from axpo_jax.miniworld.perception import Mark, PerceptionConfig

# The digits among the glyphs that the perception family teaches to read.
PRICES = tuple(int(glyph) for glyph in perception.GLYPHS if glyph.isdigit())
QUESTION_KINDS = ("total", "prices", "formula")
_STREAM = 102  # keeps the family's random stream apart from the others'


@dataclasses.dataclass(frozen=True)
class ReasoningConfig:
  """Numbers of the reasoning family.

  Attributes:
    mix: (kind, weight) pairs, kinds of `QUESTION_KINDS`.
    rows: least and greatest number of prices in a table.
    easy_share: probability that one of each is asked for.
    quantities: least and greatest of the numbers asked for otherwise.
    canvas: how the table is drawn.
  """

  mix: tuple[tuple[str, float], ...] = (("total", 1.0),)
  rows: tuple[int, int] = (2, 3)
  easy_share: float = 0.5
  quantities: tuple[int, int] = (11, 99)
  canvas: PerceptionConfig = dataclasses.field(default_factory=PerceptionConfig)

  def __post_init__(self):
    low, high = self.rows
    most = min(len(perception.COLOURS), min(rows for rows, _ in self.canvas.grids))
    if not 2 <= low <= high <= most:
      raise ValueError(f"rows={self.rows} must satisfy 2 <= low <= high <= {most} "
                       "(one colour and one row of the canvas each)")
    if not 0 <= self.easy_share <= 1:
      raise ValueError(f"easy_share={self.easy_share} is not a probability")
    if not 1 <= self.quantities[0] <= self.quantities[1]:
      raise ValueError(f"quantities={self.quantities} must satisfy 1 <= low <= high")


def make_question(
    seed: int, index: int, config: ReasoningConfig, split: str = "train") -> Question:
  """Makes question `index` of a split's stream.

  Args:
    seed: of the world; streams of different seeds or splits are independent.
    index: of the question in the stream, from 0.
    config: numbers of the family.
    split: "train", "rl" or "eval"; folded into the seed.

  Returns:
    A question of category "reasoning" with one rendered RGB image. `meta` holds its `task` (its
    kind), the `items` as (quantity, colour, price) in the order of the question, the `difficulty`
    ("easy": one of each, "hard") and all `marks` of the table.

  Raises:
    ValueError: for an unknown split.
  """
  if split not in perception.SPLITS:
    raise ValueError(f"split {split!r} is not one of {tuple(perception.SPLITS)}")
  rng = np.random.default_rng((seed, perception.SPLITS[split], index, _STREAM))
  kinds, weights = zip(*config.mix)
  task = kinds[perception.weighted_index(rng, weights)]
  grid = config.canvas.grids[rng.integers(len(config.canvas.grids))]
  marks = _table(rng, grid, config)
  easy = rng.random() < config.easy_share
  items = []
  for i in rng.permutation(len(marks))[:2]:
    low, high = (1, 1) if easy else config.quantities
    quantity = int(rng.integers(low, high, endpoint=True))
    items.append((quantity, marks[i].colour, int(marks[i].glyph)))
  text, answer = _ask(task, items, marks)
  return Question(
      id=f"reasoning-{split}-{seed}-{index}", text=text,
      images=(perception.render(rng, grid, marks, config.canvas),), answers=(answer,),
      kind="number" if task == "total" else "text", category="reasoning", source="miniworld",
      meta={"task": task, "items": tuple(items), "difficulty": "easy" if easy else "hard",
            "grid": grid, "marks": marks})


def formula(items: Sequence[tuple[int, str, int]]) -> str:
  """The sum over (quantity, colour, price) as one would type it."""
  return " + ".join(f"{price} * {quantity}" for quantity, _, price in items)


def _ask(task: str, items: Sequence[tuple[int, str, int]],
         marks: Sequence[Mark]) -> tuple[str, str]:
  """Question text and gold answer."""
  if task == "prices":
    return "List the prices.", "; ".join(f"{mark.colour} {mark.glyph}" for mark in marks)
  wanted = " and ".join(f"{quantity} {colour}" for quantity, colour, _ in items)
  if task == "formula":
    return f"How to compute {wanted}?", formula(items)
  total = sum(quantity * price for quantity, _, price in items)
  return f"What is the total of {wanted}?", str(total)


def _table(rng: np.random.Generator, grid: tuple[int, int],
           config: ReasoningConfig) -> tuple[Mark, ...]:
  """Square cells one below the other, each with its price."""
  rows, columns = grid
  count = int(rng.integers(config.rows[0], config.rows[1], endpoint=True))
  top, column = int(rng.integers(rows - count, endpoint=True)), int(rng.integers(columns))
  names = tuple(perception.COLOURS)
  colours = [names[i] for i in rng.permutation(len(names))[:count]]
  return tuple(
      Mark(colour=colour, shape="square", glyph=str(PRICES[rng.integers(len(PRICES))]),
           size="large", cell=(top + i, column),
           bbox_2d=perception.cell_bbox((top + i, column), grid))
      for i, colour in enumerate(colours))
