"""Notations of single calls, results and texts. No state.

In: parts of a message. Out: an Event of a call, the kind of an error, texts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axpo_jax.agent.parse import CallError, parse_call

SYSTEM, USER, THINK, SAY, CALL, RESULT = "system", "user", "think", "say", "call", "result"
UNANSWERED = "no_result"
CHATML = re.compile(r"<\|im_start\|>(\w+)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)

_CALL_NAMES = ("name", "function_name", "tool_name", "toolName")
ARGUMENTS = ("arguments", "input", "args", "parameters", "kwargs", "action")
CALL_KEYS = ("call_id", "tool_call_id", "toolCallId", "id")

# Up to the next tag of either kind, so that an opening tag repeated 100,000 times takes linear time.
RESPONSE = re.compile(r"<tool_response>((?:(?!</?tool_response>).)*)</tool_response>", re.DOTALL)
TEXT_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)|"
                       r"<function=([^>\s]*)>(.*?)(</function>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\s]*)>.*?(</function>|\Z)", re.DOTALL)
_ERROR_TEXT = re.compile(r"\s*\W?(error|exception|failed|traceback \(most recent call last\))\b",
                         re.IGNORECASE)
# Words of calls in notations that are not read: XML and bracket tags, ReAct, JSON with a name and
# arguments. And keys or types by which messages hold calls.
CALL_WORDS = re.compile(
  r"</?(?:tool_calls?|tool_use|tool_code|function_calls?|functions?|invoke|execute_\w+|antml:\w+)\b|"
  r"<\|(?:tool|python_tag|plugin|action)|<｜tool|\[TOOL_CALLS\]|functools\[|<end_code>|"
  r"```tool_(?:code|call)|^[ \t]*Action[ \t]*:\s*(?:\{|\w+\s*[\[(]|[^\n]*\n\s*Action Input\s*:)|"
  r'"name"\s*:\s*"[^"\n]+"\s*,\s*"(?:arguments|parameters|args|kwargs|input)"\s*:', re.MULTILINE)
_CALL_KEY = re.compile(r"(?:tool|function)s?[-_ ]?(?:use|call|invocation|request)s?", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")  # shorter ones, and those with a dot, are names
_DEEPEST = 12  # levels of a message that are searched for such keys


@dataclasses.dataclass
class Event:
  """One event of a conversation.

  Attributes:
    kind: SYSTEM, USER, THINK, SAY, CALL or RESULT.
    text: the text; for a call its arguments as written.
    name: for a call, the tool; "" if it cannot be read.
    key: matches a result with its call.
    error: for a call, the kind of its error; None if it worked.
    images: base64 texts, data URIs or paths of the images in a message of the user or in a result.
  """

  kind: str
  text: str = ""
  name: str = ""
  key: Any = None
  error: str | None = None
  images: Sequence[str] = ()


def split_text(text: str) -> list[dict[str, str]]:
  """Messages of a text: the blocks of ChatML; of other text, results after calls, and the rest is the agent's."""
  if "<|im_start|>" in text:
    if not text.lstrip().startswith("<|im_start|>"):
      text = "<|im_start|>assistant\n" + text
    return [{"role": role, "content": body} for role, body in CHATML.findall(text)]
  turns, at = [], 0
  for response in RESPONSE.finditer(text):
    before = text[at:response.start()]
    # A result follows a call or another result. Otherwise the agent quotes one.
    if before.strip() and not before.rstrip().endswith(("</tool_call>", "</function>")):
      continue
    if before.strip():
      turns.append({"role": "assistant", "content": before})
    turns.append({"role": "tool", "content": response[1].strip()})
    at = response.end()
  if text[at:].strip() or not turns:
    turns.append({"role": "assistant", "content": text[at:]})
  return turns


def split_tools(system: str) -> tuple[str, list[dict[str, Any]]]:
  """A system prompt without what Qwen's chat template adds to it, and the tools that are listed there."""
  start = f"\n{system}".find("\n# Tools\n")  # the index of its # in `system`
  opened = system.find("<tools>", start)
  closed = system.find("</tools>", opened)
  if min(start, opened, closed) < 0:
    return system, []
  listed = map(parsed, system[opened + len("<tools>"):closed].splitlines())
  return system[:start].strip(), [tool for tool in listed if isinstance(tool, dict)]


def error_of(text: str) -> str | None:
  """"tool_error" if a tool's result reads like an error: an object with a truthy "error" (or
  "is_error", or status "error"), or text that begins with Error, Exception, Failed or Traceback."""
  value = parsed(text)
  if isinstance(value, Mapping):
    return "tool_error" if flagged(value) else None
  if value is not None and not isinstance(value, str):
    return None
  return "tool_error" if _ERROR_TEXT.match(text if value is None else value) else None


def text_of(content: Any) -> str:
  """The text of a message's content: a string, or parts of which some are text or thinking."""
  if isinstance(content, str):
    return content
  parts = [content] if isinstance(content, Mapping) else content
  if not isinstance(parts, Sequence):
    return ""
  texts = (part if isinstance(part, str) else part.get("text") or part.get("thinking")
           for part in parts if isinstance(part, str | Mapping))
  return "\n".join(text for text in texts if isinstance(text, str) and text)


def images_of(content: Any, named: bool = False) -> list[str]:
  """The pictures in a message's content, as base64 texts or data URIs.

  Args:
    named: also images that are given by a path. The caller must check such paths: a log may name any file of
      this machine.
  """
  found = []
  for part in content if isinstance(content, list) else [content]:
    if isinstance(part, Mapping) and "image" in str(part.get("type")):
      # {"image_url": {"url": ...}} or {"image_url": ...}, {"source": {"data": ...}}, {"data": ...}.
      inner = first(part, ("image_url", "source", "image", "data"))
      text = first(inner, ("url", "data", "path")) if isinstance(inner, Mapping) else inner
      if isinstance(text, str) and (named or text.startswith("data:image/") or _BASE64.fullmatch(text)):
        found.append(text)
  return found


def parsed(text: str) -> Any:
  """The value of a JSON text; None if it is not JSON, or null."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def structured_call(call: Mapping[str, Any]) -> Event:
  function = call.get("function") or call.get("custom")
  inner = function if isinstance(function, Mapping) else call
  name = function if isinstance(function, str) else first(inner, _CALL_NAMES)
  written, key = first(inner, ARGUMENTS), first(call, CALL_KEYS)
  event = Event(CALL, as_text(written), str(name or ""), key, UNANSWERED)
  value = written
  if isinstance(written, str) and call.get("type") not in ("custom", "custom_tool_call"):
    value = parsed(written) if written.strip() else {}
    if value is None and written.strip() != "null":
      event.error = "bad_json"
      return event
  text_in_json = isinstance(value, str) and value is not written
  if not event.name or text_in_json or not isinstance(value, Mapping | str | None):
    event.error = "bad_call"
  return event


def call_in_text(found: re.Match) -> Event:
  inside, end, name, _, closed = found.groups()
  if inside is None:
    return Event(CALL, found[0], name, None, UNANSWERED if closed and name else "unclosed")
  if not end:
    return Event(CALL, inside.strip(), "", None, "unclosed")
  if function := _FUNCTION.match(inside):
    return Event(CALL, inside.strip(), function[1], None, UNANSWERED if function[1] else "bad_call")
  call = parse_call(inside.strip())
  if isinstance(call, CallError):
    return Event(CALL, inside.strip(), "", None, call.kind)
  return Event(CALL, as_text(call.arguments), call.name, None, UNANSWERED)


def first(value: Mapping[str, Any], names: Sequence[str]) -> Any:
  return next((value[name] for name in names if value.get(name) is not None), None)


def as_text(value: Any) -> str:
  """A value as readable text: a text itself, the texts of parts, anything else as JSON."""
  if value is None or isinstance(value, str):
    return value or ""
  if isinstance(value, list) and value and all(isinstance(p, Mapping) and "type" in p for p in value):
    return text_of(value) or " ".join(f"[{part['type']}]" for part in value)
  return json.dumps(value, ensure_ascii=False, default=str)


def flagged(value: Mapping[str, Any]) -> bool:
  return bool(value.get("error") or value.get("is_error") or value.get("isError")
              or value.get("error_code") or value.get("status") in ("error", "failed"))


def call_keys(value: Any, depth: int = 0) -> Iterator[str]:
  """Non-empty keys and types in a message that may be of a call."""
  if depth > _DEEPEST:
    return
  if isinstance(value, Mapping):
    for key, inner in value.items():
      if inner and _CALL_KEY.fullmatch(str(key)):
        yield str(key)
      if key == "type" and isinstance(inner, str) and _CALL_KEY.fullmatch(inner):
        yield inner
      yield from call_keys(inner, depth + 1)
  elif isinstance(value, list):
    for inner in value:
      yield from call_keys(inner, depth + 1)
