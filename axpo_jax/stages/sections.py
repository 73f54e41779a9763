"""Records (frozen dataclasses) made from sections of the config.

In: a config. Out: the records. Each checks its values when it is made. A run makes some of them hours after its
start (RL's after SFT), so `check` makes all of them before anything starts.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Container, Iterator
from typing import Any

from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.config_queries import engine_length, fields, limits, longest_episode, sampling_stages
from axpo_jax.data import readers
from axpo_jax.engine.protocol import SamplingParams
from axpo_jax.engine.sglang.server.spec import SidecarError, SidecarSpec
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld import perception, reasoning, world
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model import hf
from axpo_jax.model.config import LoraConfig, ModelConfig, UnsupportedConfig, VisionConfig
from axpo_jax.model.images import ImageProcessor
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.vision_inputs import patch_lengths
from axpo_jax.rl.recipes import Recipe
from axpo_jax.stages import machine
from axpo_jax.train.optimizer_config import OptimizerConfig


def world_config(config: ConfigDict, kinds: ConfigDict) -> world.WorldConfig:
  """The miniature world. Its crops have the zoom tool's limits, so that what it calls readable is readable."""
  mini, mixes = config.data.miniworld, world.kinds_by_family(kinds)
  canvas = perception.PerceptionConfig(
    mix=mixes["perception"], marks=tuple(mini.marks), large_share=mini.large_share,
    crop_min_pixels=config.images.zoom_min_pixels, crop_max_pixels=config.images.zoom_max_pixels)
  return world.WorldConfig(
    families=tuple(mini.families.items()), perception=canvas, search_mix=mixes["search"],
    reasoning=reasoning.ReasoningConfig(
      mix=mixes["reasoning"], easy_share=mini.easy_share, canvas=canvas))


def reader(config: ConfigDict, source: str) -> readers.ReaderConfig:
  """How to read the files of a source. Columns and image folder of the config hold for config.data.source only."""
  data = config.data
  how = readers.ReaderConfig(image_cache=data.image_cache, max_bad_share=data.max_bad_share)
  if source == data.source:
    how = dataclasses.replace(how, columns=readers.Columns(**data.columns),
                              image_folder=data.image_folder, image_anywhere=data.image_anywhere)
  return how


def patch_rows(config: ConfigDict, vision: VisionConfig) -> tuple[int, ...]:
  """Lengths of rows of image patches, in training and sampling. The last one fits the largest image that the
  config allows, from a question or a tool."""
  images = config.images
  usual, largest = images.max_pixels, max(images.max_pixels, images.zoom_max_pixels)
  return patch_lengths(usual // vision.patch_size**2, largest // vision.patch_size**2)


def computed_as(base: ModelConfig, section: ConfigDict) -> ModelConfig:
  """A model of these sizes with the dtypes, remat and attention of the section `model`."""
  return dataclasses.replace(base, **{name: section[name] for name in (
    "dtype", "param_dtype", "remat", "attention", "attention_chunk")})


def lora(config: ConfigDict) -> LoraConfig | None:
  """The section config.lora; None if it is off.

  Raises:
    ConfigError: invalid values, or adapters in a vision tower that a stage freezes.
  """
  section = config.lora
  if not section.rank:
    return None
  try:
    found = LoraConfig(section.rank, section.alpha, tuple(section.targets))
  except UnsupportedConfig as error:
    raise ConfigError(f"config.{error}") from error
  frozen = {"sft": config.sft.freeze_vision, "rl": config.model.freeze_vision}
  for stage in frozen.keys() & set(config.stages):
    if found.in_vision and frozen[stage]:
      raise ConfigError(
        f"config.lora.targets={found.targets} names layers of the vision tower, which is frozen: set "
        f"config.{'sft' if stage == 'sft' else 'model'}.freeze_vision to False, or leave them out")
  return found


def sampling(config: ConfigDict, stage: str, **ids: tuple[int, ...]) -> SamplingParams:
  """The sampling parameters of a stage; `ids` are the chat's stop_ids and banned_ids."""
  drawn = config.eval if stage == "eval" else config.rollout
  return SamplingParams(
    max_new_tokens=limits(config, stage).max_new_tokens, temperature=drawn.temperature,
    top_p=drawn.top_p, top_k=drawn.top_k, presence_penalty=drawn.presence_penalty, **ids)


def check(config: ConfigDict) -> None:
  """Makes every record of every stage.

  Raises:
    ConfigError: a section has an invalid value; the message names the field.
  """
  names = {name for name, _ in fields(config)}
  for where, build in _records(config):
    with _named(where, names):
      build()


@contextlib.contextmanager
def _named(where: str, names: Container[str] = ()) -> Iterator[None]:
  """Turns errors of a record into ConfigErrors of its section; `names` are the config's fields."""
  try:
    yield
  except ConfigError:
    raise
  except (ValueError, TypeError, OSError, SidecarError) as error:
    text, section = str(error), where.removesuffix(": ")
    first = re.match(r"\w*", text)[0]  # a record's message begins with the name of its field
    if f"{section.removeprefix('config.')}.{first}" in names:
      where = f"{section}."
    raise ConfigError(f"{where}{text}") from error


def _records(config: ConfigDict) -> Iterator[tuple[str, Callable[[], Any]]]:
  """(prefix of an error message, function that makes the records), quick ones first."""
  yield "config.rl.", lambda: Recipe.from_config(config.rl, config.agent.max_response_tokens)
  yield "config.model.", lambda: _model(config)
  if config.model.tokenizer or config.model.checkpoint:
    yield "config.model: ", lambda: _processor(config)
  yield "", lambda: _positions(config)
  for section, steps in (("", config.rl.steps), ("sft.", config.sft.steps)):
    values = config.sft.optimizer if section else config.optimizer
    yield f"config.{section}", lambda values=values, steps=steps: OptimizerConfig(
      **values, total_steps=steps)
  yield "config.", lambda: dataclasses.replace(_model(config), lora=lora(config))
  yield "", lambda: _balance(config)
  if config.data.source == "miniworld" or config.sft.source == "teacher":
    yield "config.data.miniworld: ", lambda: world_config(config, config.data.miniworld.kinds)
    yield "config.sft.kinds: ", lambda: world_config(config, config.sft.kinds)
  if config.data.source != "miniworld":
    yield "config.data: ", lambda: reader(config, config.data.source)
  yield "config.sft.teacher: ", lambda: TeacherConfig(**config.sft.teacher)
  for stage in sampling_stages(config):
    section = "eval" if stage == "eval" else "rollout"
    yield f"config.{section}: ", lambda stage=stage: sampling(config, stage)
  if {"python", "shell"} & {*config.agent.tools, *config.eval.extra_tools}:
    yield "config.agent.python: ", lambda: _kernels(config.agent.python)
  yield from _engine_records(config)


def _model(config: ConfigDict) -> ModelConfig:
  if not config.model.checkpoint:
    return computed_as(PRESETS[config.model.preset], config.model)
  with _named(f"config.model.checkpoint={config.model.checkpoint!r}: "):
    base = ModelConfig.from_hf(paths.local(config.model.checkpoint, hf.SMALL_FILES))
  return computed_as(base, config.model)


def _processor(config: ConfigDict) -> None:
  """Checks that the image processor makes the patches that the vision tower reads."""
  folder, vision = config.model.tokenizer or config.model.checkpoint, _model(config).vision
  form = ImageProcessor.from_checkpoint(paths.local(folder, hf.SMALL_FILES)).format
  for ours, theirs in (("patch_size", "patch_size"), ("temporal_patch_size", "temporal_patch_size"),
                       ("merge_size", "spatial_merge_size")):
    if getattr(form, ours) != getattr(vision, theirs):
      raise ConfigError(
        f"{folder}/preprocessor_config.json has {ours}={getattr(form, ours)}, but the model's "
        f"vision_config.{theirs} is {getattr(vision, theirs)}: copy the file from the model that the "
        "folder is based on")


def _positions(config: ConfigDict) -> None:
  model, length = _model(config), engine_length(config)
  if sampling_stages(config) and length > model.text.max_positions:
    raise ConfigError(f"{longest_episode(config)[1]}: sequences of {length} tokens are beyond the model's "
                      f"max_position_embeddings={model.text.max_positions}: lower it")


def _balance(config: ConfigDict) -> None:
  if _model(config).text.experts:
    return
  for name, value in (("sft", config.sft.balance_coef), ("rl.loss", config.rl.loss.balance_coef)):
    if value:
      raise ConfigError(f"config.{name}.balance_coef={value} needs a mixture of experts, and the model is dense: "
                        "set it to 0")


def _kernels(section: ConfigDict) -> Any:
  from axpo_jax.stages import toolbox
  return toolbox.kernel_config(section)


def _engine_records(config: ConfigDict) -> Iterator[tuple[str, Callable[[], Any]]]:
  """The records of the run's engine. Their modules load slowly."""
  if config.rollout.engine == "embedded":
    yield "config.rollout.embedded: ", lambda: embedded(config)
    return
  if machine.starts_servers(config) and config.model.checkpoint:
    yield "config.rollout.sidecar: ", lambda: sidecar(
      config, str(paths.local(config.model.checkpoint, hf.SMALL_FILES)))
  yield "config.rollout.sglang: ", lambda: sglang(config, "push")


def sidecar(config: ConfigDict, policy: str, **options: Any) -> SidecarSpec:
  """The servers that a run starts itself."""
  section = config.rollout.sidecar
  return SidecarSpec(model=policy, port=0, context_length=engine_length(config) + 16, **options,
                     **{**section, "servers": section.servers or max(
                       1, len(section.gpus) // section.tensor_parallel)})


def embedded(config: ConfigDict) -> Any:
  """The EmbeddedConfig."""
  from axpo_jax.engine.settings import EmbeddedConfig
  return EmbeddedConfig(**{**config.rollout.embedded, "length": engine_length(config)},
                        patch_lengths=patch_rows(config, _model(config).vision))


def sglang(config: ConfigDict, folder: str, **options: Any) -> Any:
  """The SGLangConfig with pushes through `folder`; `options` are fields of PushConfig."""
  from axpo_jax.engine.settings import FleetConfig, PushConfig, SGLangConfig
  s = config.rollout.sglang
  push = PushConfig(folder=folder, dtype=s.push_dtype,
                    shard_bytes=s.push_shard_bytes, writers=s.push_writers, delta=s.push_delta,
                    **options)
  own = {name: value for name, value in s.items()
         if not name.startswith("push_") and name not in ("fleet", "length")}
  return SGLangConfig(push=push, length=engine_length(config), fleet=FleetConfig(**s.fleet), **own)
