"""Checks that this machine's devices suffice for a run, before anything is allocated.

In: a config and its RunContext. Out: nothing, or a ConfigError with the numbers and the fields to change.
"""

import jax
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax.config_queries import sampling_stages
from axpo_jax.engine.embedded import memory as embedded_memory
from axpo_jax.errors import ConfigError
from axpo_jax.model import sharding
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.stages import distributed, learners, policies, sections
from axpo_jax.stages.context import RunContext
from axpo_jax.train.state import abstract_state


def check(config: ConfigDict, context: RunContext) -> None:
  """Checks this process's devices against the config.

  Raises:
    ConfigError: they do not suffice; names the fields to change.
  """
  stages = sampling_stages(config)
  if config.rollout.engine != "embedded" or not stages:
    return
  if config.rollout.staleness and "rl" in stages and context.mesh.size > 1:
    # The sampler's thread and the update's thread both start programs with collectives. Two devices that
    # receive two such programs in different orders deadlock. Little is lost: sampler and trainer share the
    # devices and could hardly overlap.
    raise ConfigError(
      f"config.rollout.staleness={config.rollout.staleness} with the embedded sampler works on one "
      f"device; config.mesh has {context.mesh.size}: set staleness=0, or config.rollout.engine=sglang")
  engine = sections.embedded(config)
  mesh = context.mesh if jax.process_count() == 1 else distributed.local_mesh()
  need = embedded_memory.needed(context.model_config, engine, mesh.shape, context.rules)
  training = _training_bytes(config, context) if "rl" in stages else 0.0
  try:
    embedded_memory.check(need, training, embedded_memory.free_bytes(mesh), engine)
  except embedded_memory.MemoryShort as error:
    raise ConfigError(str(error)) from error


def _training_bytes(config: ConfigDict, context: RunContext) -> float:
  """Bytes a device holds during RL's sampling: parameters, optimizer state and the reference policy."""
  trained = learners.optimizer(config.optimizer, 1, config.model.freeze_vision, context.lora)
  model = nnx.eval_shape(lambda: Qwen3VL(context.trained_config, rngs=nnx.Rngs(0)))
  frozen = policies.frozen_dtype(context, config.model.checkpoint)
  params = trained.with_frozen_dtype(nnx.split(model)[1], frozen)
  state = abstract_state(params, trained, context.mesh, context.rules)
  held = sharding.local_bytes(state)
  if context.lora is None and config.rl.loss.kl_coef and not config.rl.reference_offload:
    held += sharding.local_bytes(state.params, frozen)
  return held
