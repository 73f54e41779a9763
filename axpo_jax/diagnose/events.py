"""From messages in any notation to events: what the agent thought, said and called.

In: a list of messages as some log has them. Out: Events: what the user asked, what the agent thought,
said and called, and what came back. A call is written in one of these ways, all of which may meet in
one log:

  a field of an agent's message   tool_calls, function_call
  a part of its content           tool_use, tool_call, function_call, server_tool_use, ...
  a message of its own            role tool_call or function_call; type function_call, *_call
  text behind the last </think>   <tool_call>{JSON}</tool_call>, <function=NAME>...</function>

Results have similar notations: role tool or the like, parts tool_result, items *_call_output, <tool_response>.
`Walk.unread` reports words of calls in another notation, so that such a log never counts as one without calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.diagnose import notations
from axpo_jax.diagnose.notations import (
  CALL,
  RESPONSE,
  RESULT,
  SAY,
  SYSTEM,
  THINK,
  UNANSWERED,
  USER,
  Event,
  as_text,
  first,
  parsed,
  text_of,
)
from axpo_jax.diagnose.traces import TraceError

AGENT = (THINK, SAY, CALL)

# Roles by the names that logs give them; "call": the whole message is one or more calls.
_ROLES = {name: kind for kind, names in {
  "agent": "assistant gpt model agent bot ai chatgpt", "user": "user human",
  "result": "tool function observation ipython tool_response tool_result function_response",
  "call": "tool_call function_call"}.items() for name in names.split()}
GIVEN = "context"  # role of turns of another agent or of an example
GIVEN_ROLES = (GIVEN, "system", "developer")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thinking_blocks")
_THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")
_CALL_PARTS = ("tool_use", "tool_call", "tool-call", "function_call", "server_tool_use", "mcp_tool_use")
_RESULT_PARTS = ("tool_result", "tool-result", "tool_response", "function_response",
                 "function_call_output")
# Items of OpenAI's Responses that the provider runs: they carry their own result.
_RUN_BY_PROVIDER = ("web_search_call", "file_search_call", "code_interpreter_call",
                    "image_generation_call", "mcp_call")
_RESULT_KEYS = ("tool_call_id", "tool_use_id", "call_id", "source_call_id", "toolCallId")
# Calls that may wait for a result at once; each result is compared with all of them.
_MOST_WAITING = 128


class Walk:
  """Reads messages in order and joins calls with their results.

  Args:
    messages: as written.
    named_images: events also list images that are given by a path.

  Attributes:
    events: in order.
    asked: a digest of every message of the user before the agent's first turn; if the agent speaks first,
      before its second.
    orphans: number of results without a call.
    spoke: whether there is a turn of the agent.
  """

  def __init__(self, messages: Sequence[Any], named_images: bool = False):
    self._named = named_images
    self.events: list[Event] = []
    self.asked: list[str] = []
    self.orphans = 0
    self._waiting: list[Event] = []  # calls without a result
    self.spoke = False
    self._agent_speaks, self._answered_user = False, False
    self._raw: list[Any] = []  # messages in which a call might hide
    for message in messages:
      if not isinstance(message, Mapping):
        raise TraceError("a message is not an object")
      self._message(message)

  @property
  def calls(self) -> list[Event]:
    return [event for event in self.events if event.kind == CALL]

  def unread(self) -> str | None:
    """Words of calls in a conversation in which no call could be read; None if there are none."""
    if self.calls:
      return None
    if self.orphans:
      return "a tool's result that no call precedes"
    for event in self.events:
      if event.kind == SAY and (found := notations.CALL_WORDS.search(event.text)):
        return repr(" ".join(found[0].split()))
    return next((repr(word) for message in self._raw for word in notations.call_keys(message)), None)

  # ---- messages ----

  def _message(self, message: Mapping[str, Any]) -> None:
    kind, role = str(message.get("type") or ""), str(message.get("role") or message.get("from") or "")
    content = next((message[name] for name in ("content", "value") if message.get(name) is not None),
                   None)
    if not role and (kind.endswith("_call_output") or kind in _RESULT_PARTS):
      return self._result(message, message.get("output", content))
    if not role and (kind.endswith("_call") or kind in _CALL_PARTS):
      return self._item_call(kind, message)
    if not role and kind == "reasoning":
      return self._add(THINK, text_of(message.get("summary")) + text_of(content))
    who = _ROLES.get(role.lower())
    if who == "agent":
      self._agent(message, content)
    elif who == "call":
      self._call_message(content)
    elif who == "result":
      if message.get("requestor") != "user":  # tau2: the simulated user has tools of its own
        self._results(message, content)
    elif who == "user":
      self._user(content)
    else:
      if role.lower() not in GIVEN_ROLES:
        self._raw.append(message)
      self._add(SYSTEM, text_of(content))
    return None

  def _agent(self, message: Mapping[str, Any], content: Any) -> None:
    self._raw.append(message)
    self._agent_speaks = False  # a turn of its own, even right after another
    raw = message.get("raw_data")  # tau2 also holds the provider's message
    for place in (message, raw if isinstance(raw, Mapping) else {}):
      for name in _THOUGHTS:
        self._add(THINK, text_of(place.get(name)))
    for part in _parts(content):
      kind = part.get("type")
      if kind in _CALL_PARTS:
        self._call(_nested(part, kind))
      elif kind in _RESULT_PARTS or str(kind).endswith("_tool_result"):
        self._result(part, _content_of(part))
      elif kind in _THINKING_PARTS:
        self._add(THINK, text_of([part]) or text_of(part.get("summary")))
      else:
        self._agent_text(text_of([part]))
    for call in _as_list(message.get("tool_calls")):
      self._call(call)
    if message.get("function_call"):  # the form before tool_calls: its result repeats its name
      self._call(message["function_call"])
    self._speaks()

  def _agent_text(self, text: str) -> None:
    """Thinking ends with the last </think>; a turn that opens it and does not close it is all thinking."""
    thinking, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in rest:
      thinking, rest = rest, ""
    self._add(THINK, thinking.replace("<think>", "", 1).strip())
    at = 0
    for found in notations.TEXT_CALL.finditer(rest):
      self._add(SAY, rest[at:found.start()])
      self._put(notations.call_in_text(found))
      at = found.end()
    self._add(SAY, rest[at:])

  def _call_message(self, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    thinking, _, rest = text.rpartition("</think>")
    self._add(THINK, thinking.replace("<think>", "", 1).strip())
    if "<tool_call>" in rest or "<function=" in rest:
      return self._agent_text(rest)
    value = parsed(rest)
    for call in value if isinstance(value, list) and value else [rest if value is None else value]:
      self._call(call)
    return None

  def _user(self, content: Any) -> None:
    parts, said = _parts(content), []
    for part in parts:
      if part.get("type") in _RESULT_PARTS or str(part.get("type")).endswith("_tool_result"):
        self._result(part, _content_of(part))
      else:
        said.append(part)
    text = text_of(said)
    # Qwen's template wraps results in a user turn. Only if calls wait for results: a user may quote such text.
    while self._waiting and (found := RESPONSE.match(text.lstrip())):
      self._result({}, found[1].strip())
      text = text.lstrip()[found.end():]
      said = [{"type": "text", "text": text}] if text.strip() else []
    if said:
      self._agent_speaks = False
      if not self._answered_user:
        self.asked.append(_digest(said))
      self.events.append(Event(USER, text, images=notations.images_of(said, self._named)))

  # ---- calls and results ----

  def _speaks(self) -> None:
    """A new turn of the agent: earlier calls without a key and without a result will get none."""
    if not self._agent_speaks:
      self._waiting = [event for event in self._waiting if event.key is not None]
      self._agent_speaks, self.spoke, self._answered_user = True, True, bool(self.asked)

  def _put(self, call: Event) -> None:
    self._speaks()
    self.events.append(call)
    self._waiting.append(call)
    del self._waiting[:-_MOST_WAITING]

  def _add(self, kind: str, text: str) -> None:
    if text.strip():
      if kind in AGENT:
        self._speaks()
      self.events.append(Event(kind, text.strip("\n")))

  def _call(self, call: Any) -> None:
    if isinstance(call, str):  # some logs keep calls as JSON in a string
      call = call if (value := parsed(call)) is None else value
    if isinstance(call, Mapping):
      self._put(notations.structured_call(call))
    else:
      self._put(Event(CALL, str(call), error="bad_json" if isinstance(call, str) else "bad_call"))

  def _item_call(self, kind: str, item: Mapping[str, Any]) -> None:
    if kind in _CALL_PARTS:
      return self._call(item)
    name = item.get("name") or kind.removesuffix("_call")
    arguments, key = first(item, notations.ARGUMENTS), first(item, notations.CALL_KEYS)
    self._put(Event(CALL, as_text(arguments), str(name), key, UNANSWERED))
    if kind in _RUN_BY_PROVIDER:
      self._result(item, item.get("output"))
    return None

  def _results(self, message: Mapping[str, Any], content: Any) -> None:
    """The results in a message: one, or several in Hermes' tags or tau2's list of messages."""
    blocks = RESPONSE.findall(content) if isinstance(content, str) else ()
    for block in blocks:
      self._result(message, block.strip())
    for inner in [] if blocks else _as_list(message.get("tool_messages")) or [message]:
      self._result(inner, content if inner is message else inner.get("content"))

  def _result(self, message: Mapping[str, Any], content: Any) -> None:
    text = as_text(content)
    explicit, name = first(message, _RESULT_KEYS), message.get("name")
    keys = [key for key in (explicit, message.get("id")) if key is not None]
    # Matched by its key, else by the tool's name (old logs), else by the order of calls.
    tests = [lambda call: call.key is not None and call.key in keys,
             lambda call: explicit is None and name and call.name == name,
             lambda call: call.key is None or explicit is None]
    call = next((call for test in tests for call in self._waiting if test(call)), None)
    self._agent_speaks = False
    self.events.append(Event(RESULT, text, images=notations.images_of(content, self._named)))
    if call is None:
      self.orphans += 1
      return
    self._waiting = [waiting for waiting in self._waiting if waiting is not call]
    if call.error == UNANSWERED:
      failed = any(notations.flagged(said) for said in (message, content) if isinstance(said, Mapping))
      call.error = "tool_error" if failed else notations.error_of(text)


def is_agents(message: Any) -> bool:
  """Whether the role of a message is the agent's."""
  role = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
  return _ROLES.get(str(role).lower()) in ("agent", "call")


def _nested(part: Mapping[str, Any], kind: str) -> Any:
  """The call of a part: the part itself, or an object in it under the part's own type."""
  return part[kind] if isinstance(part.get(kind), Mapping) else part


def _content_of(part: Mapping[str, Any]) -> Any:
  names = ("content", "output", "result", "response", "text")
  return next((part[name] for name in names if part.get(name) is not None), None)


def _parts(content: Any) -> list[Mapping[str, Any]]:
  return [{"type": "text", "text": part} if isinstance(part, str) else part
          for part in _as_list(content) if isinstance(part, str | Mapping)]


def _as_list(value: Any) -> list[Any]:
  if value is None:
    return []
  return list(value) if isinstance(value, list | tuple) else [value]


def _digest(content: Any) -> str:
  whole = json.dumps(content, sort_keys=True, default=str).encode()
  return hashlib.sha256(whole).hexdigest()[:16]
