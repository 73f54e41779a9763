"""The rollout phase of a step: N rollouts a question, then AXPO's continuations of frozen prefixes.

In: questions and an Actor (engine, tools, limits). Out: Groups, each with its rollouts and the
Branches that AXPO added. A fresh rollout continues the prompt, a continuation continues a cut
transcript: both are the same call.
"""

import asyncio
import collections
import copy
import dataclasses
import itertools
import traceback
from collections.abc import Callable, Coroutine, Iterable, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from axpo_jax import seeds
from axpo_jax.agent.episode import EXACT, EpisodeLimits, continue_episode, start_transcript
from axpo_jax.agent.reward_functions import RewardSum
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.transcript import Kind, Transcript
from axpo_jax.data import question as question_lib
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Engine, SamplingParams
from axpo_jax.model import images
from axpo_jax.model.chat import Chat, ChatError
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.rl.resample import GroupView, ResampleConfig, confidence, plan_resamples, triggered
from axpo_jax.rollouts import census


@dataclasses.dataclass(frozen=True)
class Actor:
  """All that an episode needs besides its question.

  Attributes:
    reward: of finished rollouts; None: whoever asked for them scores them.
    check: raises for a transcript that nothing can be done with, such as one that cannot be packed.
  """

  engine: Engine
  chat: Chat
  processor: ImageProcessor
  toolbox: ToolBox
  limits: EpisodeLimits
  sampling: SamplingParams
  image_limits: ImageLimits
  system_prompt: str
  reward: RewardSum | None = EXACT
  check: Callable[[Transcript], None] | None = None

  def start(self, question: Question) -> Transcript:
    return start_transcript(question, self.chat, self.toolbox, self.system_prompt, self.processor,
                            self.image_limits)

  async def roll(self, transcript: Transcript, question: Question, seed: int) -> Rollout:
    """Continues `transcript` to its end and scores it.

    Whatever fails in the episode ends it as a failed rollout, and nothing else.
    """
    try:
      rollout = await continue_episode(
        transcript, question, self.engine, self.toolbox, self.limits, self.sampling, self.chat,
        self.processor, seed, reward=self.reward)
      if self.check is not None and not rollout.failed:
        self.check(rollout.transcript)
      return rollout
    except Exception as error:
      logging.log_first_n(logging.ERROR, "an episode of question %s failed:\n%s", 5, question.id,
                          traceback.format_exc())
      return Rollout.broken(question.id, transcript, seed, error)


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


async def sample_groups(actor: Actor, questions: Sequence[Question], n: int, seed: int, *,
                        progress: str = "") -> list[Group]:
  """N independent rollouts of every question, all at once.

  Args:
    seed: of the step; rollout i of question q draws from derive(seed, q, i).
    progress: label of a progress bar; empty for none.
  """
  starts = [prompt(actor, question) for question in questions]
  rollouts = iter(await _gather([
    actor.roll(start, question, seeds.derive(seed, q, i))
    for q, (question, start) in enumerate(zip(questions, starts))
    if start is not None for i in range(n)],
    progress))
  return [_group(question, itertools.islice(rollouts, n)) if start is not None
          else Group(question, [], failures=["the question cannot be asked"] * n)
          for question, start in zip(questions, starts)]


def prompt(actor: Actor, question: Question) -> Transcript | None:
  """The question's prompt; None if it cannot be asked, which must not end the run."""
  try:
    return actor.start(question)
  except (question_lib.ImageError, images.ImageError, ChatError) as error:
    logging.warning("question %s cannot be asked and is left out: %s", question.id, error)
    return None


async def resample(actor: Actor, groups: Sequence[Group], config: ResampleConfig, seed: int, *,
                   progress: str = "") -> None:
  """Adds AXPO's branches to `groups` (section 3 of the paper)."""
  views = [view(number, group, config) for number, group in enumerate(groups)]
  # Nothing is resampled yet: who failed was one of the N rollouts of a question.
  asked = sum(len(group.rollouts) + group.failed for group in groups)
  chosen = plan_resamples(views, config, seed, num_rollouts=asked)
  episodes, branches = [], []
  for number, selection in enumerate(chosen):
    group = groups[selection.group]
    source = group.rollouts[selection.rollout].transcript
    end = cut_point(source, config)
    branches.append((group, Branch(selection.rollout, end, selection.confidence, [])))
    episodes += [actor.roll(source.cut(end), group.question, seeds.derive(seed, "k", number, k))
                 for k in range(config.k)]
  rollouts = await _gather(episodes, progress)
  for number, (group, branch) in enumerate(branches):
    continued = rollouts[number * config.k:(number + 1) * config.k]
    branch.rollouts = [rollout for rollout in continued if not rollout.failed]
    group.failures += _failures(continued)
    if branch.rollouts:
      group.branches.append(branch)


def for_training(groups: Sequence[Group]) -> list[Group]:
  """Copies with what credit and batches are planned by, for the other processes of a run: questions by
  name, pictures by size and key (`pictures.fetched` gets pixels)."""
  def light(rollout: Rollout) -> Rollout:
    transcript = copy.copy(rollout.transcript)
    transcript.images = [
      dataclasses.replace(image, source=None, shown=dataclasses.replace(image.shown, pixels_HxWx3=None))
      for image in transcript.images]
    return dataclasses.replace(rollout, transcript=transcript)

  return [dataclasses.replace(
    group, question=dataclasses.replace(group.question, text="", images=(), meta={}),
    rollouts=[*map(light, group.rollouts)],
    branches=[dataclasses.replace(branch, rollouts=[*map(light, branch.rollouts)])
              for branch in group.branches]) for group in groups]


def _group(question: Question, rollouts: Iterable[Rollout]) -> Group:
  rollouts = list(rollouts)
  kept = [rollout for rollout in rollouts if not rollout.failed]
  return Group(question, kept, failures=_failures(rollouts))


def _failures(rollouts: Iterable[Rollout]) -> list[str]:
  return [rollout.error or rollout.stop for rollout in rollouts if rollout.failed]


def told_failures(groups: Iterable[Group], most: int = 5) -> str:
  """What failed how often, the most frequent reason first; "" if nothing did."""
  reasons = collections.Counter(reason for group in groups for reason in group.failures)
  listed = [f"{count} x {reason[:300]}" for reason, count in reasons.most_common(most)]
  more = len(reasons) - len(listed)
  return "; ".join(listed) + (f"; and {more} other reasons" if more else "")


def view(number: int, group: Group, config: ResampleConfig) -> GroupView:
  """What the resampling plan sees of a group."""
  spans = [_judged_span(rollout.transcript, config) for rollout in group.rollouts]
  return GroupView(
    rewards_N=np.array([rollout.reward for rollout in group.rollouts]),
    used_tool_N=np.array([rollout.used_tool for rollout in group.rollouts], bool),
    candidate_N=np.array([span is not None for span in spans], bool),
    confidence_N=np.array([_confidence(rollout.transcript, span, config)
                           for rollout, span in zip(group.rollouts, spans)]),
    index=number, key_N=[rollout.seed for rollout in group.rollouts])


def cut_point(transcript: Transcript, config: ResampleConfig) -> int:
  """Collapsed tokens that are frozen: up to and including the first opening tool-call tag, the
  first turn's thinking where no-tool rollouts are resampled, or the prompt alone."""
  if config.prefix == "question":
    return transcript.prompt_length
  start, _ = _judged_span(transcript, config)
  return start + 1 if config.subgroup == "tool" else start


def _judged_span(transcript: Transcript, config: ResampleConfig) -> tuple[int, int] | None:
  """The tokens behind the thinking whose probability ranks the prefix: the first call, or, where
  no-tool rollouts are resampled, the first turn's answer. None if there is nothing to sample."""
  if config.subgroup == "tool":
    return transcript.first_call_span()
  first = transcript.turns[0] if transcript.turns else None
  if first is None:
    return None
  answer = [i for i in range(*first) if transcript.kinds[i] == Kind.ANSWER]
  return (answer[0], first.stop) if answer else None


def _confidence(transcript: Transcript, span: tuple[int, int] | None, config: ResampleConfig
                ) -> float:
  if span is None:
    return float("nan")
  closed = transcript.ids[span[1] - 1] == transcript.special.tool_call_end
  return confidence(transcript.logprobs[slice(*span)], span=config.confidence_span, closed=closed)


async def _gather(episodes: Sequence[Coroutine], progress: str) -> list[Rollout]:
  """All episodes at once; a progress bar counts those that have ended."""
  with tqdm(total=len(episodes), desc=progress, leave=False, disable=not progress) as bar:
    async def ticked(episode):
      rollout = await episode
      bar.update()
      return rollout
    return await asyncio.gather(*map(ticked, episodes))


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
      cached_tokens=sum(rollout.first_cached_tokens for rollout in branch.rollouts))
      for branch in group.branches]
    seen = view(0, group, config)
    fired = triggered(seen.rewards_N, seen.used_tool_N, subgroup=config.subgroup)
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
