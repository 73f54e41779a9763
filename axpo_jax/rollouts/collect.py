"""The rollout phase of a step: N rollouts a question, and AXPO's continuations of frozen prefixes.

In: questions and an Actor (engine, tools, limits). Out: Groups, each with its rollouts and the
Branches that AXPO added. A fresh rollout continues the prompt, a continuation continues a cut
transcript: both are the same call.

Continuations do not wait for the step's last rollout. A prefix is resampled as soon as the plan is certain to
choose it, which is often the case once all but a few stragglers have ended:

  question 0  ====== ======== ===            K continuations --------
  question 1  ===== === =======                 K continuations ------
  question 2  ============================================== (a straggler)
"""

import asyncio
import dataclasses
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
from axpo_jax.rl.resample import Cut, DynamicConfig, GroupView, ResampleConfig, Selection
from axpo_jax.rollouts.groups import Branch, Group, cut_of, failures_of, plan_view, resumable


@dataclasses.dataclass(frozen=True)
class Actor:
  """All that an episode needs besides its question.

  Attributes:
    environment: what the episodes are about; by default nothing but their questions.
    reward: of finished rollouts; None: the caller scores them.
    check: raises for a transcript that cannot be used, such as one that cannot be packed.
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
                      resampling: "Resampling", dynamic: DynamicConfig, *, progress: str = ""
                      ) -> tuple[list[Group], list[Group]]:
  """The rollouts of one step: all that were sampled, and those of the questions that it trains on.

  Args:
    questions: batches without an end; as many are taken as are needed.
    count: B, questions to train on.
    n: N, rollouts a question.
    seed: of the step.
    resampling: what is certain to be resampled starts meanwhile, unless `dynamic` chooses the questions first.
    dynamic: if off, the step trains on the first B questions. Otherwise on the first B informative ones; on
      fewer if the rounds end before; and on the first B of all if none is informative.
  """
  sampled, kept, config = [], [], resampling.config
  for number in range(1 + dynamic.rounds):
    wanted, asked = math.ceil(dynamic.oversample * (count - len(kept))), []
    while len(asked) < wanted:
      asked += next(questions)
    new = await sample_groups(actor, asked, n, seeds.derive(seed, "round", number) if number else seed,
                              resampling=None if dynamic.rounds else resampling, progress=progress)
    sampled += new
    if not dynamic.rounds:
      return sampled, sampled
    kept += [group for group in new if group.rollouts and algorithm.informative(
      plan_view(0, group, [cut_of(rollout.transcript, config) for rollout in group.rollouts]), config)]
    if len(kept) >= count:
      break
  return sampled, kept[:count] or sampled[:count]


async def sample_groups(actor: Actor, questions: Sequence[Question], n: int, seed: int, *,
                        resampling: "Resampling | None" = None, progress: str = "") -> list[Group]:
  """N independent rollouts of every question, all at once.

  Args:
    seed: of the step; rollout i of question q draws from derive(seed, q, i).
    resampling: gets every question whose rollouts have ended.
    progress: label of a progress bar; empty for none.
  """
  async def of_question(q: int, question: Question, start: Transcript | None) -> Group:
    group = Group(question, [], failures=["the question cannot be asked"] * n)
    if start is not None:
      group = _group(question, await asyncio.gather(*(
        _counted(actor.roll(start, question, seeds.derive(seed, q, i)), bar) for i in range(n))))
    if resampling is not None:
      resampling.add(q, group)
    return group

  if resampling is not None:
    resampling.expect(len(questions), n)
  # Decoding and resizing a photograph takes a tenth of a second: in threads, and all before the first request, so that
  # requests come in the same order whatever the threads do.
  starts = await asyncio.gather(*(asyncio.to_thread(prompt, actor, question) for question in questions))
  with tqdm(total=n * len(questions), desc=progress, leave=False, disable=not progress) as bar:
    return await asyncio.gather(*(
      of_question(q, question, start) for q, (question, start) in enumerate(zip(questions, starts))))


def prompt(actor: Actor, question: Question) -> Transcript | None:
  """The question's prompt; None if it cannot be asked, which must not end the run."""
  try:
    return actor.start(question)
  except (question_lib.ImageError, images.ImageError, ChatError, EnvironmentFailed) as error:
    logging.warning("question %s cannot be asked and is left out: %s", question.id, error)
    return None


async def resample(actor: Actor, groups: Sequence[Group], config: ResampleConfig, seed: int, *,
                   recovery: Recovery | None = None, progress: str = "") -> None:
  """Adds AXPO's branches to `groups` (section 3 of the paper), all of whose rollouts have ended.

  Args: as of Resampling.
  """
  async with Resampling(actor, config, seed, recovery=recovery, progress=progress) as resampling:
    await resampling.finish(groups)


class Resampling:
  """AXPO's branches of one step. A prefix's continuations start as soon as it is certain that the plan selects it.

  So the prefixes are exactly those that the plan selects after all rollouts. Leaving the context cancels
  continuations that still run.

  Args:
    seed: of the step; continuation k of rollout i of question q draws from derive(seed, "k", q, i, k).
    recovery: what earlier steps recovered, for config.choice="recoverable".
    progress: label of a progress bar; empty for none.
  """

  def __init__(self, actor: Actor, config: ResampleConfig, seed: int, *, recovery: Recovery | None = None,
               progress: str = ""):
    self.config = config
    self._actor, self._seed, self._recovery = actor, seed, recovery
    self._rollouts = 0  # B * N
    self._unfinished: dict[int, int] = {}  # question -> N
    self._views: dict[int, GroupView] = {}
    self._groups: dict[int, Group] = {}
    self._cuts: dict[int, list[Cut | None]] = {}
    self._tasks: dict[Selection, asyncio.Task[list[Rollout]]] = {}
    self._bar = tqdm(total=0, desc=progress, leave=False, disable=not progress)

  async def __aenter__(self) -> "Resampling":
    return self

  async def __aexit__(self, *_) -> None:
    self._bar.close()
    for task in self._tasks.values():
      task.cancel()
    await asyncio.gather(*self._tasks.values(), return_exceptions=True)

  def expect(self, count: int, n: int) -> None:
    """So many questions with N rollouts each will be added."""
    self._unfinished = dict.fromkeys(range(count), n)
    self._rollouts = count * n

  def add(self, number: int, group: Group) -> None:
    """All rollouts of a question have ended."""
    self._unfinished.pop(number, None)
    self._groups[number] = group
    self._cuts[number] = [resumable(cut_of(rollout.transcript, self.config), rollout.transcript, self._actor.environment)
                          for rollout in group.rollouts]
    self._views[number] = plan_view(number, group, self._cuts[number])
    self._begin()

  async def finish(self, groups: Sequence[Group]) -> None:
    """Waits for the continuations of these groups, and adds them as branches."""
    if not self._groups:
      # Nothing is resampled yet, so all failures are of the N rollouts, and N = kept + failed.
      self._unfinished = {number: len(group.rollouts) + group.failed for number, group in enumerate(groups)}
      self._rollouts = sum(self._unfinished.values())
      for number, group in enumerate(groups):
        self.add(number, group)
    chosen = self._plan()
    for selection, rollouts in zip(chosen, await asyncio.gather(*map(self._tasks.get, chosen))):
      group = self._groups[selection.group]
      group.failures += failures_of(rollouts)
      if kept := [rollout for rollout in rollouts if not rollout.failed]:
        group.branches.append(Branch(selection.rollout, self._cuts[selection.group][selection.rollout].end,
                                     selection.confidence, kept))

  def _plan(self) -> list[Selection]:
    return algorithm.plan_resamples(
      list(self._views.values()), self.config, self._seed, num_rollouts=self._rollouts, recovery=self._recovery,
      unfinished=self._unfinished)

  def _begin(self) -> None:
    for chosen in self._plan():
      if chosen not in self._tasks:
        self._bar.total += self.config.k
        self._tasks[chosen] = asyncio.create_task(self._continuations(chosen))

  async def _continuations(self, chosen: Selection) -> list[Rollout]:
    """Those of one prefix, those that failed too."""
    group, source = self._groups[chosen.group], chosen.rollout
    prefix = group.rollouts[source].transcript.cut(self._cuts[chosen.group][source].end)
    rollouts: list[Rollout] = []
    judged: list[float] = []
    while count := algorithm.next_continuations(judged, len(rollouts), self.config):
      rollouts += await asyncio.gather(*(
        _counted(self._actor.roll(prefix, group.question, seeds.derive(self._seed, "k", chosen.group, source, k)),
                 self._bar)
        for k in range(len(rollouts), len(rollouts) + count)))
      judged = [rollout.reward for rollout in rollouts if not rollout.failed]
    return rollouts


def _group(question: Question, rollouts: Iterable[Rollout]) -> Group:
  rollouts = list(rollouts)
  kept = [rollout for rollout in rollouts if not rollout.failed]
  return Group(question, kept, failures=failures_of(rollouts))


async def _counted(episode: Coroutine[None, None, Rollout], bar: tqdm) -> Rollout:
  rollout = await episode
  bar.update()
  return rollout


