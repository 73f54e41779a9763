"""The RL loop: rollouts, AXPO's resampling, the update, new weights to the sampler.

In: a policy folder, which is also the fixed reference. Out: a trained policy folder. GRPO is the same loop with
a budget of zero. A checkpoint stores the whole state of the loop, and all randomness comes from (seed, step),
so a resumed run repeats an uninterrupted one bit for bit. When the run is asked to stop (`train.preemption`),
the state of the last step is saved.

With `rollout.staleness` = s, the rollouts of up to s later steps are collected while a step is trained. New
weights reach the sampler between two turns; every token keeps the version and the log-probability that it was
sampled with, and the loss corrects for them. Rollouts that were collected but not trained on are collected
again after a resume: a checkpoint holds the position in the questions after the last trained step.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from axpo_jax import seeds
from axpo_jax.data.question import Question
from axpo_jax.errors import RunStopped
from axpo_jax.model import lora, programs
from axpo_jax.rl.recipes import Recipe
from axpo_jax.rl.recovery import Recovery
from axpo_jax.rl.resample import prefix_budget
from axpo_jax.rollouts import census, collect
from axpo_jax.rollouts.acting import acting_census
from axpo_jax.rollouts.dump import dump_groups
from axpo_jax.rollouts.groups import (
  Group,
  failure_summary,
  for_training,
  group_stats,
  lag_metrics,
  tried_prefixes,
)
from axpo_jax.rollouts.prefetch import Prefetch
from axpo_jax.stages import (
  actors,
  distributed,
  engines,
  evaluate,
  gauges,
  learners,
  policies,
  progress,
  selection,
  toolbox,
  trackers,
  updates,
)
from axpo_jax.stages.context import RunContext
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.stages.questions import question_batches
from axpo_jax.train import preemption
from axpo_jax.train.checkpoint import Checkpoints
from axpo_jax.train.state import TrainState, with_adapters
from axpo_jax.train.step import Learner, policy_objective


@dataclasses.dataclass(frozen=True)
class Collected:
  """The rollout phase of one step.

  groups: the questions that are trained on.
  position: state of the question iterator after the step's questions.
  recovery: the record of recovered prefixes, this step included.
  """

  groups: list[Group]
  metrics: dict[str, float]
  position: Any
  recovery: Recovery

  def for_training(self) -> "Collected":
    """A light copy for the other processes of a run."""
    return dataclasses.replace(self, groups=for_training(self.groups))


class Loop:
  """One RL stage: everything that lives from step to step.

  Args:
    policy: checkpoint folder of the policy to train, which is also the reference.
    workdir: folder of the stage.
    urls: of the SGLang servers, if they sample.
    questions: endless batches of training questions; None: those of config.data.
  """

  def __init__(self, config: ConfigDict, context: RunContext, policy: str, workdir: epath.Path,
               urls: Sequence[str] = (), questions: Iterator[list[Question]] | None = None):
    self.config, self.context, self.workdir = config, context, workdir
    self.recipe = Recipe.from_config(config.rl, config.agent.max_response_tokens)
    self.recovery = Recovery()  # of the last step that was collected
    self.learner = Learner(
      context.trained_config,
      learners.optimizer(config.optimizer, config.rl.steps * config.rl.updates,
                         config.model.freeze_vision, context.lora),
      policy_objective(self.recipe.loss, config.rollout.staleness), context.mesh, context.rules,
      banned_ids=context.chat.banned_ids, temperature=config.rollout.temperature,
      chunk=config.batch.logprob_chunk, frozen_dtype=policies.frozen_dtype(context, policy))
    params = policies.load_params(context, policy, config.seed)
    self.questions = question_batches(config, context.folder) if questions is None else questions
    self.engine = engines.make_engine(config, context, params, urls, workdir)
    self.state = self._first_state(params)
    self.policy_update = updates.PolicyUpdate(config, context, self.recipe, self.learner,
                                              updates.kept_reference(params, config, context), workdir)
    # In a run of several processes only the main one collects.
    self.actor = actors.make_actor(config, context, self.engine) if distributed.is_main() else None
    self.steps_done = 0  # RL steps; each makes up to `rl.updates` optimizer steps
    self.lost_steps = 0  # how many of the last steps in a row had only failed rollouts
    self.unwritten: dict[str, float] | None = None  # metrics of the last step, before its evaluation

  def _first_state(self, params: nnx.State) -> TrainState:
    """The state that training starts from: a copy of the policy, which is also the reference. With adapters
    no copy is made: without them the policy stays as it is."""
    config, context = self.config, self.context
    if context.lora is None:
      return self.learner.init(self.learner.own_copy(params))
    return self.learner.init(
      with_adapters(params, context.trained_config, config.seed, context.mesh, context.rules))

  async def sync(self) -> None:
    """Gives the sampler the current weights. The sampler drops its cached prefixes, so that a step starts the same
    in an uninterrupted run and in a resumed one."""
    # Merged in the sampler's dtype: float32 would be a second copy of all kernels.
    merged = lora.merge(self.state.params, self.context.lora, engines.weights_dtype(self.config))
    await self.engine.update_weights(merged, self.steps_done)

  async def evaluate(self) -> dict[str, float]:
    await self.sync()
    return await distributed.on_main_async(
      lambda: evaluate.run(self.config, self.context, self.engine))

  async def collect(self, step: int) -> Collected:
    """Rollouts and continuations of one step, by the weights that the sampler holds."""
    rl, clock, seed = self.config.rl, Clock(), seeds.derive(self.config.seed, "rl", step)
    self.engine.stats(reset=True)
    self.actor.toolbox.step = step  # for the audit log
    async with collect.Resampling(self.actor, self.recipe.resample, seed, recovery=self.recovery,
                                  progress="continuations") as resampling:
      with clock("rollout"):
        sampled, groups = await collect.sample_step(
          self.actor, self.questions, rl.questions, rl.num_rollouts, seed, resampling, self.recipe.dynamic,
          progress="rollouts")
      position = self.questions.get_state()
      with clock("resample"):  # what is left of it behind the last rollout
        await resampling.finish(groups)
    self.recovery = self.recovery.after(tried_prefixes(groups))
    if failed := failure_summary(sampled):
      logging.warning("step %d: %d rollouts failed and are left out: %s", step,
                      sum(group.failed for group in sampled), failed)
    metrics = self.rollout_metrics(sampled, groups) | clock.metrics()
    sampling = clock.seconds["rollout"] + clock.seconds["resample"]
    metrics["time/sampled_tokens_per_s"] = metrics["engine/decode_tokens"] / sampling
    return Collected(groups, metrics, position, self.recovery)

  async def step(self, collected: Callable[[], Awaitable[Collected]]
                 ) -> tuple[Collected, dict[str, float]]:
    """One step: gives the sampler the weights, takes the next rollouts and trains on them.

    Args:
      collected: waits for the next rollouts.

    Returns:
      What was collected, and the step's metrics.
    """
    clock, start = Clock(), time.perf_counter()
    with clock("weights"):
      await self.sync()
    with clock("wait"):
      batch = await distributed.on_main_async(collected, Collected.for_training)
    self._count_lost_steps(batch.groups)
    metrics = batch.metrics | lag_metrics(batch.groups, self.steps_done)
    with clock("update"):
      # In a thread, so that the episodes of later steps continue.
      metrics |= await asyncio.to_thread(self.update, batch.groups)
    self.steps_done += 1
    metrics |= clock.metrics() | programs.metrics() | {"time/step_s": time.perf_counter() - start}
    metrics["time/trained_tokens_per_s"] = metrics["pack/tokens_plain"] / clock.seconds["update"]
    return batch, metrics

  def _count_lost_steps(self, groups: list[Group]) -> None:
    """Raises RolloutsFailed when every rollout of too many steps in a row failed."""
    if any(group.rollouts for group in groups):
      self.lost_steps = 0
      return
    self.lost_steps += 1
    if self.lost_steps >= self.config.rl.max_lost_steps:
      raise RolloutsFailed(
        f"all rollouts of the last {self.lost_steps} steps failed (config.rl.max_lost_steps="
        f"{self.config.rl.max_lost_steps}): {failure_summary(groups)}. Repair the cause and run "
        "the same command again: it resumes from the last checkpoint")

  def is_due(self, every: int) -> bool:
    """Whether the last step is a multiple of `every`, or the stage's last."""
    return self.steps_done == self.config.rl.steps or _each(self.steps_done, every)

  async def dump(self, groups: list[Group], first_step: int) -> None:
    """Writes the last step's rollouts, in a thread like the update. Trackers get a table of some of them."""
    path = self.workdir / "rollouts" / f"step_{self.steps_done:06d}.jsonl"
    rollouts, notes = await asyncio.to_thread(dump_groups, path, groups, self.policy_update.credits(groups),
                                              self.context.chat)
    for tracker in self.context.trackers:
      await asyncio.to_thread(tracker.table, first_step + self.steps_done, trackers.chosen(rollouts, notes),
                              self.context.chat)

  def rollout_metrics(self, sampled: list[Group], groups: list[Group]) -> dict[str, float]:
    """The step's metrics of rollouts, resampling and engine.

    Args:
      sampled: all questions. groups: those of them that are trained on.
    """
    stats = group_stats(sampled, self.recipe.resample, self.context.chat)
    trained = stats if len(sampled) == len(groups) else group_stats(
      groups, self.recipe.resample, self.context.chat)
    asked = len(groups) * self.config.rl.num_rollouts
    engine = dataclasses.asdict(self.engine.stats())
    # Counted since the process started, so it differs in a resumed run: its name begins with time/.
    compiled = engine.pop("compilations")
    return {
      **census.census(stats), **census.census_by_family(stats), **acting_census(stats),
      **census.resample_census(trained, budget=prefix_budget(asked, self.recipe.resample)),
      **census.resample_census_by_family(trained),
      "rollout/failed": float(sum(group.failed for group in sampled)),
      **({"rollout/kept_share": len(groups) / len(sampled)} if self.recipe.dynamic.rounds else {}),
      **{f"engine/{name}": float(value) for name, value in engine.items()},
      **{f"engine/{name}": value for name, value in self.engine.gauges().items()},
      "time/engine_compilations": float(compiled),
    }

  def update(self, groups: list[Group]) -> dict[str, float]:
    """Trains on the step's groups; returns metrics."""
    self.state, metrics = self.policy_update(self.state, groups, self.steps_done)
    return metrics


class Clock:
  """Seconds of every phase of a step."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str):
    start = time.perf_counter()
    yield
    self.seconds[phase] = time.perf_counter() - start

  def metrics(self) -> dict[str, float]:
    return {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}


def run(config: ConfigDict, context: RunContext, policy: str, root: epath.Path,
        first_step: int) -> epath.Path:
  """Trains the policy in folder `policy` and returns the folder of the result.

  Args:
    root: the run's folder: metrics.jsonl, and rl/ with checkpoints, rollout dumps and the trained
      policy.
    first_step: metrics of RL step s are written as step first_step + s.
  """
  folder = root / "rl"
  with (engines.servers(config, policy, folder) as urls,
        Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints):
    distributed.on_main(selection.report_tally, selection.questions(config, context.folder)[1], folder)
    loop = Loop(config, context, policy, folder, urls)
    if checkpoints.latest() is not None:
      learner = loop.learner
      restored = checkpoints.restore(learner.stored(learner.abstract_state()),
                                     iterator=loop.questions)
      loop.state = learner.restored(restored.state, lambda: loop.state.params)
      loop.steps_done, loop.unwritten = restored.step, restored.host.get("unwritten")
      loop.recovery = Recovery.from_json(restored.host.get("recovery", {}))
    distributed.on_main(gauges.write_overview, loop.state.params, loop.learner.optimizer, folder)
    # The line of a step whose evaluation was interrupted is written again.
    resume_step = first_step + loop.steps_done - bool(loop.unwritten)
    with (preemption.held(),
          distributed.metrics_writer(root, resume_step=resume_step,
                                     tensorboard=config.log.tensorboard, trackers=context.trackers) as writer,
          asyncio.Runner() as runner):
      try:
        runner.run(_train(loop, checkpoints, writer, first_step))
      finally:
        runner.run(loop.engine.close())
  return policies.export(loop.state.params, config, context, policy, loop.workdir / "policy")


async def _train(loop: Loop, checkpoints: Checkpoints, writer, first_step: int):
  config = loop.config
  if config.eval.every >= 0 and not distributed.on_main(
      lambda: evaluate.measured(read_metrics(writer.path), first_step)):
    writer.write(first_step, await loop.evaluate())
  trained = question_batches(config, loop.context.folder)  # holds Collected.position, for checkpoints
  prefetch = Prefetch(loop.collect, loop.steps_done, config.rl.steps)
  position, recovery, unwritten = None, loop.recovery, loop.unwritten

  def collected():
    prefetch.allow(loop.steps_done + config.rollout.staleness)
    return prefetch.next()

  def save(**host: Any):
    trained.set_state(position)
    checkpoints.save(loop.steps_done, loop.learner.stored(loop.state),
                     host={"stage": "rl", "recovery": recovery.to_json(), **host}, iterator=trained)

  before = loop.steps_done - bool(unwritten)
  shown = progress.Progress(config.rl.recipe, config.rl.steps, before, shown=distributed.is_main())
  with tqdm(total=config.rl.steps, initial=before, desc=config.rl.recipe,
            disable=None if distributed.is_main() else True) as bar:
    try:
      while unwritten or loop.steps_done < config.rl.steps:
        if not unwritten:
          with progress.profiled(loop.steps_done + 1, config.log.profile_steps, loop.workdir):
            batch, unwritten = await loop.step(collected)
          position, recovery = batch.position, batch.recovery
          if _each(loop.steps_done, config.log.dump_every) and distributed.is_main():
            await loop.dump(batch.groups, first_step)
        metrics = unwritten | await _evaluation(loop, prefetch) | gauges.memory() | shown.step(loop.steps_done)
        _watch(metrics, config.log)
        await asyncio.to_thread(toolbox.flush)  # before the metrics, so that the audit log covers them
        writer.write(first_step + loop.steps_done, metrics)
        shown.show(metrics)
        unwritten = None
        if loop.is_due(config.checkpoint.every) and loop.steps_done not in checkpoints.steps():
          save()
        bar.update()
    except preemption.Stopped:
      if loop.steps_done and loop.steps_done not in checkpoints.steps():
        save(unwritten=_numbers(unwritten))
      raise
    finally:
      await prefetch.close()
  checkpoints.wait()


async def _evaluation(loop: Loop, prefetch: Prefetch) -> dict[str, float]:
  """Metrics of the step's evaluation; none where it is not due."""
  if loop.config.eval.every < 0 or not loop.is_due(loop.config.eval.every):
    return {}
  await distributed.on_main_async(prefetch.settle)
  return await loop.evaluate()


def _numbers(metrics: dict[str, Any] | None) -> dict[str, int | float] | None:
  """Metrics as JSON has them."""
  return metrics and {name: value if isinstance(value, int) else float(value)
                      for name, value in metrics.items()}


def _each(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


class RolloutsFailed(RunStopped):
  """All rollouts of several steps failed, by a fault of the machine and not of the policy."""


class LogProbGapError(RunStopped):
  """Log-probabilities of sampler and trainer differ by more than the config allows."""


def _watch(metrics: dict[str, float], log: ConfigDict) -> None:
  """Warns, or stops the run, if the sampler-to-trainer gap is large: it precedes most collapses."""
  gap = metrics.get("train/logp_gap_abs_mean", 0.0)
  if gap <= log.gap_alarm:
    return
  message = (f"sampler and trainer log-probabilities differ by {gap:.4f} nats on average, more than "
             f"config.log.gap_alarm={log.gap_alarm}: check dtypes, weight updates and truncation")
  if log.stop_on_gap:
    raise LogProbGapError(message)
  logging.warning(message)
