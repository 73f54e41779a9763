"""What a policy's answers to the held-out questions say: how right it is, and of which habits.

In: per question how many rollouts called a tool and how many did not, how many of each were right, and
the same with the call forced (`eval.forced`). Out: rates, by which a cure can be told from a habit.

A call that became more frequent is no better for it. So the reward that comes from tool rollouts is
taken apart. With q the share of rollouts that call, T the share that call and are right, f the success
rate of forced calls, and D the share that do not call and are right,

    reward = T + D,    T = q f + (T - q f)

where the bracket is what choosing brings: calling where calling works. A change of reward is then

    (q1 - q0) (f0 + f1)/2  +  (f1 - f0) (q0 + q1)/2  +  change of the bracket  +  (D1 - D0)
      called more often        calls got better          chosen better             without calls
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from axpo_jax.eval import passk
from axpo_jax.rollouts.shards import Record


class Counts(NamedTuple):
  """One question's rollouts that the machine did not end.

  Attributes:
    id, family: of the question.
    tool, tool_right: rollouts that called a tool, and those of them that are right.
    direct, direct_right: rollouts that did not.
    forced, forced_right: rollouts whose call was forced.
  """

  id: str
  family: str
  tool: int
  tool_right: int
  direct: int
  direct_right: int
  forced: int = 0
  forced_right: int = 0

  @property
  def rollouts(self) -> int:
    return self.tool + self.direct

  @property
  def right(self) -> int:
    return self.tool_right + self.direct_right


def from_records(natural: Iterable[Record], forced: Iterable[Record] = ()) -> list[Counts]:
  """The counts of an evaluation's shards, and of those with the call forced, if there are any."""
  by_id = {record.id: record for record in forced}
  return [_counted(record, by_id.get(record.id)) for record in natural]


def _counted(record: Record, forced: Record | None) -> Counts:
  kept = [record.stats[i] for i in record.judged]
  called = [stats.right for stats in kept if stats.used_tool]
  direct = [stats.right for stats in kept if not stats.used_tool]
  opened = [forced.stats[i].right for i in forced.judged if forced.stats[i].used_tool] if forced else []
  return Counts(record.id, record.family, len(called), sum(called), len(direct), sum(direct),
                len(opened), sum(opened))


def pass_at(questions: Sequence[Counts], k: int) -> float | None:
  """Pass@k, over the questions with at least k rollouts."""
  return mean(passk.pass_at_k(q.right, q.rollouts, k) for q in questions if q.rollouts >= k)


def all_wrong_at(pairs: Iterable[tuple[int, int]], m: int) -> float | None:
  """Chance that m rollouts of a question are all wrong, over the questions that have as many.

  Unbiased at any number of rollouts, C(wrong, m) / C(all, m): with every question's whole subgroup
  instead, more attempts alone would lower the rate.

  Args:
    pairs: (rollouts, right ones) of every question.
  """
  return mean(1 - passk.pass_at_k(right, number, m) for number, right in pairs if number >= m)


class Shares(NamedTuple):
  """Sums over questions that the reward is made of; see the module docstring.

  Attributes:
    called: q, share of rollouts that call.
    called_right: T, share that call and are right.
    direct_right: D, share that do not call and are right.
    forced: f, success rate of forced calls.
  """

  called: float
  called_right: float
  direct_right: float
  forced: float


def shares(questions: Sequence[Counts]) -> Shares | None:
  """None without rollouts, or without forced ones."""
  rollouts, forced = sum(q.rollouts for q in questions), sum(q.forced for q in questions)
  if not (rollouts and forced):
    return None
  return Shares(sum(q.tool for q in questions) / rollouts,
                sum(q.tool_right for q in questions) / rollouts,
                sum(q.direct_right for q in questions) / rollouts,
                sum(q.forced_right for q in questions) / forced)


def parts(before: Shares, after: Shares) -> dict[str, float]:
  """The change of reward, taken apart; the four add up to it."""
  chosen = [one.called_right - one.called * one.forced for one in (before, after)]
  return {
    "part_more_often": (after.called - before.called) * (before.forced + after.forced) / 2,
    "part_better": (after.forced - before.forced) * (before.called + after.called) / 2,
    "part_chosen": chosen[1] - chosen[0],
    "part_direct": after.direct_right - before.direct_right,
  }


def measures(questions: Sequence[Counts]) -> dict[str, float]:
  """All rates of one evaluation; what is a rate of nothing is left out."""
  def ratio(number: Callable[[Counts], int], of: Callable[[Counts], int]) -> float | None:
    total = sum(map(of, questions))
    return sum(map(number, questions)) / total if total else None

  out = {
    "pass_at_1": mean(q.right / q.rollouts for q in questions if q.rollouts),
    "pass_at_4": pass_at(questions, 4),
    "tool_rate": ratio(lambda q: q.tool, lambda q: q.rollouts),
    "tool_success": ratio(lambda q: q.tool_right, lambda q: q.tool),
    "direct_success": ratio(lambda q: q.direct_right, lambda q: q.direct),
    "forced_success": ratio(lambda q: q.forced_right, lambda q: q.forced),
    "all_wrong": mean(float(q.tool_right == 0) for q in questions if q.tool),
    "all_wrong_at_2": all_wrong_at(((q.tool, q.tool_right) for q in questions), 2),
    "forced_all_wrong_at_4": all_wrong_at(((q.forced, q.forced_right) for q in questions), 4),
  }
  return {name: value for name, value in out.items() if value is not None}


def mean(values: Iterable[float]) -> float | None:
  """None of nothing."""
  values = list(values)
  return math.fsum(values) / len(values) if values else None
