"""The points of docs/results_40_steps.md: SFT policies, and every recipe from them.

  python launch/sweep.py --config=configs/evidence_tiny.py --points=configs/sweeps/evidence.py \
    --workdir=runs/evidence --parallel=2

In this order, so that whatever was finished when somebody stops is worth reading: AXPO against GRPO, the
same from two more SFT policies, then the other recipes seed by seed. Runs of one seed meet the same
questions in the same order, whatever their recipe, and begin with the same rollouts: they are pairs.
The seeds were written down before the first run; all of them count. The last four points were added
afterwards, as the first policy's runs with a random prefix were a surprise.
"""

from collections.abc import Iterator

from axpo_jax.rl.recipes import RECIPES

SEEDS = range(5)
# The first SFT policy begins all runs of the comparison; the others tell whether it was luck.
SFT_SEEDS, SEEDS_OF_OTHER_SFT = range(3), range(2)

PAIR = ("grpo", "axpo")
OTHERS = ("grpo_x125", "grpo_x2", "tool_bonus", "tool_penalty", "cispo", "no_prefix_fix",
          "resample_no_tool", "random_prefix", "no_prefix_credit", "merged_group", "mean_credit",
          "excess_credit", "no_kl")
# Beside those that rl.recipes names: what AXPO may sample at most, spent on ordinary rollouts; and
# AXPO without the KL that is on in all others.
MORE = {"grpo_x125": {"resample.ratio": 0.0, "num_rollouts": 10}, "no_kl": {"loss.kl_coef": 0.0}}


def points() -> list[dict[str, object]]:
  return list(_points())


def _points() -> Iterator[dict[str, object]]:
  for sft in SFT_SEEDS:
    yield {"name": f"sft-{sft}", "config.stages": "('sft','eval')", "config.seed": sft}
    yield from (_run(recipe, sft, seed) for seed in (SEEDS_OF_OTHER_SFT if sft else SEEDS)
                for recipe in PAIR)
  yield from (_run(recipe, 0, seed) for seed in SEEDS for recipe in OTHERS)
  yield from (_run("random_prefix", sft, seed) for sft in SFT_SEEDS[1:] for seed in SEEDS_OF_OTHER_SFT)


def _run(recipe: str, sft: int, seed: int) -> dict[str, object]:
  changes = MORE[recipe] if recipe in MORE else RECIPES[recipe]
  return {"name": f"{recipe}-sft{sft}-seed{seed}", "after": f"sft-{sft}",
          "config.model.checkpoint": f"{{workdir}}/sft-{sft}/sft/policy", "config.seed": seed,
          **{f"config.rl.{name}": value for name, value in changes.items()}}
