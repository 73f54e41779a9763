"""Environments of the `verifiers` package (0.4): their tasks as questions, their rubrics as rewards.

    python -m axpo_jax.agent.environments.verifiers textarena questions.jsonl \
      '{"config": {"game": "Hangman-v0"}, "most": 100}'
    python launch/main.py ... --config.data.path=questions.jsonl \
      --config.agent.environment=axpo_jax.agent.environments.verifiers:Taskset --config.agent.reward=environment \
      --config.agent.environment_args='{"taskset": "textarena", "config": {"game": "Hangman-v0"}, "most": 100}'

The first command writes a question for every task. In the run, verifiers' own `Env.run` leads each episode, with
the policy in its one seat:

    env.run ─▶ interaction.turn(message) ─▶ the next user message ─▶ the policy's turn ─▶ Segment ─▶ env.run ...

When it ends, the task scores the trace with its `@reward`s, `@metric`s and judges. Rewards, weighted, are the reward
`environment` of the last turn; each of them and the metrics are in the dump.

No harness and no runtime (container) is started, and no tool server of a taskset: what needs one is refused when the
run starts. Signals that read a runtime are not scored, as in verifiers' own offline scoring. Tools' answers are
not in the trace. verifiers 0.4 pins mcp==2.0, below what MCP tools need here: install it in an environment
without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import pathlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from axpo_jax.agent.environment import Environment, EnvironmentFailed, PolicyTurn, Step
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.data.question import IMAGE_MARK, Question

_MOST = 100_000  # tasks, of a taskset that ends


class Taskset(Environment):
  """A verifiers taskset, led by the `Env` that it comes with.

  Args:
    taskset: the id of an installed taskset, or "module:Class".
    config: fields of its config. The ones of a task are below "task", judges among them:
      {"task": {"judges": [{"id": "reference", "model": "...", "client": {"base_url": "..."}}]}}.
    env: fields of the environment's config; "id" names another `Env` than the taskset's own.
    most: tasks that are read; must be given where a taskset is endless.

  Raises:
    ImportError: verifiers is not installed.
    ValueError: the taskset needs what is not there: a runtime, tool servers, several agents.
  """

  waits = True  # judges are endpoints

  def __init__(self, taskset: str, config: dict[str, Any] | None = None, env: dict[str, Any] | None = None,
               most: int = 0):
    try:
      import verifiers.v1 as vf
    except ImportError as error:
      raise ImportError("tasksets of verifiers need its package: pip install verifiers") from error
    self._vf = vf
    self._env, tasks = _load(vf, taskset, config or {}, env or {})
    if tasks.INFINITE and not most:
      raise ValueError(f"the taskset {taskset!r} is endless: give 'most', the number of its tasks")
    self._tasks = {str(task.data.idx): task for task in tasks.take(most or _MOST)}
    _check(vf, self._env, tasks, next(iter(self._tasks.values()), None))
    self._openings: dict[str, str] = {}

  def questions(self) -> list[dict[str, Any]]:
    """A record for every task, as a file of questions has it."""
    return [{"id": f"task-{number}", "answer": _gold(task), "category": type(task).__name__,
             "question": _prompt(task) or task.data.name or f"Task {number}"}
            for number, task in self._tasks.items()]

  def opening(self, question: Question) -> Question:
    """The question with what the policy's seat is shown first. Blocks while the environment begins.

    Raises:
      EnvironmentFailed: it ends, or takes too long, before the policy's first turn.
    """
    return dataclasses.replace(question, text=background.run(self._opened(question)))

  async def start(self, question: Question, episode: EpisodeState) -> _Play:
    """The environment, waiting for the policy's first turn."""
    play, first = await self._begin(question)
    if first != self._openings.setdefault(question.id, first):
      await play.close()
      raise EnvironmentFailed("the environment begins otherwise than in the prompt: it must follow its task alone")
    return play

  async def step(self, state: _Play, turn: PolicyTurn) -> Step:
    """Hands the turn to the environment. Turns with calls are the tools' alone, but are in the trace."""
    state.say(turn)
    if turn.calls and not turn.last:
      return Step()
    state.to_environment.put_nowait(not turn.last or not turn.calls)
    reply = await state.next_message()
    if reply is not None and turn.last:  # no further turn: it must do with what it has
      state.to_environment.put_nowait(False)
      reply = await state.next_message()
      if reply is not None:
        raise EnvironmentFailed("the environment goes on after its agent has ended")
    if reply is not None:
      return Step(reply)
    trace = state.trace
    earned = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return Step(reward=sum(earned.values()), metadata={"rewards": earned, "metrics": dict(trace.metrics)})

  async def close(self, state: _Play) -> None:
    """Ends an environment that still waits for a turn."""
    await state.close()

  async def _opened(self, question: Question) -> str:
    if question.id not in self._openings:
      async with asyncio.timeout(self.time_limit):
        play, first = await self._begin(question)
      await play.close()
      self._openings[question.id] = first
    return self._openings[question.id]

  async def _begin(self, question: Question) -> tuple[_Play, str]:
    number = question.id.removeprefix("task-")
    if number not in self._tasks:
      raise KeyError(f"no task {number!r} in the taskset; write the questions again")
    play = _Play(self._vf, self._env, self._tasks[number])
    try:
      first = await play.next_message()
      if first is None:
        raise EnvironmentFailed("the environment ended before the policy's first turn")
    except BaseException:
      await play.close()
      raise
    return play, first


class _Play:
  """One episode: `Env.run` as a task, and the policy in its seat. Begins at once.

  Attributes:
    to_environment: True: the policy has answered; False: it has no further turn.
    trace: of the policy, from the moment that its seat is taken.
  """

  def __init__(self, vf: Any, env: Any, task: Any):
    self._vf = vf
    self.trace: Any = None
    self._to_policy: asyncio.Queue[str] = asyncio.Queue()
    self.to_environment: asyncio.Queue[bool] = asyncio.Queue()
    self._work = background.keep(self._run(env, task))

  async def next_message(self) -> str | None:
    """What the environment says next; None: it has ended, and the trace is scored. Raises what it raises."""
    said = asyncio.ensure_future(self._to_policy.get())
    await asyncio.wait({said, self._work}, return_when=asyncio.FIRST_COMPLETED)
    if said.done():
      return said.result()
    said.cancel()
    await self._work
    return None

  def say(self, turn: PolicyTurn) -> None:
    """Adds the policy's turn to the trace."""
    types = self._vf.types
    calls = [types.ToolCall(id=f"call-{turn.number}-{i}", name=call.name, arguments=json.dumps(call.arguments))
             for i, call in enumerate(turn.calls) if hasattr(call, "arguments")]
    self._add(types.AssistantMessage(content=turn.text.strip(), reasoning_content=turn.thinking,
                                     tool_calls=calls or None), sampled=True)

  async def answer(self, message: Any = None) -> Any:
    """The policy's `Segment` after a user message, or after the task's prompt where there is none."""
    vf, messages = self._vf, []
    if message is not None:
      messages = [vf.types.UserMessage(content=message)] if isinstance(message, str) else [
        vf.types.UserMessage(**m) if isinstance(m, dict) else m for m in message]
      for one in messages:
        self._add(one)
    shown = [] if self.trace.num_turns else [node.message for node in self.trace.nodes]
    texts = [_text(one) for one in (shown or messages)]
    before = len(self.trace.nodes)
    self._to_policy.put_nowait("\n\n".join(filter(None, texts)))
    if not await self.to_environment.get():
      return vf.Segment(messages=[], terminated=True)
    return vf.Segment(messages=[node.message for node in self.trace.nodes[before:] if node.sampled])

  @contextlib.asynccontextmanager
  async def seated(self, task: Any, stop: str) -> AsyncIterator[None]:
    """The policy's rollout of a task: its trace is open inside, and scored behind."""
    if self.trace is not None:
      raise EnvironmentFailed("the environment runs its agent more than once an episode")
    vf = self._vf
    self.trace = vf.Trace(task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key),
                          agent=vf.AgentInfo(config=vf.AgentConfig(harness={"id": "null"})))
    if task.data.system_prompt:
      self._add(vf.types.SystemMessage(content=task.data.system_prompt))
    if task.data.prompt is not None:
      self._add(vf.types.UserMessage(content=task.data.prompt_text))
    yield
    self.trace.stop(stop)
    self.trace.ok = True
    await task.score(self.trace)

  async def close(self) -> None:
    self._work.cancel()
    await asyncio.gather(self._work, return_exceptions=True)

  async def _run(self, env: Any, task: Any) -> None:
    vf, seat = self._vf, _Seat(self)
    if env is None:
      await seat.run(task)
      return
    agents = vf.Agents(env.config, lambda name, spec: seat)
    await env.setup(agents)
    await env.run(task, agents)
    if self.trace is None:
      raise EnvironmentFailed("the environment ran no agent")
    info = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key)
    await env.finalize(task, vf.Episode(env=vf.EnvInfo(id=env.config.env_id), task=info, traces=[self.trace]))

  def _add(self, message: Any, *, sampled: bool = False) -> None:
    nodes = self.trace.nodes
    nodes.append(self._vf.MessageNode(parent=len(nodes) - 1 if nodes else None, message=message, sampled=sampled))


class _Seat:
  """What `Env.run` finds as its agent: the part of `vf.Agent` that environments call."""

  trainable = True

  def __init__(self, play: _Play):
    self._play = play

  async def run(self, task: Any, **ignored: Any) -> Any:
    """One answer to the task's prompt."""
    async with self._play.seated(task, "agent_completed"):
      await self._play.answer()
    return self._play.trace

  @contextlib.asynccontextmanager
  async def interaction(self, task: Any, **ignored: Any) -> AsyncIterator[_Interaction]:
    """A conversation, in which the environment is the user."""
    async with self._play.seated(task, "user_closed"):
      yield _Interaction(self._play)


class _Interaction:
  """`vf.Interaction`: turns, and the trace."""

  def __init__(self, play: _Play):
    self.turn = play.answer
    self._play = play

  @property
  def trace(self) -> Any:
    return self._play.trace


def _load(vf: Any, name: str, config: dict[str, Any], env: dict[str, Any]) -> tuple[Any, Any]:
  """An environment (None: one answer to each task's prompt) and its taskset."""
  module, colon, attribute = name.partition(":")
  if not colon:
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config
    made = load_environment(resolve_env_config({"taskset": {"id": name} | config} | env))
    return made, made.taskset
  if env:
    raise ValueError(f"env={env}: an environment leads an installed taskset, not {name!r}")
  made = getattr(importlib.import_module(module), attribute)
  from verifiers.v1.utils.generic import concrete_type
  fields = concrete_type(made, vf.TasksetConfig) or vf.TasksetConfig
  return None, made(fields(**({"id": name} | config)))


def _check(vf: Any, env: Any, tasks: Any, task: Any) -> None:
  """Refuses what the policy could not do here. Raises ValueError."""
  from verifiers.v1.configs.agent import agent_config_fields
  if task is None:
    raise ValueError("the taskset has no task")
  seats = sorted(agent_config_fields(env.config)) if env is not None else ["agent"]
  if len(seats) != 1:
    raise ValueError(f"{type(env).__name__} seats several agents ({', '.join(seats)}); the policy can be one")
  if env is not None and type(env).start is not vf.Env.start:
    raise ValueError(f"{type(env).__name__} starts shared resources, which are not started here")
  if tasks.toolsets(tasks.config) or type(task).toolsets(task.config):
    raise ValueError(f"{type(tasks).__name__} has tool servers, which are not started here: give the policy "
                     "tools by config.agent.tools")
  if task.NEEDS_CONTAINER or type(task).setup is not vf.Task.setup:
    raise ValueError(f"{type(task).__name__} needs a runtime (a container); there is none here")


def _text(message: Any) -> str:
  from verifiers.v1.types import content_text
  return (content_text(message.content) or "").replace(IMAGE_MARK, "(image)")


def _prompt(task: Any) -> str:
  return "\n\n".join(filter(None, (task.data.system_prompt, task.data.prompt_text))).replace(IMAGE_MARK, "(image)")


def _gold(task: Any) -> str:
  """What the file names as the answer; scoring is the task's own."""
  return str(getattr(task.data, "answer", "") or "(scored by its task)")


def main(arguments: list[str]) -> None:
  """Writes the questions of a taskset: TASKSET FILE [ARGUMENTS of Taskset as JSON]."""
  taskset, path, *others = arguments
  found = Taskset(taskset, **(json.loads(others[0]) if others else {})).questions()
  pathlib.Path(path).write_text("".join(json.dumps(record) + "\n" for record in found))
  print(f"{len(found)} questions: {path}")


if __name__ == "__main__":
  main(sys.argv[1:])
