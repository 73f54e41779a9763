"""Filters by sampled rewards: which trajectories SFT learns from, and which questions RL trains on.

In: recorded counts (`Counts`), never a rollout or a model. Out: for each trajectory or question `KEPT` or the
reason why it is left out, and a `Tally` of these. The counts stay on disk, so thresholds can be changed without
sampling again.

The paper's filters (arXiv 2605.28774, section 5): SFT learns only from trajectories with the right answer; RL
leaves out questions that the SFT checkpoint solves 4 times of 4, or that the teacher fails 4 times of 4.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from axpo_jax.rl.advantages import RIGHT

KEPT = "kept"
# Of trajectories.
FAILED = "failed: the machine ended it"
WRONG = "wrong answer"
TOO_LONG = "too long"
# Of questions.
UNKNOWN = "the policy has no judged rollout of it"
SOLVED = "solved by the policy"
HOPELESS = "failed by the teacher"


@dataclasses.dataclass(frozen=True)
class Counts:
  """Rewards of the judged rollouts of one question, without failed ones."""

  rewards: tuple[float, ...]

  @property
  def passed(self) -> int:
    return sum(reward > RIGHT for reward in self.rewards)

  @property
  def pass_rate(self) -> float | None:
    """Share of right ones; None if nothing was judged."""
    return self.passed / len(self.rewards) if self.rewards else None


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """Which questions RL leaves out, by pass rates over the judged rollouts.

  Attributes:
    solved: a question is left out if the policy's rate is at least this; above 1 keeps all.
    hopeless: a question is left out if the teacher's rate is at most this; below 0 keeps all.
  """

  solved: float = 1.0
  hopeless: float = 0.0


def trajectory(reward: float, tokens: int, *, failed: bool = False, max_tokens: int,
               keep_wrong: bool = False) -> str:
  """Why SFT leaves a trajectory out, or KEPT.

  Args:
    tokens: of the whole sequence, images expanded.
    failed: it failed by a fault of the machine and not of the policy.
    max_tokens: longer ones are left out whole, since a part would teach to stop in the middle.
  """
  if failed:
    return FAILED
  if not (reward > RIGHT or keep_wrong):
    return WRONG
  return TOO_LONG if tokens > max_tokens else KEPT


def question(policy: Counts | None, teacher: Counts | None,
             thresholds: Thresholds = Thresholds()) -> str:
  """Why RL leaves a question out, or KEPT.

  Args:
    policy: counts of the policy that RL starts from; None if there are none.
    teacher: counts of the teacher; None if it was not asked, which keeps the question.
  """
  if policy is not None:
    if policy.pass_rate is None:
      return UNKNOWN
    if policy.pass_rate >= thresholds.solved:
      return SOLVED
  rate = None if teacher is None else teacher.pass_rate
  return HOPELESS if rate is not None and rate <= thresholds.hopeless else KEPT


@dataclasses.dataclass
class Tally:
  """Counts of what was kept and what was left out, by reason."""

  what: str  # trajectories, questions
  reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  @classmethod
  def of(cls, what: str, reasons: Iterable[str]) -> Tally:
    return cls(what, collections.Counter(reasons))

  @property
  def total(self) -> int:
    return self.reasons.total()

  @property
  def kept(self) -> int:
    return self.reasons[KEPT]

  def __str__(self) -> str:
    share = self.kept / self.total if self.total else 0.0
    dropped = [f"{count} {reason}" for reason, count in self.reasons.most_common() if reason != KEPT]
    return (f"{self.kept} of {self.total} {self.what} kept ({share:.1%})"
            + (f"; left out: {', '.join(dropped)}" if dropped else ""))

  def to_json(self) -> dict[str, Any]:
    return {"what": self.what, "total": self.total, "kept": self.kept,
            "reasons": dict(sorted(self.reasons.items()))}
