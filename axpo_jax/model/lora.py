"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685).

In: a model and a LoraConfig. Out: the same model, whose chosen linear layers compute
x @ kernel + x @ a @ b * alpha / rank. `b` is initialised with zeros, so that a new adapter changes nothing.
An adapter is a parameter of its layer like the kernel: it is stacked, scanned and sharded with it. Only the
learner has adapters: samplers, exports and the reference get a plain policy (`merge`, `switched_off`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from axpo_jax.model import sharding
from axpo_jax.model.config import LoraConfig
from axpo_jax.model.layers import Linear, Maker

# Names on the path of every parameter of an adapter: .../q/adapter/a/kernel.
ADAPTER = "adapter"


class Adapter(nnx.Module):
  """x @ a @ b * scale, with float32 parameters that are cast to x's dtype.

  a: [input axes of `linear`'s kernel, rank]. b: [rank, output axes].
  """

  def __init__(self, linear: Linear, config: LoraConfig, rngs: nnx.Rngs):
    self.scale = config.alpha / config.rank
    shape, names, fan_in = linear.kernel.shape, linear.names, linear.fan_in
    stack = shape[0] if len(shape) > len(names) else 0
    shape = shape[-len(names):]
    make = Maker(rngs, "float32", stack)
    self.a = Linear(make, (*shape[:fan_in], config.rank), (*names[:fan_in], "rank"), fan_in=fan_in)
    self.b = Linear(make, (config.rank, *shape[fan_in:]), ("rank", *names[fan_in:]), zero=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.b(self.a(x)) * self.scale


def adapt(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
  """Gives every linear layer of the names `config.targets` an adapter, in place."""
  layers = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Linear)]
  for path, layer in layers:
    if path[-1] in config.targets:
      layer.adapter = nnx.data(Adapter(layer, config, rngs))  # it was None, which is static


def is_adapter(path: tuple, _value: object = None) -> bool:
  """An nnx filter: the parameters of adapters."""
  return ADAPTER in path


def switched_off(params: nnx.State) -> nnx.State:
  """The policy that the adapters were added to, as parameters of the same tree: every b is zero.

  All other parameters share the buffers of `params`, so a step that donates `params` invalidates these too.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if _is_b(path) else x, params)


def merge(params: nnx.State, config: LoraConfig | None, dtype: str | None = None) -> nnx.State:
  """A policy without adapters that computes the same up to rounding: products are added to the kernels.

  Args:
    config: of the adapters; None: there are none, and `params` are returned as they are.
    dtype: the sums, computed in float32, are rounded to it; None: the adapters' dtype. A frozen kernel's own
      dtype may be too narrow for them.
  Returns: new merged kernels; all other parameters share the buffers of `params`.
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
