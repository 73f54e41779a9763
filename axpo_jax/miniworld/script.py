"""The form of the scripted teacher's turns: what it writes, and what it reads of a conversation.

In: thoughts, answers and arguments of calls. Out: text in the format of Qwen3-VL-Thinking, from just
after `<think>\\n` up to, and without, `<|im_end|>`; and from a conversation's text the steps so far.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_ASSISTANT = "<|im_start|>assistant\n"
_CALL_PATTERN = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_RESULT_PATTERN = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)


class Step(NamedTuple):
  """A past turn with a call: its arguments (None if it cannot be parsed), and what came back."""

  arguments: Mapping[str, Any] | None
  result: str


def read_history(text: str) -> tuple[list[Step], str]:
  """Reads a conversation's text.

  Args:
    text: all of it, with special tokens, ending where the teacher is to go on.

  Returns:
    The past steps, and the text of the turn that is open, after `<think>\\n`.

  Raises:
    ValueError: no assistant turn is open.
  """
  _, *turns = text.split(_ASSISTANT)
  if not turns:
    raise ValueError(f"the text has no assistant turn to write: ...{text[-80:]!r}")
  return [_step(past) for past in turns[:-1]], turns[-1].removeprefix("<think>\n")


def _step(past: str) -> Step:
  written, _, observed = past.partition("<|im_end|>\n")
  found = _CALL_PATTERN.search(written.rpartition("</think>")[2])
  result = _RESULT_PATTERN.search(observed)
  try:
    arguments = json.loads(found[1])["arguments"] if found else None
  except (TypeError, ValueError, KeyError):
    arguments = None
  return Step(arguments if isinstance(arguments, dict) else None, result[1] if result else "")


def answer(thought: str, text: str) -> str:
  """A turn that ends the episode."""
  return f"{thought}\n</think>\n\n<answer>\n\\boxed{{{text}}}\n</answer>"


def call_turn(thought: str, call: str) -> str:
  """A turn with a call, which is what `tool_call` gives."""
  return f"{thought}\n</think>\n\n<tool_call>{call}"


def tool_call(rng: random.Random, name: str, arguments: Mapping[str, Any], *,
              malformed: bool = False) -> str:
  """A call from just after `<tool_call>` to `</tool_call>`; a malformed one is no JSON."""
  text = json.dumps({"name": name, "arguments": arguments})
  if malformed:
    last = "]" if "]" in text else "}"
    text = rng.choice((text[:-1], text.replace(", ", " ", 1), text.replace(last, "", 1)))
  return f"\n{text}\n</tool_call>"


def thought(rng: random.Random, thoughts: Sequence[str], **words: object) -> str:
  """One of the sentences, with its words filled in."""
  return rng.choice(thoughts).format(**words)
