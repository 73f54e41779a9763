"""Buckets: the static sizes to which arrays are padded.

Each size is a compiled program of its own: few sizes mean few programs and more padding. `Buckets` double from a
least to a most size. `quarter_steps` are at most a quarter apart, for arrays that are padded once for a whole step.
The tuples are the vision tower's.
"""

import itertools
from collections.abc import Iterator


class Buckets:
  """Static sizes: `least`, doubled until `most`, which is always the last.

  fine: half steps between them as well, where padding costs more than another program.
  """

  def __init__(self, least: int, most: int, *, fine: bool = False):
    sizes = []
    while least < most:
      sizes += [least, least * 3 // 2] if fine else [least]
      least *= 2
    self.sizes = (*(size for size in sizes if size < most), most)

  def __call__(self, value: int) -> int:
    """The smallest size that holds `value`."""
    for size in self.sizes:
      if size >= value:
        return size
    raise ValueError(f"{value} exceeds the largest bucket {self.sizes[-1]}")


def quarter_steps() -> Iterator[int]:
  """1 to 8, 10, 12, 14, 16, 20, ...: sizes that few shapes come from, at most a quarter apart."""
  yield from (1, 2, 3)
  yield from (quarters << power for power in itertools.count() for quarters in (4, 5, 6, 7))


# Rows of the vision tower, and patches in a row, in sampling: each call has its own images.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PATCH_BUCKETS = (64, 128, 256, 1024, 4096, 16384)
# The same in training, where a whole step is packed at once and its micro-batches share one shape.
STEP_ROW_BUCKETS = tuple(itertools.takewhile(lambda n: n <= 4096, quarter_steps()))
STEP_PATCH_BUCKETS = tuple(16 * n for n in itertools.takewhile(lambda n: n <= 1024, quarter_steps()))
