"""Records to a benchmark's results."""

import pytest

from axpo_jax.eval.benchmarks import BENCHMARKS
from axpo_jax.eval.scoring import RULE, Score
from axpo_jax.rollouts.census import RolloutStats
from axpo_jax.rollouts.shards import Record
from axpo_jax.stages import evaluate


def record(number, rewards, *, group="", tools=0, family="", failed=0):
  stats = [RolloutStats(float(reward), i < tools, int(i < tools), 1, 10, "answer")
           for i, reward in enumerate(rewards)]
  stats += [RolloutStats(0.0, False, 0, 1, 10, "engine_error")] * failed
  scores = tuple(Score(s.reward, RULE) for s in stats)
  return Record(f"q{number}", number, len(stats), tuple(stats), ("x",) * len(stats), scores, family,
                group=group or f"q{number}")


def test_pass_rates_and_tool_use_by_hand():
  records = [record(0, [1, 0, 0, 0], tools=2), record(1, [1, 1, 1, 1], tools=4),
             record(2, [0, 0, 0], failed=1), record(3, [], failed=4)]
  found = evaluate.result(records, 4)
  assert found["pass_at_1"] == pytest.approx((0.25 + 1 + 0) / 3)  # of what was judged
  # Sample standard deviation of 0.25, 1, 0 over the root of 3.
  assert found["pass_at_1_se"] == pytest.approx(0.5204165 / 3**0.5)
  assert found["pass_at_4"] == 1.0  # questions with four judged rollouts
  assert found["tool_attempt_rate"] == pytest.approx(6 / 11)
  assert found["tool_success_rate"] == pytest.approx((1 + 4) / 6)
  assert (found["questions"], found["rollouts"], found["failed"]) == (4, 16, 5)


def test_unbiased_for_another_number_of_rollouts():
  found = evaluate.result([record(0, [1, 1, 0, 0, 0, 0, 0, 0]), record(1, [0] * 8)], 8)
  assert found["pass_at_4"] == pytest.approx((1 - 15 / 70) / 2)  # 1 - C(6, 4) / C(8, 4)
  assert found["pass_at_8"] == 0.5


def test_nothing_judged_is_no_score():
  assert evaluate.result([record(0, [], failed=4)], 4) == {
    "questions": 1.0, "rollouts": 4.0, "failed": 4.0}


def test_cycles_of_one_question_count_once_in_the_error():
  benchmark = BENCHMARKS["hrbench_4k"]
  cycles = [record(4 * q + c, [right] * 4, group=f"g{q}", family="single")
            for q, right in enumerate((1, 0, 1)) for c in range(4)]
  found = evaluate.result(cycles, 4, benchmark)
  alone = evaluate.result([record(q, [right] * 4) for q, right in enumerate((1, 0, 1))], 4)
  assert found["pass_at_1"] == alone["pass_at_1"] == pytest.approx(2 / 3)
  assert found["pass_at_1_se"] == pytest.approx(alone["pass_at_1_se"])
  assert found["all_cycles_right"] == pytest.approx(2 / 3)
  assert found["single/pass_at_1"] == pytest.approx(2 / 3)
