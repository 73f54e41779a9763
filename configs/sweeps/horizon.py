"""The points of experiments/evidence/plan.md: SFT policies, every recipe from them, and each one's last evaluation.

  python launch/sweep.py --config=configs/horizon_tiny.py --points=configs/sweeps/horizon.py \
    --workdir=runs/horizon --parallel=2

In the plan's order: the first four recipes come whole, pair by pair, before any other begins. Runs of one
SFT policy and one seed meet the same questions in the same order: they are pairs.
"""

from collections.abc import Iterator

RECIPES = {
  "grpo": {"resample.ratio": 0.0},
  "axpo": {},
  "axpo_added": {"loss.resampled_weight": 1.0},
  "axpo_added_1n": {"loss.resampled_weight": 0.125},
  "grpo_x125": {"resample.ratio": 0.0, "num_rollouts": 10},
  "axpo_added_random": {"loss.resampled_weight": 1.0, "resample.choice": "random"},
  "axpo_added_no_credit": {"loss.resampled_weight": 1.0, "credit.prefix_credit": "none"},
}
FIRST = tuple(RECIPES)[:4]
# (SFT policy, seed): SFT policies take turns, so that whoever stops early has pairs of each.
PAIRS = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (0, 3), (0, 4))
FULL = {"config.stages": "('eval',)", "config.eval.questions": 256, "config.eval.rollouts": 4,
        "config.eval.forced": True}


def points() -> list[dict[str, object]]:
  return list(_points())


def _points() -> Iterator[dict[str, object]]:
  for sft in range(3):
    yield {"name": f"sft-{sft}", **FULL, "config.stages": "('sft','eval')", "config.seed": sft}
  for sft, seed in PAIRS:
    for recipe in FIRST:
      yield from _run(recipe, sft, seed)
  for recipe in tuple(RECIPES)[len(FIRST):]:
    for sft, seed in PAIRS:
      yield from _run(recipe, sft, seed)


def _run(recipe: str, sft: int, seed: int) -> Iterator[dict[str, object]]:
  name = f"{recipe}-sft{sft}-seed{seed}"
  yield {"name": name, "after": f"sft-{sft}",
         "config.model.checkpoint": f"{{workdir}}/sft-{sft}/sft/policy", "config.seed": seed,
         **{f"config.rl.{field}": value for field, value in RECIPES[recipe].items()}}
  yield {"name": f"{name}-full", "after": name,
         "config.model.checkpoint": f"{{workdir}}/{name}/rl/policy", "config.seed": seed, **FULL}
