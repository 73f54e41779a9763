"""Linear, RMSNorm and LayerNorm, from which both towers are built, and the scan over layers.

The parameters of all layers are stacked on a leading axis and scanned (`scan_layers`): the body is traced and
compiled once, however deep the model is. Parameters are cast to the input's dtype where they are used; norms
compute in float32. Every parameter carries its logical axis names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from axpo_jax.model import sharding

_ones = jax.nn.initializers.ones
_zeros = jax.nn.initializers.zeros
# The name of what remat="dots" saves. jax's own policy does not look into functions with a custom backward pass.
_PRODUCT = "product"


class Maker:
  """Makes parameters of one dtype, with `stack` layers in front (0: a single one)."""

  def __init__(self, rngs: nnx.Rngs, dtype: str, stack: int = 0):
    self._rngs, self._dtype, self._stack = rngs, jnp.dtype(dtype), stack

  def __call__(self, init: Callable, shape: Sequence[int], names: sharding.Names) -> nnx.Param:
    if len(shape) != len(names):
      raise ValueError(f"shape {tuple(shape)} and logical axes {tuple(names)} differ in length")
    if self._stack:
      shape, names = (self._stack, *shape), ("layers", *names)
    # Not eager: flax would shard the value at once, and so need a mesh merely to build a module.
    return nnx.Param(init(self._rngs.params(), shape, self._dtype), out_sharding=tuple(names),
                     eager_sharding=False)

  def normal(self, shape: Sequence[int], names: sharding.Names, fan_in: int) -> nnx.Param:
    """Normal with a standard deviation of fan_in^-0.5, so that outputs are as large as inputs at any width.

    Qwen3-VL's own 0.02 is that of a width of 2,500, and far too small for a tiny model that is trained from
    scratch.
    """
    return self(jax.nn.initializers.normal(fan_in**-0.5), shape, names)


class Linear(nnx.Module):
  """x @ kernel + bias over the last `fan_in` axes of x; the kernel's other axes are the output's.

  shape, names: the kernel's, input axes first. A bias has the output axes. zero: the kernel is initialised with
  zeros. `adapter`: adds its own function of x, see `model.lora`.
  """

  def __init__(self, make: Maker, shape, names, *, fan_in: int = 1, bias: bool = False,
               zero: bool = False):
    self.fan_in, self.names = fan_in, tuple(names)
    self.kernel = (make(_zeros, shape, names) if zero
                   else make.normal(shape, names, math.prod(shape[:fan_in])))
    self.bias = make(_zeros, shape[fan_in:], names[fan_in:]) if bias else None
    self.adapter = None

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    if sharding.stays(kernel, x):
      y = sharding.with_stored(lambda x: _product(x, kernel, self.fan_in), x, self.names, self.fan_in)
    else:
      y = _product(x, sharding.gather_stored(kernel, self.names), self.fan_in)
    y = checkpoint_name(y, _PRODUCT)
    if self.adapter is not None:
      y = y + self.adapter(x)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, fan_in: int) -> jax.Array:
  """x @ kernel. The gradients are the usual ones, written in an order that CPUs compute fast as well."""
  return jnp.tensordot(x, kernel, fan_in)


def _product_forward(x, kernel, fan_in):
  return _product(x, kernel, fan_in), (x, kernel)


def _product_backward(fan_in, saved, dy):
  x, kernel = saved
  fan_out, tokens = kernel.ndim - fan_in, tuple(range(x.ndim - fan_in))
  dx = jnp.tensordot(dy, jnp.moveaxis(kernel, range(fan_in), range(-fan_in, 0)), fan_out)
  # In a product over the tokens, a CPU back end transposes the left operand and fuses its producer into that. If
  # the left operand is the wider one, this takes several times as long as the product.
  if math.prod(kernel.shape[:fan_in]) < math.prod(kernel.shape[fan_in:]):
    return dx, jnp.tensordot(x, dy, (tokens, tokens))
  return dx, jnp.moveaxis(jnp.tensordot(dy, x, (tokens, tokens)), range(fan_out), range(-fan_out, 0))


_product.defvjp(_product_forward, _product_backward)


class RMSNorm(nnx.Module):
  """Over the last axis, in float32."""

  def __init__(self, make: Maker, size: int, eps: float):
    self.eps = eps
    self.scale = make(_ones, (size,), ("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Over the last axis, in float32, with bias."""

  def __init__(self, make: Maker, size: int, eps: float = 1e-6):
    self.eps = eps
    self.scale = make(_ones, (size,), ("norm",))
    self.bias = make(_zeros, (size,), ("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


def scan_layers(
  layers: nnx.Module, step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]], carry: Any, xs: Any,
  *, unroll: bool = False,
) -> tuple[Any, Any]:
  """`jax.lax.scan` of step(layer, carry, x) -> (carry, y) over a stack of layers.

  unroll: write the layers out one by one, see `ModelConfig.unrolls`.
  """
  graphdef, stacked = nnx.split(layers)

  def body(carry, slices):
    state, x = slices
    return step(nnx.merge(graphdef, state), carry, x)

  return jax.lax.scan(body, carry, (stacked, xs), unroll=True if unroll else 1)


def each_layer(layers: Sequence[nnx.Module], step: Callable[[nnx.Module, Any, int], tuple[Any, Any]],
               carry: Any) -> tuple[Any, Any]:
  """`scan_layers` of a list of layers and their numbers, written out one by one."""
  found = []
  for number, layer in enumerate(layers):
    carry, y = step(layer, carry, number)
    found.append(y)
  return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *found)


def remat(function: Callable, policy: str) -> Callable:
  """function(layer, *arrays), recomputed in the backward pass as ModelConfig.remat says."""
  if policy == "none":
    return function
  policies = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),
  }

  @functools.wraps(function)
  def wrapped(layer, *args):
    graphdef, state = nnx.split(layer)
    # prevent_cse is for code outside of a scan: inside, the loop already keeps passes apart.
    inner = jax.checkpoint(
      lambda state, *args: function(nnx.merge(graphdef, state), *args),
      prevent_cse=False, policy=policies[policy],
    )
    return inner(state, *args)

  return wrapped
