"""What the embedded engine takes of a device's memory, from sizes alone, and what a device has.

In: a model's and the engine's sizes and the mesh's. Out: bytes of one device, before anything is
allocated. No device is needed: `launch/compile.py` asks the same about machines that are not here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from axpo_jax.engine.embedded.kv_pool import engine_rules
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.qwen3_vl import Qwen3VL

_GIB = 2.0**30


class MemoryShort(ValueError):
  """An engine that does not fit; the message has the numbers and the fields to change."""


@dataclasses.dataclass(frozen=True)
class EngineBytes:
  """Bytes of one device.

  Attributes:
    weights: the engine's copy of the parameters.
    pool: the KV rows.
    rows: copies of rows that a call makes: a prefill of the full rows that it reads and writes; a decode
      of one layer of all that run, or of all layers where so few are written out (`ModelConfig.unrolls`).
    workspace: activations of the largest prefill or decode call: an estimate.
  """

  weights: float
  pool: float
  rows: float
  workspace: float

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))

  def __str__(self) -> str:
    parts = ", ".join(f"{name} {value / _GIB:,.1f}" for name, value in dataclasses.asdict(self).items())
    return f"{self.total / _GIB:,.1f} GiB ({parts})"


def needed(model: ModelConfig, config: EmbeddedConfig, mesh: Mapping[str, int],
           rules: sharding.Rules | None = None) -> EngineBytes:
  """What an engine of these sizes takes of each device.

  Args:
    mesh: size of each axis, such as {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}.
  """
  rules, text = engine_rules(rules), model.text
  size = jnp.dtype(config.dtype or model.dtype).itemsize

  def parts(*names):
    axes = [axis for name in names if name is not None for axis in _axes(rules[name])]
    return math.prod(mesh.get(axis, 1) for axis in axes)

  def weight(variable):
    names = sharding.names_of(variable) or ()
    itemsize = 4 if names[-1:] == ("norm",) else size  # see Device.install
    return math.prod(variable.get_value().shape) * itemsize / parts(*names)

  params = nnx.eval_shape(lambda: nnx.state(Qwen3VL(model, rngs=nnx.Rngs(0)), nnx.Param))
  variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
  shards, tensor = parts("batch"), parts("act_kv_heads")
  row = 2 * text.num_layers * text.num_kv_heads * text.head_dim * config.length * size / tensor
  running = -(-config.max_running // shards)
  prompts = max(config.prefill_tokens // (config.length * shards), 1)
  held = text.num_layers if model.unrolls(text.num_layers) else 1
  return EngineBytes(
    weights=sum(map(weight, variables)), pool=-(-config.rows // shards) * row,
    rows=max(2 * prompts * row, running * row * held / text.num_layers),
    workspace=max(_prefill(model, config, shards, tensor, size),
                  _decode(model, running, shards, tensor)))


def _axes(axes: sharding.MeshAxes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _prefill(model: ModelConfig, config: EmbeddedConfig, shards: int, tensor: int, size: int) -> float:
  """A layer's activations and scores, beside its parameters collected from all shards."""
  text = model.text
  tokens = max(config.prefill_tokens // shards, config.length)  # a prompt is never cut
  rows = max(tokens // config.length, 1)
  weights = wide = 3 * text.intermediate_size  # of an MLP's parameters and of its activations
  if experts := text.experts:
    weights = 3 * experts.count * experts.intermediate_size
    wide = experts.per_token * (3 * experts.intermediate_size + 2 * text.hidden_size)
  layer = text.hidden_size * (weights + 2 * (text.num_heads + text.num_kv_heads) * text.head_dim)
  width = 6 * text.hidden_size + (wide + 3 * text.num_heads * text.head_dim) // tensor
  queries = min(model.attention_chunk or config.length, config.length)
  scores = rows * queries * 2 * config.length * text.num_heads // tensor
  return tokens * width * size + 2 * 4 * scores + 2 * layer * size / tensor


def _decode(model: ModelConfig, running: int, shards: int, tensor: int) -> float:
  """Logits with their masks and noise, beside the sums of all rows' logits, of which each device has a
  summand."""
  return 4 * model.text.vocab_size / tensor * (6 * running + 2 * running * shards)


def free_bytes(mesh: jax.sharding.Mesh) -> float | None:
  """Free bytes of each of the mesh's devices in this process; None if the device does not report them.

  The devices of a CPU share what the machine has.
  """
  devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  if devices[0].platform == "cpu":
    available = _available_memory()
    return None if available is None else available / len(devices)
  free = [stats["bytes_limit"] - stats.get("bytes_in_use", 0) for device in devices
          if (stats := device.memory_stats() or {}).get("bytes_limit")]
  return float(min(free)) if len(free) == len(devices) else None


def _available_memory() -> float | None:
  if not os.path.exists("/proc/meminfo"):
    return None
  with open("/proc/meminfo") as file:
    found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
  return 1024.0 * int(found[0]) if found else None


def check(need: EngineBytes, training: float, free: float | None, config: EmbeddedConfig) -> None:
  """Compares needed with free bytes; passes where free bytes are unknown.

  Args:
    training: bytes of a device that the trainer holds meanwhile.

  Raises:
    MemoryShort: it does not fit.
  """
  if free is None or need.total + training <= free:
    return
  beside = f" beside the {training / _GIB:,.1f} GiB of training" if training else ""
  raise MemoryShort(
    f"the embedded sampler needs {need} of each device{beside}, and {free / _GIB:,.1f} GiB are free: set "
    f"fewer config.rollout.embedded.rows (now {config.rows}) and max_running ({config.max_running}), "
    f"less length ({config.length}), its dtype ({config.dtype}) to bfloat16, more devices in config.mesh, "
    "or config.rollout.engine=sglang")
