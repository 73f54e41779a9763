"""The planned outcomes by hand, their correction, and the points that the plan names."""

import math
import pathlib
import runpy

import numpy as np
import pytest

from axpo_jax.eval import statistics
from experiments.evidence import horizon, store
from experiments.evidence.counts import Counts
from experiments.evidence.tables import Comparison

REPO = pathlib.Path(__file__).parents[2]
POINTS = runpy.run_path(str(REPO / "configs" / "sweeps" / "horizon.py"))["points"]()


def run(recipe, values, seed=0, sft=0, right=2, decoded=100.0):
  """A run evaluated at steps 0, 10, ... with a training step for each of them and between."""
  steps = range(10 * (len(values) - 1) + 1)
  evaluated = [values[step // 10] if step % 10 == 0 else None for step in steps]
  trained = [None, *[1.0] * (len(steps) - 1)]
  metrics = {
    "step": list(steps), "eval/pass_at_1": evaluated, "eval/tool_attempt_rate": evaluated,
    "eval/search/pass_at_1": evaluated, "rollout/rollouts": trained, "time/step_s": trained,
    "engine/decode_tokens": [value and decoded for value in trained],
    "engine/prefill_tokens_computed": trained, "pack/tokens": trained}
  return store.Run(f"{recipe}-sft{sft}-seed{seed}", recipe, sft, seed, "", "", "", "", {}, metrics,
                   [Counts("q", "search", 2, min(right, 2), 2, max(right - 2, 0), 4, right)])


@pytest.mark.parametrize("values, step", [
  ((0.5, 0.5, 0.7, 0.7), 10),  # 0.5 with 0.7 is 0.6 already
  ((0.5, 0.5, 0.65, 0.5, 0.6), 40),  # one high evaluation is not enough; the last one stands alone
  ((0.6, 0.6), 0), ((0.5, 0.59, 0.599), None)])
def test_the_first_evaluation_that_holds_with_the_next(values, step):
  one = run("grpo", values)
  assert horizon.reached(one) == step
  assert horizon.steps_to(one) == (10 * (len(values) - 1) if step is None else step)


def test_what_it_took_until_then():
  one = run("grpo", (0.5, 0.5, 0.7, 0.7), decoded=1e6)
  assert horizon.tokens_to(one) == pytest.approx(10 * (1e6 + 2) * 1e-6)
  assert horizon.seconds_to(one) == 10
  assert horizon.area(one) == pytest.approx((0.5 / 2 + 0.5 + 0.7 + 0.7 / 2) / 3)


def test_holm_by_hand():
  """Holm 1979: the smallest of n by n, the next by n - 1, never falling."""
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  found = statistics.holm([math.nan, 0.5, 0.6])
  assert math.isnan(found[0]) and found[1:] == [1, 1]


def test_pairs_alone_are_tested_and_all_tests_are_counted():
  rng = np.random.default_rng(0)
  runs = [run("grpo", (0.5, 0.5, *rng.uniform(0.45, 0.55, 3)), seed, right=1) for seed in range(9)]
  runs += [run("axpo", (0.5, 0.5, *rng.uniform(0.7, 0.8, 3)), seed, right=3) for seed in range(9)]
  runs += [run("axpo_added", (0.5, 0.5, 0.5, 0.5, 0.5), seed, right=1) for seed in (0, 1, 20)]
  found = {(test.recipe, test.outcome.name): test for test in horizon.tests(runs)}
  steps = found["axpo", "steps to 0.60"]
  assert steps.difference.n == 9 and steps.difference.mean == -30  # 10 (with 20) against 40
  assert steps.difference.p == pytest.approx(2 / 512)
  assert found["axpo_added", "Pass@1"].difference.n == 2  # seed 20 has no GRPO
  # Ten tests; all five of AXPO have the least p that nine pairs allow.
  assert steps.corrected == pytest.approx(10 * 2 / 512)
  assert math.isnan(found["axpo", "M tokens to it"].corrected)
  text = horizon.TABLES["horizon_tests"](Comparison(runs))
  assert "| AXPO, one mean | 9 | −30 (−30 … −30) p 0.039 |" in text
  levels = horizon.TABLES["horizon_levels"](Comparison(runs))
  assert "| AXPO, one mean | 9 | 9 | 10 |" in levels and "| GRPO | 9 | 0 | 40 |" in levels
  assert "| 0 | 20 | – | – | > 40; 25.0 |" in horizon.TABLES["horizon_pairs"](Comparison(runs))


def test_the_points_are_the_plans():
  names = [point["name"] for point in POINTS]
  runs = [name for name in names if "-seed" in name and not name.endswith(store.FULL)]
  assert len(runs) == 63 and {name.partition("-")[0] for name in runs} == horizon.LABELS.keys()
  first = runs[:36]
  assert {name.partition("-")[0] for name in first} == set(list(horizon.LABELS)[:4])
  assert {name.partition("-")[2] for name in first} == {
    *(f"sft0-seed{seed}" for seed in range(5)), *(f"sft{s}-seed{seed}" for s in (1, 2) for seed in (0, 1))}
  for name in runs:
    assert names[names.index(name) + 1] == name + store.FULL
