"""The comparison's points: every recipe is what its name says, and pairs share what makes them pairs."""

import collections
import importlib.util
import pathlib
import runpy

import pytest

import axpo_jax
from axpo_jax.rl import recipes
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.resample import ResampleConfig, prefix_budget
from axpo_jax.rl.shaping import ShapingConfig
from experiments.evidence.store import _NAME
from experiments.evidence.tables import LABELS

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
POINTS = runpy.run_path(str(REPO / "configs" / "sweeps" / "evidence.py"))["points"]()


def config(point):
  spec = importlib.util.spec_from_file_location("evidence", REPO / "configs" / "evidence_tiny.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  c.update_from_flattened_dict({name.removeprefix("config."): value for name, value in point.items()
                                if name.startswith("config.rl.")})
  return c


def parts(recipe):
  """(rl section, resample, credit, loss, shaping) of a recipe's first point."""
  rl = config(next(point for point in POINTS if point["name"] == f"{recipe}-sft0-seed0")).rl
  found = (ResampleConfig(**rl.resample), CreditConfig(**rl.credit), LossConfig(**rl.loss),
           ShapingConfig(**rl.shaping))
  recipes.check(*found[:2])
  return rl, *found


def test_five_seeds_of_every_recipe_and_three_policies():
  found = collections.Counter(_NAME.fullmatch(point["name"])["recipe"] for point in POINTS
                              if "-sft0-" in point["name"])
  assert found == dict.fromkeys(LABELS.keys() - {"sft"}, 5) and len(found) == 15
  for sft in (1, 2):
    names = {point["name"] for point in POINTS if point["name"].endswith(f"sft{sft}-seed0")}
    assert names == {f"{recipe}-sft{sft}-seed0" for recipe in ("grpo", "axpo", "random_prefix")}
  order = [point["name"] for point in POINTS]
  for point in POINTS:
    if "after" in point:
      assert order.index(point["after"]) < order.index(point["name"])
      assert point["after"] in point["config.model.checkpoint"]
      assert int(point["name"][-1]) == point["config.seed"]


def test_recipes_without_resampling():
  for recipe in ("grpo", "grpo_x125", "grpo_x2", "tool_bonus", "tool_penalty", "cispo"):
    rl, resample, _, _, _ = parts(recipe)
    assert prefix_budget(rl.questions * rl.num_rollouts, resample) == 0, recipe


def test_the_sampling_budget_of_axpo_is_that_of_the_wider_grpo():
  rl, resample, *_ = parts("axpo")
  most = rl.num_rollouts * rl.questions + resample.k * prefix_budget(rl.num_rollouts * rl.questions,
                                                                     resample)
  wide = parts("grpo_x125")[0]
  assert wide.num_rollouts * wide.questions == most
  assert parts("grpo_x2")[0].num_rollouts == 2 * rl.num_rollouts


@pytest.mark.parametrize("recipe, part, field, value", [
  ("no_prefix_fix", 1, "prefix", "question"), ("no_prefix_fix", 2, "prefix_credit", "none"),
  ("resample_no_tool", 1, "subgroup", "no_tool"), ("random_prefix", 1, "choice", "random"),
  ("no_prefix_credit", 2, "prefix_credit", "none"), ("merged_group", 2, "merge_resamples", True),
  ("mean_credit", 2, "prefix_credit", "mean"), ("excess_credit", 2, "prefix_credit", "excess"),
  ("no_kl", 3, "kl_coef", 0.0), ("cispo", 3, "variant", "cispo"),
  ("tool_bonus", 4, "tool_bonus", 0.2), ("tool_penalty", 4, "tool_penalty", "otc")])
def test_what_a_recipe_changes(recipe, part, field, value):
  assert getattr(parts(recipe)[part], field) == value
  assert getattr(parts("axpo")[part], field) != value


def test_all_of_them_bound_a_ratio_that_can_leave_one():
  """With one update a step CISPO's gradient would be GRPO's."""
  assert all(config(point).rl.updates == 2 for point in POINTS)
