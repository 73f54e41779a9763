"""The stages that sample and leave the policy as it is: "teach", "screen" and "eval".

In: a config, a policy folder, questions. Out: shards (`rollouts.shards`) in the stage's folder; "eval" also
writes results.json, an entry per set of questions. A stage that was killed continues with the first unfinished
shard; a stage whose shards are all finished loads no policy.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from axpo_jax import paths, seeds
from axpo_jax.agent.judge import ChatJudge
from axpo_jax.data.question import Question
from axpo_jax.data.readers import ReaderConfig
from axpo_jax.engine.openai import KEY_VARIABLE, OpenAIEngine
from axpo_jax.engine.protocol import Engine
from axpo_jax.engine.settings import OpenAIConfig
from axpo_jax.errors import ConfigError
from axpo_jax.eval import benchmarks
from axpo_jax.rollouts import collect, shards
from axpo_jax.stages import actors, distributed, engines, evaluate, forced, policies
from axpo_jax.stages.context import RunContext
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.stages.questions import eval_questions, training_questions
from axpo_jax.train import preemption

T = TypeVar("T")

RESULTS_FILE = "results.json"

ActorOf = Callable[[Question], collect.Actor]


@dataclasses.dataclass(frozen=True)
class Job:
  """The questions of one folder of shards.

  Attributes:
    section: of the config; `rollouts` and `shard` are read.
    benchmark: scores the answers; None: the training reward scores them.
    forces: a folder of shards; their rollouts are repeated with a call forced after the thinking.
  """

  name: str
  folder: epath.Path
  questions: Callable[[], Iterable[Question]]
  section: ConfigDict
  benchmark: benchmarks.Benchmark | None = None
  forces: epath.Path | None = None


def teach(config: ConfigDict, context: RunContext, policy: str, root: epath.Path,
          first_step: int) -> str:
  """A teacher's trajectories of the training questions."""
  section = config.teach
  job = Job("teach", root / "teach" / "shards",
            lambda: training_questions(config, section.questions), section)
  engines = {"policy": _policy, "openai": _endpoint, "scripted": _script}
  _sample([job], config, engines[section.engine](config, context, policy, root / "teach", "teach"))
  return policy


def screen(config: ConfigDict, context: RunContext, policy: str, root: epath.Path,
           first_step: int) -> str:
  """Samples the training questions with the current policy. The difficulty filter reads the counts."""
  job = Job("screen", root / "screen" / "shards",
            lambda: training_questions(config, config.screen.questions), config.screen)
  _sample([job], config, _policy(config, context, policy, root / "screen", "screen"))
  return policy


def evaluation(config: ConfigDict, context: RunContext, policy: str, root: epath.Path,
               first_step: int) -> str:
  """Evaluates on the benchmarks, or on the held-out questions if none is named; writes results.json at the end.
  With config.eval.forced it repeats all rollouts with a forced call (`stages.forced`)."""
  section, folder = config.eval, root / "eval"
  jobs = [Job(one.name, folder / one.name, functools.partial(_benchmark_questions, config, one), section, one)
          for one in map(benchmarks.named, section.benchmarks)]
  if not jobs:
    jobs = [Job(shards.HELD_OUT, folder / shards.HELD_OUT, lambda: eval_questions(config), section)]
  forcing = [dataclasses.replace(job, folder=job.folder / shards.FORCED, forces=job.folder)
             for job in jobs if section.forced]
  _to_its_end(functools.partial(distributed.on_main_async, functools.partial(
    _judge_again, [*jobs, *forcing], config, context)))
  found = _sample([*jobs, *forcing], config,
                  _policy(config, context, policy, folder, "eval"))
  if waiting := sum(len(record.unjudged) for records in found for record in records):
    logging.warning("the judge gave no verdict on %d answers, which count as wrong: run the same "
                    "command again to ask it again", waiting)
  results = {job.name: evaluate.result(records, section.rollouts, job.benchmark)
             for job, records in zip(jobs, found)}
  groups = [[record.group_stats() for record in records] for records in found]
  for job, members in zip(forcing, groups[len(jobs):]):
    results[job.name] |= forced.rates(members)
  distributed.on_main(_write, folder / RESULTS_FILE, results)
  if not section.benchmarks and not distributed.on_main(
      lambda: evaluate.measured(read_metrics(root), first_step)):
    metrics = evaluate.metrics(groups[0], section.rollouts, sum(r.failed for r in found[0]))
    with distributed.metrics_writer(root, resume_step=first_step,
                                    tensorboard=config.log.tensorboard, trackers=context.trackers) as writer:
      writer.write(first_step, metrics | (forced.metrics(groups[1]) if forcing else {}))
  return policy


def _benchmark_questions(config: ConfigDict, benchmark: benchmarks.Benchmark) -> Iterator[Question]:
  name, count = benchmark.name, 0
  # Not decoded here: pictures may be 8K. A broken one fails its own rollouts, which are counted.
  reader = ReaderConfig(image_check="none", max_bad_share=config.data.max_bad_share)
  for question in benchmark.read(paths.parse(config.eval.folder, "config.eval.folder") / name, reader):
    count += 1
    yield question
  if count != benchmark.size and benchmark.size:
    logging.warning("%s has %d questions here; the public release has %d", name, count,
                    benchmark.size)


def _sample(jobs: list[Job], config: ConfigDict,
            sampler: contextlib.AbstractAsyncContextManager) -> list[list[shards.Record]]:
  """The records of each job. The sampler starts only if a shard is unfinished."""
  if distributed.on_main(lambda: all(shards.done(job.folder) for job in jobs)):
    return distributed.on_main(lambda: [list(shards.records(job.folder)) for job in jobs])

  async def everything():
    async with sampler as actor:
      return [await distributed.on_main_async(functools.partial(_job, job, config, actor))
              for job in jobs]

  try:
    return _to_its_end(everything)
  except shards.ShardError as error:
    raise ConfigError(f"--workdir: {error}") from error


def _to_its_end(work: Callable[[], Awaitable[T]]) -> T:
  """Runs a coroutine function on an event loop of its own."""
  with preemption.held():
    return asyncio.run(work())


async def _job(job: Job, config: ConfigDict, actor: ActorOf) -> list[shards.Record]:
  if job.forces is not None:
    actor = _opening(actor, forced.read_thoughts(job.forces))
  async with _scorer(job, config) as score:
    return await shards.sample(
      job.folder, job.questions(), actor, job.section.rollouts,
      seeds.derive(config.seed, "shards", job.name), size=job.section.shard, score=score,
      group=lambda question: str(benchmarks.group(question)),
      progress=f"{job.name}, forced" if job.forces else job.name)


@contextlib.asynccontextmanager
async def _scorer(job: Job, config: ConfigDict) -> AsyncIterator[shards.Scorer | None]:
  """The scorer of a job's answers; None: the episodes have scored them."""
  if job.benchmark is None:
    yield None
    return
  named = config.eval.judge
  judge = ChatJudge(**named) if named.url else None
  try:
    yield lambda question, answer, response: job.benchmark.score(question, answer, judge, response)
  finally:
    if judge is not None:
      await judge.close()


async def _judge_again(jobs: Iterable[Job], config: ConfigDict, context: RunContext) -> None:
  """Asks for the verdicts that an earlier start of the run did not get."""
  for job in jobs:
    async with _scorer(job, config) as score:
      if score is not None:
        await shards.judge_again(job.folder, job.questions, score, context.chat, context.processor)


def _opening(actor: ActorOf, thoughts: forced.Thoughts) -> ActorOf:
  return lambda question: forced.opener(actor(question), thoughts)


# The samplers. Each is a context manager; its value maps a question to its actor.


@contextlib.asynccontextmanager
async def _policy(config: ConfigDict, context: RunContext, policy: str, folder: epath.Path,
                  stage: str) -> AsyncIterator[ActorOf | None]:
  """The policy in a folder, sampled by the engine of config.rollout."""
  idle = _idle(config, context, stage)
  params = policies.load_params(context, policy, config.seed)
  with engines.servers(config, policy, folder) as urls:
    engine = engines.make_engine(config, context, params, urls, folder)
    try:
      await engine.update_weights(params, 0)
      del params  # nothing trains here, and the engine has its own copy
      yield _with(idle, engine)
    finally:
      await engine.close()


@contextlib.asynccontextmanager
async def _endpoint(config: ConfigDict, context: RunContext, policy: str, folder: epath.Path,
                    stage: str) -> AsyncIterator[ActorOf | None]:
  """The teacher behind a chat endpoint."""
  section, idle = config.teach, _idle(config, context, stage)
  engine = OpenAIEngine(context.chat, OpenAIConfig(
    section.url, section.model, api_key=os.environ.get(KEY_VARIABLE, ""),
    **{name: section[name] for name in ("max_concurrent", "attempts", "timeout_s", "extensions", "omit")}))
  try:
    yield _with(idle, engine)
  finally:
    await engine.close()


@contextlib.asynccontextmanager
async def _script(config: ConfigDict, context: RunContext, policy: str, folder: epath.Path,
                  stage: str) -> AsyncIterator[ActorOf]:
  """The scripted teacher of the miniature world."""
  yield actors.scripted_teacher(config, context, stage)


def _idle(config: ConfigDict, context: RunContext, stage: str) -> collect.Actor | None:
  """An actor without an engine, made before the weights are loaded, so that a missing key fails early.

  None in all processes but the main one, since only that one samples.
  """
  return actors.make_actor(config, context, None, stage) if distributed.is_main() else None


def _with(idle: collect.Actor | None, engine: Engine) -> ActorOf | None:
  if idle is None:
    return None
  actor = dataclasses.replace(idle, engine=engine)
  return lambda question: actor


def _write(path: epath.Path, results: dict) -> None:
  paths.write_text(path, json.dumps(results, indent=2) + "\n")
