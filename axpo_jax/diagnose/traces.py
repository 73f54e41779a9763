"""One rollout of any agent, with what the diagnosis reads of it: its calls, its thinking and its reward."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.records import value_at
from axpo_jax.rl.advantages import RIGHT
from axpo_jax.rollouts.acting import ACT, DECLINE

ACTING = ("either", ACT, DECLINE)


class TraceError(ValueError):
  """A record cannot be read; the message says why."""


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
    question: the same for all rollouts of a question.
    when: step (int) or day ("2026-01-31"); None if the log has neither.
    reward: None if the log has none.
    calls: in order.
    thinking: the agent's thinking; None if the log has none.
    tools: names of the offered tools, if the log has them.
    acting: whether one should act on the question: "act", "decline" or "either".
    events: the conversation (`events.Event`), if the reader keeps events.
  """

  place: str
  question: str
  when: int | str | None = None
  reward: float | None = None
  calls: Sequence[Call] = ()
  thinking: str | None = None
  tools: Sequence[str] = ()
  acting: str = "either"
  events: Sequence[Any] = ()

  @property
  def used_tool(self) -> bool:
    return bool(self.calls)

  @property
  def scored(self) -> bool:
    return self.reward is not None

  @property
  def right(self) -> bool:
    return self.reward is not None and self.reward > RIGHT


# Names of a trace's fields in logs; the first match counts, in the record and then in its sub-records META.
# `--field reward=path.to.it` puts a path before these names.
FIELDS: dict[str, tuple[str, ...]] = {
  "reward": ("reward", "score", "correct", "is_correct", "accuracy", "acc"),
  "question": ("question_id", "qid", "problem_id", "task_id", "prompt_id", "example_id"),
  "when": ("step", "global_step", "training_step", "date", "timestamp", "created_at", "created",
           "start_time"),
  "acting": ("acting",),
  "messages": (),
}
META = ("metadata", "meta", "extra", "extra_info", "info", "reward_info")
# Ids of questions are often unique only within one of these.
_SCOPES = ("data_source", "dataset", "env_id", "domain")
# The reward in an object of several scores: the first of these names that it has.
_TOTALS = (*FIELDS["reward"], "score_total", "total", "overall", "final", "value")


class Fields:
  """Finds a trace's fields in a foreign record.

  Args:
    names: {a name in FIELDS: dotted path}, which have priority.
  """

  def __init__(self, names: Mapping[str, str] | None = None):
    self._names = dict(names or {})
    if unknown := self._names.keys() - FIELDS.keys():
      raise TraceError(f"no field {sorted(unknown)}; there are {sorted(FIELDS)}")

  @property
  def messages(self) -> str | None:
    """The dotted path of the messages, if one was given."""
    return self._names.get("messages")

  def find(self, record: Mapping[str, Any], field: str, known: Mapping[str, Any] | None = None
           ) -> tuple[str, Any]:
    """(name, value) of one field; ("", None) if the record has none. The order: a path that was given, the values
    `known` from the format, the usual names."""
    if field in self._names:
      return self._names[field], value_at(record, self._names[field])
    if known and known.get(field) is not None:
      return field, known[field]
    for place in (record, *(record.get(name) for name in META)):
      if isinstance(place, Mapping):
        for name in FIELDS[field]:
          if place.get(name) is not None:
            return name, place[name]
    return "", None

  def common(self, record: Mapping[str, Any], known: Mapping[str, Any] | None = None
             ) -> dict[str, Any]:
    """Reward, time and label of a record, as arguments of a Trace; `question` if it is named.

    Raises:
      TraceError: a value that cannot be what its name says.
    """
    name, when = self.find(record, "when", known)
    out = {"reward": _reward(self.find(record, "reward", known)[1]), "when": _when(when, name)}
    _, question = self.find(record, "question", known)
    if question is not None:
      scope = next((str(record[name]) for name in _SCOPES if record.get(name)), "")
      out["question"] = f"{scope} {question}".strip()
    _, acting = self.find(record, "acting", known)
    if acting is not None:
      if acting not in ACTING:
        raise TraceError(f"acting is {acting!r}; it must be one of {ACTING}")
      out["acting"] = acting
    return out


def _reward(value: Any) -> float | None:
  if isinstance(value, Mapping):
    name = next((name for name in _TOTALS if name in value), None)
    if name is None and len(value) == 1:
      (name,) = value
    if name is None:
      raise TraceError(f"reward is an object with the fields {sorted(map(str, value))[:8]}; name one: "
                       "--field reward=PATH")
    return _reward(value[name])
  if value is None or value == "":
    return None
  words = {"true": 1.0, "correct": 1.0, "false": 0.0, "incorrect": 0.0, "wrong": 0.0}
  if isinstance(value, str) and value.lower() in words:
    return words[value.lower()]
  try:
    reward = float(value)
  except (TypeError, ValueError, OverflowError) as error:
    raise TraceError(f"reward is {_short(value)}, not a number, true or false") from error
  if math.isinf(reward):
    raise TraceError(f"reward is {reward}, not a finite number")
  return None if math.isnan(reward) else reward


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")  # Python's own numbers may have a _ inside
_COMPACT = re.compile(r"(\d{4})(\d\d)(\d\d)(?:[T_ -]\d{4,6}.*|\d{6})?")  # 20251127_101500
# Larger numbers are seconds since 1970 (from September 2001 on), smaller ones are steps.
_FIRST_TIMESTAMP, _LAST_TIMESTAMP = 1_000_000_000, 10_000_000_000


def _when(value: Any, name: str = "") -> int | str | None:
  """A step, or the day of a date."""
  if value is None or isinstance(value, bool):
    return None
  text = str(value).strip()
  compact = _COMPACT.fullmatch(text) if "step" not in name else None
  if compact and (day := _day(*map(int, compact.groups()))) is not None:
    return day
  if not _NUMBER.fullmatch(text):
    try:
      return datetime.datetime.fromisoformat(text).date().isoformat()
    except ValueError as error:
      raise TraceError(
        f"{_short(value)} is neither a step nor a date such as 2026-01-31") from error
  number = float(text)
  while _LAST_TIMESTAMP <= number < math.inf:  # milli-, micro- and nanoseconds
    number /= 1000
  if not abs(number) < _LAST_TIMESTAMP:
    raise TraceError(f"{_short(value)} is neither a step nor a date such as 2026-01-31")
  if number < _FIRST_TIMESTAMP:
    return int(number)
  return datetime.datetime.fromtimestamp(number, datetime.UTC).date().isoformat()


def _day(year: int, month: int, day: int) -> str | None:
  try:
    return datetime.date(year, month, day).isoformat() if 1970 <= year <= 2200 else None
  except ValueError:
    return None


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
