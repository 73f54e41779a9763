"""Rows that hold shared prefixes of trajectories once (host, NumPy).

In: trajectories, each a table of integers with one line a token; equal lines are equal tokens. Out: the
trajectories of every row, and the indices of their tokens in the row.

Trajectories that share a prefix form a tree, which is never built: sorted like words in a dictionary,
trajectories come in depth-first order, and the tree branches where the common prefix of two neighbours ends:

  trajectories   A B C     A B D E     A F          row   A B C D E F

A row takes from each trajectory the tokens that the one before it in the row does not have. A tree longer than a
row is split over several rows, each of which repeats the path to its part.

Legend: S trajectories, T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
  """One trajectory in its row.

  Attributes:
    number: which trajectory.
    shared: its first tokens, which the row holds already.
    start: index in the row of the first of the others.
  """

  number: int
  shared: int
  start: int


def sort(tables_S: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
  """The trajectories depth first, and how many tokens each begins with like the one before it.

  Args:
    tables_S: [T, F] each, of one integer dtype and one F.
  """
  names = [np.ascontiguousarray(table).tobytes() for table in tables_S]
  order = sorted(range(len(names)), key=names.__getitem__)
  pairs = itertools.pairwise(order)
  return order, [0, *(_common(tables_S[a], tables_S[b]) for a, b in pairs)][:len(order)]


def _common(a_TxF: np.ndarray, b_TxF: np.ndarray) -> int:
  length = min(len(a_TxF), len(b_TxF))
  differs_T = (a_TxF[:length] != b_TxF[:length]).any(axis=1)
  return int(differs_T.argmax()) if differs_T.any() else length


def place(order: Sequence[int], shared: Sequence[int], lengths_S: Sequence[int], capacity: int
          ) -> list[list[Placed]]:
  """Rows of at most `capacity` tokens; deterministic.

  A trajectory goes where it adds the fewest tokens and, among such rows, into the fullest.

  Args:
    order, shared: from `sort`. Zeros in `shared` keep all trajectories apart.
    lengths_S: tokens of each trajectory, none more than `capacity`.
  """
  rows: list[list[Placed]] = []
  used_R, reach_R = np.zeros(len(order), int), np.zeros(len(order), int)
  for number, common in zip(order, shared, strict=True):
    # What the row's last trajectory shares with this one: the least of all pairs between them.
    np.minimum(reach_R, common, out=reach_R)
    added_R = lengths_S[number] - reach_R
    fits = np.flatnonzero(used_R[:len(rows)] + added_R[:len(rows)] <= capacity)
    if len(fits):
      row = int(min(fits, key=lambda r: (added_R[r], -used_R[r])))
    else:
      row = len(rows)
      rows.append([])
    rows[row].append(Placed(number, int(reach_R[row]), int(used_R[row])))
    used_R[row] += added_R[row]
    reach_R[row] = lengths_S[number]
  return rows


def lay_out(row: Sequence[Placed], lengths_S: Sequence[int], capacity: int
            ) -> tuple[list[np.ndarray], np.ndarray]:
  """The indices in the row of each trajectory's tokens, and the end of every token.

  A token's end is the index after its last descendant; see `model.attention`.

  Returns: one [T] array a trajectory, and ends [capacity], 0 for padding.
  """
  places, end_T = [], np.zeros(capacity, np.int32)
  path = np.zeros(0, int)
  for placed in row:
    end_T[path[placed.shared:]] = placed.start
    new = np.arange(lengths_S[placed.number] - placed.shared) + placed.start
    path = np.concatenate([path[:placed.shared], new])
    places.append(path)
  end_T[path] = row[-1].start + lengths_S[row[-1].number] - row[-1].shared if row else 0
  return places, end_T
