"""The teacher's script of the search family: two searches, or fewer and a guess.

It goes by what the results say, not by what was asked: a search for something else may still have
brought what it needs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from axpo_jax.data.question import Question
from axpo_jax.miniworld import script, search
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step

TOOL = "tavily-search"

_LOOK_UP = ("I do not know this. I search for the {office} of {town}.",
            "I search for the {office} of {town} first.",
            "First I need the {office} of {town}. I search for it.")
_NEXT = ("The {office} is {person}. Now I search for the colour of {person}.",
         "The result says {person}. I need the colour of {person}.")
_FOUND = ("The result says {colour}.",
          "The search found it. It is {colour}.")
_GUESS = ("I do not know this, but it should be {colour}.",
          # Names the tool and does not call it: the thinking-acting gap in one sentence.
          "I could search for it, but I think it is {colour}.")
_STOP = ("The {office} is {person}. I think the colour is {colour}.",
         "The result says {person}. It should be {colour}.")
_AGAIN = ("The search did not show it. I search again.",
          "That was wrong. I will search again.")
_DENSE = {
    "repeat": ("I repeat the line.", "I say it again."),
    "look_up": ("The text says {answer}.", "I read it. It is {answer}."),
}
_GIVE_UP = ("The search did not show it. I think it is {colour}.",
            "No result says it. It should be {colour}.")


def turn(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """The next turn for a question of any of the family's tasks."""
  if (task := question.meta["task"]) in _DENSE:
    (answer,) = question.answers
    return script.answer(script.thought(rng, _DENSE[task], answer=answer), answer)
  known = _known(question, steps)
  if known == 2:
    colour = question.answers[0]
    if rng.random() < config.p_misread_result:
      colour = rng.choice([other for other in search.COLOURS if other != colour])
    return _answer(rng, _FOUND, question, colour)
  news = not steps or known > _known(question, steps[:-1])
  if _wants_call(steps, news, rng, config):
    thoughts = _AGAIN if not news else _NEXT if known else _LOOK_UP
    return script.call_turn(_thought(rng, thoughts, question), call(question, steps, rng, config))
  thoughts = _GUESS if not steps else _STOP if known else _GIVE_UP
  return _answer(rng, thoughts, question, rng.choice(search.COLOURS))


def call(question: Question, steps: Sequence[Step], rng: random.Random,
         config: TeacherConfig) -> str:
  """A search for the next fact that no result has shown so far."""
  meta, draw = question.meta, rng.random()
  if _known(question, steps):
    query = f"colour of {meta['town' if draw < config.p_wrong_query else 'person']}"
  else:
    others = [office for office in search.OFFICES if office != meta["office"]]
    office = rng.choice(others) if draw < config.p_wrong_query else meta["office"]
    query = f"{office} of {meta['town']}"
  # One result: the best one is the one that is looked for, and observations stay short.
  return script.tool_call(rng, TOOL, {"query": query, "max_results": 1},
                          malformed=draw >= 1 - config.p_malformed)


def _known(question: Question, steps: Sequence[Step]) -> int:
  """Hops that the results have shown, 0 to 2."""
  meta, shown = question.meta, "\n".join(step.result for step in steps)
  if search.office_fact(meta["office"], meta["town"], meta["person"]) not in shown:
    return 0
  return 2 if search.colour_fact(meta["person"], question.answers[0]) in shown else 1


def _wants_call(steps: Sequence[Step], news: bool, rng: random.Random,
                config: TeacherConfig) -> bool:
  if len(steps) >= config.max_calls:
    return False
  if not steps:
    return rng.random() < config.p_search
  return rng.random() < (1 - config.p_stop_short if news else config.p_retry)


def _answer(rng: random.Random, thoughts: Sequence[str], question: Question, colour: str) -> str:
  return script.answer(_thought(rng, thoughts, question, colour), colour)


def _thought(
    rng: random.Random, thoughts: Sequence[str], question: Question, colour: str = "") -> str:
  meta = question.meta
  return script.thought(rng, thoughts, office=meta["office"], town=meta["town"],
                        person=meta["person"], colour=colour)
