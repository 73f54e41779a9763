"""Figures of traces: shares with intervals, overall, by tool and over time; and warnings.

In: Traces. Out: a plain dict that JSON takes (docs/diagnose.md lists its fields). A *question* here
is one question at one time: rollouts of the same question at another step are another group.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from axpo_jax.diagnose.intervals import Share, shares
from axpo_jax.diagnose.traces import Trace
from axpo_jax.diagnose.warnings import warnings
from axpo_jax.rollouts import acting
from axpo_jax.rollouts.census import TOOL_WORDS

Group = Sequence[Trace]
# Per question: how many were found, among how many.
Counter = Callable[[Group], tuple[int, int]]


def _of(among: Callable[[Trace], bool], test: Callable[[Trace], bool]) -> Counter:
  """A share of rollouts: of those `among`, the ones that pass `test`."""
  def count(group: Group) -> tuple[int, int]:
    members = [trace for trace in group if among(trace)]
    return sum(map(test, members)), len(members)
  return count


def _all_wrong(used_tool: bool) -> Counter:
  """A share of questions: of those with a scored subgroup, the ones where all of it is wrong."""
  def count(group: Group) -> tuple[int, int]:
    members = [trace for trace in group if trace.scored and trace.used_tool == used_tool]
    return int(bool(members) and not any(trace.right for trace in members)), int(bool(members))
  return count


def _declined(test: acting.Test, label: str | None = None) -> Counter:
  """A share of the scored rollouts without a call or, with a `label`, of all scored rollouts of questions with that
  label: those that pass `test`, which also gets the outcome of acting in the question's rollouts."""
  def count(group: Group) -> tuple[int, int]:
    scored = [trace for trace in group if trace.scored]
    members = [trace for trace in scored
               if (not trace.used_tool if label is None else trace.acting == label)]
    tried = acting.tried(scored)
    return sum(test(trace, tried) for trace in members), len(members)
  return count


def _errors(group: Group) -> tuple[int, int]:
  calls = [call for trace in group for call in trace.calls]
  return sum(call.error is not None for call in calls), len(calls)


def _tool(trace: Trace) -> bool:
  return trace.used_tool


# name -> (what people read, how it is counted). The names are those of docs/metrics.md where the
# training loop logs the same.
FIGURES: dict[str, tuple[str, Counter]] = {
  "success_rate": ("right, of all rollouts", _of(lambda t: t.scored, lambda t: t.right)),
  "tool_attempt_rate": ("tried a tool, of all rollouts", _of(lambda t: True, _tool)),
  "tool_success_rate": ("right, of rollouts with a tool",
                        _of(lambda t: t.scored and t.used_tool, lambda t: t.right)),
  "no_tool_success_rate": ("right, of rollouts without",
                           _of(lambda t: t.scored and not t.used_tool, lambda t: t.right)),
  "tool_all_wrong_rate": ("questions whose tool rollouts are all wrong", _all_wrong(True)),
  "no_tool_all_wrong_rate": ("questions whose other rollouts are all wrong", _all_wrong(False)),
  "stop_after_first_call_rate": ("stopped after the first call, of rollouts with a tool",
                                 _of(_tool, lambda t: len(t.calls) == 1)),
  "tool_error_rate": ("calls that failed", _errors),
  "declined_well": ("no call, and right", _declined(lambda t, tried: t.right)),
  "failed_to_act": ("no call, wrong, and acting worked elsewhere",
                    _declined(lambda t, tried: not t.right and tried == acting.WORKED)),
  "acting_failed_too": ("no call, wrong, and acting failed elsewhere",
                        _declined(lambda t, tried: not t.right and tried == acting.FAILED)),
  "nobody_acted": ("no call, wrong, and nobody acted",
                   _declined(lambda t, tried: not t.right and tried == acting.NEVER)),
  **{name: (label, _declined(test, question)) for (name, (question, test)), label in zip(
    acting.TESTS.items(), (
      "should decline: declined", "should decline: declined, and right", "should decline: acted",
      "should act: acted, right", "should act: acted, wrong",
      "should act: avoided, acting always failed", "should act: avoided, acting worked elsewhere",
      "should act: avoided, nobody tried"), strict=True)},
}
MENTION = "mention_without_call_rate"
MENTION_LABEL = "named a tool in thought, made no call, of all rollouts"
# In the order of the tables.
LABELS = {name: label for name, (label, _) in FIGURES.items()} | {MENTION: MENTION_LABEL}


def diagnose(traces: Sequence[Trace], words: Sequence[str] = ()) -> dict[str, Any]:
  """All figures of some traces.

  Args:
    traces: in any order.
    words: by these thinking mentions a tool; empty for the usual ones and the tools' own names.
  """
  groups = by_question(traces)
  counters = {name: count for name, (_, count) in FIGURES.items()}
  counters[MENTION] = _mention(words or _tool_words(traces))
  overall, rows = _shares(groups, counters), over_time(groups, counters)
  return {
    "rollouts": len(traces), "questions": len(groups),
    "calls": sum(len(trace.calls) for trace in traces),
    "scored": sum(trace.scored for trace in traces),
    "figures": _as_json(overall), "tools": by_tool(groups),
    "over_time": [{"when": when, "rollouts": rollouts, "figures": _as_json(found)}
                  for when, rollouts, found in rows],
    "warnings": warnings(overall, [(when, found) for when, _, found in rows], len(traces)),
  }


def by_question(traces: Sequence[Trace]) -> list[Group]:
  """Rollouts of one question at one time, together; sorted by time and question."""
  groups = collections.defaultdict(list)
  for trace in traces:
    groups[_order(trace.when), trace.question].append(trace)
  return [groups[key] for key in sorted(groups)]


def over_time(groups: Sequence[Group], counters: Mapping[str, Counter]
              ) -> list[tuple[int | str, int, dict[str, Share]]]:
  """(step or day, rollouts, figures) in order; what has no time is left out."""
  rows = collections.defaultdict(list)
  for group in groups:
    if group[0].when is not None:
      rows[_order(group[0].when)].append(group)
  return [(rows[key][0][0].when, sum(map(len, rows[key])), _shares(rows[key], counters))
          for key in sorted(rows)]


def by_tool(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
  """Calls and errors of every tool, most called first."""
  kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for group in groups:
    for trace in group:
      for call in trace.calls:
        kinds[call.name or "(unreadable)"][call.error or ""] += 1
  out = {}
  for tool, found in sorted(kinds.items(), key=lambda item: (-item[1].total(), item[0])):
    errors = {kind: count for kind, count in sorted(found.items()) if kind}
    rate = _shares(groups, {"error_rate": _errors_of(tool)})
    out[tool] = {"calls": found.total(), "errors": sum(errors.values()), "kinds": errors,
                 **_as_json(rate)}
  return out


def _errors_of(tool: str) -> Counter:
  def count(group: Group) -> tuple[int, int]:
    calls = [call for trace in group for call in trace.calls
             if (call.name or "(unreadable)") == tool]
    return sum(call.error is not None for call in calls), len(calls)
  return count


def _mention(words: Sequence[str]) -> Counter:
  words = [word.lower() for word in words]
  return _of(lambda t: t.used_tool or t.thinking is not None,
             lambda t: not t.used_tool and any(word in t.thinking.lower() for word in words))


def _tool_words(traces: Sequence[Trace]) -> list[str]:
  """The usual words, and the names of the tools that were offered or worked. A name of one or two
  letters would be found in any text."""
  names = {name for trace in traces for name in trace.tools}
  names |= {call.name for trace in traces for call in trace.calls if call.error is None}
  return [*TOOL_WORDS, *sorted(name for name in names if len(name) > 2)]


def _shares(groups: Sequence[Group], counters: Mapping[str, Counter]) -> dict[str, Share]:
  if not groups:
    return {}
  table_GxFx2 = np.array([[count(group) for count in counters.values()] for group in groups])
  found = shares(table_GxFx2[..., 0], table_GxFx2[..., 1])
  return {name: share for name, share in zip(counters, found) if share is not None}


def _order(when: int | str | None) -> tuple[bool, int, str]:
  """Steps before days, in order."""
  return isinstance(when, str), when if isinstance(when, int) else -1, str(when)


def _as_json(found: Mapping[str, Share]) -> dict[str, dict[str, Any]]:
  return {name: share._asdict() for name, share in found.items()}
