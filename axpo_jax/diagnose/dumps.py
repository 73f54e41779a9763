"""Reads our own dumps (rollouts/dump.py).

In: a record of a dump. Out: a Trace, or None for a continuation of a frozen prefix, since it did not choose to
call. Dumps without the text of their tokens need the run's tokenizer.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from axpo_jax.agent.token_texts import token_texts
from axpo_jax.diagnose.traces import Call, Trace

# Values of the file format, repeated here because agent.transcript needs Pillow and diagnose only numpy.
THINK, CALL = 1, 2  # of agent.transcript.Kind
FAILED_STOPS = ("deadline", "engine_error", "episode_error")  # of agent.rollout
_STEP = re.compile(r"step[_-]?(\d+)")

Decode = Callable[[Sequence[int]], str]


def read_dump(record: Mapping[str, Any], place: str, step: int | None, pieces: Sequence[str] | None
              ) -> Trace | None:
  """Reads one rollout; None for continuations and for failed rollouts."""
  extra, transcript = record.get("extra") or {}, record["transcript"]
  if "branch" in extra or record["stop"] in FAILED_STOPS:
    return None
  kinds = kinds_of(transcript)
  calls = tuple(Call(call["name"], call["error"]) for call in record["calls"])
  if not calls and CALL in kinds:  # opened, but the turn was cut before it could be read
    calls = (Call("", "unclosed"),)
  thinking = None if pieces is None else "".join(
    itertools.compress(pieces, (kind == THINK for kind in kinds)))
  question = f"{extra['group']} {record['question_id']}" if "group" in extra else (
    record["question_id"])
  return Trace(place, question, step, record["reward"], calls, thinking,
               acting=extra.get("acting") or "either")


def pieces_of(record: Mapping[str, Any], decode: Decode | None, known: dict[int, str]
              ) -> Sequence[str] | None:
  """The text of every token: from the dump, or by a tokenizer; None without either."""
  transcript = record["transcript"]
  if "pieces" in transcript:
    return transcript["pieces"]
  return None if decode is None else token_texts(transcript["ids"], decode, known)


def step_in_name(path: pathlib.Path) -> int | None:
  """The step in a file's name: step_000010.jsonl is 10."""
  found = _STEP.search(path.name)
  return int(found[1]) if found else None


def find_decode(path: pathlib.Path) -> Decode | None:
  """The decoder of the tokenizer in a run's policy folder, or where the run's config says."""
  for folder in path.resolve().parents:
    for place in (folder / "policy", *_configured(folder / "config.json")):
      if (place / "tokenizer.json").exists():
        return load_decode(place / "tokenizer.json")
    if (folder / "metrics.jsonl").exists():  # the run's own folder: those above are not part of it
      return None
  return None


def load_decode(path: pathlib.Path) -> Decode:
  """The decoder of a tokenizer.json."""
  from tokenizers import Tokenizer  # here: logs that carry their text do not need it

  tokenizer = Tokenizer.from_file(str(path))
  return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def kinds_of(transcript: Mapping[str, Any]) -> list[int]:
  """The kind of every token, from [[value, how many], ...].

  Raises:
    ValueError: it is not one kind a token.
  """
  tokens, runs = len(transcript["ids"]), transcript["kinds"]
  if sum(count for _, count in runs) != tokens or any(count < 0 for _, count in runs):
    raise ValueError(f"the kinds are not those of {tokens} tokens")
  return [value for value, count in runs for _ in range(count)]


def _configured(path: pathlib.Path) -> list[pathlib.Path]:
  if not path.exists():
    return []
  model = json.loads(path.read_text()).get("model") or {}
  return [pathlib.Path(model[name]) for name in ("tokenizer", "checkpoint") if model.get(name)]
