"""Whether the policy acts where it should, and why not where it does not.

In: a step's groups, whose questions may be labelled: one should act on them ("act"), should not ("decline"), or
may ("either"). Out: metrics that separate two cases which a tool-attempt rate mixes: a question rightly answered
without a tool, and a question where a tool was needed and avoided. The second case is split by the question's
other rollouts: acting was tried and always failed (the Thinking-Acting Gap), acting was tried and worked, or no
rollout acted.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from axpo_jax.rollouts.census import GroupStats

ACT, DECLINE = "act", "decline"
FAILED, WORKED, NEVER = "failed", "worked", "never"  # the outcome of acting


class Episode(Protocol):
  """A rollout: `census.RolloutStats` in a run, `diagnose.traces.Trace` in logs."""

  @property
  def used_tool(self) -> bool: ...

  @property
  def right(self) -> bool: ...


Test = Callable[[Episode, str], bool]


def _avoided(outcome: str) -> Test:
  return lambda rollout, tried: not rollout.used_tool and tried == outcome


# Name -> (label of the question, test of a rollout and of the outcome of acting in its question).
TESTS: dict[str, tuple[str, Test]] = {
  "should_decline/declined": (DECLINE, lambda rollout, _: not rollout.used_tool),
  "should_decline/declined_and_right": (DECLINE, lambda rollout, _: not rollout.used_tool and rollout.right),
  "should_decline/acted": (DECLINE, lambda rollout, _: rollout.used_tool),
  "should_act/acted_right": (ACT, lambda rollout, _: rollout.used_tool and rollout.right),
  "should_act/acted_wrong": (ACT, lambda rollout, _: rollout.used_tool and not rollout.right),
  "should_act/avoided_hard": (ACT, _avoided(FAILED)),
  "should_act/avoided_able": (ACT, _avoided(WORKED)),
  "should_act/avoided_untried": (ACT, _avoided(NEVER)),
}


def tried(rollouts: Iterable[Episode]) -> str:
  """The outcome of acting in a question's rollouts: FAILED, WORKED or NEVER."""
  acted = [rollout.right for rollout in rollouts if rollout.used_tool]
  return NEVER if not acted else WORKED if any(acted) else FAILED


def acting_census(groups: Sequence[GroupStats], *, prefix: str = "rollout") -> dict[str, float]:
  """Shares of the rollouts of questions that should be acted on, and of those that should not.

  Args:
    groups: a step's questions; continuations are not counted, since their prefix acts.
    prefix: first part of the names.

  Returns:
    Metrics by name (docs/metrics.md); none about a label that no question carries.
  """
  out: dict[str, float] = {}
  for name, (label, test) in TESTS.items():
    passed = [test(rollout, outcome) for group in groups if group.acting == label
              for outcome in [tried(group.rollouts)] for rollout in group.rollouts]
    if passed:
      out[f"{prefix}/{name}"] = sum(passed) / len(passed)
  return out
