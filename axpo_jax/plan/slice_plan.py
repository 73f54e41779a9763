"""A run's shapes and programs on a slice of TPUs or on GPU servers, for `launch/compile.py`.

In: a config and a topology. Out: a description (mesh, micro-batch, sampler) and a `slice_report.Report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from axpo_jax.config_queries import engine_length, sampling_stages
from axpo_jax.engine.embedded import kv_pool
from axpo_jax.engine.embedded.call_sizes import CallSizes
from axpo_jax.engine.sglang.server import sizing
from axpo_jax.errors import ConfigError
from axpo_jax.model import hf, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.presets import PRESETS
from axpo_jax.plan import aot, chips, slice_report
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.stages import learners, machine, sections
from axpo_jax.train.batch import Batch, batch_shards
from axpo_jax.train.step import Learner, policy_objective, supervised_objective


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config's run on a slice of TPUs or on GPU servers.

  Attributes:
    topology: the trainer's chips.
    mesh: over these chips.
    rows: rows of a micro-batch: config.batch.rows, rounded up to a multiple of the shards as in packing.
    image_share, largest: see `aot.abstract_batch`.
    servers: how many SGLang servers the run starts on the host's other GPUs.
  """

  config: ConfigDict
  topology: str
  model: ModelConfig
  mesh: jax.sharding.Mesh
  rows: int
  image_share: float
  largest: bool = False
  servers: int = 0

  @classmethod
  def from_config(cls, config: ConfigDict, topology: str, *, layers: int = 0,
                  image_share: float = 0.25, largest: bool = False) -> Plan:
    """
    Args:
      topology: all chips, those of the run's own servers included.
      layers: text layers, if fewer than the model's; 0: all.

    Raises:
      ConfigError: no model is named, a value is wrong, or the mesh does not fit the chips.
      TopologyError: see `chips`.
    """
    kind, hosts, gpus = chips.parse(topology)
    model, servers = _model_config(config, layers), 0
    sections.check(config)
    if gpus and hosts == 1 and machine.starts_servers(config):
      section = config.rollout.sidecar
      split = machine.split(tuple(map(str, range(gpus))), section.servers, section.tensor_parallel,
                            tuple(map(str, section.gpus)))
      servers, topology = split.servers, f"{kind}:{len(split.trainers)}"
    try:
      mesh = chips.slice_mesh(topology, dict(config.mesh))
    except sharding.ShardingError as error:
      raise ConfigError(f"config.mesh={dict(config.mesh)} on {topology}: {error}") from error
    shards = batch_shards(mesh)
    return cls(config, topology, model, mesh,
               -(-config.batch.rows // shards) * shards, image_share, largest, servers)

  def describe(self) -> str:
    """Chips, mesh, micro-batch and sampler, one line each.

    Raises:
      ConfigError: the GPUs of one SGLang server cannot hold the longest episode.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
    tokens = self.rows * self.config.batch.length
    text = (f"{self.mesh.size} chips as {self.topology}, mesh {mesh}; {self.model.text.num_layers} "
            f"layers; micro-batches of {self.rows} rows x {self.config.batch.length:,} = "
            f"{tokens:,} tokens, {tokens // self.mesh.size:,} a chip")
    if better := chips.better_mesh(self.mesh):
      flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in better.items())
      text += (f"\nfsdp spans all three dimensions of the slice, where libtpu gathers weights at twice the "
               f"bytes: try {flags}")
    if sampling_stages(self.config):
      sampler = self._servers() if self.config.rollout.engine == "sglang" else self._engine()
      text += f"\nsampling: {sampler}"
    return text

  def _engine(self) -> str:
    """How many programs the embedded engine can need."""
    config, mesh = self.config, self._sampler_mesh()
    shards = sharding.parts("batch", mesh, kv_pool.engine_rules(None))
    penalised = tuple(
      drawn.max_new_tokens if drawn.presence_penalty else 0
      for drawn in (sections.sampling(config, stage) for stage in sampling_stages(config)))
    counts = CallSizes.of(sections.embedded(config), shards).programs(
      self.model.vision.merge_unit, penalised)
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return (f"the embedded engine, whose calls can have {sum(counts.values()):,} shapes at most ({listed}); each "
            "is compiled when a call first has it")

  def _servers(self) -> str:
    """What one SGLang server holds."""
    section, kind = self.config.rollout.sidecar, chips.parse(self.topology)[0]
    gpu = kind if chips.CHIPS[kind].gpu else "h100"
    gigabytes = chips.CHIPS[gpu].gpu["device_memory_size"] / 1e9
    tokens = sizing.tokens_that_fit(self.model, section.tensor_parallel, gigabytes, section.mem_fraction)
    longest = engine_length(self.config)
    one = (f"{section.tensor_parallel} {gpu} hold {sizing.parameters(self.model) * 2 / 1e9:.1f} GB of "
           f"weights and keys and values of {max(tokens, 0):,} tokens, {max(tokens, 0) // longest} of the "
           f"longest episodes ({longest:,})")
    if tokens < longest:
      raise ConfigError(f"config.rollout.sidecar.tensor_parallel={section.tensor_parallel}: the GPUs of "
                        f"one server are too few: {one}; raise it")
    if self.servers:
      return f"{self.servers} SGLang servers on the host's other GPUs; for each, {one}"
    return f"SGLang servers on GPUs of their own (config.rollout.urls); for each, {one}"

  def report(self, functions: Sequence[str]) -> slice_report.Report:
    """Compiles the functions that the run has."""
    learner, batch = self._learner(), self._batch()
    held = aot.held_bytes(learner, batch)
    scored_dtype = None
    if self._has_reference and not self.model.lora:
      scored_dtype = self._frozen_dtype
      held["reference"] = sharding.local_bytes(learner.abstract_state().params, scored_dtype)
    programs = aot.compile_step(
      learner, batch, [name for name in functions if name in aot.FUNCTIONS], scored_dtype)
    if self.config.rollout.engine == "embedded" and sampling_stages(self.config):
      sampler = dataclasses.replace(self.model, lora=None), sections.embedded(self.config)
      kept, found = aot.compile_sampler(*sampler, self._sampler_mesh(),
                                        [name for name in functions if name in aot.SAMPLER])
      held, programs = held | kept, programs | found
    return slice_report.Report(chips.CHIPS[chips.parse(self.topology)[0]], held, programs,
                               self.config.rl.reference_offload)

  def _sampler_mesh(self) -> jax.sharding.Mesh:
    """The main process's chips: in a run of several processes it alone samples."""
    if len({device.process_index for device in self.mesh.devices.flat}) == 1:
      return self.mesh
    return sharding.make_mesh(
      {"fsdp": -1}, [device for device in self.mesh.devices.flat if device.process_index == 0])

  def _learner(self) -> Learner:
    config = self.config
    if "rl" in config.stages:
      objective, steps = policy_objective(LossConfig(**config.rl.loss)), config.rl.steps
      section, frozen = config.optimizer, config.model.freeze_vision
    else:
      objective, steps = supervised_objective(config.sft.balance_coef), config.sft.steps
      section, frozen = config.sft.optimizer, config.sft.freeze_vision
    return Learner(self.model, learners.optimizer(section, steps, frozen, self.model.lora), objective,
                   self.mesh, chunk=config.batch.logprob_chunk, frozen_dtype=self._frozen_dtype)

  def _batch(self) -> Batch:
    options = learners.pack_options(self.config, self.model, self.mesh)
    return aot.abstract_batch(self.mesh, options, image_share=self.image_share, largest=self.largest,
                              scored=self._has_reference)

  @property
  def _frozen_dtype(self) -> str:
    """The dtype of parameters that are not trained, as in `policies.frozen_dtype`. Qwen's checkpoints, which
    the presets describe, are bfloat16."""
    checkpoint = self.config.model.checkpoint
    return (hf.stored_dtype(checkpoint) or self.model.param_dtype) if checkpoint else "bfloat16"

  @property
  def _has_reference(self) -> bool:
    return "rl" in self.config.stages and bool(self.config.rl.loss.kl_coef)


def _model_config(config: ConfigDict, layers: int) -> ModelConfig:
  section = config.model
  if section.preset:
    if section.preset not in PRESETS:
      raise ConfigError(f"config.model.preset={section.preset!r}; there are {sorted(PRESETS)}")
    base = PRESETS[section.preset]
  elif section.checkpoint:
    base = ModelConfig.from_hf(section.checkpoint)
  else:
    raise ConfigError("set config.model.preset (--config.model.preset=8b), or config.model.checkpoint "
                      f"to a folder with config.json; presets are {sorted(PRESETS)}")
  least = len(base.vision.deepstack_layers)
  if layers and not least <= layers <= base.text.num_layers:
    raise ConfigError(f"--layers={layers}: from {least}, the layers that take image features, to "
                      f"{base.text.num_layers}")
  text = dataclasses.replace(base.text, num_layers=layers or base.text.num_layers)
  base = dataclasses.replace(base, text=text, lora=sections.lora(config))
  return sections.computed_as(base, section)
