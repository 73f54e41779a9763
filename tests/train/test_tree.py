"""Rows of shared prefixes against a trie of sets, on random words."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from axpo_jax.train import tree

WORDS = st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=12)


def _tables(words):
  """Two integers a token; the second tells `b` from `a`, the first from `c` on nothing."""
  return [np.asarray([[7, ord(letter)] for letter in word], np.int32) for word in words]


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(WORDS, st.integers(8, 30))
def test_rows_hold_every_prefix_once(words, capacity):
  order, shared = tree.sort(_tables(words))
  lengths = [len(word) for word in words]
  rows = tree.place(order, shared, lengths, capacity)
  assert sorted(placed.number for row in rows for placed in row) == list(range(len(words)))
  for row in rows:
    places, end_T = tree.lay_out(row, lengths, capacity)
    prefixes = {words[p.number][:n + 1] for p in row for n in range(lengths[p.number])}
    assert (end_T > 0).sum() == len(prefixes) <= capacity
    letters = np.full(capacity, "")
    for placed, where_T in zip(row, places, strict=True):
      letters[where_T] = list(words[placed.number])
    for placed, where_T in zip(row, places, strict=True):
      word = words[placed.number]
      # What each of its tokens sees, by the ends, is the word up to there.
      for n, at in enumerate(where_T):
        seen = [t for t in range(at + 1) if at < end_T[t]]
        assert "".join(letters[seen]) == word[:n + 1]


def test_sorted_neighbours_say_what_is_shared():
  order, shared = tree.sort(_tables(["ba", "ab", "abb", "aab", "ab"]))
  assert [["ba", "ab", "abb", "aab", "ab"][i] for i in order] == ["aab", "ab", "ab", "abb", "ba"]
  assert shared == [0, 1, 2, 2, 0]
  assert tree.sort([]) == ([], [])


def test_a_trajectory_goes_where_it_adds_least():
  words = ["aaaa", "aaab", "bbbb", "bbba", "bbab"]
  order, shared = tree.sort(_tables(words))
  rows = tree.place(order, shared, [4] * 5, capacity=8)
  # aaaa + aaab take 5. Of the others, none of the first letters fits there: bb(ab, ba, bb) take 7.
  assert [[words[p.number] for p in row] for row in rows] == [["aaaa", "aaab"],
                                                              ["bbab", "bbba", "bbbb"]]
  assert [p.shared for p in rows[1]] == [0, 2, 3]


@pytest.mark.parametrize(("order", "rows"), [
  ([0, 1, 2, 3], [[0, 2], [1, 3]]),  # 5 | 4 | 3 into the fuller row | 3 into the other
  ([3, 2, 1, 0], [[3, 2], [1], [0]]),
])
def test_without_sharing_the_fullest_row_that_has_room(order, rows):
  placed = tree.place(order, [0] * 4, [5, 4, 3, 3], capacity=8)
  assert [[p.number for p in row] for row in placed] == rows
  assert not any(p.shared for row in placed for p in row)
