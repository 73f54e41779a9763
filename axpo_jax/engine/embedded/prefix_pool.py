"""The prefix cache, on the host: which sequence runs in which KV row, what a row holds, what to evict.

A row is a running slot and a cache entry at once. A new sequence reuses the longest prefix that any row
holds. If that row is idle and holds nothing but the prefix, the sequence continues in it. Else the
prefix is copied into the least recently used idle row. This module plans the moves and the engine
carries them out. Decisions depend on the order of calls and never on time.

Sequences are compared by content keys (see `content_keys`): a text token's id, or a hash of the image for
an image token. So equal ids with different images never match. A match may end at any token, because
attention is causal and every prefix of a row is valid.

Legend: R rows, S slots in a row, T tokens of a sequence.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np

# Columns compared at a time: most rows drop out in the first chunk.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Match:
  """The longest cached prefix: its row (-1: none) and its length in tokens."""

  row: int
  length: int


NO_MATCH = Match(-1, 0)


@dataclasses.dataclass(frozen=True)
class Move:
  """A row handed to a sequence: tokens [0, cached) come from row `source`, maybe `row` itself."""

  row: int
  source: int
  cached: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which device a row is on: `rows` are split evenly into `shards`, in their order."""

  rows: int
  shards: int = 1

  def shard(self, row: int) -> int:
    return row * self.shards // self.rows

  def most(self, rows: Iterable[int]) -> int:
    """The largest number of `rows` that one device has."""
    return max(collections.Counter(map(self.shard, rows)).values(), default=0)

  def spread(self, rows: Sequence[int], each: int) -> np.ndarray:
    """The order in which a call takes sequences that are in `rows`, so that each device gets those in
    its own rows: int [shards * each] of indices into `rows`; padding has the index behind the last.
    """
    order, taken = np.full((self.shards, each), len(rows)), [0] * self.shards
    for index, row in enumerate(rows):
      shard = self.shard(row)
      order[shard, taken[shard]] = index
      taken[shard] += 1
    return order.reshape(-1)


def content_keys(ids_T: np.ndarray, image_T: np.ndarray, image_keys: Sequence[str]) -> np.ndarray:
  """int64 [T]: the id where image_T is -1, else a negative hash of that image's key."""
  keys_T = np.asarray(ids_T, np.int64).copy()
  for number, key in enumerate(image_keys):
    digest = hashlib.sha256(key.encode()).digest()
    keys_T[image_T == number] = -1 - int.from_bytes(digest[:7], "big")
  return keys_T


def common_prefix(a_T: np.ndarray, b_T: np.ndarray) -> int:
  """Length of the longest common prefix of two key arrays."""
  shorter = min(len(a_T), len(b_T))
  differ = a_T[:shorter] != b_T[:shorter]
  return int(np.argmax(differ)) if differ.any() else shorter


class PrefixPool:
  """Rows of cached tokens. A row's first `valid` slots hold computed keys and values.

  A row's life:

    acquire ──▶ commit ──▶ extend … extend ──▶ release ──▶ (a cache entry) ──▶ acquire
    busy        prompt     tokens              idle        until evicted
                computed   decoded
  """

  def __init__(self, rows: int, length: int, shards: int = 1, most_busy: int | None = None):
    """most_busy: running sequences of one shard, at most; new ones go where the fewest run."""
    self.layout, self._most_busy = Layout(rows, shards), most_busy or rows
    self._shard_R = np.asarray([self.layout.shard(row) for row in range(rows)])
    self._keys_RxS = np.zeros((rows, length), np.int64)
    self._valid_R = np.zeros(rows, np.int64)
    self._busy_R = np.zeros(rows, bool)
    self._used_R = np.full(rows, -1, np.int64)
    self._clock = 0
    self._pinned: set[int] = set()  # sources of moves that have not been carried out

  @property
  def rows(self) -> int:
    return len(self._valid_R)

  @property
  def busy(self) -> int:
    """Rows of running sequences."""
    return int(self._busy_R.sum())

  def valid(self, row: int) -> int:
    """Tokens of `row` whose keys and values are computed."""
    return int(self._valid_R[row])

  def match(self, keys_T: np.ndarray) -> Match:
    """The row with the longest valid common prefix; among equals an idle exact one, then the first.

    "Exact" means that the row holds nothing else: it can be continued in place.
    """
    length_R = self._prefix_lengths(keys_T)
    best = int(length_R.max(initial=0))
    if best == 0:
      return NO_MATCH
    candidates = np.flatnonzero(length_R == best)
    exact = candidates[(self._valid_R[candidates] == best) & ~self._busy_R[candidates]]
    return Match(int(exact[0] if len(exact) else candidates[0]), best)

  def _prefix_lengths(self, keys_T: np.ndarray) -> np.ndarray:
    length_R = np.zeros(self.rows, np.int64)
    alive = np.flatnonzero(self._valid_R)
    for start in range(0, len(keys_T), _CHUNK):
      chunk = keys_T[start : start + _CHUNK]
      same = self._keys_RxS[alive, start : start + len(chunk)] == chunk
      length_R[alive] += np.where(same.all(1), len(chunk), np.argmin(same, 1))
      alive = alive[same.all(1) & (self._valid_R[alive] > start + len(chunk))]
      if not len(alive):
        break
    return np.minimum(length_R, self._valid_R)

  def acquire(
    self, keys_T: np.ndarray, match: Match, wanted: Collection[int] = ()
  ) -> Move | None:
    """Hands out a row for the sequence; None when every row is running or pinned.

    Args:
      keys_T: the prompt's content keys.
      match: what `match` found, cut so that at least the last prompt token is left to compute.
      wanted: rows that waiting sequences would start from: evicted only if there is no other.
    """
    source, cached = match.row, match.length
    exact = source >= 0 and not self._busy_R[source] and cached == self._valid_R[source]
    if exact and self._running(source) < self._most_busy:
      row = source
    else:
      row = self._evictable({*wanted, source}, source)
      if row is None:
        return None
    in_place = row == source
    if source >= 0:
      self._pinned.add(source)
      self._touch(source)
    self._busy_R[row] = True
    self._keys_RxS[row, : len(keys_T)] = keys_T
    self._valid_R[row] = cached if in_place else 0
    self._touch(row)
    return Move(row, source if source >= 0 else row, cached)

  def _running(self, row: int) -> int:
    """Running sequences of the row's shard."""
    return int(self._busy_R[self._shard_R == self._shard_R[row]].sum())

  def _evictable(self, wanted: Collection[int], source: int) -> int | None:
    """The idle row to use: one of the shard with the fewest running sequences, since a call lasts as long
    as its fullest shard. Among equals one of the source's shard, which needs no copy between devices."""
    running_S = np.bincount(self._shard_R[self._busy_R], minlength=self.layout.shards)
    near = self._shard_R[source] if source >= 0 else -1
    running_R = running_S[self._shard_R]
    usable_R = ~self._busy_R & (running_R < self._most_busy)
    usable_R[list(self._pinned)] = False
    rows = np.flatnonzero(usable_R)
    if not len(rows):
      return None
    wanted_R = np.zeros(self.rows, bool)
    wanted_R[[row for row in wanted if row >= 0]] = True
    order = np.lexsort((self._used_R[rows], self._shard_R[rows] != near, running_R[rows],
                        wanted_R[rows]))  # by the last one first; among equals the first row
    return int(rows[order[0]])

  def _touch(self, row: int) -> None:
    self._used_R[row] = self._clock
    self._clock += 1

  def commit(self, moves: Iterable[tuple[Move, int]]) -> None:
    """The wave's moves have been carried out: (move, tokens now valid in its row)."""
    self._pinned.clear()
    for move, valid in moves:
      self._valid_R[move.row] = valid

  def abandon(self, moves: Iterable[Move]) -> None:
    """The wave's moves failed: their rows are idle, and what they hold is unknown."""
    self._pinned.clear()
    for move in moves:
      self._busy_R[move.row] = False
      self._valid_R[move.row] = 0

  def extend(self, row: int, ids: Sequence[int]) -> None:
    """Decode drew `ids`: it fed the pending token and all of `ids` but the last, now pending."""
    valid = self.valid(row)
    room = self._keys_RxS[row, valid + 1 : valid + 1 + len(ids)]
    room[:] = ids[: len(room)]
    self._valid_R[row] = valid + len(ids)

  def release(self, row: int) -> None:
    """The sequence is finished; its row stays as a cache entry."""
    self._busy_R[row] = False
    self._touch(row)

  def clear(self) -> None:
    """Forgets all rows: the weights changed, or the buffers were lost."""
    self._valid_R[:] = 0
    self._busy_R[:] = False
    self._used_R[:] = -1
    self._pinned.clear()


@dataclasses.dataclass(frozen=True)
class Waiting:
  """What planning needs to know of a queued sequence.

  group: equal for sequences whose keys are equal. They are matched once for all.
  """

  keys_T: np.ndarray
  group: Hashable


def plan_wave(
  queue: Sequence[Waiting], pool: PrefixPool, *, capacity: int, defer_gain: int
) -> list[tuple[int, Move]]:
  """The sequences to start now: (index in the queue, move), in the queue's order.

  A sequence waits for the next wave if a member of this one computes more of its prefix than the cache
  holds: at least `defer_gain` tokens more, or all that it lacks. So a shared prefix is computed once,
  and short accidental overlaps do not shrink waves to one sequence.

  Args:
    capacity: most sequences to start.
  """
  matches: dict[Hashable, Match] = {}
  for waiting in queue:
    if waiting.group not in matches:
      found = pool.match(waiting.keys_T[:-1])
      matches[waiting.group] = found if found.length else NO_MATCH
  wanted = {match.row for match in matches.values()}
  wave: list[tuple[int, Move]] = []
  leaders: dict[Hashable, np.ndarray] = {}  # groups of this wave that compute something
  for index, waiting in enumerate(queue):
    if len(wave) == capacity:
      break
    match = matches[waiting.group]
    if _gains_by_waiting(waiting, match.length, leaders, defer_gain):
      continue
    if match.row >= 0 and pool.valid(match.row) < match.length:
      continue  # this wave evicted its source; the next wave matches it again
    move = pool.acquire(waiting.keys_T, match, wanted)
    if move is None:
      break
    wave.append((index, move))
    if match.length < len(waiting.keys_T) - 1:
      leaders[waiting.group] = waiting.keys_T[:-1]
  return wave


def _gains_by_waiting(
  waiting: Waiting, cached: int, leaders: dict[Hashable, np.ndarray], defer_gain: int
) -> bool:
  lacking = len(waiting.keys_T) - 1 - cached
  if lacking == 0:
    return False
  if waiting.group in leaders:
    return True
  shared = max((common_prefix(waiting.keys_T[:-1], keys) for keys in leaders.values()), default=0)
  return shared - cached >= min(defer_gain, lacking)
