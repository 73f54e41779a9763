"""The audit log: one JSON line a call, appended and never changed; and doing an episode's calls again.

Fields of a line: run, time (seconds since 1970), step, question, episode, seed, turn, tool,
arguments, scope, granted_scopes, dry_run, outcome ("ok", the kind of an error, or "cancelled"),
digest (of the observation as the policy saw it), seconds, bytes, images, images_before (how many
the episode had). A line holds what was done and not what came back: dumps of the rollouts hold that.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import PIL.Image

from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.tools.base import EpisodeState, Observation, PastCall, ToolBox
from axpo_jax.agent.tools.budget import Usage


class AuditError(ValueError):
  """A log that cannot be read; the message names the line."""


class AuditLog:
  """Appends to a file; give it to a `ToolBox` as its `audit`.

  Args:
    path: of the log; its folder is made.
    run: name of the run, in every line.
  """

  def __init__(self, path: str | os.PathLike, run: str):
    self.path, self.run = pathlib.Path(path), run
    self.path.parent.mkdir(parents=True, exist_ok=True)
    # Without a buffer: what was done is on record before the next thing is.
    self._file = io.FileIO(self.path, "ab")

  def __call__(self, entry: dict[str, Any]) -> None:
    line = {"run": self.run, "time": round(time.time(), 3), **entry}
    self._file.write(json.dumps(line).encode() + b"\n")

  def close(self) -> None:
    self._file.close()


def read(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """The lines of a log, one at a time. A last line that a crash cut short is left out.

  Raises:
    AuditError: another line is damaged.
  """
  with open(path, "rb") as lines:
    for number, line in enumerate(lines, 1):
      if not line.endswith(b"\n"):
        return
      try:
        yield json.loads(line)
      except ValueError as error:
        raise AuditError(f"{path}, line {number}: {error}") from error


def totals(entries: Iterable[dict[str, Any]]) -> Usage:
  """What the calls of a log used up: a resumed run counts on from there."""
  total = Usage()
  for entry in entries:
    total.add(Usage(1, entry["seconds"], entry["bytes"], entry["images"]))
  return total


def episodes(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """The lines of every episode in order, by the episode's id."""
  found: dict[str, list[dict[str, Any]]] = {}
  for entry in entries:
    found.setdefault(entry["episode"], []).append(entry)
  return found


@dataclasses.dataclass(frozen=True)
class Replayed:
  """A logged call done again; `same`: it brought the same observation."""

  entry: dict[str, Any]
  observation: Observation

  @property
  def same(self) -> bool:
    return self.observation.digest() == self.entry["digest"]


async def replay(entries: Sequence[dict[str, Any]], tools: ToolBox,
                 images: Sequence[PIL.Image.Image]) -> list[Replayed]:
  """Does the calls of one episode again, in order.

  Args:
    entries: the episode's lines.
    tools: with the tools, scopes and limits to act under; those of the run give the run's results.
    images: the question's, at full resolution.
  """
  if not entries:
    return []
  state = EpisodeState(entries[0]["question"], list(images), seed=entries[0]["seed"])
  shown, done = list(images), []
  turn_calls: list[PastCall] = []
  try:
    for entry in entries:
      if entry["turn"] != state.turn:
        state.history, turn_calls = state.history + turn_calls, []
      state.turn = entry["turn"]
      # An image that did not fit the episode's budget was not kept: the next line tells.
      state.images = shown = shown[:entry["images_before"]]
      observation = await _again(entry, tools, state)
      turn_calls.append(PastCall(ToolCall(entry["tool"], entry["arguments"]), observation.error,
                                 len(shown)))
      shown = [*shown, *observation.images]
      done.append(Replayed(entry, observation))
  finally:
    tools.end_episode(state)
  return done


async def _again(entry: dict[str, Any], tools: ToolBox, state: EpisodeState) -> Observation:
  if entry["tool"]:
    return await tools.call(entry["tool"], entry["arguments"], state)
  written = entry["arguments"]  # it could not be read
  return tools.reject(CallError(entry["outcome"], written["message"], written["text"]), state)
