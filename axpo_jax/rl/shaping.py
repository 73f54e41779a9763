"""Reward shaping of other recipes, before the advantages; AXPO itself shapes no reward.

Trigger, census and evaluation use the rewards as judged.

Legend: N rollouts of one question.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from axpo_jax.rl.advantages import is_right, reward_vector


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
  """Reward shaping; off by default.

  Attributes:
    tool_bonus: added to the reward of a tool-using rollout, in units of reward.
    tool_bonus_needs_right: True pays the bonus to right rollouts only (as DeepEyes does).
    tool_penalty: "none", or "otc" (arXiv 2504.14870, the GRPO form): a right answer is worth less
      the more calls it took beyond the fewest that were enough in its group.
    otc_smoothing: c of that rule; larger is milder where no call is needed.
    overlong_share: DAPO's soft punishment (arXiv 2503.14476): over the last share of the response limit the
      reward falls linearly by `overlong_penalty`. 0 is off; DAPO's is 0.2 (4,096 of 20,480 tokens).
    overlong_limit: the response limit in tokens; in a config, 0 takes that of the run's episodes.
    overlong_penalty: what a response at or beyond the limit loses, in units of reward.
  """

  tool_bonus: float = 0.0
  tool_bonus_needs_right: bool = True
  tool_penalty: str = "none"
  otc_smoothing: float = 3.0
  overlong_share: float = 0.0
  overlong_limit: int = 0
  overlong_penalty: float = 1.0

  def __post_init__(self):
    if self.tool_penalty not in ("none", "otc"):
      raise ValueError(f"shaping.tool_penalty={self.tool_penalty!r}; choose 'none' or 'otc'.")
    if not self.otc_smoothing > 0:
      raise ValueError(f"shaping.otc_smoothing={self.otc_smoothing}; it must be > 0.")
    if not 0 <= self.overlong_share <= 1:
      raise ValueError(f"shaping.overlong_share={self.overlong_share} is a share; give 0 to 1.")
    if self.overlong_limit < 0:
      raise ValueError(f"shaping.overlong_limit={self.overlong_limit}; it must be >= 0 tokens.")


UNSHAPED = ShapingConfig()


def shape_rewards(
  rewards_N: Sequence[float] | np.ndarray,
  num_calls_N: Sequence[int] | np.ndarray | None,
  config: ShapingConfig,
  lengths_N: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
  """Rewards for the advantages.

  Args:
    rewards_N: binary rewards of one group.
    num_calls_N: tool calls of each rollout; None: none.
    lengths_N: response tokens of each, images expanded; None: none.

  Returns:
    float64 [N]; equal to the input under the default config.

  Raises:
    ValueError: the vectors differ in length, or there is no limit for the lengths.
  """
  rewards_N = reward_vector(rewards_N)
  num_calls_N = _counts(num_calls_N, rewards_N, "call counts")
  right_N = is_right(rewards_N)
  if config.tool_penalty == "otc":
    rewards_N = rewards_N * otc_factors(right_N, num_calls_N, config.otc_smoothing)
  if config.tool_bonus:
    paid_N = (num_calls_N > 0) & (right_N | (not config.tool_bonus_needs_right))
    rewards_N = rewards_N + config.tool_bonus * paid_N
  if config.overlong_share:
    if not config.overlong_limit:
      raise ValueError("shaping.overlong_limit=0: give the response limit in tokens.")
    lengths_N = _counts(lengths_N, rewards_N, "lengths")
    # 0 before the last share, 1 at the limit, straight between.
    buffer = config.overlong_share * config.overlong_limit
    over_N = (lengths_N - (config.overlong_limit - buffer)) / buffer
    rewards_N = rewards_N - config.overlong_penalty * np.clip(over_N, 0.0, 1.0)
  return rewards_N


def _counts(counts_N: Sequence[int] | np.ndarray | None, rewards_N: np.ndarray, what: str) -> np.ndarray:
  counts_N = np.asarray(np.zeros(len(rewards_N)) if counts_N is None else counts_N, dtype=np.int64)
  if counts_N.shape != rewards_N.shape:
    raise ValueError(f"{rewards_N.size} rewards but {counts_N.size} {what}.")
  return counts_N


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
