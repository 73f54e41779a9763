"""The rollout phase of a step: N rollouts a question, then AXPO's continuations of frozen prefixes.

In: questions and an Actor (engine, tools, limits). Out: Groups, each with its rollouts and the
Branches that AXPO added. A fresh rollout continues the prompt, a continuation continues a cut
transcript: both are the same call.
"""

import asyncio
import dataclasses
import itertools
import math
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

from absl import logging
from tqdm import tqdm

from axpo_jax import seeds
from axpo_jax.agent.environment import QUESTION, Environment, EnvironmentFailed, opened
from axpo_jax.agent.episode import EXACT, continue_episode, start_transcript
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.reward_functions import RewardSum
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.transcript import Transcript
from axpo_jax.data import question as question_lib
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Engine, SamplingParams
from axpo_jax.model import images
from axpo_jax.model.chat import Chat, ChatError
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.rl import algorithm
from axpo_jax.rl.recovery import Recovery
from axpo_jax.rl.resample import DynamicConfig, ResampleConfig
from axpo_jax.rollouts.groups import Branch, Group, cut_of, failures_of, plan_view, resumable


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
    return start_transcript(opened(self.environment, question), self.chat, self.toolbox, self.system_prompt,
                            self.processor, self.image_limits)

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
      plan_view(0, group, [cut_of(rollout.transcript, config) for rollout in group.rollouts]), config)]
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
  except (question_lib.ImageError, images.ImageError, ChatError, EnvironmentFailed) as error:
    logging.warning("question %s cannot be asked and is left out: %s", question.id, error)
    return None


async def resample(actor: Actor, groups: Sequence[Group], config: ResampleConfig, seed: int, *,
                   recovery: Recovery | None = None, progress: str = "") -> None:
  """Adds AXPO's branches to `groups` (section 3 of the paper).

  Args:
    seed: of the step; continuation k of its prefix m draws from derive(seed, "k", m, k).
    recovery: what earlier steps recovered, for config.choice="recoverable".
  """
  cuts = [[resumable(cut_of(rollout.transcript, config), rollout.transcript, actor.environment)
           for rollout in group.rollouts] for group in groups]
  views = [plan_view(number, group, own) for number, (group, own) in enumerate(zip(groups, cuts))]
  # Nothing is resampled yet, so all failures are of the N rollouts, and N = kept + failed.
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
    group.failures += failures_of(rollouts)
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


def _group(question: Question, rollouts: Iterable[Rollout]) -> Group:
  rollouts = list(rollouts)
  kept = [rollout for rollout in rollouts if not rollout.failed]
  return Group(question, kept, failures=failures_of(rollouts))


async def _gather(episodes: Sequence[Coroutine], progress: str) -> list[Rollout]:
  """All episodes at once; a progress bar counts those that have ended."""
  with tqdm(total=len(episodes), desc=progress, leave=False, disable=not progress) as bar:
    return await asyncio.gather(*(_counted(episode, bar) for episode in episodes))


async def _counted(episode: Coroutine[None, None, Rollout], bar: tqdm) -> Rollout:
  rollout = await episode
  bar.update()
  return rollout


