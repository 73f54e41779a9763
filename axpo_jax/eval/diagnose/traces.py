"""One rollout of any agent, as far as the question "does it act, and does that help?" goes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.rl.acting import ACT, DECLINE
from axpo_jax.rl.advantages import RIGHT

ACTING = ("either", ACT, DECLINE)


class TraceError(ValueError):
  """A record that cannot be read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Call:
  """One tool call.

  Attributes:
    name: the tool as called; "" when the call could not be read.
    error: kind of its error, None when it worked.
  """

  name: str
  error: str | None = None


@dataclasses.dataclass(frozen=True)
class Trace:
  """One rollout.

  Attributes:
    place: file and line that it was read from.
    question: rollouts of the same question share this.
    when: step (int) or day ("2026-01-31") that it belongs to; None if the log does not say.
    reward: None if the log does not say.
    calls: in order.
    thinking: what the agent said to itself; None where the log has nothing of the kind.
    tools: names of the tools that it was offered, as far as the log says.
    acting: whether one should act on the question: "act", "decline" or "either".
  """

  place: str
  question: str
  when: int | str | None = None
  reward: float | None = None
  calls: Sequence[Call] = ()
  thinking: str | None = None
  tools: Sequence[str] = ()
  acting: str = "either"

  @property
  def used_tool(self) -> bool:
    return bool(self.calls)

  @property
  def scored(self) -> bool:
    return self.reward is not None

  @property
  def right(self) -> bool:
    return self.reward is not None and self.reward > RIGHT


# Names under which logs keep what a trace needs, first match wins; looked for in the record and
# then in its sub-records META. `--field reward=path.to.it` puts a name before these.
FIELDS: dict[str, tuple[str, ...]] = {
  "reward": ("reward", "score", "correct", "is_correct", "accuracy", "acc"),
  "question": ("question_id", "qid", "problem_id", "task_id", "prompt_id"),
  "when": ("step", "global_step", "training_step", "date", "timestamp", "created_at", "created"),
  "acting": ("acting",),
}
META = ("metadata", "meta", "extra", "extra_info", "info")


class Fields:
  """Finds a trace's facts in a foreign record.

  Args:
    names: {"reward" | "question" | "when" | "acting": dotted path}, looked for first.
  """

  def __init__(self, names: Mapping[str, str] | None = None):
    self._names = dict(names or {})
    if unknown := self._names.keys() - FIELDS.keys():
      raise TraceError(f"no field {sorted(unknown)}; there are {sorted(FIELDS)}")

  def find(self, record: Mapping[str, Any], field: str) -> Any:
    """The value of one field; None if the record has none."""
    if field in self._names:
      return _at(record, self._names[field])
    for place in (record, *(record.get(name) for name in META)):
      if isinstance(place, Mapping):
        for name in FIELDS[field]:
          if place.get(name) is not None:
            return place[name]
    return None

  def common(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """Reward, time and label of a record, as arguments of a Trace; `question` if it is named.

    Raises:
      TraceError: a value that cannot be what its name says.
    """
    out = {"reward": _reward(self.find(record, "reward")), "when": _when(self.find(record, "when"))}
    if (question := self.find(record, "question")) is not None:
      out["question"] = str(question)
    if (acting := self.find(record, "acting")) is not None:
      if acting not in ACTING:
        raise TraceError(f"acting is {acting!r}; it must be one of {ACTING}")
      out["acting"] = acting
    return out


def text_of(content: Any) -> str:
  """The text of a message's content: a string, or parts of which some are text."""
  if isinstance(content, str):
    return content
  if isinstance(content, Sequence):
    return "\n".join(part if isinstance(part, str) else str(part.get("text") or "")
                     for part in content if isinstance(part, str | Mapping))
  return ""


def _at(record: Any, path: str) -> Any:
  for name in path.split("."):
    record = record.get(name) if isinstance(record, Mapping) else None
  return record


def _reward(value: Any) -> float | None:
  if value is None or value == "":
    return None
  words = {"true": 1.0, "correct": 1.0, "false": 0.0, "incorrect": 0.0, "wrong": 0.0}
  if isinstance(value, str) and value.lower() in words:
    return words[value.lower()]
  try:
    reward = float(value)
  except (TypeError, ValueError) as error:
    raise TraceError(f"reward is {value!r}, not a number, true or false") from error
  return None if reward != reward else reward


# Larger numbers are seconds since 1970 (from September 2001 on), smaller ones are steps.
_FIRST_TIMESTAMP = 1_000_000_000


def _when(value: Any) -> int | str | None:
  """A step, or the day of a date."""
  if value is None or isinstance(value, bool):
    return None
  try:
    number = float(value)
  except (TypeError, ValueError):
    try:
      return datetime.datetime.fromisoformat(str(value)).date().isoformat()
    except ValueError as error:
      raise TraceError(f"{value!r} is neither a step nor a date such as 2026-01-31") from error
  if number < _FIRST_TIMESTAMP:
    return int(number)
  seconds = number / 1000 if number > 1000 * _FIRST_TIMESTAMP else number
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
