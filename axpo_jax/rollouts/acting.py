"""Did the policy act where it should, and where it did not, why not?

In: a step's groups, whose questions may say that one should act on them ("act"), should not
("decline"), or may ("either"). Out: metrics that keep two things apart which a tool-attempt rate
mixes: a question that was rightly left alone, and one where acting was called for and avoided. The
latter is split by what the question's other rollouts show: acting was tried and always failed (it
is hard: the Thinking-Acting Gap), it was tried and worked, or nobody tried.
"""

from collections.abc import Sequence

from axpo_jax.rollouts.census import GroupStats, RolloutStats

ACT, DECLINE = "act", "decline"


def acting_census(groups: Sequence[GroupStats], *, prefix: str = "rollout") -> dict[str, float]:
  """Shares of the rollouts of questions that should be acted on, and of those that should not.

  Args:
    groups: a step's questions; continuations are not counted, since their prefix acts.
    prefix: first part of the names.

  Returns:
    Metrics by name (docs/metrics.md); none about a label that no question carries.
  """
  out: dict[str, float] = {}
  if declining := _labelled(groups, DECLINE):
    out |= _shares("should_decline", declining, {
      "declined": lambda rollout, group: not rollout.used_tool,
      "declined_and_right": lambda rollout, group: not rollout.used_tool and rollout.right,
      "acted": lambda rollout, group: rollout.used_tool})
  if acting := _labelled(groups, ACT):
    out |= _shares("should_act", acting, {
      "acted_right": lambda rollout, group: rollout.used_tool and rollout.right,
      "acted_wrong": lambda rollout, group: rollout.used_tool and not rollout.right,
      "avoided_hard": lambda rollout, group: not rollout.used_tool and _tried(group) == "failed",
      "avoided_able": lambda rollout, group: not rollout.used_tool and _tried(group) == "worked",
      "avoided_untried": lambda rollout, group: not rollout.used_tool and _tried(group) == "never"})
  return {f"{prefix}/{name}": value for name, value in out.items()}


def _labelled(groups: Sequence[GroupStats], label: str) -> list[tuple[RolloutStats, GroupStats]]:
  return [(rollout, group) for group in groups if group.acting == label
          for rollout in group.rollouts]


def _tried(group: GroupStats) -> str:
  """What acting came to in the question's ordinary rollouts."""
  acted = [rollout for rollout in group.rollouts if rollout.used_tool]
  if not acted:
    return "never"
  return "worked" if any(rollout.right for rollout in acted) else "failed"


def _shares(label: str, members, tests) -> dict[str, float]:
  return {f"{label}/{name}": sum(test(*member) for member in members) / len(members)
          for name, test in tests.items()}
