"""Low-rank adapters (Hu et al., arXiv 2106.09685): linear layers that learn in a few directions.

In: a model and a LoraConfig. Out: the same model whose chosen linear layers compute
x @ kernel + x @ a @ b * alpha / rank. `b` begins with zeros, so that a new adapter changes nothing.
An adapter is a parameter of its layer like the kernel: stacked, scanned and split over the mesh with
it. What the trainer does with adapters is in `train.adapters`.
"""

from __future__ import annotations

import jax
from flax import nnx

from axpo_jax.model.config import LoraConfig
from axpo_jax.model.layers import Linear, Maker

# Names on the path of every parameter of an adapter: .../q/adapter/a/kernel.
ADAPTER = "adapter"


class Adapter(nnx.Module):
  """x @ a @ b * scale, float32 parameters computed with in the dtype of x.

  a has the input axes of `linear`'s kernel and the rank; b the rank and its output axes.
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
