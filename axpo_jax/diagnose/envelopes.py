"""Formats of log records: where a record holds its conversations.

In: a record (one JSON object). Out: Conversations: messages as written in the log (`events` reads them), and the
record that holds reward, question and time. A format is a function that returns None for a record of another
format; the first that fits reads the record.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from axpo_jax.diagnose.events import GIVEN, GIVEN_ROLES, is_agents
from axpo_jax.diagnose.notations import CHATML, parsed, split_text, text_of
from axpo_jax.diagnose.traces import TraceError
from axpo_jax.records import value_at

COMPLETIONS = ("completion", "output", "response")
_USERS = ("user", "human")
PROMPTS = ("prompt", "input", "messages", "question")
# Names under which a record may keep a list of messages.
_LISTS = ("messages", "traj", "conversations", "conversation", "trajectory", "history", "items")
_SYSTEM_BLOCK = re.compile(r"^<\|im_start\|>system", re.MULTILINE)
_SUCCESS_FILE = "result.json"  # Harbor: what the verifier found, in the folder of a trial


class NoFormat(TraceError):
  """The record fits none of the formats."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One rollout as a log has it.

  Attributes:
    messages: as written.
    record: holds its reward, question, time and label.
    facts: {"question" | "reward" | "when": value} that the format defines.
    tools: descriptions of the offered tools, as written.
    inside: what else the record holds that is not read ("2 sub-agent trajectories"); "" if nothing.
  """

  messages: Sequence[Any]
  record: Mapping[str, Any]
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tools: Any = None
  inside: str = ""


Reader = Callable[[Mapping[str, Any], pathlib.Path], list[Conversation] | None]


def conversations(record: Mapping[str, Any], path: pathlib.Path, form: str | None,
                  messages: str | None = None) -> tuple[str, list[Conversation]]:
  """The format of a record and the rollouts in it.

  Args:
    record: one JSON object.
    path: of its file; in some formats it names the question.
    form: a key of FORMATS; None takes the first that fits.
    messages: a dotted path to the messages, or to a text; has priority over all formats.

  Raises:
    NoFormat: no format fits.
    TraceError: the record is not of the named format.
  """
  if messages is not None:
    found = value_at(record, messages)
    if not isinstance(found, list | str) or not found:
      raise TraceError(f"there are no messages at {messages!r}")
    return "messages", [Conversation(_as_messages(found, "assistant"), record, tools=_tools(record))]
  for name in [form] if form else FORMATS:
    if (read := FORMATS[name](record, path)) is not None:
      return name, read
  if form:
    raise TraceError(f"not a record of format {form}; it has the fields {sorted(record)[:8]}")
  raise NoFormat(f"no format fits a record with the fields {sorted(record)[:8]}; --format forces one "
                 f"of {', '.join(FORMATS)}, --field messages=PATH names where the messages are")


def text_records(text: str) -> list[tuple[int, dict[str, Any]]]:
  """The line and the record of every conversation in a text file. A conversation begins with a system block; a line
  right before it may hold facts: `reward=1 step=3 question_id=q7`."""
  starts = [_with_head(text, found.start()) for found in _SYSTEM_BLOCK.finditer(text)] or [0]
  out, line = [], 1
  for start, stop in zip(starts, [*starts[1:], len(text)]):
    part = text[start:stop]
    head = part.partition("<|im_start|>")[0]
    facts = dict(word.split("=", 1) for word in head.split() if "=" in word)
    out.append((line, {**facts, "text": part[len(head):]}))
    line += part.count("\n")
  return out


def _with_head(text: str, block: int) -> int:
  """Where the line of facts before a system block begins; without such a line, where the block begins."""
  before = text.rfind("\n", 0, max(0, block - 1)) + 1
  head = text[before:block]
  return before if "=" in head and "<" not in head else block


# ---- one function a format ----


def _atif(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """Harbor's interchange format: steps of system, user and agent, results beside their calls."""
  steps = record.get("steps")
  if not _objects(steps) or not all("source" in step for step in steps):
    return None
  messages: list[dict[str, Any]] = []
  for step in steps:
    # Steps that are copied from an earlier trajectory count there.
    ours = step["source"] == "agent" and not step.get("is_copied_context")
    role = "assistant" if ours else step["source"] if step["source"] != "agent" else GIVEN
    messages.append({"role": role, "content": step.get("message"),
                     "reasoning_content": step.get("reasoning_content"),
                     "tool_calls": step.get("tool_calls") if ours else None})
    observation = step.get("observation") if ours else None
    results = observation.get("results") if isinstance(observation, Mapping) else None
    messages += [{**result, "role": "tool"} for result in results or ()]
  agent = record.get("agent") if isinstance(record.get("agent"), Mapping) else {}
  facts = {"when": next((step["timestamp"] for step in steps if step.get("timestamp")), None)}
  subagents = record.get("subagent_trajectories") or ()
  return [Conversation(messages, record, facts | _harbor(path), agent.get("tool_definitions"),
                       f"{len(subagents)} trajectories of sub-agents" if subagents else "")]


def _harbor(path: pathlib.Path) -> dict[str, Any]:
  """Reward and task of a trial, which Harbor writes one or two folders above its trajectory."""
  for folder in list(path.parents)[:2]:
    file = folder / _SUCCESS_FILE
    found = parsed(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    if isinstance(found, Mapping) and isinstance(found.get("verifier_result"), Mapping):
      return {"reward": found["verifier_result"].get("rewards"), "question": found.get("task_name")}
  return {}


def _tau2(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """results.json of tau2: many simulations of the tasks of one domain."""
  if not _objects(record.get("simulations")):
    return None
  domain = value_at(record, "info.environment_info.domain_name")
  return [Conversation(run.get("messages") or (), run, {
            "question": f"{domain or path.stem} {run.get('task_id')}"})
          for run in record["simulations"]]


def _swe_agent(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """.traj of SWE-agent: thought, action (a command: its first word is the tool) and observation."""
  steps = record.get("trajectory")
  if not _objects(steps) or not all("action" in step for step in steps):
    return None
  shown = record.get("history") or steps[0].get("query") or ()
  messages = []
  for message in shown if _objects(shown) else ():  # up to the agent's first turn, without examples
    if message.get("role") == "assistant" and not message.get("is_demo"):
      break
    messages += [message] if not message.get("is_demo") else []
  for step in steps:
    action = str(step["action"] or "").strip()
    call = {"name": action.split()[0], "arguments": {"action": action}} if action else None
    thought = step.get("thought") or ""
    said = "" if call else step.get("response") or thought
    messages.append({"role": "assistant", "content": said, "reasoning_content": thought,
                     "tool_calls": [call] if call else None})
    if call:
      messages.append({"role": "tool", "content": step.get("observation") or ""})
  return [Conversation(messages, record,
                       {"question": record.get("instance_id") or path.name.partition(".traj")[0]})]


def _verifiers_trace(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """Trace of verifiers: a graph of messages; the sampled ones are the agent's."""
  nodes = record.get("nodes")
  if not _objects(nodes) or not all(isinstance(node.get("message"), Mapping) for node in nodes):
    return None
  messages = [node["message"] if node.get("sampled") or node["message"].get("role") != "assistant"
              else {**node["message"], "role": GIVEN, "tool_calls": None} for node in nodes]
  task = record.get("task") if isinstance(record.get("task"), Mapping) else {}
  rewards = list((record.get("rewards") or {}).values())
  scored = rewards and all(isinstance(reward, Mapping) for reward in rewards)
  return [Conversation(messages, record, {
    "question": task.get("key") or task.get("hash") or json.dumps(task.get("data"), sort_keys=True),
    "reward": sum(reward["score"] * reward.get("weight", 1.0) for reward in rewards) if scored else None,
    "when": None}, record.get("tools"))]


def _responses(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """OpenAI's Responses: `input` and `output` items, of a call or of a logged request and response."""
  asked = record.get("responses_create_params")  # NeMo-Gym
  request = asked if isinstance(asked, Mapping) else record
  response = record.get("response") if isinstance(record.get("response"), Mapping) else record
  output = response.get("output")
  if not _objects(output) or not any("type" in item for item in output):
    return None
  # Items of the input are part of the rollout: a client without state at the server sends all of them.
  given = _as_messages(request.get("input") or (), "user")
  return [Conversation([*given, *output], record, tools=request.get("tools") or response.get("tools"))]


def _messages(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """A list of messages under one of the usual names, followed by the answer of a logged request."""
  lists = (record[name] for name in _LISTS if _objects(record.get(name)))
  messages = list(next(lists, ()))
  for source in (record, record.get("response")):
    if isinstance(source, Mapping) and _objects(source.get("choices")):
      messages.append(source["choices"][0].get("message"))
    elif source is not record and isinstance(source, Mapping) and source.get("role"):
      messages.append(source)  # Anthropic's answer is a message itself
  if not messages or (not any(map(is_agents, messages)) and _made(record) is not None):
    return None
  facts = {}
  instruction = value_at(record, "info.task.instruction")
  if "traj" in record and instruction:  # tau-bench counts its tasks from 0 in every domain
    facts["question"] = f"{record.get('task_id')} {instruction}"
  return [Conversation(_system(record) + messages, record, facts, _tools(record))]


def _completion(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  """A prompt and a completion, each a text or messages: verifiers, verl, TRL. Turns of an agent before the prompt's
  last user turn are examples; those after it are the beginning of this rollout."""
  if (made := _made(record)) is None:
    return None
  prompt = _as_messages(next((record[name] for name in PROMPTS if record.get(name)), ()), "user")
  roles = [message.get("role") for message in prompt]
  asked = max((i for i, role in enumerate(roles) if role in _USERS), default=-1)
  given = [message if i > asked or role in (*_USERS, *GIVEN_ROLES)
           else {"role": GIVEN, "content": text_of(message.get("content"))}
           for i, (role, message) in enumerate(zip(roles, prompt))]
  return [Conversation([*given, *_as_messages(made, "assistant")], record, tools=_tools(record))]


def _text(record: Mapping[str, Any], path: pathlib.Path) -> list[Conversation] | None:
  text = record.get("text")
  if not isinstance(text, str) or not text.strip():
    return None
  return [Conversation(split_text(text), record, tools=_tools(record))]


# In the order of trial.
FORMATS: dict[str, Reader] = {
  "atif": _atif, "tau2": _tau2, "swe-agent": _swe_agent, "verifiers": _verifiers_trace,
  "responses": _responses, "messages": _messages, "completion": _completion, "text": _text}


# ---- parts ----


def _objects(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _as_messages(value: Any, role: str) -> list[Any]:
  """Messages of a list, or of a text, which is one message of `role` unless it is ChatML."""
  if not isinstance(value, str):
    if not all(isinstance(message, Mapping) for message in value):
      raise TraceError("a message is not an object")
    return list(value)
  if role == "assistant":
    return split_text(value)
  if CHATML.search(value):
    return [message for message in split_text(value) if message["content"].strip()]
  return [{"role": role, "content": value}]


def _made(record: Mapping[str, Any]) -> str | list | None:
  return next((record[name] for name in COMPLETIONS
               if isinstance(record.get(name), str | list) and record[name]), None)


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The system prompt as a message: Anthropic and ShareGPT hold it beside the messages."""
  return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def _tools(record: Mapping[str, Any]) -> Any:
  return record.get("tools") or record.get("functions")
