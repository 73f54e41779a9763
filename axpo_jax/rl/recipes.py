"""Recipes and ablations as config switches, and the rewards that two of them shape.

`RECIPES` maps a name to overrides of the RL config, dotted as in `--config.rl.<name>=...`; a
`ConfigDict` takes them with `config.rl.update_from_flattened_dict(RECIPES[name])`.

Legend: N rollouts of one question.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from axpo_jax.rl.advantages import is_right, reward_vector
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.resample import ResampleConfig

RECIPES: Mapping[str, Mapping[str, Any]] = {
  "axpo": {},
  "grpo": {"resample.ratio": 0.0},
  # The paper's ablations of AXPO.
  "no_prefix_fix": {"resample.prefix": "question", "credit.prefix_credit": "none"},
  "resample_no_tool": {"resample.subgroup": "no_tool"},
  "random_prefix": {"resample.choice": "random"},
  "no_prefix_credit": {"credit.prefix_credit": "none"},
  "merged_group": {"credit.merge_resamples": True},
  # The paper's other recipes, all without resampling.
  "grpo_x2": {"resample.ratio": 0.0, "num_rollouts": 16},
  "tool_bonus": {"resample.ratio": 0.0, "shaping.tool_bonus": 0.2},
  "tool_penalty": {"resample.ratio": 0.0, "shaping.tool_penalty": "otc"},
  "cispo": {"resample.ratio": 0.0, "loss.variant": "cispo"},
  # Beyond the paper.
  "mean_credit": {"credit.prefix_credit": "mean"},
  "excess_credit": {"credit.prefix_credit": "excess"},
  "dr_grpo_scale": {"resample.ratio": 0.0, "credit.normalise_std": False},
}


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
  """Reward shaping before the advantages; off by default (AXPO has none).

  Attributes:
    tool_bonus: added to the reward of a tool-using rollout, in units of reward.
    tool_bonus_needs_right: True pays the bonus to right rollouts only (as DeepEyes does).
    tool_penalty: "none", or "otc" (arXiv 2504.14870, the GRPO form): a right answer is worth less
      the more calls it took beyond the fewest that were enough in its group.
    otc_smoothing: c of that rule; larger is milder where no call is needed.
  """

  tool_bonus: float = 0.0
  tool_bonus_needs_right: bool = True
  tool_penalty: str = "none"
  otc_smoothing: float = 3.0

  def __post_init__(self):
    if self.tool_penalty not in ("none", "otc"):
      raise ValueError(f"shaping.tool_penalty={self.tool_penalty!r}; choose 'none' or 'otc'.")
    if not self.otc_smoothing > 0:
      raise ValueError(f"shaping.otc_smoothing={self.otc_smoothing}; it must be > 0.")


def check(resample: ResampleConfig, credit: CreditConfig) -> None:
  """Raises ValueError for switches that contradict each other; call it where configs are built."""
  if resample.prefix == "question" and credit.prefix_credit != "none":
    raise ValueError(
      f"resample.prefix='question' freezes no prefix, so credit.prefix_credit="
      f"{credit.prefix_credit!r} has nothing to credit; set credit.prefix_credit='none'."
    )


def shape_rewards(
  rewards_N: Sequence[float] | np.ndarray,
  num_calls_N: Sequence[int] | np.ndarray,
  config: ShapingConfig,
) -> np.ndarray:
  """Rewards for the advantages; trigger and census keep using the judged ones.

  Args:
    rewards_N: binary rewards of one group.
    num_calls_N: tool calls of each rollout.

  Returns:
    float64 [N]; equal to the input under the default config.
  """
  rewards_N, num_calls_N = reward_vector(rewards_N), np.asarray(num_calls_N, dtype=np.int64)
  if rewards_N.shape != num_calls_N.shape:
    raise ValueError(f"{rewards_N.size} rewards but {num_calls_N.size} call counts.")
  right_N = is_right(rewards_N)
  if config.tool_penalty == "otc":
    rewards_N = rewards_N * otc_factors(right_N, num_calls_N, config.otc_smoothing)
  if config.tool_bonus:
    paid_N = (num_calls_N > 0) & (right_N | (not config.tool_bonus_needs_right))
    rewards_N = rewards_N + config.tool_bonus * paid_N
  return rewards_N


def otc_factors(right_N: np.ndarray, num_calls_N: np.ndarray, smoothing: float) -> np.ndarray:
  """OTC-GRPO's factor in [0, 1]; n is the fewest calls of a right rollout, m this rollout's.

  n = 0: cos(m pi / (2m + c)), which is 1 at m = 0. n > 0: sin(f pi / 2n) with f = 2nm / (m + n),
  which is 1 at m = n. Without a right rollout the factor is 1: there is nothing to scale.
  """
  if not right_N.any():
    return np.ones(len(right_N))
  fewest = int(num_calls_N[right_N].min())
  return np.array([_otc_factor(int(m), fewest, smoothing) for m in num_calls_N])


def _otc_factor(calls: int, fewest: int, smoothing: float) -> float:
  if fewest == 0:
    return math.cos(calls * math.pi / (2 * calls + smoothing))
  matched = 2 * fewest * calls / (calls + fewest)
  return math.sin(matched * math.pi / (2 * fewest))
