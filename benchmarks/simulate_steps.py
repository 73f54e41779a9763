"""Simulated training steps: rollouts, the plan of continuations, updates and pushes. See `simulate.py`.

  push ──▶ rollouts ──▶ plan ──▶ continuations ──▶ update ──▶ push ──▶ ...

In: a workload (what rollouts are like), a `Plant` (how fast the machines are), a `Policy` (how a run uses them). Out: a
`Step` for every step. Prefixes are chosen by the run's own code (`rl.algorithm.plan_resamples`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from axpo_jax.rl import algorithm
from axpo_jax.rl.resample import GroupView, ResampleConfig, Selection, prefix_budget
from benchmarks.simulate_servers import Event, Plant, Request, Server, Simulation

TAIL = 0.9  # share of a step's rollouts behind which its stragglers begin


class Turn(NamedTuple):
  """new: tokens of the observation before it. tokens: that it draws. tool_s: seconds of its calls."""

  new: int
  tokens: int
  tool_s: float = 0.0


class Rollout(NamedTuple):
  """call_at: tokens of the first turn up to its call, which a continuation keeps. confidence: of that call."""

  turns: Sequence[Turn]
  used_tool: bool = False
  right: bool = False
  call_at: int = 0
  confidence: float = 0.5

  @property
  def tokens(self) -> int:
    """Drawn and observed."""
    return sum(turn.new + turn.tokens for turn in self.turns)


class Question(NamedTuple):
  """prompt: tokens. continuation: number k of the prefix of rollout i."""

  prompt: int
  rollouts: Sequence[Rollout]
  continuation: Callable[[int, int], Rollout]


class Workload(Protocol):
  def step(self, seed: int, number: int, questions: int, rollouts: int) -> list[Question]:
    """The questions of a step, the same ones for the same seed and number."""


@dataclasses.dataclass(frozen=True)
class Policy:
  """How a run uses the machines. The defaults are what the code does.

  Attributes:
    staleness: steps that rollouts may be ahead of the trainer.
    on_push: of samples that run while weights load: "partial" keeps their tokens, "drop" draws them anew, "drain"
      waits for them.
    resample: "barrier" plans when all rollouts are done. "exact" continues a prefix as soon as no open question can
      take its part of the budget: the plan is the same. "first" continues the best prefix of a question as soon
      as the question is complete, while the budget lasts.
    extra: rollouts asked for beyond N of each question; the slowest are dropped.
    delta: pushes hold changed values alone.
    overlap: the next collection begins with the stragglers of the one before, as far as staleness allows it.
    older_first: servers take requests of an earlier step first; False: in the order in which they come.
  """

  staleness: int = 0
  on_push: str = "partial"
  resample: str = "barrier"
  extra: int = 0
  delta: bool = True
  overlap: bool = False
  older_first: bool = True


@dataclasses.dataclass
class Step:
  """One step. Times are the clock's; a collection may overlap with the trainer's work on earlier steps.

  Attributes:
    begin: of the collection. tail: TAIL of the rollouts were done. rolled: all were. collected: all continuations
      were too.
    version: pushes before it. lag: of its rollouts' weights behind those that are trained.
    tokens: to train on, prompts once a question.
    kept, dropped: rollouts. triggered: questions. prefixes, continuations: how many.
  """

  begin: float
  version: int
  tail: float = 0.0
  rolled: float = 0.0
  collected: float = 0.0
  lag: int = 0
  tokens: int = 0
  kept: list[Rollout] = dataclasses.field(default_factory=list)
  dropped: list[Rollout] = dataclasses.field(default_factory=list)
  triggered: int = 0
  prefixes: int = 0
  continuations: int = 0
  push_s: float = 0.0
  wait_s: float = 0.0
  update_s: float = 0.0
  end: float = 0.0

  @property
  def step_s(self) -> float:
    return self.push_s + self.wait_s + self.update_s


class Planner:
  """Which prefixes to continue, as questions become complete. The budget is the step's: r * B * N."""

  def __init__(self, questions: int, rollouts: int, config: ResampleConfig, mode: str):
    self._config, self._mode, self._open, self._rollouts = config, mode, questions, rollouts
    self.budget = prefix_budget(questions * rollouts, config)
    self._triggered: list[GroupView] = []
    self._served: set[tuple[int, int]] = set()

  def complete(self, view: GroupView) -> list[Selection]:
    """A question is complete: what can be continued now."""
    self._open -= 1
    triggered = algorithm.triggered(view.rewards_N, view.used_tool_N)
    self._triggered += [view] * triggered
    if self._mode == "first" and self._open:
      return self._serve(self._queue([view])[:1]) if triggered else []
    if not self.budget or (self._open and (self._mode == "barrier" or self._open >= self.budget)):
      return []
    certain, rounds = [], collections.Counter()
    for position, chosen in enumerate(self._queue(self._triggered)):
      rounds[chosen.group] += 1  # breadth first: no open question has more prefixes that can come before this one
      if position + self._open * rounds[chosen.group] < self.budget:
        certain.append(chosen)
    return self._serve(certain)

  def _queue(self, views: Sequence[GroupView]) -> list[Selection]:
    """The plan with a budget for all of their prefixes."""
    enough = math.ceil((len(views) * self._rollouts + 1) * self._config.k / (self._config.ratio or 1))
    return algorithm.plan_resamples(views, self._config, num_rollouts=enough)

  def _serve(self, chosen: Sequence[Selection]) -> list[Selection]:
    new = [entry for entry in chosen if (entry.group, entry.rollout) not in self._served]
    new = new[:self.budget - len(self._served)]
    self._served |= {(entry.group, entry.rollout) for entry in new}
    return new


class Group:
  """A question at its server. `finished` are its first N rollouts to end; then it is `complete`."""

  def __init__(self, question: Question, server: Server, index: int):
    self.question, self.server, self.index = question, server, index
    self.finished: list[int] = []
    self.asked: dict[int, Request] = {}
    self.complete = Event()

  def view(self) -> GroupView:
    """What the plan reads of it."""
    rollouts = [self.question.rollouts[i] for i in sorted(self.finished)]
    used_N = np.array([rollout.used_tool for rollout in rollouts])
    return GroupView(np.array([float(rollout.right) for rollout in rollouts]), used_N, used_N,
                     np.array([rollout.confidence for rollout in rollouts]), self.index)


class Run:
  """A training run.

  Args:
    questions: B. rollouts: N. config: of resampling, r and K among it.
  """

  def __init__(self, workload: Workload, plant: Plant, policy: Policy, *, questions: int, rollouts: int,
               config: ResampleConfig, seed: int = 0):
    self.workload, self.plant, self.policy, self.config, self.seed = workload, plant, policy, config, seed
    self.questions, self.rollouts = questions, rollouts
    self.clock = Simulation()
    self.servers = [Server(self.clock, plant) for _ in range(plant.servers)]
    self._collections: list[tuple[Event, Event]] = []  # (its stragglers began, it is done)
    self._pushes = 0

  def train(self, steps: int, warm: int = 0) -> list[Step]:
    """Simulates warm + steps steps; returns the last ones. What servers count is of these alone."""
    return self.clock.run(self.clock.spawn(self._train(steps, warm)))

  async def _train(self, steps: int, warm: int) -> list[Step]:
    done = []
    for number in range(warm + steps):
      if number == warm:
        self._forget()
      begin = self.clock.now
      await self._push()
      self._allow(number + self.policy.staleness)
      pushed = self.clock.now
      step = await self._collections[number][1]
      waited, step.lag = self.clock.now, self._pushes - step.version
      await self.clock.sleep(self.plant.update_seconds(step.tokens))
      step.push_s, step.wait_s, step.update_s = pushed - begin, waited - pushed, self.clock.now - waited
      step.end = self.clock.now
      done.append(step)
    for server in self.servers:
      server.advance()
    return done[warm:]

  def _forget(self) -> None:
    for server in self.servers:
      server.advance()
      server.seconds.clear()
      server.drawn = server.thrown = server.prefilled = 0

  async def _push(self) -> None:
    """Sampling goes on while weights are written, not while they are loaded."""
    await self.clock.sleep(self.plant.write_seconds(self.policy.delta))
    seconds = self.plant.load_seconds(self.policy.delta)
    for loaded in [self.clock.spawn(server.install(seconds, self.policy.on_push)) for server in self.servers]:
      await loaded
    self._pushes += 1

  def _allow(self, last: int) -> None:
    """Collections up to step `last` may begin, each behind the one before (`rollouts.prefetch`)."""
    while (number := len(self._collections)) <= last:
      before = self._collections[-1][0 if self.policy.overlap else 1] if self._collections else None
      straggling = Event()
      self._collections.append((straggling, self.clock.spawn(self._collect(number, before, straggling))))

  async def _collect(self, number: int, before: Event | None, straggling: Event) -> Step:
    if before is not None:
      await before
    step = Step(self.clock.now, self._pushes)
    planner = Planner(self.questions, self.rollouts, self.config, self.policy.resample)
    groups, continued = [], []

    def ended(group: Group, i: int) -> None:
      """One rollout is done."""
      group.finished.append(i)
      step.kept.append(group.question.rollouts[i])
      if len(step.kept) == math.ceil(TAIL * self.questions * self.rollouts):
        step.tail = self.clock.now
        self.clock.set(straggling)
      if len(group.finished) < self.rollouts:
        return
      view = group.view()
      step.triggered += algorithm.triggered(view.rewards_N, view.used_tool_N)
      for chosen in planner.complete(view):
        source = groups[chosen.group]
        rollout = sorted(source.finished)[chosen.rollout]
        continued.extend(self.clock.spawn(self._continue(number, source, rollout, k)) for k in range(self.config.k))
        step.prefixes += 1
      self._drop(group, step)
      self.clock.set(group.complete)

    for index, question in enumerate(self.workload.step(self.seed, number, self.questions,
                                                        self.rollouts + self.policy.extra)):
      # As in `engine.sglang.fleet`: all requests of a question go to one server.
      groups.append(Group(question, min(self.servers, key=lambda server: server.load), index))
      for i in range(len(question.rollouts)):
        self.clock.spawn(self._roll(number, groups[-1], i, ended))
    for group in groups:
      await group.complete
    step.rolled = self.clock.now
    step.tokens = sum(group.question.prompt for group in groups) + sum(rollout.tokens for rollout in step.kept)
    for rollout in continued:
      step.tokens += await rollout
    step.continuations, step.collected = len(continued), self.clock.now
    return step

  def _drop(self, group: Group, step: Step) -> None:
    """Ends the rollouts of a complete question that are not among its first N."""
    for i, rollout in enumerate(group.question.rollouts):
      if i not in group.finished:
        step.dropped.append(rollout)
        group.server.abort(group.asked[i])

  async def _roll(self, number: int, group: Group, i: int, ended: Callable[[Group, int], None]) -> None:
    question = group.question
    await self._turns(group, i, question.rollouts[i].turns, ("question", number, group.index), (number, group.index, i),
                      question.prompt)
    if len(group.finished) < self.rollouts:
      ended(group, i)

  async def _continue(self, number: int, group: Group, i: int, k: int) -> int:
    """Continuation k of a prefix; returns its tokens."""
    rollout, source = group.question.continuation(i, k), group.question.rollouts[i]
    await self._turns(group, None, rollout.turns, (number, group.index, i), (number, group.index, i, k),
                      group.question.prompt, source.call_at)
    return rollout.tokens

  async def _turns(self, group: Group, i: int | None, turns: Sequence[Turn], prefix: tuple, own: tuple, prompt: int,
                   frozen: int = 0) -> None:
    """An episode from its prompt, and what is frozen behind it, to its end.

    Args:
      prefix: cache key of that beginning. own: of what it becomes.
    """
    context = prompt + frozen
    for turn in turns:
      request = Request(prefix, context, turn.new, turn.tokens, prompt + frozen,
                        rank=own[0] if self.policy.older_first else 0)
      if i is not None:
        group.asked[i] = request
      await group.server.generate(request)
      if request.aborted:
        return
      group.server.keep(own)
      context, prefix = context + turn.new + turn.tokens, own
      if turn.tool_s:
        group.server.tool(1)
        await self.clock.sleep(turn.tool_s)
        group.server.tool(-1)
      if i is not None and len(group.finished) == self.rollouts:
        return  # its question did without it
