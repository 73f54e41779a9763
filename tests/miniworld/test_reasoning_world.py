"""The reasoning family: tables that can be read, totals that follow, what guessing is worth."""

import collections
import dataclasses
import re

import numpy as np
import PIL.Image
import pytest

from axpo_jax.miniworld import perception, reasoning

CONFIG = reasoning.ReasoningConfig()
FAST = reasoning.ReasoningConfig(canvas=perception.PerceptionConfig(cell_px=40))


def test_a_question_is_a_function_of_its_place():
  first, again = (reasoning.make_question(3, 17, CONFIG) for _ in range(2))
  assert dataclasses.replace(first, images=()) == dataclasses.replace(again, images=())
  np.testing.assert_array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
  seen = {(seed, split, index): reasoning.make_question(seed, index, FAST, split)
          for seed in (0, 1) for split in perception.SPLITS for index in range(10)}
  assert len({np.asarray(q.images[0]).tobytes() for q in seen.values()}) == len(seen)
  assert len({q.id for q in seen.values()}) == len(seen)


def test_bad_values_are_errors():
  with pytest.raises(ValueError, match="split 'test'"):
    reasoning.make_question(0, 0, CONFIG, "test")
  for wrong in ({"rows": (1, 3)}, {"rows": (2, 6)}, {"easy_share": 1.5}, {"quantities": (0, 9)}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      reasoning.ReasoningConfig(**wrong)


def read_table(question):
  """Colour -> price, from the pixels of the original alone: by the best match of each cell."""
  image = np.asarray(question.images[0], np.float64)
  table = {}
  for row, column in np.ndindex(5, 5):
    cell = image[80 * row:80 * row + 80, 80 * column:80 * column + 80]
    if np.ptp(cell, axis=-1).max() < 80:
      continue
    coloured = cell[np.ptp(cell, axis=-1) > 80].mean(0)
    colour = min(perception.COLOURS, key=lambda c: np.abs(np.array(perception.COLOURS[c])
                                                          - coloured).sum())
    ink = (cell.max(-1) < 60)[20:60, 20:60]
    table[colour] = max(reasoning.PRICES, key=lambda price: _overlap(ink, _digit(price)))
  return table


def _digit(price):
  canvas = PIL.Image.new("RGB", (80, 80), "white")
  perception._draw_glyph(PIL.ImageDraw.Draw(canvas), (40, 40), str(price), 40)
  return (np.asarray(canvas).max(-1) < 60)[20:60, 20:60]


def _overlap(a, b):
  return (a & b).sum() / (a | b).sum()


def test_the_total_follows_from_the_picture_and_the_question():
  for index in range(60):
    question = reasoning.make_question(0, index, CONFIG)
    table = read_table(question)
    wanted = re.fullmatch(r"What is the total of (\d+) (\w+) and (\d+) (\w+)\?", question.text)
    first, colour, second, other = wanted.groups()
    assert colour != other
    assert question.answers == (str(int(first) * table[colour] + int(second) * table[other]),)
    easy = question.meta["difficulty"] == "easy"
    assert (first == second == "1") == easy
    assert easy or 11 <= min(int(first), int(second)) <= max(int(first), int(second)) <= 99


def test_dense_tasks_ask_what_a_total_rests_on():
  for index in range(30):
    config = dataclasses.replace(CONFIG, mix=(("prices", 1.0), ("formula", 1.0)))
    question = reasoning.make_question(0, index, config)
    table = read_table(question)
    if question.meta["task"] == "prices":  # read from top to bottom
      assert question.answers == ("; ".join(f"{c} {price}" for c, price in table.items()),)
    else:
      asked = re.fullmatch(r"How to compute (\d+) (\w+) and (\d+) (\w+)\?", question.text).groups()
      assert question.answers == (
          f"{table[asked[1]]} * {asked[0]} + {table[asked[3]]} * {asked[2]}",)


def test_prices_stand_one_below_the_other():
  for index in range(60):
    cells = [mark.cell for mark in reasoning.make_question(0, index, FAST).meta["marks"]]
    assert 2 <= len(cells) <= 3
    assert len({column for _, column in cells}) == 1
    assert [row for row, _ in cells] == list(range(cells[0][0], cells[0][0] + len(cells)))


def test_what_guessing_is_worth():
  answers = collections.defaultdict(collections.Counter)
  for index in range(3000):
    question = reasoning.make_question(0, index, FAST)
    answers[question.meta["difficulty"]][question.answers[0]] += 1
  easy, hard = answers["easy"], answers["hard"]
  assert abs(easy.total() - 1500) < 4.5 * np.sqrt(750)
  assert {"6", "9", "11"} == {answer for answer, _ in easy.most_common(3)}
  assert abs(easy["9"] / easy.total() - 2 / 9) < 4.5 * np.sqrt(2 / 9 * 7 / 9 / easy.total())
  assert hard.most_common(1)[0][1] < 0.02 * hard.total()
