"""AXPO from top to bottom: Algorithm 1 of the paper (arXiv 2605.28774), as a training step runs it.

  1. sample       N rollouts of each of B questions, judged right or wrong       rollouts.collect
  2. trigger      questions whose tool-using rollouts are all wrong              triggered
  3. cut          each behind the <tool_call> that opened its call               choose_cut
  4. choose       M of those rollouts, least certain call first, breadth first   plan_resamples
  5. resample     K continuations of each prefix, with the same policy           next_continuations, rollouts.collect
  6. credit       one advantage a rollout, a prefix, a continuation              assign_credit
  7. mask         the tokens of a sequence that receive it                       loss_mask
  8. update       the clipped surrogate with a KL, summed and divided once       loss_weights, losses.policy_loss

With a budget of zero nothing is resampled, and the step is GRPO bit for bit. All functions are pure and work on
plain arrays and small records: `rollouts.collect` samples, `train` packs and differentiates. Other modules of
this folder hold the details and the switches: `resample` (confidence, budget, order), `credit` (advantage of a
prefix), `advantages`, `shaping`, `weights`, `surrogates`, `losses`; `recipes` names settings of the switches.

Legend: B questions, N rollouts of one question, K continuations of one prefix, S sequences, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from axpo_jax.rl import credit as credit_lib
from axpo_jax.rl import resample as resample_lib
from axpo_jax.rl import weights as weights_lib
from axpo_jax.rl.advantages import group_advantages, is_right, reward_vector
from axpo_jax.rl.credit import ALL, CONTINUATION, PREFIX, Credit, CreditConfig, GroupOutcome
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.recovery import Recovery
from axpo_jax.rl.resample import Cut, GroupView, ResampleConfig, Selection
from axpo_jax.rl.shaping import UNSHAPED, ShapingConfig, shape_rewards

T = TypeVar("T")

# ---- 1. sample: only dynamic sampling (DAPO) rejects anything here


def informative(group: GroupView, config: ResampleConfig) -> bool:
  """Whether training on a question has an effect: its rewards differ, or it may be resampled.

  Dynamic sampling (DAPO, arXiv 2503.14476) keeps only such questions. Those that AXPO may resample are kept
  even if all of their rewards are zero.
  """
  rewards_N = reward_vector(group.rewards_N)
  repairable = bool(config.ratio) and triggered(
    rewards_N, group.used_tool_N, subgroup=config.subgroup) and bool(np.any(group.candidate_N))
  return repairable or bool(np.any(rewards_N != rewards_N[0]))


# ---- 2. trigger


def triggered(rewards_N: np.ndarray, used_tool_N: np.ndarray, *, subgroup: str = "tool") -> bool:
  """Whether the subgroup is not empty and every member of it is wrong.

  The other subgroup may be right: then GRPO never gives the *tool call* a positive advantage.
  """
  member_N = resample_lib.subgroup_mask(used_tool_N, subgroup)
  return bool(member_N.any() and not is_right(reward_vector(rewards_N))[member_N].any())


# ---- 3. cut


def choose_cut(cuts: Sequence[Cut], config: ResampleConfig) -> Cut | None:
  """Where a rollout is cut.

  Args:
    cuts: one per call of the rollout, in order. The frozen tokens end with the opening tag, so that whatever
      is decoded next is a tool call.

  Returns:
    The cut at the first call (paper), at the last, or at the least certain one; None without a call.
  """
  if not cuts:
    return None
  if config.cut == "uncertain":
    return min(cuts, key=lambda cut: (cut.confidence, cut.end))
  return cuts[0] if config.cut == "first" else cuts[-1]


# ---- 4. choose


def plan_resamples(
  groups: Sequence[GroupView],
  config: ResampleConfig,
  rng_seed: int = 0,
  *,
  num_rollouts: int | None = None,
  recovery: Recovery | None = None,
  unfinished: Mapping[int, int] = MappingProxyType({}),
) -> list[Selection]:
  """The step's prefixes in the order in which they are chosen.

  Round 0 holds every triggered question's best prefix, round 1 every second best, and so on; the
  budget cuts the queue. Ties fall to the smaller question index, then the smaller rollout key, so the plan
  does not depend on the order of questions or rollouts. Nothing carries over to the next step.

  While some questions are unfinished, the plan holds only the prefixes that are chosen whatever those turn out
  to be: each takes as many places in the queue as it has rollouts, before all others of the round.

    round 0   ?  ?  0.3  0.5     round 1   ?  ?  0.4     budget 3: 0.3 is certain, 0.5 must wait

  Args:
    groups: the step's finished questions, triggered or not.
    config: see ResampleConfig.
    rng_seed: used by choice="random" only; >= 0, change it every step.
    num_rollouts: B * N, failed rollouts included, for the budget; None: the rollouts of `groups`.
    recovery: what earlier steps recovered; read by choice="recoverable" only, None: nothing yet.
    unfinished: the step's other questions: index -> N. `num_rollouts` must count them.

  Returns:
    At most `resample.prefix_budget` selections, each (group, rollout) at most once.

  Raises:
    ValueError: question indices repeat, or a candidate has no finite confidence.
  """
  resample_lib.check_indices(groups)
  queue: list[tuple[tuple, Selection | None]] = []
  for group in groups:
    if not triggered(group.rewards_N, group.used_tool_N, subgroup=config.subgroup):
      continue
    ranked = resample_lib.rank_candidates(group, config, rng_seed, recovery or Recovery())
    queue += [(_queue_key(config, group.index, rank, score, key),
               Selection(group.index, rollout, float(group.confidence_N[rollout])))
              for rank, (score, key, rollout) in enumerate(ranked)]
  queue += [(_queue_key(config, index, rank, -math.inf, -1), None)
            for index, n in unfinished.items() for rank in range(n)]
  queue.sort(key=lambda entry: entry[0])
  if num_rollouts is None:
    num_rollouts = sum(len(group.rewards_N) for group in groups) + sum(unfinished.values())
  first = queue[:resample_lib.prefix_budget(num_rollouts, config)]
  return [chosen for _, chosen in first if chosen is not None]


def _queue_key(config: ResampleConfig, index: int, rank: int, score: float, key: int) -> tuple:
  """The sort key of a question's prefix number `rank` in the queue."""
  return (rank if config.breadth_first else 0, score if config.round_order == "confidence" else 0.0,
          index, rank, key)


# ---- 5. resample


def next_continuations(rewards: Sequence[float], drawn: int, config: ResampleConfig) -> int:
  """How many continuations of a prefix to sample next, in parallel; 0: no more.

  Args:
    rewards: of the continuations so far, without those that failed by a fault of the machine.
    drawn: how many were sampled so far, failed ones included.
  """
  if not config.early_stop:
    return config.k - drawn
  right = is_right(rewards)
  if right.any() and not right.all():  # a right and a wrong one: the group has its contrast
    return 0
  return min(max(2 - drawn, 1), config.k - drawn)


# ---- 6. credit


def assign_credit(
  groups: Sequence[GroupOutcome],
  config: CreditConfig,
  shaping: ShapingConfig = UNSHAPED,
) -> list[Credit]:
  """Advantage and region of every sequence of the step.

    rollout       A_i = (r_i - mean(r)) / std(r)                 on all of its tokens
    prefix        A = (r_prefix - mean(r~)) / std(r~)            before the cut; the failed call is masked
    continuation  A_k = (r_k - mean_K(r)) / std_K(r)             from the cut on; the copied prefix is masked

  With `config.turn_weight`, the tokens of a turn also get the advantage of its own reward.

  Order: the N rollouts of a question, then its branches' continuations, question by question.
  Sequences with zero advantage stay: their KL counts, and their tokens are in the denominator of the
  token mean. Dropping them would make the size of a step depend on luck.

  Raises:
    ValueError: a branch names a source that is not there or already has a branch, or rewards are
      empty or not finite.
  """
  credits = []
  for number, group in enumerate(groups):
    credit_lib.check_branches(number, group)
    rewards_N = shape_rewards(group.rewards_N, group.num_calls_N, shaping, group.lengths_N)
    rewards_MxK = [shape_rewards(branch.rewards_K, branch.num_calls_K, shaping, branch.lengths_K)
                   for branch in group.branches]
    plain_N, resampled_MxK = _grouped(rewards_N, rewards_MxK, config)
    credits += [Credit(number, i, None, ALL, float(a)) for i, a in enumerate(plain_N)]
    for branch, rewards_K in zip(group.branches, rewards_MxK, strict=True):
      if config.prefix_credit != "none" and branch.frozen:
        earned = credit_lib.prefix_advantage(rewards_N, branch.source, rewards_K, config)
        credits[branch.source - len(plain_N)] = Credit(number, branch.source, None, PREFIX, earned)
    for m, resampled_K in enumerate(resampled_MxK):
      credits += [Credit(number, k, m, CONTINUATION, float(a)) for k, a in enumerate(resampled_K)]
  return credit_lib.with_turns(credits, groups, config) if config.turn_weight else credits


def _grouped(rewards_N: np.ndarray, rewards_MxK: Sequence[np.ndarray], config: CreditConfig
             ) -> tuple[np.ndarray, list[np.ndarray]]:
  """Advantages of the N rollouts and of each branch's continuations. Each branch is a group of its own; in the
  ablation all are in one group with the rollouts."""
  groups = [rewards_N, *rewards_MxK]
  if not config.merge_resamples:
    plain_N, *resampled = [group_advantages(rewards, **config.scale) for rewards in groups]
    return plain_N, resampled
  ends = np.cumsum([len(rewards) for rewards in groups])[:-1]
  plain_N, *resampled = np.split(group_advantages(np.concatenate(groups), **config.scale), ends)
  return plain_N, resampled


# ---- 7. mask


def loss_mask(sampled_T: np.ndarray, region: str, prefix_end: int | None = None) -> np.ndarray:
  """Which tokens of a sequence carry loss: the sampled ones of a region, never prompt or observations.

    question  thinking  <tool_call>  its call  observation  answer
              [------ prefix -----]  [---- continuation ---------]      [-] the sampled tokens of each

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


# ---- 8. update


class LossWeights(NamedTuple):
  """Weights of the sequences of an update.

  weights_S: float32 [S], of one token of each sequence. divisor: of the summed loss. metrics: to log.
  """

  weights_S: np.ndarray
  divisor: float
  metrics: dict[str, float]


def split_updates(items: Sequence[T], updates: int) -> list[list[T]]:
  """Splits a step's sequences over its updates: update i gets every `updates`-th from i on. So sequences of one
  question, which are neighbours, are spread over the updates. Empty updates are left out."""
  return [list(items[i::updates]) for i in range(updates) if items[i::updates]]


def needs_old_logprobs(config: LossConfig, updates: int, old_logprobs: str) -> bool:
  """Whether log-probabilities under the weights at the start of the step need a forward pass of their own. If
  not, the update's own pass gives them, and the ratio is exactly one."""
  return updates > 1 or old_logprobs == "trainer" or config.tis_mask is not None


def loss_weights(
  credits: Sequence[Credit],
  tokens_S: np.ndarray,
  questions: float,
  config: LossConfig,
  gap_sums_S: np.ndarray | None = None,
) -> LossWeights:
  """Weights of an update's sequences: GRPO's loss plus L_clip of the prefixes and continuations.

  Args:
    credits: of the update's sequences.
    tokens_S: how many tokens of each carry loss.
    questions: B of the step, times the share of its sequences that this update has.
    config: `aggregation`, `sum_length`, `resampled_weight` and `tis_mask` are read.
    gap_sums_S: sum over each sequence's tokens of (trainer's - sampler's log-probability); needed where
      `tis_mask` is set.
  """
  regions = np.asarray([credit.region for credit in credits])
  metrics = {}
  if config.tis_mask is not None:
    drifted_S = weights_lib.drifted(gap_sums_S, tokens_S, config.tis_mask)
    metrics["train/tis_masked_share"] = float(tokens_S[drifted_S].sum() / max(tokens_S.sum(), 1))
    tokens_S = np.where(drifted_S, 0, tokens_S)
  weights_S, divisor = weights_lib.sequence_weights(tokens_S, regions != ALL, config, questions)
  advantages_S = np.asarray([credit.advantage for credit in credits])
  shares = weights_lib.advantage_shares(weights_S, tokens_S, advantages_S, regions)
  return LossWeights(weights_S, divisor, metrics | shares)
