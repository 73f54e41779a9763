"""The SFT loop: the policy learns to imitate trajectories whose answer is right.

In: a policy folder (or random parameters) and a stream of trajectories. Out: a trained policy folder. Only
tokens that the teacher sampled carry loss.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Iterator

import grain
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from axpo_jax import seeds
from axpo_jax.agent.rollout import Rollout
from axpo_jax.data import filters, pipeline
from axpo_jax.data.question import Question
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld.world import MiniWorldSource
from axpo_jax.model import programs
from axpo_jax.model.images import ImageLimits
from axpo_jax.stages import (
  actors,
  distributed,
  gauges,
  learners,
  policies,
  progress,
  sections,
  selection,
  toolbox,
)
from axpo_jax.stages.context import RunContext
from axpo_jax.stages.conversations import Conversations, Prompts
from axpo_jax.train import examples as examples_lib
from axpo_jax.train import preemption
from axpo_jax.train.batch import packing_metrics, targets
from axpo_jax.train.checkpoint import Checkpoints
from axpo_jax.train.packing import Example, PackingError
from axpo_jax.train.step import Learner, supervised_objective

# Trajectories in a row that SFT may leave out before it gives up.
_MOST_DROPPED = 1000


def run(config: ConfigDict, context: RunContext, policy: str, root: epath.Path,
        first_step: int) -> epath.Path:
  """Fine-tunes the policy in folder `policy` ("" = random) and returns the result's folder.

  Args:
    root: the run's folder: metrics.jsonl, and sft/ with checkpoints and the trained policy.
    first_step: metrics of SFT step s are written as step first_step + s.
  """
  sft, workdir = config.sft, root / "sft"
  learner = Learner(
    context.trained_config, learners.optimizer(sft.optimizer, sft.steps, sft.freeze_vision, context.lora),
    supervised_objective(sft.balance_coef), context.mesh, context.rules, banned_ids=context.chat.banned_ids,
    chunk=config.batch.logprob_chunk, frozen_dtype=policies.frozen_dtype(context, policy))
  data = sft_batches(config, context)
  distributed.on_main(selection.report_tally, data.tally, workdir)
  with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
    params = functools.partial(policies.trained_params, context, policy, config.seed)
    if checkpoints.latest() is None:
      state = learner.init(params())
    else:
      stored = checkpoints.restore(learner.stored(learner.abstract_state()), iterator=data.stream)
      state = learner.restored(stored.state, params)
    before = int(state.step)
    distributed.on_main(gauges.write_overview, state.params, learner.optimizer, workdir)
    shown = progress.Progress("sft", sft.steps, before, shown=distributed.is_main())
    with (preemption.held(),
          distributed.metrics_writer(root, resume_step=first_step + before, tensorboard=config.log.tensorboard,
                                     trackers=context.trackers) as writer,
          tqdm(total=sft.steps, initial=before, desc="sft",
               disable=None if distributed.is_main() else True) as bar):
      for done in range(before + 1, sft.steps + 1):
        start = time.perf_counter()
        examples, counts = next(data)
        batches = learners.pack_examples(config, context, examples)
        loaded = time.perf_counter()
        with progress.profiled(done, config.log.profile_steps, workdir):
          state, result = learner.update(state, batches, targets(batches))
          metrics = learner.metrics(result, batches, workdir / "nonfinite")
        seconds = time.perf_counter() - loaded
        metrics |= packing_metrics(batches, examples) | counts | programs.metrics() | gauges.memory()
        metrics |= gauges.utilisation(context.model_config, batches, seconds, context.mesh.devices.flat)
        metrics |= {"time/load_s": loaded - start, "time/update_s": seconds, **shown.step(done)}
        metrics = {name.replace("train/", "sft/"): value for name, value in metrics.items()}
        writer.write(first_step + done, metrics)
        shown.show(metrics)
        stopping = distributed.on_main(preemption.stop_requested)
        if stopping or done % config.checkpoint.every == 0 or done == sft.steps:
          checkpoints.save(done, learner.stored(state), host={"stage": "sft"}, iterator=data.stream)
        bar.update()
        if stopping:
          raise preemption.Stopped
      checkpoints.wait()
  return policies.export(state.params, config, context, policy, workdir / "policy")


class SftBatches:
  """Endless batches of supervised examples; checkpointable like the stream beneath.

  A trajectory that is left out (wrong answer, too long) is counted, and the next one takes its place.

  Raises:
    ConfigError: many trajectories in a row were left out.

  Attributes:
    tally: of the filter on shards; None if the source is not shards.
  """

  def __init__(self, stream: grain.DatasetIterator, size: int, tally: filters.Tally | None = None):
    self.stream, self.size, self.tally = stream, size, tally

  def __iter__(self) -> Iterator[tuple[list[Example], dict[str, float]]]:
    return self

  def __next__(self) -> tuple[list[Example], dict[str, float]]:
    kept, seen, dropped = [], 0, 0
    while len(kept) < self.size:
      found = next(self.stream)
      kept += found
      seen += 1
      dropped = 0 if found else dropped + 1
      if dropped == _MOST_DROPPED:
        raise ConfigError(
          f"{dropped} trajectories in a row were left out: none has the right answer within "
          "config.sft.max_length tokens. For the scripted teacher see config.agent.max_new_tokens "
          "and max_response_tokens, which cut its turns too")
    return kept, {"data/trajectories_read": seen, "data/kept_share": self.size / seen}


def sft_batches(config: ConfigDict, context: RunContext) -> SftBatches:
  """Batches of the scripted teacher's trajectories, made on demand, or of those in a dump, shards or
  conversations."""
  sft, tally = config.sft, None
  if sft.source == "teacher":
    source = MiniWorldSource(config.data.miniworld.train_size, config.data.miniworld.seed,
                             "train", sections.world_config(config, sft.kinds))
    transform = _teacher(config, context)
  elif sft.source == "conversations":
    source, transform = conversations(config, context), _filter(config, context)
  else:
    source, tally = selection.trajectories(config.sft, context.processor, context.folder)
    transform = _filter(config, context)
  return SftBatches(pipeline.example_stream(source, seed=config.seed, transform=transform),
                    sft.examples, tally)


def conversations(config: ConfigDict, context: RunContext) -> Conversations:
  """The conversations of config.sft.path in the policy's chat format. One without a system prompt or tools gets
  this run's."""
  images = config.images
  tools = toolbox.toolbox(config, context.chat, context.processor.factor, folder=context.folder)
  return Conversations(config.sft.path, Prompts(
    context.chat, context.processor, ImageLimits(images.min_pixels, images.max_pixels),
    ImageLimits(images.zoom_min_pixels, images.zoom_max_pixels), actors.system_prompt(config),
    tools.schemas(), config.agent.max_images, context.model_config.text.vocab_size))


def _filter(config: ConfigDict, context: RunContext) -> Callable[[Rollout], list[Example]]:
  """Maps a rollout to a list with its example, or to an empty list if SFT leaves it out.

  Not to None: grain would remove that from the stream, and it could not be counted.
  """
  def transform(rollout: Rollout) -> list[Example]:
    reason = filters.trajectory(rollout.reward, rollout.transcript.expanded_length, failed=rollout.failed,
                                max_tokens=config.sft.max_length, keep_wrong=config.sft.keep_wrong)
    if reason != filters.KEPT:
      return []
    example = examples_lib.supervised(rollout, context.model_config.image_token_id)
    try:
      learners.check_packable(example, config, context)
    except PackingError as error:
      logging.log_first_n(logging.WARNING, "a trajectory of question %s is left out: %s", 5,
                          rollout.question_id, error)
      return []
    return [example]
  return transform


def _teacher(config: ConfigDict, context: RunContext) -> Callable[[Question], list[Example]]:
  """Maps a question to the example of the scripted teacher's episode, which the policy's own episode loop runs."""
  to_examples, teacher_of = _filter(config, context), actors.scripted_teacher(config, context)

  def transform(question: Question) -> list[Example]:
    teacher = teacher_of(question)
    episode = teacher.roll(teacher.start(question), question,
                           seeds.derive(config.seed, "teacher", question.id))
    return to_examples(asyncio.run(episode))
  return transform
