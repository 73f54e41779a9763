"""From a config to the parts of a run: policy, chat, tools, engine, questions.

Each function reads one section of the configuration and says which field is wrong when one is.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax import paths, processes, seeds
from axpo_jax.agent.episode import EpisodeLimits
from axpo_jax.agent.prompts import SHORT_SYSTEM_PROMPT, SYSTEM_PROMPT
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.transcript import Transcript
from axpo_jax.config import limits
from axpo_jax.data import adapters, filters, pipeline, readers
from axpo_jax.data.question import Question
from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.protocol import Engine
from axpo_jax.engine.sglang.engine import SGLangEngine
from axpo_jax.engine.sglang.server.spec import API_KEY_VARIABLE, SidecarError
from axpo_jax.engine.sglang.server.supervisor import Sidecar
from axpo_jax.engine.sglang.weight_push import PushFolder
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.world import MiniWorldSource
from axpo_jax.model import hf, sharding
from axpo_jax.model.attention import reads_key_blocks
from axpo_jax.model.chat import Chat
from axpo_jax.model.config import PRESETS, LoraConfig, ModelConfig
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.rollouts.collect import Actor
from axpo_jax.stages import distributed, plugins, sections, selection, toolbox
from axpo_jax.stages.conversations import Conversations, Prompts
from axpo_jax.stages.sections import computed_as
from axpo_jax.train import adapters as lora
from axpo_jax.train import examples
from axpo_jax.train.batch import Batch, batch_shards, vision_rows_here
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import Example, PackingError, check_example, pack
from axpo_jax.train.state import Optimizer, init_params, make_optimizer

# Trajectories in a row that SFT may leave out before it gives up.
_MOST_DROPPED = 1000
_PROMPTS = {"full": SYSTEM_PROMPT, "short": SHORT_SYSTEM_PROMPT}


@dataclasses.dataclass(frozen=True)
class Workbench:
  """What every stage of a run shares; the parameters themselves belong to the stages.

  folder: of the run; None keeps no audit log. lora: adapters that are trained in the place of the
  model's own parameters; None: there are none.
  """

  model_config: ModelConfig
  graphdef: nnx.GraphDef
  chat: Chat
  processor: ImageProcessor
  mesh: jax.sharding.Mesh
  rules: sharding.Rules
  folder: epath.Path | None = None
  lora: LoraConfig | None = None

  @property
  def trained_config(self) -> ModelConfig:
    """The model as learners know it, with adapters; all others know `model_config`."""
    return dataclasses.replace(self.model_config, lora=self.lora)


def workbench(config: ConfigDict, folder: epath.Path | None = None) -> Workbench:
  """Reads the checkpoint's (or preset's) sizes, its tokenizer and image processor.

  Raises:
    ConfigError: a file is missing or damaged, or the mesh does not fit the devices.
  """
  named = config.model.tokenizer or config.model.checkpoint
  files = paths.local(named, hf.SMALL_FILES)
  try:
    chat = Chat.from_pretrained(files)
  except Exception as error:  # the tokenizer's libraries raise any for a broken folder
    raise ConfigError(f"config.model.{'tokenizer' if config.model.tokenizer else 'checkpoint'}={named!r}: "
                      f"its tokenizer cannot be loaded: {error}") from error
  model_config = _model_config(config, chat)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(model_config, rngs=nnx.Rngs(0))))
  return Workbench(model_config, graphdef, chat, ImageProcessor.from_checkpoint(files),
                   _mesh(config, params), sharding.DEFAULT_RULES, folder, lora.from_config(config))


def _mesh(config: ConfigDict, params: nnx.State) -> jax.sharding.Mesh:
  """The mesh, which must divide the model's sizes."""
  try:
    mesh = sharding.make_mesh(dict(config.mesh))
    sharding.param_shardings(params, mesh)
  except sharding.ShardingError as error:
    raise ConfigError(f"config.mesh={dict(config.mesh)}: {error}") from error
  return mesh


def _model_config(config: ConfigDict, chat: Chat) -> ModelConfig:
  m = config.model
  if m.checkpoint:
    base = hf.load_config(paths.local(m.checkpoint, hf.SMALL_FILES))
  else:
    base = PRESETS[m.preset]
    if m.preset == "tiny":
      base = _with_tokenizer(base, chat)
  if chat.vocab_size > base.text.vocab_size:
    raise ConfigError(
      f"config.model.{'tokenizer' if m.tokenizer else 'checkpoint'}: its tokenizer has {chat.vocab_size} ids, "
      f"the model {base.text.vocab_size}: take the tokenizer that belongs to the checkpoint")
  return computed_as(base, m)


def _with_tokenizer(base: ModelConfig, chat: Chat) -> ModelConfig:
  """The tiny preset takes its vocabulary from whatever tokenizer it is trained with."""
  return dataclasses.replace(
    base, text=dataclasses.replace(base.text, vocab_size=chat.vocab_size),
    image_token_id=chat.image_pad_id, video_token_id=chat.video_pad_id,
    vision_start_token_id=chat.vision_start_id, vision_end_token_id=chat.vision_end_id)


def frozen_dtype(bench: Workbench, checkpoint: str | epath.Path) -> str:
  """Of parameters that nothing trains: bfloat16 where the checkpoint is, which loses nothing and
  takes half of float32's memory; else that of all parameters."""
  own = bench.model_config.param_dtype
  return (hf.stored_dtype(paths.local(checkpoint)) or own) if checkpoint else own


def load_params(bench: Workbench, checkpoint: str | epath.Path, seed: int) -> nnx.State:
  """Parameters from a checkpoint folder, in `frozen_dtype`, or random ones where `checkpoint` is
  empty; sharded. A learner casts what it trains."""
  if checkpoint:
    stored = dataclasses.replace(bench.model_config, param_dtype=frozen_dtype(bench, checkpoint))
    return hf.load_params(paths.local(checkpoint), stored, mesh=bench.mesh, rules=bench.rules)
  return init_params(bench.model_config, seed, bench.mesh, bench.rules)


def trained_params(bench: Workbench, checkpoint: str | epath.Path, seed: int) -> nnx.State:
  """`load_params` for a learner: with new adapters where those are trained."""
  params = load_params(bench, checkpoint, seed)
  if bench.lora is None:
    return params
  return lora.attach(params, bench.trained_config, seed, bench.mesh, bench.rules)


def actor(config: ConfigDict, bench: Workbench, engine: Engine, stage: str = "rl") -> Actor:
  """The policy at work: engine, tools, limits and sampling of a stage."""
  agent, own = config.agent, limits(config, stage)
  tools = toolbox.toolbox(config, bench.chat, bench.processor.factor, evaluation=stage == "eval",
                          folder=bench.folder)
  episode_limits = EpisodeLimits(
    max_turns=own.max_turns, max_new_tokens_per_turn=own.max_new_tokens,
    max_response_tokens=own.max_response_tokens, max_total_tokens=own.max_total_tokens,
    max_images=agent.max_images, max_image_pixels=config.images.zoom_max_pixels,
    deadline=agent.deadline or None)
  sampling = sections.sampling(config, stage, stop_ids=bench.chat.stop_ids,
                               banned_ids=bench.chat.banned_ids)
  return Actor(
    engine=engine, chat=bench.chat, processor=bench.processor, toolbox=tools,
    limits=episode_limits, sampling=sampling,
    image_limits=ImageLimits(config.images.min_pixels, config.images.max_pixels),
    system_prompt=_PROMPTS.get(agent.system_prompt, agent.system_prompt),
    # Benchmarks are scored by their own rules.
    reward=None if stage == "eval" and config.eval.benchmarks else plugins.reward(config),
    check=_trainable(config, bench) if stage == "rl" else None)


def _trainable(config: ConfigDict, bench: Workbench) -> Callable[[Transcript], None]:
  """Raises PackingError, or another ValueError, for what the update could not train on: it would end
  there not with its own episode but with the run."""
  def check(transcript: Transcript) -> None:
    example = examples.from_transcript(transcript, transcript.sampled, 1.0,
                                       bench.model_config.image_token_id)
    _check_packable(example, config, bench)
    if not np.isfinite(example.behaviour_logp_T).all():
      raise PackingError("the sampler gave a token no finite log-probability")
  return check


def _check_packable(example: Example, config: ConfigDict, bench: Workbench) -> None:
  check_example(example, config.batch.length, bench.chat.banned_ids,
                max(sections.patch_rows(config, bench.model_config.vision)),
                bench.model_config.text.vocab_size)


@contextlib.contextmanager
def servers(config: ConfigDict, policy: str, folder: epath.Path) -> Iterator[tuple[str, ...]]:
  """URLs of the SGLang servers: those that the config names, or else some of our own, which start
  with the policy's checkpoint and stop at the end. None where the engine is another.

  Raises:
    ConfigError: they cannot be started; says what to install or to change.
  """
  section = config.rollout
  if section.engine != "sglang" or section.urls:
    yield tuple(section.urls)
    return
  with contextlib.ExitStack() as stack:
    yield distributed.on_main(_start_servers, stack, config, policy, folder)


def _start_servers(stack: contextlib.ExitStack, config: ConfigDict, policy: str, folder: epath.Path
                   ) -> tuple[str, ...]:
  try:
    # A server that loads weights does not answer: it does not hang.
    spec = sections.sidecar(config, str(paths.local(policy)),
                            hang_after=max(config.rollout.sglang.load_s, 300.0),
                            api_key=os.environ.get(API_KEY_VARIABLE, ""))
    return tuple(stack.enter_context(Sidecar(spec, paths.scratch(folder / "sidecar"))).urls)
  except SidecarError as error:
    raise ConfigError(f"config.rollout.sidecar: {error}") from error


def engine(config: ConfigDict, bench: Workbench, params: nnx.State, urls: Sequence[str],
           folder: epath.Path) -> Engine:
  """The sampler that the config names. Give it weights (`update_weights`) before anything else.

  Args:
    urls: of the servers, see `servers`.
    folder: of the stage; weights are handed to servers through it unless the config names another.

  In a run of several processes all of them call this, and `update_weights` of what they get; only the
  main one samples.
  """
  if config.rollout.engine == "embedded":
    return _embedded(config, bench, params)
  made = sections.sglang(
    config, os.path.abspath(config.rollout.sglang.push_folder or paths.scratch(folder / "push")),
    skip_vision=vision_stands(config, bench.lora))
  if not distributed.is_main():
    return distributed.Follower(PushFolder(made.push, bench.model_config).write)
  kind = SGLangEngine if jax.process_count() == 1 else distributed.RemoteEngine
  return kind(urls, bench.model_config, dataclasses.replace(
    made, api_key=os.environ.get(API_KEY_VARIABLE, "")))


def engine_dtype(config: ConfigDict) -> str | None:
  """Of the weights that the sampler takes; None: the model's own."""
  rollout = config.rollout
  return rollout.embedded.dtype if rollout.engine == "embedded" else rollout.sglang.push_dtype


def vision_stands(config: ConfigDict, adapters: LoraConfig | None) -> bool:
  """Whether RL leaves the vision tower as it was."""
  return config.model.freeze_vision or (adapters is not None and not adapters.in_vision)


def _embedded(config: ConfigDict, bench: Workbench, params: nnx.State) -> Engine:
  args = bench.model_config, bench.graphdef, params
  options = {"config": sections.embedded(config), "rules": bench.rules}
  if jax.process_count() == 1:
    return EmbeddedEngine(*args, mesh=bench.mesh, **options)
  if distributed.is_main():
    return distributed.LocalEngine(*args, **options)
  mesh = distributed.local_mesh()
  distributed.whole_on_main(params, mesh, bench.rules)
  return distributed.Follower(
    lambda params, _version: distributed.whole_on_main(params, mesh, bench.rules))


def optimizer(section: ConfigDict, total_steps: int, freeze_vision: bool,
              adapters: LoraConfig | None = None) -> Optimizer:
  """The optimizer of a section such as config.optimizer or config.sft.optimizer."""
  return make_optimizer(OptimizerConfig(**section, total_steps=total_steps,
                                        freeze_vision=freeze_vision, adapters=bool(adapters)))


def pack_examples(config: ConfigDict, bench: Workbench, batch: list[Example]) -> list[Batch]:
  """Micro-batches in the shapes that the config fixes, so that few programs are compiled."""
  return pack(batch, banned_ids=bench.chat.banned_ids,
              vocab_size=bench.model_config.text.vocab_size,
              image_rows_here=vision_rows_here(bench.mesh, bench.rules),
              **pack_options(config, bench.model_config, bench.mesh, bench.rules))


def pack_options(config: ConfigDict, model: ModelConfig, mesh: jax.sharding.Mesh,
                 rules: sharding.Rules | None = None) -> dict[str, Any]:
  """The options of `pack` that decide about shapes: all that a run can meet come from them
  (benchmarks/programs.py counts them)."""
  text, section = model.text, config.batch
  with sharding.use(mesh, rules):
    list_blocks = reads_key_blocks(model.attention, section.length, text.num_heads,
                                   text.num_kv_heads, text.head_dim)
  return dict(
    rows=section.rows, length=section.length, share_prefixes=section.share_prefixes,
    vision_config=model.vision, list_blocks=list_blocks,
    patch_buckets=sections.patch_rows(config, model.vision),
    rows_multiple_of=batch_shards(mesh, rules),
    image_rows_multiple_of=sharding.parts("vision_rows", mesh, rules),
    row_buckets=[section.image_rows << doubled for doubled in range(16)])


def export(params: nnx.State, config: ConfigDict, bench: Workbench, policy: str | epath.Path,
           folder: epath.Path) -> epath.Path:
  """Saves a trained policy as a folder that every tool of the ecosystem loads, adapters merged in.

  The tokenizer and processor files are those of `policy`, the folder it was trained from.
  """
  # A store gets the folder when it is whole, and config.json last: by that file a stage is known to be
  # done. In other processes `on_disk` is not written to.
  on_disk = paths.scratch(folder)
  hf.save_checkpoint_hf(on_disk, lora.merge(params, bench.lora, config.model.export_dtype),
                        bench.model_config,
                        dtype=config.model.export_dtype,
                        tokenizer_from=paths.local(config.model.tokenizer or policy, hf.SMALL_FILES))
  if paths.is_remote(folder):
    distributed.on_main(
      lambda: paths.upload(on_disk, folder, last=hf.CONFIG_FILE, stays=True))
  processes.barrier()  # the next stage reads what the main process has written
  return folder


def question_batches(config: ConfigDict, folder: epath.Path | None = None
                     ) -> grain.DatasetIterator:
  """Endless, checkpointable batches of training questions, those that the filter keeps.

  Args:
    folder: of the run, whose stages "teach" and "screen" the filter reads.
  """
  source, (records, _) = _questions(config, "rl", config.data.path), selection.questions(config, folder)
  if records is not None:
    source = pipeline.Chosen(source, [record.place for record in records],
                             [record.id for record in records])
  # Dynamic sampling draws as many as it needs: from batches of one.
  size = 1 if config.rl.dynamic.rounds else config.rl.questions
  return pipeline.question_batches(source, size, seed=config.seed)


def training_questions(config: ConfigDict, most: int = 0) -> Iterator[Question]:
  """The training questions in their order, as a stream; the first `most` of them, if it is not 0."""
  if config.data.source == "miniworld":
    source = _questions(config, "rl", "")
    stream = (source[i] for i in range(len(source)))
  else:
    stream = _read(config, config.data.path)
  return itertools.islice(stream, most or None)


def eval_questions(config: ConfigDict) -> list[Question]:
  """The held-out questions, the same at every call."""
  source = _questions(config, "eval", config.data.eval_path)
  return [source[i] for i in range(min(config.eval.questions, len(source)))]


def _questions(config: ConfigDict, split: str, path: str) -> pipeline.Source[Question]:
  if config.data.source == "miniworld":
    size = config.eval.questions if split == "eval" else config.data.miniworld.train_size
    return MiniWorldSource(size, config.data.miniworld.seed, split, sections.world_config(
      config, config.data.miniworld.kinds))
  return list(_read(config, path, config.data.eval_source if split == "eval" else ""))


def _read(config: ConfigDict, path: str, source: str = "") -> Iterator[Question]:
  source = source or config.data.source
  how = sections.reader(config, source)
  try:
    yield from (adapters.read(source, path, how) if source in adapters.LAYOUTS
                else readers.read_questions(path, how))
  except readers.ReaderError as error:
    raise ConfigError(f"config.data: {error}") from error


class SftBatches:
  """Endless batches of supervised examples; checkpointable like the stream beneath.

  A trajectory that is left out (wrong answer, too long) is replaced by the next one, and counted.

  Raises:
    ConfigError: of many trajectories in a row, none could be kept.

  Attributes:
    tally: of the shards' trajectories before the stream; None where they are not of shards.
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


def sft_batches(config: ConfigDict, bench: Workbench) -> SftBatches:
  """Trajectories of the scripted teacher, made as they are needed, or those of a dump, of shards or of
  conversations."""
  sft, tally = config.sft, None
  if sft.source == "teacher":
    source = MiniWorldSource(config.data.miniworld.train_size, config.data.miniworld.seed,
                             "train", sections.world_config(config, sft.kinds))
    transform = _teacher(config, bench)
  elif sft.source == "conversations":
    source, transform = conversations(config, bench), _filter(config, bench)
  else:
    source, tally = selection.trajectories(config.sft, bench.processor, bench.folder)
    transform = _filter(config, bench)
  return SftBatches(pipeline.example_stream(source, seed=config.seed, transform=transform),
                    sft.examples, tally)


def conversations(config: ConfigDict, bench: Workbench) -> Conversations:
  """The conversations of config.sft.path in the policy's chat format, with this run's prompt where they have
  none."""
  images, agent = config.images, config.agent
  tools = toolbox.toolbox(config, bench.chat, bench.processor.factor, folder=bench.folder)
  return Conversations(config.sft.path, Prompts(
    bench.chat, bench.processor, ImageLimits(images.min_pixels, images.max_pixels),
    ImageLimits(images.zoom_min_pixels, images.zoom_max_pixels),
    _PROMPTS.get(agent.system_prompt, agent.system_prompt), tools.schemas(), agent.max_images,
    bench.model_config.text.vocab_size))


def _filter(config: ConfigDict, bench: Workbench) -> Callable[[Rollout], list[Example]]:
  """From a rollout to its example; to none if SFT leaves it out.

  A list, since grain takes None out of a stream by itself: nobody could count it.
  """
  def transform(rollout: Rollout) -> list[Example]:
    wrong = rollout.reward <= 0.5 and not config.sft.keep_wrong
    too_long = rollout.transcript.expanded_length > config.sft.max_length
    if rollout.failed or wrong or too_long:
      return []
    example = examples.supervised(rollout, bench.model_config.image_token_id)
    try:
      _check_packable(example, config, bench)
    except PackingError as error:
      logging.log_first_n(logging.WARNING, "a trajectory of question %s is left out: %s", 5,
                          rollout.question_id, error)
      return []
    return [example]
  return transform


def _teacher(config: ConfigDict, bench: Workbench) -> Callable[[Question], list[Example]]:
  """From a question to the example of the teacher's episode, by the same loop that rolls out the
  policy. The prompt is the policy's, except for warm starts that leave it out."""
  to_examples, teacher_of = _filter(config, bench), scripted_teacher(config, bench)

  def transform(question: Question) -> list[Example]:
    teacher = teacher_of(question)
    episode = teacher.roll(teacher.start(question), question,
                           seeds.derive(config.seed, "teacher", question.id))
    return to_examples(asyncio.run(episode))
  return transform


def scripted_teacher(config: ConfigDict, bench: Workbench, stage: str = "sft"
                     ) -> Callable[[Question], Actor]:
  """Who plays a question of the miniature world from its script, with the habits of sft.teacher and
  within the limits of a stage."""
  habits = TeacherConfig(**config.sft.teacher)
  # One actor for all: its tools may hold processes.
  idle = actor(config, bench, TeacherEngine(bench.chat, {}, habits), stage)
  return lambda question: dataclasses.replace(
    idle, engine=TeacherEngine(bench.chat, {question.id: question}, habits))
