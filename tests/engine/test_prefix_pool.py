"""The ledger against a simulated device: whatever the pool claims to hold, the rows really hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo_jax.engine.embedded.prefix_pool import (
  NO_MATCH,
  Match,
  Move,
  PrefixPool,
  Waiting,
  common_prefix,
  content_keys,
  plan_wave,
)

LENGTH = 12


def _keys(*ids):
  return np.asarray(ids, np.int64)


def _hold(pool, ids, wanted=()):
  """A finished sequence whose tokens, but for the last, are cached. Returns its row."""
  move = pool.acquire(_keys(*ids), pool.match(_keys(*ids[:-1])), wanted)
  pool.commit([(move, len(ids) - 1)])
  pool.release(move.row)
  return move.row


class SimulatedRows:
  """What the device would hold: for each slot the whole prefix that its value was computed from."""

  def __init__(self, rows):
    self.rows = [[None] * LENGTH for _ in range(rows)]

  def carry_out(self, jobs):
    """Copies first (all read, then all written), then prefills one by one, whole rows each."""
    copies = [(m, list(self.rows[m.source])) for keys, m in jobs if m.cached == len(keys) - 1]
    for move, content in copies:
      if move.source != move.row:
        self.rows[move.row] = content
    for keys, move in jobs:
      if move.cached < len(keys) - 1:
        content = list(self.rows[move.source])
        for slot in range(move.cached, len(keys) - 1):
          content[slot] = self._value(content[:slot], keys[slot])
        self.rows[move.row] = content

  def decode(self, row, slot, key):
    self.rows[row][slot] = self._value(self.rows[row][:slot], key)

  @staticmethod
  def _value(before, key):
    return (before[-1] if before else (), int(key))

  def prefix(self, row, length):
    """The keys that the first `length` slots of `row` were computed from; checks each slot."""
    keys, before = [], ()
    for slot in range(length):
      assert self.rows[row][slot] is not None and self.rows[row][slot][0] == before
      before = self.rows[row][slot]
      keys.append(before[1])
    return keys


class Simulation:
  """The engine's use of the pool, with two-letter texts so that prefixes collide all the time."""

  def __init__(self, rows):
    self.pool, self.device = PrefixPool(rows, LENGTH), SimulatedRows(rows)
    self.queue, self.running = [], []  # of [group, keys] and of [row, keys]
    self.computed = 0

  def submit(self, group, ids, count):
    self.queue += [(group, _keys(*ids))] * count

  def admit(self, capacity, defer_gain):
    while True:
      waiting = [Waiting(keys, group) for group, keys in self.queue]
      wave = plan_wave(
        waiting, self.pool, capacity=capacity - len(self.running), defer_gain=defer_gain
      )
      if not wave:
        return
      jobs = [(self.queue[index][1], move) for index, move in wave]
      self.device.carry_out(jobs)
      self.pool.commit((move, len(keys) - 1) for keys, move in jobs)
      self.computed += sum(len(keys) - 1 - move.cached for keys, move in jobs)
      taken = {index for index, _ in wave}
      self.queue = [job for index, job in enumerate(self.queue) if index not in taken]
      self.running += [(move.row, list(keys)) for keys, move in jobs]
      assert len({row for row, _ in self.running}) == len(self.running) == self.pool.busy

  def decode(self, ids):
    """Every running row draws `ids` (less if its row ends); the first one finishes."""
    for row, keys in self.running:
      new, valid = ids[: LENGTH - len(keys)], self.pool.valid(row)
      for offset, key in enumerate([keys[-1], *new][: len(new)]):
        self.device.decode(row, valid + offset, key)
      keys += new
      self.pool.extend(row, new)
    if self.running:
      self.pool.release(self.running.pop(0)[0])

  def check(self):
    for row in range(self.pool.rows):
      valid = self.pool.valid(row)
      assert self.device.prefix(row, valid) == self.pool._keys_RxS[row, :valid].tolist()
    for row, keys in self.running:
      assert self.pool.valid(row) == len(keys) - 1
      assert self.device.prefix(row, len(keys) - 1) == keys[:-1]


_texts = st.lists(st.integers(1, 2), min_size=1, max_size=LENGTH - 1)
_steps = st.one_of(
  st.tuples(st.just("submit"), _texts, st.integers(1, 3)),
  st.tuples(st.just("admit"), st.integers(1, 5), st.integers(1, 4)),
  st.tuples(st.just("decode"), st.lists(st.integers(1, 2), min_size=1, max_size=3)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.lists(_steps, max_size=25))
def test_rows_hold_what_the_pool_says(rows, steps):
  simulation = Simulation(rows)
  for number, (name, *args) in enumerate(steps):
    if name == "submit":
      simulation.submit(number, *args)
    else:
      getattr(simulation, name)(*args)
    simulation.check()
  for _ in range(len(simulation.queue) + len(simulation.running)):
    simulation.admit(rows, 2)
    simulation.decode([1])
    simulation.check()
  assert not simulation.queue and not simulation.running  # everyone gets a turn


@settings(max_examples=150, deadline=None)
@given(st.lists(_texts, min_size=1, max_size=6), _texts)
def test_match_is_the_longest_prefix(texts, wanted):
  pool = PrefixPool(8, LENGTH)
  for ids in texts:
    _hold(pool, [*ids, 9])
  best = max(common_prefix(_keys(*ids), _keys(*wanted)) for ids in texts)
  match = pool.match(_keys(*wanted))
  assert match.length == best
  assert match == NO_MATCH if not best else pool._keys_RxS[match.row, :best].tolist() == wanted[:best]


def test_match_looks_beyond_its_chunks():
  pool = PrefixPool(3, 700)
  long = np.arange(1, 601)
  for end in (200, 500, 300):
    _hold(pool, [*long[:end], 0, 0])
  assert pool.match(long) == Match(1, 500)
  assert pool.match(long[:256]).length == 256


def test_a_shared_prefix_is_computed_once():
  simulation = Simulation(16)
  simulation.submit("question", range(1, 11), 8)
  simulation.submit("other", [*range(1, 6), 7, 7, 7], 4)
  simulation.admit(16, 2)
  assert simulation.computed == 9 + 2  # the other one lacks two tokens behind the five shared
  assert len(simulation.running) == 12


def test_short_accidental_overlaps_do_not_make_waves_of_one():
  pool = PrefixPool(8, LENGTH)
  waiting = [Waiting(_keys(5, i, *range(10, 17)), i) for i in range(4)]
  assert [index for index, _ in plan_wave(waiting, pool, capacity=8, defer_gain=4)] == [0, 1, 2, 3]
  pool.clear()
  assert [index for index, _ in plan_wave(waiting, pool, capacity=8, defer_gain=1)] == [0]


def test_a_turn_goes_on_in_place_and_a_branch_is_copied():
  pool = PrefixPool(3, LENGTH)
  row = _hold(pool, [1, 2, 3, 4, 5])
  branch = pool.acquire(_keys(1, 2, 3, 9), pool.match(_keys(1, 2, 3)))
  assert branch.source == row != branch.row and branch.cached == 3
  turn = pool.acquire(_keys(1, 2, 3, 4, 5, 6), pool.match(_keys(1, 2, 3, 4, 5)))
  assert turn == Move(row, row, 4)


def test_the_row_unused_for_longest_goes_first_and_wanted_ones_last():
  pool = PrefixPool(3, LENGTH)
  rows = [_hold(pool, [i, i, i, 0]) for i in (1, 2, 3)]
  branch = pool.acquire(_keys(1, 1, 7), pool.match(_keys(1, 1)))
  assert (branch.source, branch.row) == (rows[0], rows[1])  # row 0 is older, but needed
  pool.commit([(branch, 2)])
  assert pool.acquire(_keys(5, 5), NO_MATCH, wanted={rows[2]}).row == rows[0]  # row 2 is older


def test_no_row_is_taken_from_a_running_sequence_or_from_under_a_copy():
  pool = PrefixPool(2, LENGTH)
  row = _hold(pool, [1, 2, 3, 4])
  first = pool.acquire(_keys(1, 2, 9), pool.match(_keys(1, 2)))
  assert first.source == row
  assert pool.acquire(_keys(7, 7), NO_MATCH) is None  # the source is pinned until the copy is done
  pool.commit([(first, 2)])
  assert pool.acquire(_keys(7, 7), NO_MATCH).row == row
  assert pool.acquire(_keys(8, 8), NO_MATCH) is None


def test_content_keys_tell_pictures_apart():
  ids, image_T = np.array([5, 2, 2, 6, 2]), np.array([-1, 0, 0, -1, 1])
  same = content_keys(ids, image_T, ["a", "a"])
  other = content_keys(ids, image_T, ["a", "b"])
  assert same[1] == same[2] == same[4] < 0
  assert common_prefix(same, other) == 4
  assert same[[0, 3]].tolist() == [5, 6]


@pytest.mark.parametrize("a,b,length", [((1, 2), (1, 2, 3), 2), ((), (1,), 0), ((1, 2), (3, 2), 0)])
def test_common_prefix(a, b, length):
  assert common_prefix(_keys(*a), _keys(*b)) == length


def test_devices_share_the_running_sequences():
  """Four devices of two rows each, which run one sequence each."""
  pool = PrefixPool(8, LENGTH, shards=4, most_busy=1)
  moves = [pool.acquire(_keys(n, n + 1, 9), NO_MATCH) for n in range(5)]
  assert [move.row for move in moves[:4]] == [0, 2, 4, 6] and moves[4] is None
  pool.commit([(move, 2) for move in moves[:4]])
  pool.release(4)
  # Row 0 holds the prefix, but its device is full: a copy to the one that is free.
  asked = _keys(0, 1, 5)
  assert pool.acquire(asked, pool.match(asked[:-1])) == Move(5, 0, 2)
  pool.clear()
  assert pool.layout.spread([6, 0, 7], 2).tolist() == [1, 3, 3, 3, 3, 3, 0, 2]
  assert pool.layout.most([6, 0, 7]) == 2
