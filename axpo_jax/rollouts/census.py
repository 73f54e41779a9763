"""Statistics of a step's rollouts, as logged metrics (docs/metrics.md has every name).

In: plain records of rollouts and resampled branches. Out: flat dicts of name -> float. A rate with an empty
denominator (the success rate of tool use if no rollout used a tool) is left out, not reported as 0 or NaN.

Legend: N rollouts of one question, K continuations of one prefix.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from axpo_jax.rl.advantages import RIGHT
from axpo_jax.rl.credit import PREFIX, Credit

# Stop reasons that mean "ran out of room"; the names are the episode loop's.
TRUNCATED_STOPS = frozenset({"turn_limit", "token_limit", "length"})

# Words by which thinking mentions a tool: mention_without_call_rate.
TOOL_WORDS = ("zoom", "tool", "search", "python", "crop")

# Statistics of ordinary rollouts, and of resampling, that are also reported by family.
BY_FAMILY = (
  "questions", "reward_mean", "tool_attempt_rate", "tool_success_rate", "no_tool_success_rate",
  "tool_all_wrong_rate", "tool_all_wrong_rate_after", "calls_per_tool_rollout", "tool_error_rate")
RESAMPLING_BY_FAMILY = ("triggered_share", "recovered_share", "continuation_success_rate")

_MOST_PARTS = 64  # of rewards, among the metrics
SUBGROUPS = ("tool", "no_tool")
STATES = ("absent", "all_wrong", "mixed", "all_right")


@dataclasses.dataclass(frozen=True)
class RolloutStats:
  """One rollout or continuation as the census reads it.

  Attributes:
    reward: as judged (0 or 1), before any shaping.
    used_tool: at least one tool call was opened after the thinking; always true for a continuation
      of an AXPO prefix.
    num_calls: tool calls made, failed ones included; a continuation counts its own.
    turns: assistant turns.
    sampled_tokens: tokens the policy sampled; a continuation counts its own.
    stop: why the episode ended.
    tool_errors: failed calls by kind of error.
    mentions_tool_without_call: the thinking names a tool, but no call follows.
    confidence: mean sampling probability of the first call's tokens (`resample.confidence`); None
      without a call.
    total_tokens: length of the expanded sequence, prompt and observations included.
    prompt_tokens: prompt tokens sent to the sampler over all turns (expanded).
    cached_tokens: those of them served from its prefix cache.
    reward_timed_out: judging it ran out of time or memory; its reward is 0.
    reward_failed: a reward function failed, and the reward counts as 0.
    reward_parts: the parts whose weighted sum is the reward.
  """

  reward: float
  used_tool: bool
  num_calls: int
  turns: int
  sampled_tokens: int
  stop: str
  tool_errors: Mapping[str, int] = dataclasses.field(default_factory=dict)
  mentions_tool_without_call: bool = False
  confidence: float | None = None
  total_tokens: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  reward_timed_out: bool = False
  reward_failed: bool = False
  reward_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def right(self) -> bool:
    return self.reward > RIGHT


@dataclasses.dataclass(frozen=True)
class BranchStats:
  """K continuations of one prefix.

  Attributes:
    source: position of the source rollout in its group.
    rollouts: the K continuations.
    prefix_tokens: prompt tokens (expanded) of the K first requests, summed: K times the length of
      question and frozen prefix.
    cached_tokens: those of them served from the sampler's prefix cache.
    frozen: there is a prefix; False: they begin at the question.
  """

  source: int
  rollouts: Sequence[RolloutStats]
  prefix_tokens: int = 0
  cached_tokens: int = 0
  frozen: bool = True

  @property
  def recovered(self) -> bool:
    return any(rollout.right for rollout in self.rollouts)


@dataclasses.dataclass(frozen=True)
class GroupStats:
  """One question: its rollouts, its branches, whether it triggered, its family ("" for none), and whether one
  should act on it ("act", "decline" or "either"; see `rollouts.acting`)."""

  rollouts: Sequence[RolloutStats]
  branches: Sequence[BranchStats] = ()
  triggered: bool = False
  family: str = ""
  acting: str = "either"


def census(
  groups: Sequence[GroupStats], *, prefix: str = "rollout", fixed_counts: Sequence[int] = (2, 4)
) -> dict[str, float]:
  """Statistics of the ordinary rollouts; branches count only in `*_after`.

  Args:
    groups: the step's questions.
    prefix: first part of the names: "rollout" in training, "eval" in evaluation.
    fixed_counts: subgroup sizes m of tool_all_wrong_rate_at_<m>.

  Returns:
    Metrics by name; empty if there is no rollout.
  """
  rollouts = [rollout for group in groups for rollout in group.rollouts]
  if not rollouts:
    return {}
  out = {"questions": float(len(groups)), "rollouts": float(len(rollouts))}
  out |= _tool_use(rollouts) | _subgroups(groups) | _all_wrong(groups, fixed_counts)
  out |= _calls(rollouts) | _lengths(rollouts) | _endings(rollouts)
  judged = (*rollouts, *(r for g in groups for branch in g.branches for r in branch.rollouts))
  out["reward_timeouts"] = float(sum(r.reward_timed_out for r in judged)) or None
  out["reward_failures"] = float(sum(r.reward_failed for r in judged)) or None
  out |= _reward_parts(rollouts)
  return {f"{prefix}/{name}": value for name, value in out.items() if value is not None}


def resample_census(groups: Sequence[GroupStats], *, budget: int) -> dict[str, float]:
  """Statistics of trigger, selection and continuations: the axpo/ metrics.

  Args:
    groups: the step's questions with their branches.
    budget: M, the whole prefixes the step could afford (`resample.prefix_budget`).
  """
  branches = [branch for group in groups for branch in group.branches]
  extra = [rollout for branch in branches for rollout in branch.rollouts]
  triggered = [group for group in groups if group.triggered]
  served = [group for group in triggered if group.branches]
  out = {
    "triggered": float(len(triggered)),
    "triggered_share": _share(g.triggered for g in groups),
    "served_share": _share(bool(g.branches) for g in triggered),
    "prefixes": float(len(branches)),
    "budget": float(budget),
    "budget_used": len(branches) / budget if budget else None,
    "continuations": float(len(extra)),
    "recovered": float(sum(any(b.recovered for b in g.branches) for g in served)),
    "recovered_share": _share(any(b.recovered for b in g.branches) for g in triggered),
    "prefix_recovered_share": _share(branch.recovered for branch in branches),
    "prefix_mixed_share": _share(_state(branch.rollouts) == "mixed" for branch in branches),
    "not_frozen": float(sum(not branch.frozen for branch in branches)) or None,
    "continuation_success_rate": _share(rollout.right for rollout in extra),
    "continuation_length_mean": _mean(r.sampled_tokens for r in extra),
    "continuation_truncated_rate": _share(r.stop in TRUNCATED_STOPS for r in extra),
    "continuation_tool_error_rate": _ratio(
      sum(sum(r.tool_errors.values()) for r in extra), sum(r.num_calls for r in extra)
    ),
    "prefix_cached_share": _ratio(
      sum(b.cached_tokens for b in branches), sum(b.prefix_tokens for b in branches)
    ),
  }
  out |= _confidences(groups)
  return {f"axpo/{name}": value for name, value in out.items() if value is not None}


def families(groups: Sequence[GroupStats]) -> dict[str, list[GroupStats]]:
  """The groups of every family, by its name in metrics; those without a family are left out."""
  out = collections.defaultdict(list)
  for group in groups:
    if group.family:
      out[re.sub(r"\W+", "_", group.family)].append(group)
  return dict(sorted(out.items()))


def census_by_family(groups: Sequence[GroupStats], *, prefix: str = "rollout") -> dict[str, float]:
  """The statistics `BY_FAMILY` of every family's groups, as {prefix}/{family}/..."""
  return _selected(BY_FAMILY, {
    f"{prefix}/{family}": census(members, prefix="") for family, members in families(groups).items()})


def resample_census_by_family(groups: Sequence[GroupStats]) -> dict[str, float]:
  """The statistics `RESAMPLING_BY_FAMILY` of every family's groups, as axpo/{family}/..."""
  return _selected(RESAMPLING_BY_FAMILY, {
    f"axpo/{family}": resample_census(members, budget=0)
    for family, members in families(groups).items()})


def _selected(names: Iterable[str], found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """The metrics whose last part is in `names`, under their prefix."""
  out = {}
  for prefix, metrics in found.items():
    by_name = {name.rpartition("/")[2]: value for name, value in metrics.items()}
    out |= {f"{prefix}/{name}": by_name[name] for name in names if name in by_name}
  return out


def credit_census(credits: Sequence[Credit]) -> dict[str, float]:
  """Sizes and signs of the advantages that a step assigns, per sequence."""
  prefixes = [credit.advantage for credit in credits if credit.region == PREFIX]
  out = {
    "train/sequences": float(len(credits)),
    "train/sequences_nonzero_share": _share(credit.advantage != 0 for credit in credits),
    "axpo/prefix_advantage_mean": _mean(prefixes),
    "axpo/prefix_advantage_positive_share": _share(a > 0 for a in prefixes),
  }
  return {name: value for name, value in out.items() if value is not None}


def _tool_use(rollouts):
  tool = [r for r in rollouts if r.used_tool]
  no_tool = [r for r in rollouts if not r.used_tool]
  return {
    "reward_mean": _mean(r.reward for r in rollouts),
    "tool_attempt_rate": len(tool) / len(rollouts),
    "tool_success_rate": _share(r.right for r in tool),
    "no_tool_success_rate": _share(r.right for r in no_tool),
    "mention_without_call_rate": _share(r.mentions_tool_without_call for r in rollouts),
    "confidence_mean": _mean(r.confidence for r in tool if r.confidence is not None),
  }


def _subgroups(groups):
  """The census table, as shares of the questions; each subgroup's four shares add up to 1."""
  counts = collections.Counter(
    (subgroup, _state(_members(group.rollouts, subgroup)))
    for group in groups
    for subgroup in SUBGROUPS
  )
  table = {
    f"census_{subgroup}_{state}": counts[subgroup, state] / len(groups)
    for subgroup in SUBGROUPS
    for state in STATES
  }
  table["no_signal_share"] = _share(_state(group.rollouts) != "mixed" for group in groups)
  return table


def _all_wrong(groups, fixed_counts):
  """Of the questions where the subgroup is not empty, the share where all of it is wrong."""
  out = {}
  for subgroup in SUBGROUPS:
    before = [_members(group.rollouts, subgroup) for group in groups]
    after = [_members(_with_branches(group), subgroup) for group in groups]
    out[f"{subgroup}_all_wrong_rate"] = _share(_state(m) == "all_wrong" for m in before if m)
    out[f"{subgroup}_all_wrong_rate_after"] = _share(
      _state(a) == "all_wrong" for m, a in zip(before, after) if m
    )
  tool = [_members(group.rollouts, "tool") for group in groups]
  for count in fixed_counts:
    rates = [_all_wrong_of(count, members) for members in tool if len(members) >= count]
    out[f"tool_all_wrong_rate_at_{count}"] = _mean(rates)
  return out


def _calls(rollouts):
  tool = [r for r in rollouts if r.used_tool]
  calls = sum(r.num_calls for r in rollouts)
  errors = collections.Counter()
  for rollout in rollouts:
    errors.update(rollout.tool_errors)
  out = {
    "calls_mean": calls / len(rollouts),
    "calls_per_tool_rollout": _mean(r.num_calls for r in tool),
    "stop_after_first_call_rate": _share(r.num_calls == 1 for r in tool),
    "tool_error_rate": _ratio(sum(errors.values()), calls),
  }
  return out | {f"tool_errors/{kind}": float(n) for kind, n in sorted(errors.items())}


def _lengths(rollouts):
  out = {
    "length_mean": _mean(r.sampled_tokens for r in rollouts),
    "length_max": float(max(r.sampled_tokens for r in rollouts)),
    "length_tool_mean": _mean(r.sampled_tokens for r in rollouts if r.used_tool),
    "length_no_tool_mean": _mean(r.sampled_tokens for r in rollouts if not r.used_tool),
    "turns_mean": _mean(r.turns for r in rollouts),
    "turns_max": float(max(r.turns for r in rollouts)),
    "prompt_cached_share": _ratio(
      sum(r.cached_tokens for r in rollouts), sum(r.prompt_tokens for r in rollouts)
    ),
  }
  if any(r.total_tokens for r in rollouts):
    out["total_length_mean"] = _mean(r.total_tokens for r in rollouts)
    out["total_length_max"] = float(max(r.total_tokens for r in rollouts))
  return out


def _reward_parts(rollouts):
  """Mean of every part over the rollouts that have it. Reward functions name the parts; the first `_MOST_PARTS`
  names are kept."""
  names = list(dict.fromkeys(name for r in rollouts for name in r.reward_parts))[:_MOST_PARTS]
  return {f"reward/{name}": _mean(r.reward_parts[name] for r in rollouts if name in r.reward_parts)
          for name in names}


def _endings(rollouts):
  stops = collections.Counter(r.stop for r in rollouts)
  out = {"truncated_rate": _share(r.stop in TRUNCATED_STOPS for r in rollouts)}
  return out | {f"stop/{stop}": n / len(rollouts) for stop, n in sorted(stops.items())}


def _confidences(groups):
  """Mean confidence of the selected prefixes, and of every other tool call of the step."""
  selected, other = [], []
  for group in groups:
    sources = {branch.source for branch in group.branches}
    for position, rollout in enumerate(group.rollouts):
      if rollout.confidence is not None:
        (selected if position in sources else other).append(rollout.confidence)
  return {"confidence_selected": _mean(selected), "confidence_other": _mean(other)}


def _members(rollouts, subgroup):
  return [r for r in rollouts if r.used_tool == (subgroup == "tool")]


def _with_branches(group):
  return [*group.rollouts, *(r for branch in group.branches for r in branch.rollouts)]


def _state(rollouts):
  right = sum(r.right for r in rollouts)
  if not rollouts:
    return "absent"
  if right == 0:
    return "all_wrong"
  return "all_right" if right == len(rollouts) else "mixed"


def _all_wrong_of(count, members):
  """Chance that `count` members drawn without replacement are all wrong (unbiased)."""
  wrong = sum(not r.right for r in members)
  return math.comb(wrong, count) / math.comb(len(members), count)


def _mean(values: Iterable[float]) -> float | None:
  values = [float(v) for v in values]
  return math.fsum(values) / len(values) if values else None


_share = _mean


def _ratio(numerator: float, denominator: float) -> float | None:
  return numerator / denominator if denominator else None
