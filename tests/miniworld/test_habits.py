"""The teacher's habits: bad values, and its rates against sums done by hand."""


import pytest

from axpo_jax.miniworld.habits import TeacherConfig
from tests.miniworld.habits import always


@pytest.mark.parametrize("wrong, message", [
  ({"p_retry": 2}, "p_retry=2"), ({"max_calls": 0}, "max_calls=0"),
  ({"p_wrong_mark": 0.6, "p_off_cell": 0.6}, "p_off_cell .* exceed 1"),
  ({"p_wrong_query": 0.99}, "p_wrong_query .* exceed 1"),
  ({"p_wrong_code": 0.6, "p_broken_code": 0.6}, "p_broken_code .* exceed 1")])
def test_bad_configs(wrong, message):
  with pytest.raises(ValueError, match=message):
    TeacherConfig(**wrong)


def test_perception_by_hand():
  # Large only, no mistakes in pointing: tool 0.2, right 0.9 by crop and 0.8 directly.
  config = always(p_tool_large=0.2, p_misread_crop=0.1, p_misread_large=0.2)
  assert config.rates(1.0) == pytest.approx((0.2, 0.2 * 0.9 + 0.8 * 0.8, 0.9, 0.8, 0.18 / 0.82))
  # Small only: half the calls miss, half of those are tried once more, the rest guessed (1 in 12).
  config = always(p_tool_small=1.0, p_off_cell=0.5, p_retry=0.5)
  second = 0.5 + 0.5 / 12
  first = 0.5 + 0.5 * (0.5 * second + 0.5 / 12)
  assert config.rates(0.0) == pytest.approx((1.0, first, first, 0.0, 1.0))


def test_search_by_hand():
  # Six colours. It searches half of the time, stops short half of the time, makes no mistakes else.
  config = always(p_search=0.5, p_stop_short=0.5, p_misread_result=0.2)
  found = 0.5 / 6 + 0.5 * 0.8
  right = 0.5 * found + 0.5 / 6
  assert config.search_rates() == pytest.approx((0.5, right, found, 1 / 6, 0.5 * found / right))
  # A quarter of the queries are wrong. Two calls: both right; or one wrong, after which the other
  # can at best find the bridge.
  config = always(p_search=1.0, p_wrong_query=0.25, p_retry=1.0)
  found = 0.75 * (0.75 + 0.25 / 6) + 0.25 / 6
  assert config.search_rates() == pytest.approx((1.0, found, found, 0.0, 1.0))


def test_reasoning_by_hand():
  # Hard only: always computes; 10 % wrong code, 20 % that does not run, half of which is mended.
  config = always(p_python_hard=1.0, p_wrong_code=0.1, p_broken_code=0.2, p_retry=0.5,
                  p_slip_hard=0.9)
  second = 0.7 + 0.2 * 0.1
  first = 0.7 + 0.2 * (0.5 * second + 0.5 * 0.1)
  assert config.reasoning_rates(0.0) == pytest.approx((1.0, first, first, 0.0, 1.0))
  # Easy only, in the head.
  assert always(p_slip_easy=0.25).reasoning_rates(1.0) == pytest.approx((0, 0.75, 0, 0.75, 0))
