"""Logs of other makers for the browser of the page: the same groups that our dumps give.

In: traces with their events (diagnose.reading, keep=True). Out: a group a question. Such logs
have texts and no tokens, so nothing is coloured by advantage or confidence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from axpo_jax.diagnose import figures, notations
from axpo_jax.diagnose.traces import Trace
from axpo_jax.report.pictures import IMAGE, Pictures

# As agent.transcript.Kind numbers them; a later turn of the user is none of those.
_KINDS = {notations.THINK: 1, notations.CALL: 2, notations.RESULT: 3, notations.SAY: 4,
          notations.USER: 5}
_NAME = 120  # characters of a question's name: some logs put the whole task there


def groups(r: int, traces: Sequence[Trace], pictures: Pictures) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
  """The questions of run `r`, sorted by time: how many rollouts, and what makes the group."""
  for members in figures.by_question(traces):
    yield len(members), functools.partial(_group, r, members, pictures)


def _group(r: int, members: Sequence[Trace], pictures: Pictures) -> dict[str, Any]:
  first = members[0]
  before = _prompt(first)
  asked = "\n\n".join(event.text for event in before if event.kind == notations.USER)
  system = "\n\n".join(event.text for event in before if event.kind == notations.SYSTEM)
  # Without an id of the question, the file and line of its first rollout name it.
  name = first.place if first.question.startswith(("asked ", first.place)) else first.question
  return {"run": r, "at": f"step {first.when}" if isinstance(first.when, int) else first.when or "",
          "id": name[:_NAME], "category": "", "gold": [], "acting": first.acting, "question": asked or name,
          "system": system, "images": _images(before, pictures),
          "rollouts": [_rollout(trace, pictures) for trace in members]}


def _prompt(trace: Trace) -> Sequence[notations.Event]:
  """The messages before the agent's first turn."""
  kinds = [event.kind for event in trace.events]
  spoken = (i for i, kind in enumerate(kinds)
            if kind in (notations.THINK, notations.SAY, notations.CALL))
  return trace.events[:next(spoken, len(kinds))]


def _images(events: Sequence[notations.Event], pictures: Pictures) -> list[dict[str, Any]]:
  return [{"key": pictures.add_text(image), "origin": event.kind}
          for event in events for image in event.images]


def _rollout(trace: Trace, pictures: Pictures) -> dict[str, Any]:
  said = [event for event in trace.events if event.kind in (notations.SAY, notations.CALL)]
  answer = said[-1].text if said and said[-1].kind == notations.SAY else None
  events = [event for event in trace.events[len(_prompt(trace)):] if event.kind in _KINDS]
  segments = [{"kind": _KINDS[event.kind], "at": at, "tokens": [_shown(event)]}
              for at, event in enumerate(events)]
  for segment, event in zip(segments, events):
    segment["tokens"] += [IMAGE] * len(event.images)
  return {"reward": trace.reward, "answer": answer and answer.strip()[:200], "stop": "answer",
          "images": _images(events, pictures), "start": 0, "segments": segments,
          "calls": [{"name": event.name, "error": event.error, "box": None}
                    for event in trace.events if event.kind == notations.CALL]}


def _shown(event: notations.Event) -> str:
  return f"{event.name or '(unreadable)'}  {event.text}" if event.kind == notations.CALL else event.text

