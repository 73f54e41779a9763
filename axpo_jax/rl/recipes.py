"""Recipes: AXPO, its ablations, other methods and our variants, as settings of config.rl.

A name maps to overrides of `config.rl`, dotted as in `--config.rl.<field>=...`. `--config.rl.recipe=<name>` applies
them; `axpo+<name>` applies them and keeps AXPO's resampling. docs/algorithm.md has a line and a paper for each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.resample import DynamicConfig, ResampleConfig
from axpo_jax.rl.shaping import ShapingConfig

_PLAIN = {"resample.ratio": 0.0}  # without AXPO's resampling

RECIPES: Mapping[str, Mapping[str, Any]] = {
  "axpo": {},
  "grpo": _PLAIN,
  # The paper's ablations of AXPO.
  "no_prefix_fix": {"resample.prefix": "question", "credit.prefix_credit": "none"},
  "resample_no_tool": {"resample.subgroup": "no_tool"},
  "random_prefix": {"resample.choice": "random"},
  "no_prefix_credit": {"credit.prefix_credit": "none"},
  "merged_group": {"credit.merge_resamples": True},
  # The paper's other recipes.
  "grpo_x2": {**_PLAIN, "num_rollouts": 16},
  "tool_bonus": {**_PLAIN, "shaping.tool_bonus": 0.2},
  "tool_penalty": {**_PLAIN, "shaping.tool_penalty": "otc"},
  "cispo": {**_PLAIN, "loss.variant": "cispo"},
  # Surrogates, each with the bounds of its paper.
  "gspo": {**_PLAIN, "loss.variant": "gspo", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4,
           "loss.aggregation": "sequence_mean"},
  "gmpo": {**_PLAIN, "loss.variant": "gmpo", "loss.clip_low": 0.4, "loss.aggregation": "sequence_mean"},
  "sapo": {**_PLAIN, "loss.variant": "sapo", "loss.aggregation": "sequence_mean"},
  "dppo": {**_PLAIN, "loss.variant": "dppo", "loss.clip_low": 0.15, "loss.clip_high": 0.15},
  "icepop": {**_PLAIN, "loss.tis_rule": "mask", "loss.tis_floor": 0.5, "loss.tis_cap": 5.0},
  # Advantages and normalisation.
  "rloo": {**_PLAIN, "credit.normalise_std": False, "credit.leave_one_out": True},
  "dr_grpo": {**_PLAIN, "credit.normalise_std": False, "loss.aggregation": "sequence_sum", "loss.sum_length": 0.0},
  "dr_grpo_scale": {**_PLAIN, "credit.normalise_std": False},
  "sequence_sum": {**_PLAIN, "loss.aggregation": "sequence_sum"},
  "dapo": {**_PLAIN, "loss.clip_high": 0.28, "loss.kl_coef": 0.0, "dynamic.rounds": 9,
           "shaping.overlong_share": 0.2},
  # Beyond the paper.
  "mean_credit": {"credit.prefix_credit": "mean"},
  "excess_credit": {"credit.prefix_credit": "excess"},
  "any_cut": {"resample.cut": "uncertain"},
  "early_stop": {"resample.early_stop": True},
  "recoverable_prefix": {"resample.choice": "recoverable"},
}


def overrides(name: str) -> dict[str, Any]:
  """The overrides of a recipe: a name in RECIPES, or "axpo+<name>", which keeps the resampling of AXPO on.

  Raises:
    ValueError: there is no such recipe.
  """
  first, plus, other = name.partition("+")
  if (other if plus else first) not in RECIPES or (plus and first != "axpo"):
    raise ValueError(f"{name!r}; choose one of {', '.join(RECIPES)}, or axpo+<one of them>")
  return {field: value for field, value in RECIPES[other or first].items()
          if not (plus and field == "resample.ratio")}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The RL section of a config as records."""

  resample: ResampleConfig
  credit: CreditConfig
  loss: LossConfig
  shaping: ShapingConfig
  dynamic: DynamicConfig

  @classmethod
  def from_config(cls, rl: Mapping[str, Any], response_limit: int = 0) -> "Recipe":
    """The records of a section.

    Args:
      rl: the section, a mapping of mappings.
      response_limit: tokens that a response may have; taken where `loss.sum_length` or
        `shaping.overlong_limit` is 0.

    Raises:
      ValueError: invalid values or combinations.
    """
    loss, shaping = dict(rl["loss"]), dict(rl["shaping"])
    loss["sum_length"] = loss["sum_length"] or float(response_limit)
    shaping["overlong_limit"] = shaping["overlong_limit"] or response_limit
    recipe = cls(ResampleConfig(**rl["resample"]), CreditConfig(**rl["credit"]), LossConfig(**loss),
                 ShapingConfig(**shaping), DynamicConfig(**rl["dynamic"]))
    check(recipe.resample, recipe.credit)
    return recipe


def check(resample: ResampleConfig, credit: CreditConfig) -> None:
  """Raises ValueError for switches that contradict each other."""
  if resample.prefix == "question" and credit.prefix_credit != "none":
    raise ValueError(
      f"resample.prefix='question' freezes no prefix, so credit.prefix_credit="
      f"{credit.prefix_credit!r} has nothing to credit; set credit.prefix_credit='none'."
    )
  if resample.cut != "first" and (resample.prefix == "question" or resample.subgroup == "no_tool"):
    raise ValueError(
      f"resample.cut={resample.cut!r} chooses among tool calls, but resample.prefix={resample.prefix!r} and "
      f"resample.subgroup={resample.subgroup!r} cut elsewhere; set resample.cut='first'."
    )
