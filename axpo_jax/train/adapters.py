"""What the trainer does with low-rank adapters: adds them, leaves them out, merges them in.

In: parameters of a policy, and a ModelConfig that names adapters. Out: parameters with adapters (which
only the learner knows), or a plain policy again, for samplers, exports and the reference.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax.errors import ConfigError
from axpo_jax.model import sharding
from axpo_jax.model.config import LoraConfig, ModelConfig, UnsupportedConfig
from axpo_jax.model.lora import ADAPTER, is_adapter
from axpo_jax.train.state import init_params


def from_config(config: ConfigDict) -> LoraConfig | None:
  """The section config.lora; None where it is switched off.

  Raises:
    ConfigError: values that cannot work, or adapters in a vision tower that a stage freezes.
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


def attach(params: nnx.State, config: ModelConfig, seed: int, mesh: jax.sharding.Mesh,
           rules: sharding.Rules | None = None) -> nnx.State:
  """`params`, in the buffers that they have, with new adapters, which change nothing yet."""
  return nnx.merge_state(params, init_params(config, seed, mesh, rules, only=is_adapter))


def switched_off(params: nnx.State) -> nnx.State:
  """The policy that the adapters were added to, as parameters of the same tree: every b is zero.

  The rest stands in the buffers that it has, so a step that donates `params` ends this too.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if _is_b(path) else x, params)


def merge(params: nnx.State, config: LoraConfig | None, dtype: str | None = None) -> nnx.State:
  """A policy without adapters that computes the same up to rounding: products added to kernels.

  Sums are float32, then rounded to `dtype`, that of whoever takes the policy; None is the adapters'.
  Of a frozen kernel's own dtype they are not: it may be narrower. Other parameters stand in the buffers
  that they have. Without a config `params` themselves.
  """
  if config is None:
    return params
  flat = dict(nnx.to_flat_state(params))
  merged = []
  for path, variable in flat.items():
    if is_adapter(path):
      continue
    inner = (*path[:-1], ADAPTER)
    if path[-1] == "kernel" and (*inner, "a", "kernel") in flat:
      a, b = (flat[*inner, name, "kernel"].get_value() for name in "ab")
      variable = _merged(variable, a, b, config.alpha / config.rank, dtype or a.dtype)
    merged.append((path, variable))
  return nnx.from_flat_state(merged)


def _merged(kernel: nnx.Variable, a: jax.Array, b: jax.Array, scale: float, dtype: Any
            ) -> nnx.Variable:
  value = kernel.get_value()
  stacked = sharding.names_of(kernel)[0] == "layers"
  return kernel.replace(_add_product(value, a, b, scale, stacked, value.sharding, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("scale", "stacked", "where", "dtype"))
def _add_product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, stacked: bool,
                 where: jax.sharding.Sharding, dtype: jnp.dtype) -> jax.Array:
  def one(kernel, a, b):
    product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(dtype)

  return jax.lax.with_sharding_constraint((jax.vmap(one) if stacked else one)(kernel, a, b), where)


def _is_b(path: tuple) -> bool:
  return f"/{ADAPTER}/b/" in sharding.path_name(path)
