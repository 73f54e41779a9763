"""The scripted teacher's habits: probabilities, and the rates that follow from them in closed form.

The teacher makes mistakes so that the filter for right answers has something to drop, and so that a policy
trained on the rest has seen how to recover from a failed call. `rates`, `search_rates` and `reasoning_rates` give
the teacher's expected rates, so that a config can be chosen, and the teacher tested, by calculation.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from axpo_jax.miniworld import perception, search


class Rates(NamedTuple):
  """Expected shares of a teacher's trajectories over the questions of one family.

  `tool`: with at least one call; `right`: with the right answer; `tool_right`, `direct_right`:
  right answers among those with and without a call; `tool_of_right`: calls among the right ones,
  which is the tool share after the filter.
  """

  tool: float
  right: float
  tool_right: float
  direct_right: float
  tool_of_right: float


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """Probabilities of what the teacher does.

  Attributes:
    p_malformed: that a call cannot be parsed, in every family.
    p_retry: that it calls again after a call that did not bring what it was for.
    max_calls: calls in one trajectory; one less than the turns of an episode.

    p_tool_small, p_tool_large: that it zooms when the glyph is small or large.
    p_wrong_mark, p_off_cell: that a zoom points at another mark, or at a cell beside the right one.
      Otherwise it points at the target.
    p_misread_crop, p_misread_large: that it misreads a glyph it can see. A small glyph without a
      crop it guesses, uniformly over the alphabet.

    p_search: that it searches.
    p_stop_short: that it answers after the first of the two hops, guessing.
    p_wrong_query: that a search asks for another office, or for the colour of the town.
    p_misread_result: that it takes another colour from the right result.

    p_python_hard, p_python_easy: that it computes with python, where the sum is hard or easy.
    p_wrong_code: that the code runs and computes something else.
    p_broken_code: that the code does not run.
    p_slip_hard, p_slip_easy: that the sum in its head is wrong.
  """

  p_malformed: float = 0.03
  p_retry: float = 0.6
  max_calls: int = 2

  p_tool_small: float = 0.45
  p_tool_large: float = 0.10
  p_wrong_mark: float = 0.06
  p_off_cell: float = 0.08
  p_misread_crop: float = 0.04
  p_misread_large: float = 0.06

  p_search: float = 0.40
  p_stop_short: float = 0.20
  p_wrong_query: float = 0.08
  p_misread_result: float = 0.03

  p_python_hard: float = 0.45
  p_python_easy: float = 0.10
  p_wrong_code: float = 0.06
  p_broken_code: float = 0.04
  p_slip_hard: float = 0.80
  p_slip_easy: float = 0.06

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.startswith("p_") and not 0 <= value <= 1:
        raise ValueError(f"{field.name}={value} is not a probability")
    if self.max_calls < 1:
      raise ValueError(f"max_calls={self.max_calls} must be at least 1")
    if self.p_point < 0:
      raise ValueError("p_wrong_mark + p_off_cell + p_malformed exceed 1")
    if self.p_query < 0:
      raise ValueError("p_wrong_query + p_malformed exceed 1")
    if self.p_code < 0:
      raise ValueError("p_wrong_code + p_broken_code + p_malformed exceed 1")

  @property
  def p_point(self) -> float:
    """Probability that a zoom points at the target."""
    return 1 - self.p_wrong_mark - self.p_off_cell - self.p_malformed

  @property
  def p_query(self) -> float:
    """Probability that a search asks for what comes next."""
    return 1 - self.p_wrong_query - self.p_malformed

  @property
  def p_code(self) -> float:
    """Probability that a call's code computes the answer."""
    return 1 - self.p_wrong_code - self.p_broken_code - self.p_malformed

  def rates(self, large_share: float) -> Rates:
    """What to expect over perception questions of which `large_share` have a large glyph."""
    large, small = 1 - self.p_misread_large, 1 / len(perception.GLYPHS)
    return _mixed(
        (large_share, self.p_tool_large, self._right_after_zoom(large), large),
        (1 - large_share, self.p_tool_small, self._right_after_zoom(small), small))

  def search_rates(self) -> Rates:
    """What to expect over search questions.

    It takes a search for another office to bring no news; a back end that returns several results
    can bring the right one beside it.
    """
    guess = 1 / len(search.COLOURS)
    return _mixed((1.0, self.p_search, self._right_after_search(self.max_calls), guess))

  def reasoning_rates(self, easy_share: float) -> Rates:
    """What to expect over reasoning questions of which `easy_share` are easy."""
    easy, hard = 1 - self.p_slip_easy, 1 - self.p_slip_hard
    return _mixed(
        (easy_share, self.p_python_easy, self._right_after_code(easy), easy),
        (1 - easy_share, self.p_python_hard, self._right_after_code(hard), hard))

  def _right_after_zoom(self, blind: float) -> float:
    """Probability of a right answer once it calls; `blind` is the one without any crop."""
    right = blind
    for _ in range(self.max_calls):
      missed = self.p_retry * right + (1 - self.p_retry) * blind
      right = self.p_point * (1 - self.p_misread_crop) + (1 - self.p_point) * missed
    return right

  def _right_after_search(self, calls: int, *, hop: int = 1) -> float:
    """Probability of a right answer where it searches for a hop, with `calls` left for it."""
    guess = 1 / len(search.COLOURS)
    if not calls:
      return guess
    missed = (self.p_retry * self._right_after_search(calls - 1, hop=hop)
              + (1 - self.p_retry) * guess)
    if hop == 2:
      found = 1 - self.p_misread_result
    else:
      found = (self.p_stop_short * guess
               + (1 - self.p_stop_short) * self._right_after_search(calls - 1, hop=2))
    return self.p_query * found + (1 - self.p_query) * missed

  def _right_after_code(self, blind: float) -> float:
    """Probability of a right answer once it calls; `blind` is the one in its head."""
    right = blind
    for _ in range(self.max_calls):
      failed = self.p_retry * right + (1 - self.p_retry) * blind
      right = self.p_code + (self.p_broken_code + self.p_malformed) * failed
    return right


def _mixed(*parts: tuple[float, float, float, float]) -> Rates:
  """Rates over parts of (share, tool rate, right after a call, right without one)."""
  tool = sum(share * p_tool for share, p_tool, _, _ in parts)
  tool_right = sum(share * p_tool * right for share, p_tool, right, _ in parts)
  direct_right = sum(share * (1 - p_tool) * blind for share, p_tool, _, blind in parts)
  right = tool_right + direct_right
  return Rates(tool, right, _ratio(tool_right, tool), _ratio(direct_right, 1 - tool),
               _ratio(tool_right, right))


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
