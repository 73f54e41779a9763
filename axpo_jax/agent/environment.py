"""Environments: episodes that are more than a question with tools, such as a game, a user or a machine.

In: the policy's turns. Out: the reply to each turn, and its reward. The loop stays `episode.continue_episode`,
which samples a turn, runs its calls, and then steps the environment:

    opening(question) ─▶ prompt ─▶ start(question) ─▶ [ turn ─▶ its calls ─▶ step(state, turn) ]... ─▶ close(state)

An environment has a state of its own for each episode. A question with tools is `Environment` itself: it never
replies, so an episode ends with the first turn that calls no tool.

An AXPO resample continues a transcript from the middle of an episode, and needs the state at that point. `resume`
says how it is restored: "replay" steps a fresh state through the turns so far, and every reply must be the same
as before; "copy" keeps a deep copy of the state after every turn; "none" cannot restore it, and such rollouts
are resampled from the question.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from absl import logging

from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.base import EpisodeState, Observation, PastCall, Tool, ToolBox
from axpo_jax.data.question import Question

REPLAY, COPY, NONE = "replay", "copy", "none"
MEMORY = "environment"  # where tools find the state: `episode.memory[MEMORY]`


class EnvironmentFailed(RuntimeError):
  """An environment took too long, returned no valid step, or could not restore its state."""


@dataclasses.dataclass(frozen=True)
class PolicyTurn:
  """What the policy said in one turn.

  Attributes:
    number: of the turn, from 0.
    text: after its thinking, calls included as they were written.
    thinking: what it thought.
    calls: the calls it makes; they have been run, unless this was the last turn it had.
    last: the policy gets no further turn, whatever the step replies: a limit has been reached.
  """

  number: int
  text: str
  thinking: str
  calls: Sequence[ToolCall | CallError] = ()
  last: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
  """The environment's response to a turn.

  Attributes:
    reply: the next user message. None ends an episode whose turn made no call. A turn with calls is answered
      by its tools, and has no reply.
    reward: of this turn.
    done: the episode is over.
    metadata: JSON values for the dump.
  """

  reply: Observation | str | None = None
  reward: float = 0.0
  done: bool = False
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Environment:
  """A question with tools, and the base of all environments.

  Attributes:
    tools: offered in addition to the config's; they find the state in `episode.memory["environment"]`.
    resume: "replay", "copy" or "none"; see the module docstring.
    waits: `start`, `step` and `close` wait for something outside, and run on the tools' event loop, during the
      sampling. If False they run on the episode's loop, without a time limit, and should take milliseconds.
    time_limit: seconds that `start` and `step` may each take, if they wait.
  """

  tools: Sequence[Tool] = ()
  resume: str = REPLAY
  waits: bool = False
  time_limit: float = 60.0

  def opening(self, question: Question) -> Question:
    """The question with the prompt's text and images. It must depend on the question alone, since all rollouts
    of a question share one prompt. May block for a moment."""
    return question

  async def start(self, question: Question, episode: EpisodeState) -> Any:
    """The state of a new episode. Draw random numbers by `seed_of(question)`, so that all rollouts of a question
    have the same task, and a replay has the same state."""
    return None

  async def step(self, state: Any, turn: PolicyTurn) -> Step:
    """The response to the policy's turn. May change `state`."""
    return Step()

  async def close(self, state: Any) -> None:
    """The episode is over: releases what `state` holds."""


# A turn, and the ids that answered it.
Answered = tuple[PolicyTurn, Sequence[int]]


class Running:
  """An environment in one episode: its state, and calls of it within limits.

  Args:
    tools: of the episode. An environment that waits runs beside the sampling where they do.
  """

  def __init__(self, environment: Environment, tools: ToolBox):
    self._environment, self._tools = environment, tools
    self._state: Any = None
    self._started = False

  async def start(self, question: Question, episode: EpisodeState, turns: Sequence[Answered] = (),
                  states: Sequence[Any] = (), rendered: Callable[[Step], Sequence[int]] = lambda _: ()
                  ) -> None:
    """Begins the episode, in the state behind the turns of a transcript that is continued.

    Args:
      episode: its history has the outcomes of the turns' calls.
      turns: those that were answered, each with the ids that answered it.
      states: copies of the state behind each, if there are any.
      rendered: ids of a step's reply.

    Raises:
      EnvironmentFailed: it cannot, or a replay answers otherwise than the transcript says.
    """
    if turns and len(states) == len(turns) and states[-1] is not None:
      self._own(self._copy(states[-1]), episode)  # without `start`, whose state nobody would close
      return
    if turns and self._environment.resume != REPLAY:
      raise EnvironmentFailed(f"its state cannot be made again (resume={self._environment.resume!r}), so "
                              "an episode cannot go on from the middle")
    self._own(await self._bounded("start", self._environment.start(question, episode)), episode)
    past = iter(tuple(episode.history))
    for turn, answered in turns:
      await self._replay(turn, answered, rendered, past, episode)

  def _own(self, state: Any, episode: EpisodeState) -> None:
    self._state, self._started = state, True
    episode.memory[MEMORY] = state

  async def _replay(self, turn: PolicyTurn, answered: Sequence[int], rendered: Callable[[Step], Sequence[int]],
                    past: Iterator[PastCall], episode: EpisodeState) -> None:
    """Steps through a turn again, after those of its calls that may have changed the state."""
    own, episode.turn = {tool.name for tool in self._environment.tools}, turn.number
    for call in turn.calls:
      before = next(past) if isinstance(call, ToolCall) else None
      if before is None or call.name not in own:
        continue
      again = await self._tools.repeat(before, episode)
      if again is not None and again.error and not before.error:
        raise EnvironmentFailed(f"in its replay, {call.name} of turn {turn.number} fails, which worked "
                                f"before: {again.text[:300]}")
    step = await self.step(turn)
    if step.done or (step.reply is not None and list(rendered(step)) != list(answered)):
      raise EnvironmentFailed(f"its replay answers turn {turn.number} otherwise than before: what it "
                              "draws must depend on the question alone")

  async def step(self, turn: PolicyTurn) -> Step:
    """What follows a turn, checked. Raises EnvironmentFailed."""
    step = await self._bounded("step", self._environment.step(self._state, turn))
    if not isinstance(step, Step):
      raise EnvironmentFailed(f"its step is {type(step)}; return a Step")
    if isinstance(step.reward, bool) or not isinstance(step.reward, (int, float)) or (
        not math.isfinite(step.reward)):
      raise EnvironmentFailed(f"the reward of its step is {step.reward!r:.100}; give a finite number")
    if turn.calls and step.reply is not None:
      raise EnvironmentFailed("it replied to a turn whose calls are answered already")
    reply = Observation(step.reply) if isinstance(step.reply, str) else step.reply
    if not isinstance(reply, (Observation, NoneType)):
      raise EnvironmentFailed(f"the reply of its step is {type(reply)}; give a text or an Observation")
    return dataclasses.replace(step, reply=reply)

  def copied(self) -> Any:
    """A copy of the state for later resamples; None if the environment does not restore by copies."""
    return self._copy(self._state) if self._environment.resume == COPY else None

  def _copy(self, state: Any) -> Any:
    try:
      return copy.deepcopy(state)
    except Exception as error:  # whatever the state holds: a lock, a socket
      raise EnvironmentFailed(f"its state cannot be copied ({error}): set its resume to 'replay' or 'none'"
                              ) from error

  async def close(self) -> None:
    """Ends the episode; what that raises is logged."""
    if self._started:
      self._started = False
      try:
        await self._bounded("close", self._environment.close(self._state))
      except EnvironmentFailed as error:
        logging.log_first_n(logging.WARNING, "an environment did not close: %s", 5, error)

  async def _bounded(self, what: str, work: Coroutine) -> Any:
    if self._environment.waits:
      work = self._timed(what, work)
      work = background.submit(work) if self._tools.overlap else _on_the_spot(work)
    try:
      return await work
    except EnvironmentFailed:
      raise
    except Exception as error:
      raise EnvironmentFailed(f"its {what} failed: {_described(error)}") from error

  async def _timed(self, what: str, work: Coroutine) -> Any:
    seconds = self._environment.time_limit
    try:
      async with asyncio.timeout(seconds) as clock:
        return await work
    except TimeoutError as error:
      if not clock.expired():
        raise
      raise EnvironmentFailed(f"its {what} took longer than {seconds:g} seconds") from error


async def _on_the_spot(work: Coroutine) -> Any:
  return background.run(work)


def opened(environment: Environment, question: Question) -> Question:
  """The question as the environment's prompt shows it. Raises EnvironmentFailed, whatever `opening` raises."""
  try:
    return environment.opening(question)
  except EnvironmentFailed:
    raise
  except Exception as error:
    raise EnvironmentFailed(f"its opening failed: {_described(error)}") from error


def _described(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error)[:500]}"


def seed_of(question: Question) -> int:
  """A seed of 31 bits that depends on the question alone."""
  digest = hashlib.blake2b(question.id.encode("utf-8", "replace"), digest_size=4).digest()
  return int.from_bytes(digest, "big") >> 1


QUESTION = Environment()
