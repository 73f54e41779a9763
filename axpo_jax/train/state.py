"""The train state and the optimizer: parameters, AdamW moments and step, all sharded.

In: a model config (or loaded parameters) and an OptimizerConfig. Out: a TrainState, sharded by the mesh and the
rules. The state is a plain pytree, the same for SFT and RL.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.lora import is_adapter
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.train.optimizer_config import OptimizerConfig

# Root mean square of AdamW's usual update before the learning rate; Muon's is scaled to it.
_ADAM_RMS = 0.2
# The module of Qwen3VL that holds the vision tower and its mergers.
VISION = "vision"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes.

  Attributes:
    params: all parameters, frozen ones included.
    opt_state: optax state of the trained parameters.
    step: int32, optimizer steps done.
  """

  params: nnx.State
  opt_state: Any
  step: jax.Array


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optax transformation over the trained part of the parameters.

  The transformation sees float32 gradients and float32 views of the parameters whatever their own
  dtype, so moments and decay are computed in float32.
  """

  config: OptimizerConfig
  schedule: optax.Schedule
  transform: optax.GradientTransformation

  def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen) parameters."""
    return nnx.split_state(params, self._trains, ...)

  def with_frozen_dtype(self, params: nnx.State, dtype: str) -> nnx.State:
    """Abstract parameters, of which the frozen ones have another dtype."""
    trained, frozen = self.split(params)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), frozen)
    return nnx.merge_state(trained, frozen)

  def init(self, params: nnx.State) -> Any:
    return self.transform.init(_as_float32(self.split(params)[0]))

  def step(self, trained: nnx.State, grads: nnx.State, opt_state: Any) -> tuple[nnx.State, Any]:
    """(trained parameters, opt_state) after one update by float32 `grads`."""
    master = _as_float32(trained)
    updates, opt_state = self.transform.update(grads, opt_state, master)
    master = optax.apply_updates(master, updates)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), master, trained), opt_state

  def _trains(self, path: tuple, _value: Any) -> bool:
    if self.config.adapters and not is_adapter(path):
      return False
    return not (self.config.freeze_vision and path[0] == VISION)


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """Learning rate of the optimizer step that is numbered from 0."""
  warmup = round(config.warmup * config.total_steps)
  rest = max(config.total_steps - warmup, 1)

  def schedule(step):
    rate = jnp.minimum(1.0, (step + 1) / max(warmup, 1)) if warmup else jnp.ones(())
    if config.schedule == "cosine":
      done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
      rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return config.learning_rate * rate

  return schedule


def make_optimizer(config: OptimizerConfig) -> Optimizer:
  """Clip by global norm, then AdamW or Muon."""
  schedule = make_schedule(config)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  update = {"adamw": _adamw, "muon": _muon}[config.name](config, schedule)
  return Optimizer(config, schedule, optax.chain(clip, update))


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.adamw(
    schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=_decayed,
    mu_dtype=jnp.dtype(config.mu_dtype))


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  return optax.contrib.muon(
    schedule, eps=config.eps, weight_decay=config.weight_decay, weight_decay_mask=_decayed,
    mu_dtype=jnp.dtype(config.mu_dtype), adam_b1=config.b1, adam_b2=config.b2,
    adam_learning_rate=schedule, muon_weight_dimension_numbers=_matrix_axes,
    consistent_rms=_ADAM_RMS)


def _matrix_axes(params: nnx.State) -> nnx.State:
  """Input and output axes of every kernel, None for other parameters; a stack of layers is a stack
  of matrices."""

  def of(path, variable):
    names = sharding.names_of(variable)
    if not _is_kernel(path):
      return variable.replace(None)
    first = int(names[0] == "layers")
    # The projections out of attention take heads and head size together.
    inputs = first + (2 if names[first] in ("heads", "vision_heads") else 1)
    return variable.replace(optax.contrib.MuonDimensionNumbers(
      tuple(range(first, inputs)), tuple(range(inputs, len(names)))))

  return jax.tree_util.tree_map_with_path(
    of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _is_kernel(path: tuple) -> bool:
  """True at the kernels of linear layers."""
  return "kernel" in sharding.path_name(path).split("/")


def init_params(config: ModelConfig, seed: int, mesh: jax.sharding.Mesh,
                rules: sharding.Rules | None = None, *, only: nnx.filterlib.Filter = ...
                ) -> nnx.State:
  """Random parameters, created in place on the mesh. Equal seeds give equal values on any mesh.

  only: which of them to create, by an nnx filter.
  """

  def create():
    return nnx.state(Qwen3VL(config, rngs=nnx.Rngs(seed)), nnx.All(nnx.Param, only))

  shardings = sharding.param_shardings(nnx.eval_shape(create), mesh, rules)
  # XLA's CPU backend takes ten times as long to optimise the random draws as to compile them, and
  # they run once.
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  options = {"xla_backend_optimization_level": 0} if on_cpu else None
  return jax.jit(create, out_shardings=shardings, compiler_options=options)()


def with_adapters(params: nnx.State, config: ModelConfig, seed: int, mesh: jax.sharding.Mesh,
                  rules: sharding.Rules | None = None) -> nnx.State:
  """`params` in their own buffers, with new adapters, which do not change the outputs yet."""
  return nnx.merge_state(params, init_params(config, seed, mesh, rules, only=is_adapter))


def init_state(params: nnx.State, optimizer: Optimizer, mesh: jax.sharding.Mesh,
               rules: sharding.Rules | None = None) -> TrainState:
  """A state at step 0 that *owns* `params`: the first step donates their buffers.

  Keep a reference policy or a sampler's weights as a copy of their own (`copy_params`).
  """
  shardings = state_shardings(params, optimizer, mesh, rules)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
  params = jax.device_put(params, shardings.params)
  step = sharding.put(np.zeros((), np.int32), shardings.step)
  return TrainState(params, opt_state, step)


def abstract_state(params: nnx.State, optimizer: Optimizer, mesh: jax.sharding.Mesh,
                   rules: sharding.Rules | None = None) -> TrainState:
  """A TrainState of ShapeDtypeStructs with shardings, to restore a checkpoint to.

  Args:
    params: arrays or ShapeDtypeStructs.
  """
  shapes = _state_shapes(params, optimizer)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
    state_shardings(params, optimizer, mesh, rules))


def state_shardings(params: nnx.State, optimizer: Optimizer, mesh: jax.sharding.Mesh,
                    rules: sharding.Rules | None = None) -> TrainState:
  """A TrainState of NamedShardings. Moments are sharded like their parameters."""
  return sharding.param_shardings(_state_shapes(params, optimizer), mesh, rules)


def copy_params(params: nnx.State, like: nnx.State | None = None) -> nnx.State:
  """Parameters in buffers of their own with the same shardings.

  like: a tree whose dtypes they take; None: they keep theirs.
  """
  return jax.tree.map(
    lambda x, as_: jnp.array(x, dtype=as_.dtype, copy=True, device=x.sharding), params,
    params if like is None else like)


def move_params(params: nnx.State, memory: str) -> nnx.State:
  """The parameters, sharded as before, in "device" memory or in "pinned_host", the memory of each device's host.
  Arrays that are there already are not copied."""
  return jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), params)


def _state_shapes(params, optimizer) -> TrainState:
  def create(params):
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  return jax.eval_shape(create, params)


def _as_float32(params):
  return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _decayed(params: nnx.State) -> nnx.State:
  """True at the kernels of linear layers."""
  return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)
