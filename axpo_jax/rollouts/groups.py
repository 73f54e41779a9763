"""A question with its rollouts and branches, and its views for the algorithm and the census.

In: `Group`s as `collect` makes them. Out: the plain records of `rl.algorithm` (where each rollout can be cut, the
confidence of its call, its reward) and of `census`. Neither reads transcripts: after this module only `train` does.
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
    prefix_end: how many collapsed tokens of the source are frozen.
    confidence: of the source's call.
    rollouts: the continuations; their transcripts include the frozen prefix.
  """

  source: int
  prefix_end: int
  confidence: float
  rollouts: list[Rollout]

  @property
  def frozen(self) -> bool:
    """Whether there is a prefix; False: the continuations begin at the question."""
    return self.prefix_end > self.rollouts[0].transcript.prompt_length


@dataclasses.dataclass
class Group:
  """One question, its rollouts, and the branches that AXPO added.

  `failures` has the reason of every rollout and continuation that failed by a fault of the machine and not of
  the policy (engine error, deadline, a question whose image does not open). They are not in `rollouts` and
  `branches`, since nothing can be learnt from them.
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
  """Light copies for the other processes of a run, with what credit and packing need: questions by id, images by
  size and key (`train.pictures.fetched` gets the pixels)."""
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
  """The reasons of failures with their counts, most frequent first; "" if nothing failed."""
  reasons = collections.Counter(reason for group in groups for reason in group.failures)
  listed = [f"{count} x {reason[:300]}" for reason, count in reasons.most_common(most)]
  more = len(reasons) - len(listed)
  return "; ".join(listed) + (f"; and {more} other reasons" if more else "")


def plan_view(number: int, group: Group, cuts: Sequence[Cut | None]) -> GroupView:
  """The group as the resampling plan reads it; `cuts` holds the cut of each rollout."""
  return GroupView(
    rewards_N=np.array([rollout.reward for rollout in group.rollouts]),
    used_tool_N=np.array([rollout.used_tool for rollout in group.rollouts], bool),
    candidate_N=np.array([own is not None for own in cuts], bool),
    confidence_N=np.array([float("nan") if own is None else own.confidence for own in cuts]),
    index=number, key_N=[rollout.seed for rollout in group.rollouts], family=group.question.category)


def outcome_of(group: Group) -> GroupOutcome:
  """The group as credit assignment reads it."""
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
  """The step's resampled prefixes, for the record of `rl.recovery`."""
  return [Tried(group.question.category, branch.confidence, any(is_right([r.reward for r in branch.rollouts])))
          for group in groups for branch in group.branches]


def response_length(transcript: Transcript) -> int:
  """Expanded tokens after the prompt, which `EpisodeLimits.max_response_tokens` limits."""
  after = [image.shown.num_tokens - 1 for image in transcript.images[
    transcript.ids[:transcript.prompt_length].count(transcript.special.image_pad):]]
  return len(transcript) - transcript.prompt_length + sum(after)


def cut_of(transcript: Transcript, config: ResampleConfig) -> Cut | None:
  """Where a rollout is cut, and the confidence of the tokens sampled there; None if there is nothing to resample.

  The collapsed tokens before the cut are frozen: up to and including the opening tag of a tool call; the first
  turn's thinking if no-tool rollouts are resampled; or the prompt alone.
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
  """The cut, moved to the question if the environment cannot restore its state at the cut."""
  if found and environment.resume == NONE and Kind.OBSERVATION in transcript.kinds[:found.end]:
    return Cut(transcript.prompt_length, found.confidence)
  return found


def _cut(transcript: Transcript, span: tuple[int, int], kept: int, config: ResampleConfig) -> Cut:
  """The cut after the first `kept` tokens of a span; the span's probabilities are its confidence."""
  closed = transcript.ids[span[1] - 1] == transcript.special.tool_call_end
  return Cut(span[0] + kept, confidence(transcript.logprobs[slice(*span)], span=config.confidence_span,
                                        closed=closed))


def _calls(transcript: Transcript, config: ResampleConfig) -> list[tuple[int, int]]:
  """[start, stop) of the calls at which a rollout may be cut, tags included."""
  first = transcript.first_call_span()
  if config.cut == "first" or first is None:
    return [] if first is None else [first]
  # Only calls that ran: a call in the last allowed turn does not run, and would not run in a continuation.
  later = [(turn.start + span.start, turn.start + span.stop)
           for turn in transcript.turns[:len(transcript.outcomes)]
           for span in parse.call_spans(transcript.ids[turn.start:turn.stop], transcript.special)]
  return later or [first]


def _first_answer(transcript: Transcript) -> list[tuple[int, int]]:
  """[start, stop) of the first turn's text after its thinking, if there is any."""
  first = transcript.turns[0] if transcript.turns else None
  if first is None:
    return []
  answer = [i for i in range(*first) if transcript.kinds[i] == Kind.ANSWER]
  return [(answer[0], first.stop)] if answer else []


def group_stats(groups: Sequence[Group], config: ResampleConfig, chat: Chat
                ) -> list[census.GroupStats]:
  """The groups as the census reads them; `config` defines the trigger."""
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
  """By how many versions the sampling weights were older than `version`, the weights about to be trained: mean and
  maximum over the sampled tokens."""
  rollouts = [r for g in groups for r in (*g.rollouts, *(r for b in g.branches for r in b.rollouts))]
  versions = np.array([v for r in rollouts for v in r.transcript.versions[r.start:] if v >= 0])
  if not versions.size:
    return {}
  return {"rollout/lag_mean": float(version - versions.mean()),
          "rollout/lag_max": float(version - versions.min())}


def rollout_stats(rollout: Rollout, chat: Chat) -> census.RolloutStats:
  """A rollout as the census reads it."""
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
