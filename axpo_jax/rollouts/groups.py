"""A question with its rollouts and branches, and what the algorithm and the census read of it.

In: `Group`s as `collect` makes them. Out: the plain records of `rl.algorithm` (where each rollout can be cut, how
certain its call was, what each was worth) and of `census`. Transcripts end here: nothing behind this module reads
tokens before `train` packs them.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from axpo_jax.agent import parse
from axpo_jax.agent.environment import NONE, Environment
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.transcript import Kind, Transcript
from axpo_jax.data.question import Question
from axpo_jax.model.chat import Chat
from axpo_jax.rl import algorithm
from axpo_jax.rl.advantages import is_right
from axpo_jax.rl.credit import BranchOutcome, GroupOutcome
from axpo_jax.rl.recovery import Tried
from axpo_jax.rl.resample import Cut, GroupView, ResampleConfig, confidence
from axpo_jax.rollouts import census


@dataclasses.dataclass
class Branch:
  """K continuations of one frozen prefix.

  Attributes:
    source: the rollout of the group whose prefix it is.
    prefix_end: collapsed tokens of the source that are frozen.
    confidence: of the source's call.
    rollouts: the continuations, whole transcripts (frozen prefix included).
  """

  source: int
  prefix_end: int
  confidence: float
  rollouts: list[Rollout]

  @property
  def frozen(self) -> bool:
    """Whether there is a prefix; False: they begin at the question."""
    return self.prefix_end > self.rollouts[0].transcript.prompt_length


@dataclasses.dataclass
class Group:
  """One question, its rollouts, and the branches that AXPO added to them.

  `failures` has the reason of every rollout and continuation that the machine and not the policy
  ended (engine error, deadline, a question whose image does not open). They are left out: nothing can
  be learnt from them.
  """

  question: Question
  rollouts: list[Rollout]
  branches: list[Branch] = dataclasses.field(default_factory=list)
  failures: list[str] = dataclasses.field(default_factory=list)

  @property
  def failed(self) -> int:
    """How many rollouts and continuations failed."""
    return len(self.failures)


def for_training(groups: Sequence[Group]) -> list[Group]:
  """Copies with what credit and batches are planned by, for the other processes of a run: questions by
  name, pictures by size and key (`pictures.fetched` gets pixels)."""
  def light(rollout: Rollout) -> Rollout:
    transcript = copy.copy(rollout.transcript)
    transcript.states = []
    transcript.images = [
      dataclasses.replace(image, source=None, shown=dataclasses.replace(image.shown, pixels_HxWx3=None))
      for image in transcript.images]
    return dataclasses.replace(rollout, transcript=transcript)

  return [dataclasses.replace(
    group, question=dataclasses.replace(group.question, text="", images=(), meta={}),
    rollouts=[*map(light, group.rollouts)],
    branches=[dataclasses.replace(branch, rollouts=[*map(light, branch.rollouts)])
              for branch in group.branches]) for group in groups]


def failures_of(rollouts: Iterable[Rollout]) -> list[str]:
  return [rollout.error or rollout.stop for rollout in rollouts if rollout.failed]


def failure_summary(groups: Iterable[Group], most: int = 5) -> str:
  """What failed how often, the most frequent reason first; "" if nothing did."""
  reasons = collections.Counter(reason for group in groups for reason in group.failures)
  listed = [f"{count} x {reason[:300]}" for reason, count in reasons.most_common(most)]
  more = len(reasons) - len(listed)
  return "; ".join(listed) + (f"; and {more} other reasons" if more else "")


def plan_view(number: int, group: Group, cuts: Sequence[Cut | None]) -> GroupView:
  """What the resampling plan reads of a group, whose rollouts are cut as `cuts` says."""
  return GroupView(
    rewards_N=np.array([rollout.reward for rollout in group.rollouts]),
    used_tool_N=np.array([rollout.used_tool for rollout in group.rollouts], bool),
    candidate_N=np.array([own is not None for own in cuts], bool),
    confidence_N=np.array([float("nan") if own is None else own.confidence for own in cuts]),
    index=number, key_N=[rollout.seed for rollout in group.rollouts], family=group.question.category)


def outcome_of(group: Group) -> GroupOutcome:
  """What credit reads of a group."""
  def counts(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    return {"num_calls": np.array([len(rollout.calls) for rollout in rollouts], int),
            "lengths": np.array([response_length(rollout.transcript) for rollout in rollouts], int)}

  def rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    return np.array([rollout.reward for rollout in rollouts], np.float64)

  def turns(rollouts: Sequence[Rollout]) -> list[list[float]]:
    return [rollout.transcript.rewards for rollout in rollouts]

  return GroupOutcome(
    rewards(group.rollouts),
    [BranchOutcome(branch.source, rewards(branch.rollouts),
                   **{f"{name}_K": x for name, x in counts(branch.rollouts).items()}, frozen=branch.frozen,
                   turn_rewards_K=turns(branch.rollouts))
     for branch in group.branches],
    **{f"{name}_N": x for name, x in counts(group.rollouts).items()}, turn_rewards_N=turns(group.rollouts))


def tried_prefixes(groups: Iterable[Group]) -> list[Tried]:
  """The step's resampled prefixes, as `rl.recovery` learns from them."""
  return [Tried(group.question.category, branch.confidence, any(is_right([r.reward for r in branch.rollouts])))
          for group in groups for branch in group.branches]


def response_length(transcript: Transcript) -> int:
  """Expanded tokens after the prompt, which `EpisodeLimits.max_response_tokens` limits."""
  after = [image.shown.num_tokens - 1 for image in transcript.images[
    transcript.ids[:transcript.prompt_length].count(transcript.special.image_pad):]]
  return len(transcript) - transcript.prompt_length + sum(after)


def cut_of(transcript: Transcript, config: ResampleConfig) -> Cut | None:
  """Where a rollout is cut, and how certain the policy was of what it sampled there; None if there is
  nothing to sample again.

  The collapsed tokens before the cut are frozen: up to and including the opening tag of a tool call, the
  first turn's thinking where no-tool rollouts are resampled, or the prompt alone.
  """
  if config.subgroup == "no_tool":
    found = [_cut(transcript, span, 0, config) for span in _first_answer(transcript)]
  else:
    found = [_cut(transcript, span, 1, config) for span in _calls(transcript, config)]
  chosen = algorithm.choose_cut(found, config)
  if chosen is not None and config.prefix == "question":
    return Cut(transcript.prompt_length, chosen.confidence)
  return chosen


def resumable(found: Cut | None, transcript: Transcript, environment: Environment) -> Cut | None:
  """The cut; at the question, where the environment cannot give its state in the middle again."""
  if found and environment.resume == NONE and Kind.OBSERVATION in transcript.kinds[:found.end]:
    return Cut(transcript.prompt_length, found.confidence)
  return found


def _cut(transcript: Transcript, span: tuple[int, int], kept: int, config: ResampleConfig) -> Cut:
  """The cut behind the first `kept` tokens of a span, whose probabilities say how certain it was."""
  closed = transcript.ids[span[1] - 1] == transcript.special.tool_call_end
  return Cut(span[0] + kept, confidence(transcript.logprobs[slice(*span)], span=config.confidence_span,
                                        closed=closed))


def _calls(transcript: Transcript, config: ResampleConfig) -> list[tuple[int, int]]:
  """[start, stop) of the calls at which a rollout may be cut, tags included."""
  first = transcript.first_call_span()
  if config.cut == "first" or first is None:
    return [] if first is None else [first]
  # Of later calls those that ran: a continuation of the last allowed turn's would not run either.
  later = [(turn.start + span.start, turn.start + span.stop)
           for turn in transcript.turns[:len(transcript.outcomes)]
           for span in parse.call_spans(transcript.ids[turn.start:turn.stop], transcript.special)]
  return later or [first]


def _first_answer(transcript: Transcript) -> list[tuple[int, int]]:
  """[start, stop) of what the first turn says behind its thinking, if it says anything."""
  first = transcript.turns[0] if transcript.turns else None
  if first is None:
    return []
  answer = [i for i in range(*first) if transcript.kinds[i] == Kind.ANSWER]
  return [(answer[0], first.stop)] if answer else []


def group_stats(groups: Sequence[Group], config: ResampleConfig, chat: Chat
                ) -> list[census.GroupStats]:
  """The groups as the census counts them; `config` says what triggers."""
  def stats(rollout: Rollout) -> census.RolloutStats:
    return rollout_stats(rollout, chat)

  out = []
  for group in groups:
    branches = [census.BranchStats(
      branch.source, [stats(rollout) for rollout in branch.rollouts],
      prefix_tokens=sum(rollout.first_prompt_tokens for rollout in branch.rollouts),
      cached_tokens=sum(rollout.first_cached_tokens for rollout in branch.rollouts),
      frozen=branch.frozen)
      for branch in group.branches]
    rewards_N = np.array([rollout.reward for rollout in group.rollouts])
    used_tool_N = np.array([rollout.used_tool for rollout in group.rollouts], bool)
    fired = algorithm.triggered(rewards_N, used_tool_N, subgroup=config.subgroup)
    out.append(census.GroupStats([stats(r) for r in group.rollouts], branches, fired,
                                 family=group.question.category,
                                 acting=group.question.acting))
  return out


def lag_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
  """How many versions older than `version`, which is about to be trained, the sampling weights
  were: mean and largest over the sampled tokens."""
  rollouts = [r for g in groups for r in (*g.rollouts, *(r for b in g.branches for r in b.rollouts))]
  versions = np.array([v for r in rollouts for v in r.transcript.versions[r.start:] if v >= 0])
  if not versions.size:
    return {}
  return {"rollout/lag_mean": float(version - versions.mean()),
          "rollout/lag_max": float(version - versions.min())}


def rollout_stats(rollout: Rollout, chat: Chat) -> census.RolloutStats:
  """A rollout as the census counts it."""
  transcript = rollout.transcript
  return census.RolloutStats(
    reward=rollout.reward, used_tool=rollout.used_tool, num_calls=len(rollout.calls),
    turns=rollout.num_turns, sampled_tokens=int(transcript.sampled[rollout.start:].sum()),
    stop=rollout.stop,
    tool_errors=dict(collections.Counter(call.error for call in rollout.calls if call.error)),
    mentions_tool_without_call=not rollout.used_tool and _mentions(transcript, chat),
    confidence=rollout.confidence(), total_tokens=transcript.expanded_length,
    prompt_tokens=rollout.prompt_tokens, cached_tokens=rollout.cached_tokens,
    reward_timed_out=rollout.reward_timed_out, reward_failed=rollout.reward_error is not None,
    reward_parts=rollout.reward_parts)


def _mentions(transcript: Transcript, chat: Chat) -> bool:
  """Whether the thinking names a tool."""
  thought = chat.decode([i for i, kind in zip(transcript.ids, transcript.kinds)
                         if kind == Kind.THINK]).lower()
  return any(word in thought for word in census.TOOL_WORDS)
