"""A corpus of hostile inputs, and the bounds that they must meet.

`SUBJECT.jsonl` holds one case a line and `test_SUBJECT.py` runs each through the real objects:

    {"case": "a factorial without end", "bound": "wrong within 2 s", "answer": "(99999999)!"}

"case" names the attack and "bound" says, in words, what holds it; "held" marks those that never
succeeded and shall not; the other keys belong to the subject. What does not fit in a line is built by a
test, or lies in a file of `SUBJECT/`. A case stays when its cause is gone: whoever finds a new attack
adds a line and sees it fail first.

    @pytest.mark.parametrize("case", corpus.cases("answers"))
    def test_answers(case):
      with corpus.bounds(seconds=2, megabytes=64):
        assert rewards.judge(question, case["answer"]) == 0.0
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

FOLDER = pathlib.Path(__file__).parent


def cases(subject: str) -> list[Any]:
  """One pytest parameter a line of SUBJECT.jsonl; its id is the name of the case."""
  lines = (FOLDER / f"{subject}.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines if line]
  return [pytest.param(case, id=case["case"]) for case in found]


@contextlib.contextmanager
def bounds(*, seconds: float, megabytes: float = 64) -> Iterator[None]:
  """Fails if what runs inside takes longer, or lifts this process's peak memory by more.

  Args:
    seconds: wall time; leave room for a busy machine, and let the attack without its bound take
      many times as long.
    megabytes: by which the peak of resident memory may rise. A peak that an earlier test set hides
      a smaller one.
  """
  begin, before = time.monotonic(), _peak_mb()
  yield
  took, rose = time.monotonic() - begin, _peak_mb() - before
  assert took <= seconds, f"it took {took:.1f} s; the bound is {seconds} s"
  assert rose <= megabytes, f"memory rose by {rose:.0f} MB; the bound is {megabytes} MB"


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
