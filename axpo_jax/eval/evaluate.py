"""Evaluation: some rollouts of every held-out question, under the evaluation's own sampling.

In: a config and an engine that holds the policy. Out: eval/ metrics (Pass@k with standard errors, tool
use), by family too. The questions and the seeds are the same at every call, so two evaluations
differ by the policy alone.
"""

from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from axpo_jax.eval import passk
from axpo_jax.rl import census
from axpo_jax.rl.acting import acting_census
from axpo_jax.rl.resample import ResampleConfig
from axpo_jax.rollout.engine import Engine
from axpo_jax.train import build, collect, seeds


def measured(lines: Iterable[Mapping], step: int) -> bool:
  """Whether the metrics file has an evaluation at `step` already (a run that was resumed)."""
  return any(line["step"] == step and "eval/pass_at_1" in line for line in lines)


async def run(config: ConfigDict, bench: build.Workbench, engine: Engine, *,
              progress: bool = True) -> dict[str, float]:
  """Metrics of the policy that `engine` holds; see docs/metrics.md, eval/."""
  actor = build.actor(config, bench, engine, evaluation=True)
  groups = await collect.sample_groups(
    actor, build.eval_questions(config), config.eval.rollouts, seeds.derive(config.seed, "eval"),
    progress="evaluation" if progress else "")
  stats = collect.group_stats(groups, ResampleConfig(), bench.chat)
  out = {**_pass_at(stats, "eval", config.eval.rollouts), **census.census(stats, prefix="eval"),
         **census.census_by_family(stats, prefix="eval"), **acting_census(stats, prefix="eval"),
         "eval/failed": float(sum(group.failed for group in groups))}
  for family, members in census.families(stats).items():
    if any(group.rollouts for group in members):
      out |= _pass_at(members, f"eval/{family}", config.eval.rollouts)
  return out


def _pass_at(stats: Sequence[census.GroupStats], prefix: str, k: int) -> dict[str, float]:
  scored = [[rollout.reward for rollout in group.rollouts] for group in stats if group.rollouts]
  return passk.summarise(scored, ks=sorted({1, k}), prefix=prefix)
