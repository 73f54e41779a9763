"""Recipes name real config fields, and shaping follows its formulas."""

import dataclasses
import math
import re

import numpy as np
import pytest

from axpo_jax.config import base_config
from axpo_jax.rl import recipes
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.recipes import RECIPES
from axpo_jax.rl.resample import ResampleConfig
from axpo_jax.rl.shaping import ShapingConfig, shape_rewards

DATACLASSES = {
  "resample": ResampleConfig,
  "credit": CreditConfig,
  "loss": LossConfig,
  "shaping": ShapingConfig,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_sets_fields_of_the_config_tree(name):
  config = base_config().rl
  config.update_from_flattened_dict(RECIPES[name])  # unknown fields and wrong types raise
  built = recipes.Recipe.from_config(config, response_limit=1000)
  for dotted, value in RECIPES[name].items():
    part, _, field = dotted.rpartition(".")
    if part and dotted != "loss.sum_length":
      assert getattr(getattr(built, part), field) == value
  assert built.loss.sum_length == (1000 if name == "dr_grpo" else 1)


def test_names_are_found_or_refused():
  assert recipes.overrides("gspo") == RECIPES["gspo"]
  with_axpo = recipes.overrides("axpo+gspo")
  assert "resample.ratio" not in with_axpo and with_axpo["loss.variant"] == "gspo"
  for name in ("gppo", "grpo+gspo", "axpo+gppo", ""):
    with pytest.raises(ValueError, match=f"^{re.escape(repr(name))}; choose one of axpo, grpo,"):
      recipes.overrides(name)


def test_the_tree_and_the_dataclasses_agree_on_the_paper():
  config = base_config().rl
  for part, cls in DATACLASSES.items():
    assert cls(**dict(getattr(config, part))) == cls(), part


def test_the_papers_values():
  resample, loss = ResampleConfig(), LossConfig()
  assert (resample.ratio, resample.k) == (0.25, 4)
  assert (loss.clip_low, loss.clip_high, loss.kl_coef) == (0.2, 0.4, 1e-3)


def test_every_switch_differs_from_axpo():
  assert [name for name, changes in RECIPES.items() if not changes] == ["axpo"]
  distinct = {tuple(sorted(changes.items())) for changes in RECIPES.values()}
  assert len(distinct) == len(RECIPES)


def test_contradicting_switches_are_an_error():
  with pytest.raises(ValueError, match="cut='first'"):
    recipes.check(ResampleConfig(subgroup="no_tool", cut="last"), CreditConfig())
  with pytest.raises(ValueError, match="prefix_credit='none'"):
    recipes.check(ResampleConfig(prefix="question"), CreditConfig())


def test_default_shaping_changes_nothing():
  rewards = np.array([0.0, 1.0, 1.0])
  np.testing.assert_array_equal(shape_rewards(rewards, [3, 0, 2], ShapingConfig()), rewards)


def test_tool_bonus():
  rewards, calls = [1, 1, 0, 0], [2, 0, 1, 0]
  np.testing.assert_allclose(
    shape_rewards(rewards, calls, ShapingConfig(tool_bonus=0.2)), [1.2, 1, 0, 0]
  )
  any_answer = ShapingConfig(tool_bonus=0.2, tool_bonus_needs_right=False)
  np.testing.assert_allclose(shape_rewards(rewards, calls, any_answer), [1.2, 1, 0.2, 0])


def test_otc_where_no_call_was_needed():
  """n = 0: cos(m pi / (2m + c))."""
  got = shape_rewards([1, 1, 1, 0], [0, 1, 2, 0], ShapingConfig(tool_penalty="otc"))
  np.testing.assert_allclose(got, [1, math.cos(math.pi / 5), math.cos(2 * math.pi / 7), 0])


def test_otc_where_calls_were_needed():
  """n = 2: sin(f pi / 4), f = 4m / (m + 2); best at m = n."""
  got = shape_rewards([1, 1, 0, 0], [2, 4, 0, 2], ShapingConfig(tool_penalty="otc"))
  np.testing.assert_allclose(got, [1, math.sin((16 / 6) * math.pi / 4), 0, 0])


def test_otc_leaves_groups_without_a_right_answer_alone():
  np.testing.assert_array_equal(
    shape_rewards([0, 0], [0, 3], ShapingConfig(tool_penalty="otc")), [0, 0]
  )


def test_overlong_responses_lose_reward():
  """DAPO: nothing up to 80 of 100 tokens, then straight down to -1 at 100, and no further."""
  config = ShapingConfig(overlong_share=0.2, overlong_limit=100)
  got = shape_rewards([1, 1, 1, 0, 1], None, config, [0, 80, 90, 100, 140])
  np.testing.assert_allclose(got, [1, 1, 0.5, -1, 0])


def test_bad_shaping():
  with pytest.raises(ValueError, match="tool_penalty='atc'"):
    ShapingConfig(tool_penalty="atc")
  with pytest.raises(ValueError, match="otc_smoothing=0"):
    ShapingConfig(otc_smoothing=0.0)
  with pytest.raises(ValueError, match="overlong_share=2"):
    ShapingConfig(overlong_share=2.0)
  with pytest.raises(ValueError, match="overlong_limit=0"):
    shape_rewards([1], None, ShapingConfig(overlong_share=0.5), [3])
  with pytest.raises(ValueError, match="call counts"):
    shape_rewards([1, 0], [1], ShapingConfig())


def test_configs_are_frozen_and_hashable():
  for cls in DATACLASSES.values():
    assert hash(cls()) == hash(cls())
    with pytest.raises(dataclasses.FrozenInstanceError):
      cls().anything = 1
