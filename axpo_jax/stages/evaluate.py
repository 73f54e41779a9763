"""Evaluation: some rollouts of every held-out question, under the evaluation's own sampling.

In: a config and an engine that holds the policy, or the records of questions that were sampled. Out:
eval/ metrics (Pass@k with standard errors, tool use), by family too, or a benchmark's results. The
questions and the seeds are the same at every call, so two evaluations differ by the policy alone.
"""

from collections.abc import Iterable, Mapping, Sequence

from absl import logging
from ml_collections import ConfigDict

from axpo_jax import seeds
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Engine
from axpo_jax.eval import passk
from axpo_jax.eval.benchmarks import Benchmark
from axpo_jax.rl.resample import ResampleConfig
from axpo_jax.rollouts import census, collect
from axpo_jax.rollouts.acting import acting_census
from axpo_jax.rollouts.groups import failure_summary, group_stats
from axpo_jax.rollouts.shards import Record
from axpo_jax.stages import actors
from axpo_jax.stages.context import RunContext
from axpo_jax.stages.questions import eval_questions

# Pass@k is reported for these k (the paper's) and for the number of rollouts.
_KS = (1, 4)


def measured(lines: Iterable[Mapping], step: int) -> bool:
  """Whether the metrics file already has an evaluation at `step`: a resumed run does not repeat it."""
  return any(line["step"] == step and "eval/pass_at_1" in line for line in lines)


async def run(config: ConfigDict, context: RunContext, engine: Engine, *,
              progress: bool = True) -> dict[str, float]:
  """Metrics of the policy that `engine` holds; see docs/metrics.md, eval/."""
  actor = actors.make_actor(config, context, engine, "eval")
  groups = await collect.sample_groups(
    actor, eval_questions(config), config.eval.rollouts, seeds.derive(config.seed, "eval"),
    progress="evaluation" if progress else "")
  if failed := failure_summary(groups):
    logging.warning("evaluation: rollouts failed and are left out: %s", failed)
  return metrics(group_stats(groups, ResampleConfig(), context.chat), config.eval.rollouts,
                 sum(group.failed for group in groups))


def metrics(stats: Sequence[census.GroupStats], n: int, failed: int) -> dict[str, float]:
  """Metrics of held-out questions with `n` rollouts each; `failed` rollouts in total had no result."""
  out = {**_pass_at(stats, "eval", n), **census.census(stats, prefix="eval"),
         **census.census_by_family(stats, prefix="eval"), **acting_census(stats, prefix="eval"),
         "eval/failed": float(failed)}
  for family, members in census.families(stats).items():
    if any(group.rollouts for group in members):
      out |= _pass_at(members, f"eval/{family}", n)
  return out


def _pass_at(stats: Sequence[census.GroupStats], prefix: str, k: int) -> dict[str, float]:
  scored = [[rollout.reward for rollout in group.rollouts] for group in stats if group.rollouts]
  return passk.summarise(scored, ks=sorted({1, k}), prefix=prefix)


def result(records: Sequence[Record], n: int, benchmark: Benchmark | None = None
           ) -> dict[str, float]:
  """Results of one set of questions, as tables show them.

  Args:
    n: rollouts a question.
    benchmark: adds what it reports beyond Pass@k.

  Returns:
    pass_at_k and pass_at_k_se for k of 1, 4 and n (variants of a question count as one in the
    error), tool_attempt_rate and tool_success_rate, and counts: questions, rollouts, failed.
  """
  judged = [record for record in records if record.judged]
  out = {"questions": float(len(records)), "rollouts": float(sum(r.asked for r in records)),
         "failed": float(sum(r.failed for r in records))}
  if not judged:
    return out
  out |= passk.summarise([r.counts.rewards for r in judged], ks=sorted({*_KS, n}),
                         clusters_Q=[r.group for r in judged], prefix="all")
  counted = census.census([r.group_stats() for r in judged], prefix="all")
  out |= {f"all/{name}": counted[f"all/{name}"] for name in ("tool_attempt_rate", "tool_success_rate")
          if f"all/{name}" in counted}
  if benchmark is not None:
    out |= benchmark.details([(_variant(r), [r.scores[i] for i in r.judged]) for r in judged],
                             prefix="all")
  return {name.removeprefix("all/"): value for name, value in out.items()}


def _variant(record: Record) -> Question:
  """What `Benchmark.details` reads of a question. The question itself may be a huge picture."""
  return Question(record.id, "", (), ("",), category=record.family, meta={"group": record.group})
