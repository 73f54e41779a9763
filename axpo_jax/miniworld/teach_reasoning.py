"""The teacher's script of the reasoning family: it reads two prices and computes, or reckons."""

from __future__ import annotations

import random
from collections.abc import Sequence

from axpo_jax.data.question import Question
from axpo_jax.miniworld import reasoning, script
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step

TOOL = "python"

_COMPUTE = ("I read {first} and {second}. I compute it with python.",
            "I see {first} and {second}. I use python for the total.")
_SHOWN = ("The result is there.",
          "I have the total.")
_EASY = ("I read {first} and {second}. I can add it directly.",
         "I see {first} and {second}. The total is small.")
_GUESS = ("I read {first} and {second}. I think I know the total.",
          # Names the tool and does not call it: the thinking-acting gap in one sentence.
          "I see {first} and {second}. I could use python, but I think I know the total.")
_BROKEN = ("The call was not valid. I try again.",
           "That was wrong. I compute it again.")
_DENSE = {
    "prices": ("I list the prices.", "I read the table."),
    "formula": ("I read {first} and {second}.", "I see {first} and {second}."),
}
_GIVE_UP = ("That was wrong. I think I know the total.",)


def turn(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """The next turn for a question of any of the family's tasks."""
  if (task := question.meta["task"]) in _DENSE:
    return script.answer(_thought(rng, _DENSE[task], question), question.answers[0])
  if steps and _is_number(steps[-1].result):
    return script.answer(_thought(rng, _SHOWN, question), steps[-1].result.strip())
  if _wants_call(question, steps, rng, config):
    thought = _thought(rng, _BROKEN if steps else _COMPUTE, question)
    return script.call_turn(thought, call(question, steps, rng, config))
  thoughts = _GIVE_UP if steps else _EASY if _is_easy(question) else _GUESS
  return script.answer(_thought(rng, thoughts, question), _reckoned(question, rng, config))


def call(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """A line of python that prints the total, whatever was run before."""
  items, draw = question.meta["items"], rng.random()
  if draw < config.p_wrong_code:
    items = _confused(items, rng)
  code = f"print({reasoning.formula(items)})"
  if config.p_wrong_code <= draw < config.p_wrong_code + config.p_broken_code:
    code = code[:-1]
  return script.tool_call(rng, TOOL, {"code": code}, malformed=draw >= 1 - config.p_malformed)


def _confused(items: Sequence[tuple[int, str, int]], rng: random.Random):
  """The items with a price misread, so that the total is another."""
  (quantity, colour, price), second = items
  other = rng.choice([p for p in reasoning.PRICES if p != price])
  return (quantity, colour, other), second


def _reckoned(question: Question, rng: random.Random, config: TeacherConfig) -> str:
  """The total in its head."""
  total = int(question.answers[0])
  slip = config.p_slip_easy if _is_easy(question) else config.p_slip_hard
  if rng.random() < slip:
    total += rng.choice([-2, -1, 1, 2] if _is_easy(question) else [-20, -10, 10, 20])
  return str(total)


def _wants_call(question: Question, steps: Sequence[Step], rng: random.Random,
                config: TeacherConfig) -> bool:
  if len(steps) >= config.max_calls:
    return False
  if steps:
    return rng.random() < config.p_retry
  return rng.random() < (config.p_python_easy if _is_easy(question) else config.p_python_hard)


def _is_easy(question: Question) -> bool:
  return question.meta["difficulty"] == "easy"


def _is_number(result: str) -> bool:
  return result.strip().isdigit()


def _thought(rng: random.Random, thoughts: Sequence[str], question: Question) -> str:
  first, second = (f"{colour} {price}" for _, colour, price in question.meta["items"])
  return script.thought(rng, thoughts, first=first, second=second)
