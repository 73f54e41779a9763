"""Tasksets of the `verifiers` package (0.4): their tasks as questions, their rubrics as rewards.

    python -m axpo_jax.agent.environments.verifiers my_tasks:MyTaskset questions.jsonl
    python launch/main.py ... --config.data.path=questions.jsonl \
      --config.agent.environment=axpo_jax.agent.environments.verifiers:Taskset \
      --config.agent.environment_args='{"taskset": "my_tasks:MyTaskset"}' --config.agent.reward=environment

The first command writes a question for every task. In the run, a finished episode becomes a `Trace`, which the
task scores by all that it has: `@reward`s, `@metric`s and judges. Rewards are parts of the reward
`environment`, with their weights; metrics are in the dump. What needs a runtime (a container, a harness) is
not scored, as in verifiers' own offline scoring; tools' answers are not in the trace. verifiers 0.4 pins mcp==2.0, below what MCP tools need here:
install it in an environment without them.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

from axpo_jax.agent.environment import Environment, PolicyTurn, Step
from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.data.question import IMAGE_MARK, Question


class Taskset(Environment):
  """A verifiers taskset.

  Args:
    taskset: "module:Class", or the id of an installed taskset.
    config: fields of its config.
    most: tasks that are read of an endless taskset.
  """

  waits = True  # judges are endpoints

  def __init__(self, taskset: str, config: dict[str, Any] | None = None, most: int = 100_000):
    try:
      import verifiers.v1 as vf
    except ImportError as error:
      raise ImportError("tasksets of verifiers need its package: pip install verifiers") from error
    self._vf = vf
    self._tasks = {str(task.data.idx): task for task in _load(vf, taskset, config or {}).take(most)}

  def questions(self) -> list[dict[str, Any]]:
    """A record for every task, as a file of questions has it."""
    return [{"id": f"task-{number}", "answer": _gold(task), "category": type(task).__name__,
             "question": "\n\n".join(filter(None, (task.data.system_prompt, _prompt(task))))}
            for number, task in self._tasks.items()]

  async def start(self, question: Question, episode: EpisodeState) -> dict[str, Any]:
    """The task and a trace with its prompt."""
    number = question.id.removeprefix("task-")
    if number not in self._tasks:
      raise KeyError(f"no task {number!r} in the taskset; write the questions again")
    task, vf = self._tasks[number], self._vf
    trace = vf.Trace(task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key),
                     agent=vf.AgentInfo(config=vf.AgentConfig(harness={"id": "null"})))
    if task.data.system_prompt:
      _say(vf, trace, vf.types.SystemMessage(content=task.data.system_prompt))
    _say(vf, trace, vf.types.UserMessage(content=_prompt(task)))
    return {"task": task, "trace": trace}

  async def step(self, state: dict[str, Any], turn: PolicyTurn) -> Step:
    """Adds the turn to the trace; the last one is scored."""
    vf, task, trace = self._vf, state["task"], state["trace"]
    calls = [vf.types.ToolCall(id=f"call-{turn.number}-{i}", name=call.name,
                               arguments=json.dumps(call.arguments))
             for i, call in enumerate(turn.calls) if hasattr(call, "arguments")]
    _say(vf, trace, vf.types.AssistantMessage(content=turn.text.strip(), reasoning_content=turn.thinking,
                                              tool_calls=calls or None), sampled=True)
    if turn.calls:
      return Step()
    trace.stop("agent_completed")
    trace.ok = True
    await task.score(trace)
    earned = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return Step(reward=sum(earned.values()), metadata={"rewards": earned, "metrics": dict(trace.metrics)})


def _say(vf: Any, trace: Any, message: Any, *, sampled: bool = False) -> None:
  parent = len(trace.nodes) - 1 if trace.nodes else None
  trace.nodes.append(vf.MessageNode(parent=parent, message=message, sampled=sampled))


def _load(vf: Any, name: str, config: dict[str, Any]) -> Any:
  module, colon, attribute = name.partition(":")
  if not colon:
    from verifiers.v1.utils.loaders import load_taskset
    return load_taskset(vf.TasksetConfig(id=name, **config))
  made = getattr(importlib.import_module(module), attribute)
  from verifiers.v1.utils.generic import concrete_type
  fields = concrete_type(made, vf.TasksetConfig) or vf.TasksetConfig
  return made(fields(**({"id": name} | config)))


def _prompt(task: Any) -> str:
  return task.data.prompt_text.replace(IMAGE_MARK, "(image)")


def _gold(task: Any) -> str:
  """What the file names as the answer; scoring is the task's own."""
  return str(getattr(task.data, "answer", "") or "(scored by its task)")


def main(arguments: list[str]) -> None:
  """Writes the questions of a taskset: TASKSET FILE [CONFIG as JSON]."""
  taskset, path, *config = arguments
  found = Taskset(taskset, json.loads(config[0]) if config else None).questions()
  pathlib.Path(path).write_text("".join(json.dumps(record) + "\n" for record in found))
  print(f"{len(found)} questions: {path}")


if __name__ == "__main__":
  main(sys.argv[1:])
