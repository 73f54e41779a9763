"""The mix of families: whose question stands where."""

import collections

import numpy as np
import pytest

from axpo_jax.miniworld import perception, reasoning, search, world

CANVAS = perception.PerceptionConfig(cell_px=40)  # faster to draw


def mixed(**families):
  return world.WorldConfig(families=tuple(families.items()), perception=CANVAS,
                           reasoning=reasoning.ReasoningConfig(canvas=CANVAS))


def test_each_place_holds_its_familys_question():
  config = mixed(perception=1, search=1, reasoning=1)
  for split in perception.SPLITS:
    for index in range(30):
      question = world.make_question(1, index, config, split)
      own = {"perception": lambda i, s: perception.make_question(1, i, CANVAS, s),
             "search": lambda i, s: search.make_question(1, i, s),
             "reasoning": lambda i, s: reasoning.make_question(1, i, config.reasoning, s)}
      expected = own[question.category](index, split)
      assert question.id == expected.id and question.text == expected.text
      assert len(question.images) == len(expected.images)
      for image, other in zip(question.images, expected.images):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(other))


def test_the_default_is_the_perception_family_as_it_was():
  for index in range(5):
    question = world.make_question(0, index, world.WorldConfig(), "rl")
    expected = perception.make_question(0, index, perception.PerceptionConfig(), "rl")
    assert question.id == expected.id and question.answers == expected.answers
    np.testing.assert_array_equal(np.asarray(question.images[0]), np.asarray(expected.images[0]))


def test_weights_are_shares():
  n, config = 1200, mixed(perception=0, search=3, reasoning=1)
  counts = collections.Counter(world.make_question(0, i, config).category for i in range(n))
  assert set(counts) == {"search", "reasoning"}
  assert abs(counts["search"] - 0.75 * n) < 4.5 * np.sqrt(n * 0.75 * 0.25)


def test_bad_mixes_are_errors():
  with pytest.raises(ValueError, match=r"names \['serach'\]"):
    mixed(serach=1)
  with pytest.raises(ValueError, match="one is above 0"):
    mixed(search=0)
  with pytest.raises(ValueError, match="0 or more"):
    mixed(search=-1, perception=2)
  with pytest.raises(ValueError, match=r"no kind of question .* \['search'\]"):
    world.WorldConfig(families=(("search", 1),), search_mix=())
  with pytest.raises(ValueError, match="split 'test'"):
    world.make_question(0, 0, mixed(search=1), "test")


def test_kinds_go_to_their_families():
  mixes = world.kinds_by_family({"read": 1, "formula": 2, "look_up": 3, "where": 4})
  assert mixes == {"perception": (("read", 1), ("where", 4)), "search": (("look_up", 3),),
                   "reasoning": (("formula", 2),)}
  with pytest.raises(ValueError, match=r"kinds \['raed'\]"):
    world.kinds_by_family({"raed": 1})
