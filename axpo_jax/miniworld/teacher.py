"""The scripted teacher of the miniature world: it writes assistant turns as text.

In: a question of any family, the steps so far, a random stream. Out: one assistant turn (see
`script`). `habits` has the probabilities of its choices. The families' scripts are in `teach_perception`, `teach_search` and `teach_reasoning`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from axpo_jax.data.question import Question
from axpo_jax.miniworld import teach_perception, teach_reasoning, teach_search
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step

_SCRIPTS = {"perception": teach_perception, "search": teach_search, "reasoning": teach_reasoning}


def turn(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """Writes the next assistant turn.

  Args:
    question: one of the miniature world.
    steps: every call so far and what came back, in order.
    rng: the turn's random stream; all choices come from it.
    config: the teacher's habits.

  Returns:
    The text after `<think>\\n`: a thought, `</think>`, then a tool call or the answer.

  Raises:
    ValueError: the question is not one of the miniature world.
  """
  return _script(question).turn(question, steps, rng, config)


def call(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """Writes a call from just after `<tool_call>` to `</tool_call>`; also ends a cut prefix.

  Raises:
    ValueError: the question is not one of the miniature world.
  """
  return _script(question).call(question, steps, rng, config)


def _script(question: Question):
  if question.category not in _SCRIPTS:
    raise ValueError(f"the teacher does not know the family {question.category!r} of question "
                     f"{question.id!r}; it knows {tuple(_SCRIPTS)}")
  return _SCRIPTS[question.category]
