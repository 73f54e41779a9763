"""From the token ids of one assistant turn to the tool calls it makes.

In: ids as sampled. Out: spans (which tokens are thinking, which are calls) and parsed calls. Tags
are recognised by token id and never by text: `<tool_call>` spelled out of ordinary tokens is not a
call, so the parser, the AXPO cut and the trainer always agree on where a call begins. Only what
follows the LAST `</think>` of the turn counts; a call quoted in the thinking is not a call.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """The token ids a transcript must recognise. Read them from a Chat with `from_chat`."""

  image_pad: int
  video_pad: int
  im_start: int
  im_end: int
  endoftext: int
  think_end: int
  tool_call: int
  tool_call_end: int

  @classmethod
  def from_chat(cls, chat: Any) -> SpecialIds:
    """Reads the ids from the attributes `<name>_id` of `chat`."""
    return cls(**{field.name: getattr(chat, f"{field.name}_id")
                  for field in dataclasses.fields(cls)})

  @property
  def stop_ids(self) -> tuple[int, int]:
    """Ids that end a turn."""
    return self.im_end, self.endoftext


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A well-formed call: a name and an object of arguments, neither checked against a tool yet."""

  name: str
  arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CallError:
  """A call that could not be read.

  Attributes:
    kind: "bad_json", "bad_call" (JSON, but not a call) or "unclosed".
    message: what is wrong, in words the policy can act on.
    text: the call as it was written.
  """

  kind: str
  message: str
  text: str


# Far more than a tool needs, and far less than what takes Python's JSON or a dump apart.
MAX_DEPTH = 64  # arrays and objects within each other
MAX_CHARACTERS = 1 << 18  # of one call


class CallSpan(NamedTuple):
  """Tokens [start, stop) of one call, tags included; `closed`: it ends with </tool_call>."""

  start: int
  stop: int
  closed: bool


def think_stop(ids: Sequence[int], special: SpecialIds) -> int:
  """Index just after the last `</think>`; len(ids) when the thinking never ends."""
  for i in range(len(ids) - 1, -1, -1):
    if ids[i] == special.think_end:
      return i + 1
  return len(ids)


def call_spans(ids: Sequence[int], special: SpecialIds) -> list[CallSpan]:
  """Calls of one turn, in order: from `<tool_call>` to `</tool_call>`, both included.

  A call that is never closed reaches to the end of the turn (a stop token stays outside).
  """
  spans, start = [], None
  end = len(ids)
  if end and ids[-1] in special.stop_ids:
    end -= 1
  for i in range(think_stop(ids, special), end):
    if ids[i] == special.tool_call and start is None:
      start = i
    elif ids[i] == special.tool_call_end and start is not None:
      spans.append(CallSpan(start, i + 1, True))
      start = None
  if start is not None:
    spans.append(CallSpan(start, end, False))
  return spans


def parse_turn(ids: Sequence[int], special: SpecialIds,
               decode: Callable[[Sequence[int]], str]) -> list[ToolCall | CallError]:
  """Parses every call of one turn.

  Args:
    ids: the sampled tokens of the turn.
    special: the tag ids.
    decode: ids to text, special tokens kept.

  Returns:
    One ToolCall or CallError per call, in order; empty when the turn makes no call.
  """
  calls = []
  for span in call_spans(ids, special):
    inside = ids[span.start + 1:span.stop - 1 if span.closed else span.stop]
    text = decode(list(inside)).strip()
    if span.closed:
      calls.append(parse_call(text))
    else:
      calls.append(CallError("unclosed", "the call was not closed with </tool_call>", text))
  return calls


def parse_call(text: str) -> ToolCall | CallError:
  """Parses the JSON between the tags: `{"name": ..., "arguments": {...}}`.

  What it returns can be encoded, copied and written by everybody: no deeper than `MAX_DEPTH`, all
  numbers finite, and no half of a surrogate pair in any text.
  """
  if len(text) > MAX_CHARACTERS:
    return CallError("bad_call", f"a call has at most {MAX_CHARACTERS} characters, this one has "
                     f"{len(text)}", text[:MAX_CHARACTERS])
  try:
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
  except json.JSONDecodeError as error:
    return CallError("bad_json", f"not valid JSON: {error.msg} at character {error.pos}", text)
  except (ValueError, RecursionError) as error:  # NaN, 1e999, 5,000-digit integers, 10,000 brackets
    return CallError("bad_json", f"not valid JSON: {error}", text)
  if problem := _beyond_bounds(value):
    return CallError("bad_call", problem, text)
  if not isinstance(value, dict):
    return CallError("bad_call", f"a call must be a JSON object, got {_type_name(value)}", text)
  if not isinstance(value.get("name"), str):
    return CallError("bad_call", 'a call needs a string "name"', text)
  if not isinstance(value.get("arguments"), dict):
    return CallError("bad_call", 'a call needs an object "arguments"', text)
  return ToolCall(value["name"], value["arguments"])


def _no_constant(name: str):
  raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
  number = float(digits)
  if not math.isfinite(number):
    raise ValueError(f"{digits[:40]} is too large for a number")
  return number


def _beyond_bounds(value: Any) -> str | None:
  """What makes a value unfit to be a call, in words; None if nothing does."""
  if deeper_than(MAX_DEPTH, value):
    return f"a call is at most {MAX_DEPTH} arrays and objects deep"
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    return "\\ud800 to \\udfff are halves of characters: write both halves"
  return None


def deeper_than(most: int, value: Any) -> bool:
  """Whether a JSON value has more than `most` arrays and objects within each other. Without recursion."""
  level, depth = [value], 0
  while level := [part for part in level if isinstance(part, (dict, list))]:
    depth += 1
    if depth > most:
      return True
    level = [part for outer in level
             for part in (outer.values() if isinstance(outer, dict) else outer)]
  return False


def _type_name(value: Any) -> str:
  names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean",
           type(None): "null"}
  return names.get(type(value), "a number")
