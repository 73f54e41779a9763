"""OpenAI-style chat logs: records with `messages`, calls in `tool_calls`, results by role `tool`.

In: one JSON object. Out: one Trace. Reasoning is taken from `reasoning_content`, `reasoning` or
<think> tags; where a log has none of them, what the assistant says beside its calls stands for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.eval.diagnose.traces import Call, Fields, Trace, TraceError, text_of

_THINK = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_ERROR_TEXT = re.compile(r"\s*\W?(error|exception|failed|traceback \(most recent call last\))\b",
                         re.IGNORECASE)


def read_chat(record: Mapping[str, Any], place: str, fields: Fields) -> Trace:
  """Reads one conversation.

  Raises:
    TraceError: no list of messages, or a message that is none.
  """
  messages = _messages(record)
  calls, results, asked, thoughts, said = [], {}, [], [], []
  for message in messages:
    role = message.get("role")
    if role == "assistant":
      calls += _calls(message)
      thoughts += _thoughts(message)
      said.append(text_of(message.get("content")))
    elif role in ("tool", "function"):
      results.setdefault(message.get("tool_call_id") or message.get("name"), []).append(message)
    elif role == "user":
      asked.append(json.dumps(message.get("content"), sort_keys=True))
  if not said:
    raise TraceError("no message of the assistant")
  # Without an id of the question, equal questions are those that ask for the same.
  return Trace(**{
    "place": place, "question": "".join(asked), "thinking": "\n".join(thoughts or said),
    "calls": tuple(_judged(*call, results) for call in calls),
    "tools": _tool_names(record.get("tools")), **fields.common(record)})


def error_of(text: str) -> str | None:
  """"tool_error" if a tool's result reads like an error: an object with a truthy "error" (or
  "is_error", or status "error"), or text that begins with Error, Exception, Failed or Traceback."""
  try:
    value = json.loads(text)
  except ValueError:
    return "tool_error" if _ERROR_TEXT.match(text) else None
  if isinstance(value, Mapping):
    return "tool_error" if _flagged(value) else None
  return "tool_error" if isinstance(value, str) and _ERROR_TEXT.match(value) else None


def _messages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  messages = list(record["messages"] if isinstance(record.get("messages"), list) else ())
  for source in (record, record.get("response")):  # the answer of a logged request
    if isinstance(source, Mapping) and source.get("choices"):
      messages.append(source["choices"][0]["message"])
  if not messages:
    raise TraceError('"messages" is not a list with messages in it')
  if not all(isinstance(message, Mapping) for message in messages):
    raise TraceError("a message is not an object")
  return messages


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """(name, arguments, key of the result) of every call of a message."""
  out = []
  for call in message.get("tool_calls") or ():
    function = call.get("function") or call
    out.append((str(function.get("name") or ""), function.get("arguments"), call.get("id")))
  if old := message.get("function_call"):  # the form before tool_calls
    out.append((str(old.get("name") or ""), old.get("arguments"), old.get("name")))
  return out


def _judged(name: str, arguments: Any, key: Any, results: dict[Any, list]) -> Call:
  # A server hands out each id once, an old-style log repeats the tool's name: first come first.
  answers = results.get(key) or results.get(name) or []
  result = answers.pop(0) if answers else None
  try:
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
  except ValueError:
    return Call(name, "bad_json")
  if not name or not isinstance(value, Mapping | None):
    return Call(name, "bad_call")
  if result is None:
    return Call(name, "no_result")
  return Call(name, "tool_error" if _flagged(result) else error_of(text_of(result.get("content"))))


def _flagged(value: Mapping[str, Any]) -> bool:
  return bool(value.get("error") or value.get("is_error") or value.get("isError")
              or value.get("status") in ("error", "failed"))


def _thoughts(message: Mapping[str, Any]) -> list[str]:
  found = [text_of(message[name]) for name in ("reasoning_content", "reasoning")
           if message.get(name)]
  return found + _THINK.findall(text_of(message.get("content")))


def _tool_names(tools: Any) -> tuple[str, ...]:
  if not isinstance(tools, Sequence) or isinstance(tools, str):
    return ()
  functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
  return tuple(str(function["name"]) for function in functions if function.get("name"))
