"""Details of credit assignment: switches, records, and the advantage of a prefix.

`algorithm.assign_credit` uses them (arXiv 2605.28774, section 3).

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
    turn_weight: ours; weight of the advantage of a turn's own reward, which is added to the rollout's
      advantage on the turn's tokens. 0: no rewards of turns.
    leave_one_out: True compares a reward with the mean of the *others* of its group (RLOO,
      arXiv 2402.14740); needs normalise_std=False.
  """

  prefix_credit: str = "any"
  merge_resamples: bool = False
  ddof: int = 1
  eps: float = 1e-6
  normalise_std: bool = True
  leave_one_out: bool = False
  turn_weight: float = 0.0

  def __post_init__(self):
    if self.prefix_credit not in PREFIX_CREDITS:
      raise ValueError(
        f"credit.prefix_credit={self.prefix_credit!r}; choose one of {PREFIX_CREDITS}."
      )
    if self.ddof not in (0, 1):
      raise ValueError(f"credit.ddof={self.ddof}; choose 0 or 1.")
    if not self.eps >= 0:
      raise ValueError(f"credit.eps={self.eps}; it must be >= 0.")
    if self.leave_one_out and self.normalise_std:
      raise ValueError("credit.leave_one_out=True needs credit.normalise_std=False.")

  @property
  def scale(self) -> dict:
    """Keyword arguments of `advantages.standardise`."""
    return {name: getattr(self, name) for name in ("ddof", "eps", "normalise_std", "leave_one_out")}


@dataclasses.dataclass(frozen=True, eq=False)
class BranchOutcome:
  """K continuations of one prefix.

  Attributes:
    source: position in the group of the rollout whose prefix it is.
    rewards_K: as judged.
    num_calls_K, lengths_K: tool calls, and response tokens; only shaping reads them.
    turn_rewards_K: of each turn, from the rollout's first on; credit.turn_weight needs them.
    frozen: False if they begin at the question: then there is no prefix to credit.
  """

  source: int
  rewards_K: np.ndarray
  num_calls_K: np.ndarray | None = None
  lengths_K: np.ndarray | None = None
  frozen: bool = True
  turn_rewards_K: Sequence[Sequence[float]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GroupOutcome:
  """One question after rollouts and resampling.

  Attributes:
    rewards_N: as judged.
    branches: at most one per source.
    num_calls_N, lengths_N: tool calls, and response tokens; only shaping reads them.
    turn_rewards_N: of each turn; credit.turn_weight needs them.
  """

  rewards_N: np.ndarray
  branches: Sequence[BranchOutcome] = ()
  num_calls_N: np.ndarray | None = None
  lengths_N: np.ndarray | None = None
  turn_rewards_N: Sequence[Sequence[float]] | None = None


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
    turns: what is added to it on the tokens of each turn; empty: nothing.
  """

  group: int
  rollout: int
  branch: int | None
  region: str
  advantage: float
  turns: tuple[float, ...] = ()


def prefix_advantage(
  rewards_N: np.ndarray, source: int, rewards_K: np.ndarray, config: CreditConfig
) -> float:
  """A_prefix = (r_prefix - mean(r~)) / std(r~), r~ = rewards with the source's replaced.

  "excess" compares r_prefix = mean(rewards_K) with the mean of the other N - 1 rewards, in units of the
  standard deviation of all those N - 1 + K rewards. The paper's form does not work for it: if nothing else is
  right, r~ is zero except at the source, and its standard deviation cancels the size of r_prefix.

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


def turn_advantages(rewards: Sequence[Sequence[float]], config: CreditConfig) -> list[tuple[float, ...]]:
  """Weighted advantages of the turns of a group's rollouts.

  Turn t of a rollout is compared with turn t of the others that have one; a turn that no other rollout has
  gets 0.

  Args:
    rewards: of each rollout, one a turn.
  """
  out = [[0.0] * len(own) for own in rewards]
  for turn in range(max(map(len, rewards), default=0)):
    have = [i for i, own in enumerate(rewards) if len(own) > turn]
    if len(have) > 1:
      earned = group_advantages([rewards[i][turn] for i in have], **config.scale)
      for i, advantage in zip(have, earned):
        out[i][turn] = config.turn_weight * float(advantage)
  return [tuple(own) for own in out]


def with_turns(credits: Sequence[Credit], groups: Sequence[GroupOutcome], config: CreditConfig
               ) -> list[Credit]:
  """The credits with the advantages of their turns.

  Raises:
    ValueError: a group has no rewards of turns.
  """
  found: dict[tuple[int, int | None], list[tuple[float, ...]]] = {}
  for number, group in enumerate(groups):
    members = [(None, group.turn_rewards_N), *((m, b.turn_rewards_K) for m, b in enumerate(group.branches))]
    for branch, rewards in members:
      if rewards is None:
        raise ValueError(f"credit.turn_weight={config.turn_weight}, but group {number} has no rewards of turns.")
      found[number, branch] = turn_advantages(rewards, config)
  return [dataclasses.replace(c, turns=found[c.group, c.branch][c.rollout]) for c in credits]


def check_branches(number: int, group: GroupOutcome) -> None:
  """Raises ValueError for a branch whose source is no rollout of group `number`, or has a branch already."""
  sources = [branch.source for branch in group.branches]
  if any(not 0 <= source < len(group.rewards_N) for source in sources):
    raise ValueError(
      f"group {number}: branch sources {sources} must be positions below {len(group.rewards_N)}."
    )
  if len(set(sources)) != len(sources):
    raise ValueError(f"group {number}: a rollout may be the source of one branch, got {sources}.")
