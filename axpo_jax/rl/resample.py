"""Details of resampling: switches, confidence of a call, budget, order of a question's rollouts.

`algorithm.plan_resamples` uses them (arXiv 2605.28774, section 3).

Legend: B questions, N rollouts of one question, K continuations of one prefix, C tokens of a call.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from axpo_jax.rl.recovery import Recovery

_CHOICES = {
  "choice": ("uncertain", "random", "recoverable"),
  "cut": ("first", "last", "uncertain"),
  "subgroup": ("tool", "no_tool"),
  "prefix": ("thinking", "question"),
  "round_order": ("confidence", "index"),
  "confidence_span": ("call", "call_body"),
}


@dataclasses.dataclass(frozen=True)
class ResampleConfig:
  """Budget and choice of prefixes. The defaults are the paper's AXPO.

  Attributes:
    ratio: r, extra continuations per ordinary rollout of the step (paper: 0.25). 0 is plain GRPO.
    k: K, continuations per selected prefix (paper: 4).
    choice: "uncertain" takes the lowest confidence first (paper); "random" is the ablation;
      "recoverable" (beyond the paper) takes the prefix whose family and confidence were recovered most often
      earlier in the run (`recovery`).
    cut: at which call a rollout is cut: "first" (paper); or, beyond the paper and among the calls whose tools
      ran, "last" or "uncertain", the least certain one (searches often fail at the second hop).
    early_stop: beyond the paper; True samples two continuations of a prefix, then one at a time, and stops as
      soon as one is right and one is wrong. At most K; saved continuations are not spent elsewhere.
    subgroup: the rollouts whose failure triggers, and which are resampled: "tool" (paper), or "no_tool"
      (ablation: the no-tool rollouts of a question where all of them fail).
    prefix: "thinking" freezes the thinking up to and including the opening tool-call tag (paper);
      "question" freezes nothing, the extra rollouts start from the question (ablation
      "no prefix fix"; needs CreditConfig.prefix_credit="none", see recipes.check).
    breadth_first: True takes one prefix of every triggered question before a second of any (paper); False
      takes the globally best prefixes.
    round_order: ours; order of the questions within a round: "confidence" (ascending) or "index".
    confidence_span: ours; tokens the confidence averages over: "call" (the first call, tags
      included) or "call_body" (without the tags).
  """

  ratio: float = 0.25
  k: int = 4
  choice: str = "uncertain"
  cut: str = "first"
  early_stop: bool = False
  subgroup: str = "tool"
  prefix: str = "thinking"
  breadth_first: bool = True
  round_order: str = "confidence"
  confidence_span: str = "call"

  def __post_init__(self):
    for field, allowed in _CHOICES.items():
      if getattr(self, field) not in allowed:
        raise ValueError(f"resample.{field}={getattr(self, field)!r}; choose one of {allowed}.")
    if not (math.isfinite(self.ratio) and self.ratio >= 0):
      raise ValueError(f"resample.ratio={self.ratio}; it must be finite and >= 0 (0 turns it off).")
    if self.k < 2:
      raise ValueError(f"resample.k={self.k}; a group of continuations needs at least 2.")


@dataclasses.dataclass(frozen=True)
class DynamicConfig:
  """Dynamic sampling (DAPO, arXiv 2503.14476): a step trains only on questions that `algorithm.informative` keeps.

  Attributes:
    rounds: most further rounds of sampling until a step has B such questions; 0 is off, and a step trains on
      all of its questions, as in AXPO's paper.
    oversample: questions of a round, as a multiple of those that are missing. Larger values need fewer rounds
      and discard more questions. At least 1.
  """

  rounds: int = 0
  oversample: float = 1.0

  def __post_init__(self):
    if self.rounds < 0:
      raise ValueError(f"dynamic.rounds={self.rounds}; it must be >= 0 (0 is off).")
    if not (math.isfinite(self.oversample) and self.oversample >= 1):
      raise ValueError(f"dynamic.oversample={self.oversample}; it must be >= 1.")


@dataclasses.dataclass(frozen=True, eq=False)
class GroupView:
  """What the plan reads of one question.

  Attributes:
    rewards_N: binary rewards as judged, before any shaping.
    used_tool_N: whether the rollout opened at least one tool call.
    candidate_N: whether the rollout can be cut and continued (it has a prefix end, and token and
      turn budget left after it). Only candidates of the resampled subgroup are ever selected.
    confidence_N: mean sampling probability of the tokens behind the cut (see `confidence`); NaN
      where the rollout is no candidate.
    index: the question's number within the step; comes back as Selection.group. Unique.
    key_N: a number that identifies the rollout in any order (its seed). Breaks ties and
      draws the random choice, so that permuting rollouts changes nothing. Non-negative, unique in
      the group; None means the position, the one case in which a tie depends on order.
    family: kind of question, for choice="recoverable".
  """

  rewards_N: np.ndarray
  used_tool_N: np.ndarray
  candidate_N: np.ndarray
  confidence_N: np.ndarray
  index: int
  key_N: Sequence[int] | None = None
  family: str = ""

  def __post_init__(self):
    lengths = {
      name: len(value)
      for name in ("rewards_N", "used_tool_N", "candidate_N", "confidence_N", "key_N")
      if (value := getattr(self, name)) is not None
    }
    if len(set(lengths.values())) != 1:
      raise ValueError(f"group {self.index}: vectors differ in length: {lengths}.")
    keys = self.keys
    if len(set(keys)) != len(keys) or min(keys, default=0) < 0:
      raise ValueError(f"group {self.index}: key_N must be unique and >= 0, got {list(keys)}.")

  @property
  def keys(self) -> tuple[int, ...]:
    return tuple(range(len(self.rewards_N))) if self.key_N is None else tuple(map(int, self.key_N))


class Cut(NamedTuple):
  """Where a rollout can be cut: `end` of its tokens are frozen; `confidence` of what followed them."""

  end: int
  confidence: float


@dataclasses.dataclass(frozen=True)
class Selection:
  """One prefix to resample: rollout `rollout` (position) of the group whose index is `group`."""

  group: int
  rollout: int
  confidence: float


def confidence(
  logprobs_C: Sequence[float] | np.ndarray, *, span: str = "call", closed: bool = True
) -> float:
  """Arithmetic mean of the sampling probabilities over a call's tokens. Low means uncertain.

  Args:
    logprobs_C: behaviour log-probabilities of the first call's tokens, both tags included.
    span: ResampleConfig.confidence_span; "call_body" leaves out the one-token tags.
    closed: whether the last token is the closing tag (False for a call cut off by a limit).

  Raises:
    ValueError: no token is left, or a log-probability is not finite.
  """
  logprobs_C = np.asarray(logprobs_C, dtype=np.float64)
  if span == "call_body":
    logprobs_C = logprobs_C[1 : len(logprobs_C) - 1 if closed else None]
  if logprobs_C.size == 0 or not np.isfinite(logprobs_C).all():
    raise ValueError(
      f"a call's confidence needs finite log-probabilities of at least one token, got "
      f"{logprobs_C.tolist()}; pass the sampled tokens of the first call only."
    )
  return math.fsum(np.exp(logprobs_C)) / logprobs_C.size


def subgroup_mask(used_tool_N: np.ndarray, subgroup: str = "tool") -> np.ndarray:
  """Members of the tool or the no-tool subgroup; bool [N]."""
  used_tool_N = np.asarray(used_tool_N, dtype=bool)
  return used_tool_N if subgroup == "tool" else ~used_tool_N


def prefix_budget(num_rollouts: int, config: ResampleConfig) -> int:
  """M = floor(r * B * N / K) whole prefixes; `num_rollouts` is B * N, failed rollouts included.

  Exact in decimals: 0.29 of 100 is 29, which binary floating point would floor to 28.
  """
  return math.floor(Fraction(str(config.ratio)) * num_rollouts / config.k)


def check_indices(groups: Sequence[GroupView]) -> None:
  """Raises ValueError if two questions of a step have one index."""
  indices = [group.index for group in groups]
  if len(set(indices)) != len(indices):
    raise ValueError(f"GroupView.index must be unique within a step, got {indices}.")


def rank_candidates(
  group: GroupView, config: ResampleConfig, rng_seed: int, recovery: Recovery
) -> list[tuple[float, int, int]]:
  """(score, key, position) of the group's candidates, best first; a lower score is better.

  Raises:
    ValueError: a candidate has no finite confidence.
  """
  eligible_N = np.asarray(group.candidate_N, dtype=bool) & subgroup_mask(
    group.used_tool_N, config.subgroup
  )
  ranked = []
  for rollout in np.flatnonzero(eligible_N).tolist():
    score, key = float(group.confidence_N[rollout]), group.keys[rollout]
    if not math.isfinite(score):
      raise ValueError(
        f"group {group.index}, rollout {rollout} is a candidate with confidence {score}; "
        "clear its candidate flag or give the mean probability of its call."
      )
    if config.choice == "random":
      # A draw per rollout rather than a shuffle: it does not depend on the order of the others.
      score = np.random.default_rng([rng_seed, group.index, key]).random()
    elif config.choice == "recoverable":
      score = -recovery.chance(group.family, score)
    ranked.append((score, key, rollout))
  return sorted(ranked)
