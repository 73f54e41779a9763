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
import math
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from axpo_jax import seeds
from axpo_jax.agent import parse
from axpo_jax.agent.environment import NONE, QUESTION, Environment
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
from axpo_jax.rl import algorithm
from axpo_jax.rl.advantages import is_right
from axpo_jax.rl.credit import Branch as BranchOutcome
from axpo_jax.rl.credit import GroupOutcome
from axpo_jax.rl.recovery import Recovery, Tried
from axpo_jax.rl.resample import Cut, DynamicConfig, GroupView, ResampleConfig, confidence
from axpo_jax.rollouts import census


@dataclasses.dataclass(frozen=True)
class Actor:
  """All that an episode needs besides its question.

  Attributes:
    environment: what the episodes are about; by default nothing but their questions.
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
  environment: Environment = QUESTION
  reward: RewardSum | None = EXACT
  check: Callable[[Transcript], None] | None = None

  def start(self, question: Question) -> Transcript:
    return start_transcript(self.environment.opening(question), self.chat, self.toolbox, self.system_prompt, self.processor,
                            self.image_limits)

  async def roll(self, transcript: Transcript, question: Question, seed: int) -> Rollout:
    """Continues `transcript` to its end and scores it.

    Whatever fails in the episode ends it as a failed rollout, and nothing else.
    """
    try:
      rollout = await continue_episode(
        transcript, question, self.engine, self.toolbox, self.limits, self.sampling, self.chat,
        self.processor, seed, environment=self.environment,
        reward=self.reward)
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


async def sample_step(actor: Actor, questions: Iterator[Sequence[Question]], count: int, n: int, seed: int,
                      config: ResampleConfig, dynamic: DynamicConfig, *, progress: str = ""
                      ) -> tuple[list[Group], list[Group]]:
  """The rollouts of one step: all that were sampled, and those of the questions that it trains on.

  Args:
    questions: batches without an end; as many are taken as are needed.
    count: B, questions to train on.
    n: N, rollouts a question.
    seed: of the step.
    config: what AXPO can repair, which `dynamic` must not leave out.
    dynamic: off, the first B questions are trained on. Otherwise the first B that can teach something;
      fewer if the rounds end before, and the first B of all if none can.
  """
  sampled, kept = [], []
  for number in range(1 + dynamic.rounds):
    wanted, asked = math.ceil(dynamic.oversample * (count - len(kept))), []
    while len(asked) < wanted:
      asked += next(questions)
    new = await sample_groups(actor, asked, n, seeds.derive(seed, "round", number) if number else seed,
                              progress=progress)
    sampled += new
    if not dynamic.rounds:
      return sampled, sampled
    kept += [group for group in new if group.rollouts and algorithm.informative(
      view(0, group, [cut(rollout.transcript, config) for rollout in group.rollouts]), config)]
    if len(kept) >= count:
      break
  return sampled, kept[:count] or sampled[:count]


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
                   recovery: Recovery | None = None, progress: str = "") -> None:
  """Adds AXPO's branches to `groups` (section 3 of the paper).

  Args:
    seed: of the step; continuation k of its prefix m draws from derive(seed, "k", m, k).
    recovery: what earlier steps recovered, for config.choice="recoverable".
  """
  cuts = [[_resumable(cut(rollout.transcript, config), rollout.transcript, actor.environment)
           for rollout in group.rollouts] for group in groups]
  views = [view(number, group, own) for number, (group, own) in enumerate(zip(groups, cuts))]
  # Nothing is resampled yet: who failed was one of the N rollouts of a question.
  asked = sum(len(group.rollouts) + group.failed for group in groups)
  chosen = algorithm.plan_resamples(views, config, seed, num_rollouts=asked, recovery=recovery)
  with tqdm(total=len(chosen) * config.k, desc=progress, leave=False, disable=not progress) as bar:
    continued = await asyncio.gather(*(
      _continuations(actor, groups[selection.group], selection.rollout,
                     cuts[selection.group][selection.rollout].end, config,
                     [seeds.derive(seed, "k", number, k) for k in range(config.k)], bar)
      for number, selection in enumerate(chosen)))
  for selection, rollouts in zip(chosen, continued):
    group = groups[selection.group]
    group.failures += _failures(rollouts)
    if kept := [rollout for rollout in rollouts if not rollout.failed]:
      group.branches.append(Branch(selection.rollout, cuts[selection.group][selection.rollout].end,
                                   selection.confidence, kept))


async def _continuations(actor: Actor, group: Group, source: int, end: int, config: ResampleConfig,
                         seeds_K: Sequence[int], bar: tqdm) -> list[Rollout]:
  """Continuations of the first `end` tokens of a rollout; those that failed too."""
  prefix, rollouts = group.rollouts[source].transcript.cut(end), []
  judged: list[float] = []
  while count := algorithm.draws(judged, len(rollouts), config):
    new = seeds_K[len(rollouts):len(rollouts) + count]
    rollouts += await asyncio.gather(*(
      _counted(actor.roll(prefix, group.question, seed), bar) for seed in new))
    judged = [rollout.reward for rollout in rollouts if not rollout.failed]
  return rollouts


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


def view(number: int, group: Group, cuts: Sequence[Cut | None]) -> GroupView:
  """What the resampling plan reads of a group, whose rollouts are cut as `cuts` says."""
  return GroupView(
    rewards_N=np.array([rollout.reward for rollout in group.rollouts]),
    used_tool_N=np.array([rollout.used_tool for rollout in group.rollouts], bool),
    candidate_N=np.array([own is not None for own in cuts], bool),
    confidence_N=np.array([float("nan") if own is None else own.confidence for own in cuts]),
    index=number, key_N=[rollout.seed for rollout in group.rollouts], family=group.question.category)


def outcome(group: Group) -> GroupOutcome:
  """What credit reads of a group."""
  def counts(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    return {"num_calls": np.array([len(rollout.calls) for rollout in rollouts], int),
            "lengths": np.array([response_length(rollout.transcript) for rollout in rollouts], int)}

  def rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    return np.array([rollout.reward for rollout in rollouts], np.float64)

  return GroupOutcome(
    rewards(group.rollouts),
    [BranchOutcome(branch.source, rewards(branch.rollouts),
                   **{f"{name}_K": x for name, x in counts(branch.rollouts).items()}, frozen=branch.frozen)
     for branch in group.branches],
    **{f"{name}_N": x for name, x in counts(group.rollouts).items()})


def tried(groups: Iterable[Group]) -> list[Tried]:
  """The step's resampled prefixes, as `rl.recovery` learns from them."""
  return [Tried(group.question.category, branch.confidence, any(is_right([r.reward for r in branch.rollouts])))
          for group in groups for branch in group.branches]


def response_length(transcript: Transcript) -> int:
  """Expanded tokens after the prompt, which `EpisodeLimits.max_response_tokens` limits."""
  after = [image.shown.num_tokens - 1 for image in transcript.images[
    transcript.ids[:transcript.prompt_length].count(transcript.special.image_pad):]]
  return len(transcript) - transcript.prompt_length + sum(after)


def cut(transcript: Transcript, config: ResampleConfig) -> Cut | None:
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


def _resumable(found: Cut | None, transcript: Transcript, environment: Environment) -> Cut | None:
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


async def _gather(episodes: Sequence[Coroutine], progress: str) -> list[Rollout]:
  """All episodes at once; a progress bar counts those that have ended."""
  with tqdm(total=len(episodes), desc=progress, leave=False, disable=not progress) as bar:
    return await asyncio.gather(*(_counted(episode, bar) for episode in episodes))


async def _counted(episode: Coroutine[None, None, Rollout], bar: tqdm) -> Rollout:
  rollout = await episode
  bar.update()
  return rollout


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
