"""The audit log: one JSON line a call, appended and never changed; and doing an episode's calls again.

Fields of a line: run, time (seconds since 1970), step, question, episode, seed, turn, tool,
arguments, scope, granted_scopes, dry_run, outcome ("ok", the kind of an error, or "cancelled"),
digest (of the observation as the policy saw it), seconds, bytes, images, images_before (how many
the episode had). A line holds what was done and not what came back: dumps of the rollouts hold that.

An object store cannot append. There a log is a folder of parts: a thread sends the part that grows
every few seconds, and begins another when it is large. A kill -9 loses the lines of those seconds.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import PIL.Image
from etils import epath

from axpo_jax import paths
from axpo_jax.agent.lines import to_line
from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.tools.base import EpisodeState, Observation, PastCall, ToolBox
from axpo_jax.agent.tools.budget import Usage

_EVERY = 10.0  # seconds between two sendings to a store
_PART_BYTES = 1 << 23  # of a part that is not sent again


class AuditError(ValueError):
  """A log that cannot be read; the message names the line."""


class AuditLog:
  """Appends to a file; give it to a `ToolBox` as its `audit`.

  Args:
    path: of the log; its folder is made.
    run: name of the run, in every line.
  """

  def __init__(self, path: str | os.PathLike, run: str):
    self.path, self.run = epath.Path(path), run
    if paths.is_remote(self.path):
      self._file = _Parts(self.path)
    else:
      paths.make(self.path.parent)
      # Without a buffer: what was done is on record before the next thing is.
      self._file = io.FileIO(self.path, "ab")

  def __call__(self, entry: dict[str, Any]) -> None:
    line = {"run": self.run, "time": round(time.time(), 3), **entry}
    self._file.write(to_line(line).encode() + b"\n")

  def flush(self) -> None:
    """Returns when all lines are where they belong."""
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _Parts:
  """A growing file as numbered objects below a path of a store."""

  def __init__(self, path: epath.Path):
    self._path, self._number = path, len(_files(path))
    self._lines: list[bytes] = []  # of the part that grows
    self._sent = 0  # of them
    self._growing, self._sending = threading.Lock(), threading.Lock()
    self._closed = threading.Event()
    threading.Thread(target=self._send_on, name="audit log", daemon=True).start()

  def write(self, line: bytes) -> None:
    with self._growing:
      self._lines.append(line)

  def flush(self) -> None:
    """Sends what was not sent yet."""
    with self._sending:
      with self._growing:
        lines = list(self._lines)
      if len(lines) == self._sent:
        return
      data = b"".join(lines)
      paths.write_bytes(self._path / f"{self._number:05d}.jsonl", data)
      self._sent = len(lines)
      if len(data) >= _PART_BYTES:
        with self._growing:
          del self._lines[:len(lines)]
        self._number, self._sent = self._number + 1, 0

  def close(self) -> None:
    self._closed.set()
    self.flush()

  def _send_on(self) -> None:
    while not self._closed.wait(_EVERY):
      try:
        self.flush()
      except Exception as error:  # of the store; what was not sent is sent the next time
        logging.warning("the audit log %s was not sent: %r", self._path, error)


def _files(path: epath.Path) -> list[epath.Path]:
  if paths.is_remote(path):
    return paths.glob(path, "*.jsonl")
  return [path] if path.exists() else []


def read(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """The lines of a log, one at a time; none if there is no log. A last line that a crash cut short is
  left out.

  Raises:
    AuditError: another line is damaged.
  """
  for file in _files(epath.Path(path)):
    yield from _lines_of(file)


def _lines_of(path: epath.Path) -> Iterator[dict[str, Any]]:
  with path.open("rb") as lines:
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
      # An image that did not fit the episode's budget was not kept, as the next line shows.
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
