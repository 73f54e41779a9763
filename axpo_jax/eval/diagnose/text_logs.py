"""Text logs in the format of Qwen and Hermes: <think>, <tool_call>{JSON}</tool_call>,
<tool_response>.

In: a record whose text stands in `text`, `output`/`response`/`completion` (what the agent wrote, with
`input`/`prompt` before it) or in ShareGPT `conversations`; or a plain text file of ChatML. Out: one
Trace a conversation. The rules are those of our own transcripts: calls count behind the last
</think> of their turn, and one that is never closed is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from axpo_jax.agent.parse import CallError, parse_call
from axpo_jax.eval.diagnose.chat_logs import error_of
from axpo_jax.eval.diagnose.traces import Call, Fields, Trace, TraceError, text_of

TEXTS = ("text", "output", "response", "completion")
PROMPTS = ("input", "prompt", "question")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool",
          "observation": "tool", "ipython": "tool", "function_call": "assistant"}
_BLOCK = re.compile(r"<\|im_start\|>(\w+)\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_START = re.compile(r"^(?:[^\n<]*=[^\n<]*\n)?<\|im_start\|>system", re.MULTILINE)
_NAME = re.compile(r'"name":\s*"([^"]+)"')


def is_text(record: Mapping[str, Any]) -> bool:
  """Whether a record is of this format."""
  return isinstance(record.get("conversations"), list) or any(
    isinstance(record.get(name), str) for name in TEXTS)


def read_text(record: Mapping[str, Any], place: str, fields: Fields) -> Trace:
  """Reads one record.

  Raises:
    TraceError: there is no text of the agent in it.
  """
  if isinstance(record.get("conversations"), list):
    turns = [_turn(turn) for turn in record["conversations"]]
  else:
    turns = _prompt(record) + _turns(next(record[name] for name in TEXTS
                                          if isinstance(record.get(name), str)))
  return _trace(turns, place, fields.common(record))


def conversations(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Of a text file, the line of every conversation and its record. A conversation begins with a
  system block; a line `reward=1 step=3 question_id=q7` right before it says what it is."""
  starts = [found.start() for found in _START.finditer(text)] or [0]
  for start, stop in zip(starts, [*starts[1:], len(text)]):
    part = text[start:stop]
    head = part.partition("<|im_start|>")[0]
    facts = dict(word.split("=", 1) for word in head.split() if "=" in word)
    yield text.count("\n", 0, start) + 1, {**facts, "text": part[len(head):]}


def _prompt(record: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What stood before the agent's text; the examples of calls in it are not the agent's."""
  if isinstance(record.get("text"), str):
    return []
  asked = [text_of(record[name]) or json.dumps(record[name]) for name in PROMPTS
           if record.get(name)]
  return [("user", asked[0])] if asked else []


def _turn(turn: Any) -> tuple[str, str]:
  if not isinstance(turn, Mapping):
    raise TraceError("a turn of the conversation is not an object")
  role = str(turn.get("from") or turn.get("role"))
  return _ROLES.get(role, role), text_of(turn.get("value") or turn.get("content"))


def _turns(text: str) -> list[tuple[str, str]]:
  """(role, text) of every turn. Text without ChatML is the agent's, but for the tools' results."""
  if "<|im_start|>" in text:
    if not text.lstrip().startswith("<|im_start|>"):
      text = "<|im_start|>assistant\n" + text
    return [(role, body) for role, body in _BLOCK.findall(text)]
  turns, at = [], 0
  for response in _RESPONSE.finditer(text):
    if said := text[at:response.start()].strip():
      turns.append(("assistant", said))
    turns.append(("tool", response.group()))
    at = response.end()
  return [*turns, ("assistant", text[at:])] if text[at:].strip() else turns


def _trace(turns: list[tuple[str, str]], place: str, common: dict[str, Any]) -> Trace:
  calls, waiting, asked, thoughts, tools = [], [], [], [], []
  spoke = False
  for role, text in turns:
    results = _RESPONSE.findall(text) or ([text] if role == "tool" else [])
    if role == "assistant":
      spoke = True
      calls += waiting
      thinking, _, rest = text.rpartition("</think>")
      # Without </think> the turn is all thinking only if it says so by an opening tag.
      if not thinking and "<think>" in rest:
        thinking, rest = rest, ""
      thoughts.append(thinking or _CALL.sub("", rest))
      waiting = [_call(*found) for found in _CALL.findall(rest)]
    elif results:
      # The results come in the order of the calls.
      answered = [_judged(call, result) for call, result in zip(waiting, results)]
      calls += answered
      waiting = waiting[len(answered):]
    elif role == "system":
      tools += _NAME.findall(text.partition("<tools>")[2].partition("</tools>")[0])
    elif role == "user":
      asked.append(text)
  if not spoke:
    raise TraceError("there is no turn of the assistant in the text")
  calls += [_unanswered(call) for call in waiting]
  return Trace(**{"place": place, "question": "".join(asked), "thinking": "\n".join(thoughts),
                  "calls": tuple(map(_unanswered, calls)), "tools": tuple(tools), **common})


# A call that nobody has answered yet carries this instead of an error.
_WAITING = "?"


def _call(inside: str, end: str) -> Call:
  if not end:
    return Call("", "unclosed")
  found = parse_call(inside.strip())
  return Call("", found.kind) if isinstance(found, CallError) else Call(found.name, _WAITING)


def _judged(call: Call, result: str) -> Call:
  return Call(call.name, error_of(result.strip())) if call.error == _WAITING else call


def _unanswered(call: Call) -> Call:
  return Call(call.name, "no_result") if call.error == _WAITING else call
