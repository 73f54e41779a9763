"""Who learns from which tokens with which advantage (arXiv 2605.28774, section 3).

In: per question the N rewards and the branches (a source rollout, its K continuations' rewards).
Out: one `Credit` per sequence to train on. A group without branches is plain GRPO, by the same code.

Legend: N rollouts of one question, K continuations of one prefix.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from axpo_jax.rl.advantages import group_advantages, mean_and_std, reward_vector, standardise

PREFIX_CREDITS = ("any", "mean", "excess", "none")
ALL, PREFIX, CONTINUATION = "all", "prefix", "continuation"


@dataclasses.dataclass(frozen=True)
class CreditConfig:
  """How rewards become advantages. The defaults are the paper's AXPO.

  Attributes:
    prefix_credit: recovery reward of a prefix. "any": 1 if any continuation is right (paper);
      "mean": the mean of the K rewards; "excess": that mean against the success rate of the
      group's other rollouts (both beyond the paper); "none": no recovery credit, the source
      keeps its plain GRPO advantage on all of its tokens (ablation).
    merge_resamples: True puts the continuations into the question's own advantage group instead of
      one of their own (ablation).
    ddof: ours; 1 is the unbiased standard deviation, 0 the population's.
    eps: ours; added to every standard deviation.
    normalise_std: False only centres the rewards (Dr.GRPO).
  """

  prefix_credit: str = "any"
  merge_resamples: bool = False
  ddof: int = 1
  eps: float = 1e-6
  normalise_std: bool = True

  def __post_init__(self):
    if self.prefix_credit not in PREFIX_CREDITS:
      raise ValueError(
        f"credit.prefix_credit={self.prefix_credit!r}; choose one of {PREFIX_CREDITS}."
      )
    if self.ddof not in (0, 1):
      raise ValueError(f"credit.ddof={self.ddof}; choose 0 or 1.")
    if not self.eps >= 0:
      raise ValueError(f"credit.eps={self.eps}; it must be >= 0.")

  @property
  def scale(self) -> dict:
    """Keyword arguments of `advantages.standardise`."""
    return {"ddof": self.ddof, "eps": self.eps, "normalise_std": self.normalise_std}


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
  """K continuations of the prefix of rollout `source` (its position in the group)."""

  source: int
  rewards_K: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GroupOutcome:
  """One question after rollouts and resampling.

  Attributes:
    rewards_N: rewards of the N rollouts (shaped, if a recipe shapes them).
    used_tool_N: whether each rollout opened a tool call. The rule does not need it; it is here so
      that a group's outcome is complete.
    branches: at most one per source.
  """

  rewards_N: np.ndarray
  used_tool_N: np.ndarray
  branches: Sequence[Branch] = ()


@dataclasses.dataclass(frozen=True)
class Credit:
  """One sequence to train on.

  Attributes:
    group: position of the question in the list given to `assign_credit`.
    rollout: position of the rollout, or the number k of the continuation.
    branch: None for one of the N rollouts, else the position of its branch.
    region: which sampled tokens learn. "all": every one of the rollout. "prefix": those before the
      source's prefix end; its own call and what follows are masked. "continuation": those from
      the prefix end on; the copied prefix is masked.
    advantage: the same for all those tokens.
  """

  group: int
  rollout: int
  branch: int | None
  region: str
  advantage: float


def prefix_advantage(
  rewards_N: np.ndarray, source: int, rewards_K: np.ndarray, config: CreditConfig
) -> float:
  """A_prefix = (r_prefix - mean(r~)) / std(r~), r~ = rewards with the source's replaced.

  With "excess" the comparison is r_prefix = mean(rewards_K) against the mean of the other N - 1
  rewards, in units of the standard deviation of all those N - 1 + K rewards. The paper's form
  would not do there: r~ is all zero but for the source when nothing else is right, and its own
  standard deviation then cancels the size of r_prefix.

  Raises:
    ValueError: prefix_credit is "none", which has no prefix advantage.
  """
  rewards_N, rewards_K = reward_vector(rewards_N), reward_vector(rewards_K)
  if config.prefix_credit == "none":
    raise ValueError('prefix_credit="none" has no prefix advantage; the source keeps its own.')
  if config.prefix_credit == "excess":
    return _excess_advantage(np.delete(rewards_N, source), rewards_K, config)
  # For binary rewards the maximum *is* "any right"; it also stays defined for shaped ones.
  recovery = rewards_K.max() if config.prefix_credit == "any" else mean_and_std(rewards_K, 0)[0]
  replaced_N = rewards_N.copy()
  replaced_N[source] = recovery
  return float(standardise(recovery, replaced_N, **config.scale))


def _excess_advantage(others: np.ndarray, rewards_K: np.ndarray, config: CreditConfig) -> float:
  pooled = np.concatenate([others, rewards_K])
  if others.size == 0 or np.all(pooled == pooled[0]):
    return 0.0
  excess = mean_and_std(rewards_K, 0)[0] - mean_and_std(others, 0)[0]
  if not config.normalise_std:
    return excess
  return excess / (mean_and_std(pooled, config.ddof)[1] + config.eps)


def assign_credit(groups: Sequence[GroupOutcome], config: CreditConfig) -> list[Credit]:
  """Advantage and region of every sequence of the step.

  Order: the N rollouts of a question, then its branches' continuations, question by question.
  Sequences with zero advantage stay: their KL counts, and so do their tokens in the one token mean
  over every unmasked token of the step. Dropping them would make the step's size depend on luck.

  Raises:
    ValueError: a branch names a source that is not there or already has a branch, or rewards are
      empty or not finite.
  """
  credits = []
  for number, group in enumerate(groups):
    _check_branches(number, group)
    plain_N, resampled_MxK = _advantages(group, config)
    prefix_by_source = {
      branch.source: prefix_advantage(group.rewards_N, branch.source, branch.rewards_K, config)
      for branch in group.branches
      if config.prefix_credit != "none"
    }
    for rollout, plain in enumerate(plain_N):
      if rollout in prefix_by_source:
        credits.append(Credit(number, rollout, None, PREFIX, prefix_by_source[rollout]))
      else:
        credits.append(Credit(number, rollout, None, ALL, float(plain)))
    for branch, resampled_K in enumerate(resampled_MxK):
      credits += [
        Credit(number, k, branch, CONTINUATION, float(a)) for k, a in enumerate(resampled_K)
      ]
  return credits


def loss_mask(sampled_T: np.ndarray, region: str, prefix_end: int | None = None) -> np.ndarray:
  """Which tokens of a sequence carry loss: the sampled ones of a region, no prompt, no observation.

  Args:
    sampled_T: whether the policy sampled the token. For a continuation: of its whole sequence, the
      copied prefix included.
    region: Credit.region.
    prefix_end: tokens of the sequence before the cut, in the same form (collapsed or expanded) as
      `sampled_T`; needed for "prefix" and "continuation". The opening tag is the prefix's last.

  Returns:
    bool [T]. "prefix" and "continuation" split "all" without overlap.

  Raises:
    ValueError: an unknown region, or a prefix_end that is missing or outside the sequence.
  """
  sampled_T = np.asarray(sampled_T, dtype=bool)
  if region == ALL:
    return sampled_T.copy()
  if region not in (PREFIX, CONTINUATION):
    raise ValueError(f"region={region!r}; choose 'all', 'prefix' or 'continuation'.")
  if prefix_end is None or not 0 < prefix_end <= len(sampled_T):
    raise ValueError(f"prefix_end={prefix_end} must lie in 1..{len(sampled_T)} for {region!r}.")
  before_T = np.arange(len(sampled_T)) < prefix_end
  return sampled_T & (before_T if region == PREFIX else ~before_T)


def _advantages(group: GroupOutcome, config: CreditConfig) -> tuple[np.ndarray, list[np.ndarray]]:
  """Plain advantages of the N rollouts, and those of each branch's K continuations."""
  if not (config.merge_resamples and group.branches):
    return group_advantages(group.rewards_N, **config.scale), [
      group_advantages(branch.rewards_K, **config.scale) for branch in group.branches
    ]
  merged = np.concatenate([group.rewards_N, *(branch.rewards_K for branch in group.branches)])
  sizes = [len(group.rewards_N), *(len(branch.rewards_K) for branch in group.branches)]
  plain_N, *resampled = np.split(group_advantages(merged, **config.scale), np.cumsum(sizes)[:-1])
  return plain_N, resampled


def _check_branches(number: int, group: GroupOutcome) -> None:
  sources = [branch.source for branch in group.branches]
  if len(group.used_tool_N) != len(group.rewards_N):
    raise ValueError(
      f"group {number}: {len(group.rewards_N)} rewards but {len(group.used_tool_N)} tool flags."
    )
  if any(not 0 <= source < len(group.rewards_N) for source in sources):
    raise ValueError(
      f"group {number}: branch sources {sources} must be positions below {len(group.rewards_N)}."
    )
  if len(set(sources)) != len(sources):
    raise ValueError(f"group {number}: a rollout may be the source of one branch, got {sources}.")
