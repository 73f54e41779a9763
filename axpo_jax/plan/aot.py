"""Compiles a run's programs for chips that are not here, and measures them.

In: a Learner over a mesh of `chips.slice_mesh`, or the embedded engine's sizes. Out: a Program for each
function of the train step and of the engine: memory of a chip, FLOPs, seconds to compile. Nothing is
allocated.

  mesh = slice_mesh("v5p:4x4x4", {"fsdp": -1})
  programs = compile_step(Learner(..., mesh), abstract_batch(...))
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from axpo_jax.engine.embedded import sampling
from axpo_jax.engine.embedded.device import DecodeInputs, Device, PrefillInputs
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import flops, sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import VisionInputs
from axpo_jax.train.batch import Batch, shardings
from axpo_jax.train.step import Learner

# The functions of a train step, each with those kinds of `held_bytes` that are its arguments.
FUNCTIONS = {
  "score": ("parameters", "batch"),
  "accumulate": ("parameters", "gradients", "batch"),
  "apply": ("parameters", "optimizer", "gradients"),
}
# The functions of the embedded engine.
SAMPLER = ("prefill", "decode")
_GIB = 2.0**30
# How libtpu reports a program that exceeds the chip.
_USED = re.compile(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm")


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled function.

  Attributes:
    temporaries: bytes of a chip besides the arguments: activations above all, outputs that replace no
      argument, and the machine code.
    flops: matrix products, all chips together.
    seconds: core seconds to compile.
    chips: how many run it together.
  """

  temporaries: float
  flops: float
  seconds: float
  chips: int = 1


def abstract_batch(mesh: jax.sharding.Mesh, options: Mapping[str, Any], *, image_share: float,
                   scored: bool, largest: bool = False, rules: sharding.Rules | None = None) -> Batch:
  """The shapes of a full micro-batch: no padding, and every token is a target.

  Args:
    options: arguments of `pack`, see `stages.learners.pack_options`.
    image_share: share of image tokens; it decides how many rows the vision tower has.
    scored: the batch has the reference policy's log-probabilities.
    largest: one image has the largest size, which decides the length of a row of the vision tower.
  """
  multiple, vision = options["image_rows_multiple_of"], options["vision_config"]
  rows = -(-options["rows"] // options["rows_multiple_of"]) * options["rows_multiple_of"]
  length, patches = options["length"], options["patch_buckets"][-1 if largest else 0]
  images = int(rows * length * image_share * vision.merge_unit / patches)
  vision_rows = images and next(-(-size // multiple) * multiple for size in options["row_buckets"]
                                if size >= images)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  def of(dtype, *rest):
    return array(dtype, rows, length, *rest)

  batch = Batch(
    tokens_BxT=of(jnp.int32), positions_BxTx3=of(jnp.int32, 3), ends_BxT=of(jnp.int32),
    at_BxG=of(jnp.int32), targets_BxG=of(jnp.int32), weights_BxG=of(jnp.float32),
    advantages_BxG=of(jnp.float32), behaviour_logp_BxG=of(jnp.float32),
    lag_BxG=of(jnp.int32),
    ref_logp_BxG=of(jnp.float32) if scored else None)
  if vision_rows:
    row = (vision_rows, patches)
    batch = dataclasses.replace(batch, image_index_BxT=of(jnp.int32), vision=VisionInputs(
      array(jnp.float32, *row, vision.patch_dim), array(jnp.int32, *row),
      array(jnp.int32, *row, 2), array(jnp.int32, *row, 4), array(jnp.float32, *row, 4)))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch,
                      shardings(batch, mesh, rules))


def compile_step(learner: Learner, batch: Batch, names: Sequence[str] = FUNCTIONS,
                 scored_dtype: str | None = None) -> dict[str, Program]:
  """Compiles the named functions of a step; `scored_dtype` as in `Learner.trace`."""
  held, traced = held_bytes(learner, batch), learner.trace(batch, scored_dtype)
  return {name: _compile(traced[name], learner.mesh.size, sum(held[kind] for kind in FUNCTIONS[name]))
          for name in names}


def compile_sampler(model: ModelConfig, engine: EmbeddedConfig, mesh: jax.sharding.Mesh,
                    names: Sequence[str] = SAMPLER) -> tuple[dict[str, float], dict[str, Program]]:
  """Compiles the named functions of the embedded engine, each at its largest shape.

  A prefill computes prompts that fill their row, as many as `prefill_tokens` allows. A decode runs all
  `max_running` sequences with full rows.

  Returns: bytes of a chip that the engine keeps, by kind; and the programs.
  """
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(model, rngs=nnx.Rngs(0))))
  device = Device(model, graphdef, rows=engine.rows, length=engine.length,
                  dtype=engine.dtype or model.dtype, mesh=mesh)
  shards, length = device.shards, engine.length
  prompts = shards * max(1, engine.prefill_tokens // (length * shards))
  running = shards * -(-engine.max_running // shards)

  def of(rows, *rest):
    return np.zeros((rows, *rest), np.int32)

  traced = device.trace(
    params,
    PrefillInputs(of(prompts), of(prompts), of(prompts), of(prompts, length), of(prompts, length, 3),
                  of(prompts, length), None),
    DecodeInputs(*[of(running)] * 6, sampling.row_params([], [], rows=running, width=4), None),
    engine.decode_block)
  held = {"engine's weights": sharding.local_bytes(device.abstract_params(params)),
          "engine's pool": sharding.local_bytes(device.abstract_pool())}
  return held, {name: _compile(traced[name], mesh.size, sum(held.values()), engine.decode_block)
                for name in names}


def held_bytes(learner: Learner, batch: Batch) -> dict[str, float]:
  """Bytes of a chip that exist before and after a function of a step, by kind."""
  state = learner.abstract_state()
  trained = learner.optimizer.split(state.params)[0]
  return {"parameters": sharding.local_bytes(state.params), "optimizer": sharding.local_bytes(state.opt_state),
          "gradients": sharding.local_bytes(trained, jnp.float32), "batch": sharding.local_bytes(batch)}


def _compile(traced: jax.stages.Traced, chips: int, arguments: float, rounds: int | None = None
             ) -> Program:
  """
  Args:
    arguments: bytes of a chip.
    rounds: iterations of loops whose length depends on data.
  """
  # Not `cost_analysis()`: it counts a loop's body once, and the layers are a loop; for GPUs that are not
  # here it returns None.
  work, start = flops.count(traced.jaxpr, rounds), time.process_time()
  try:
    memory = traced.lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    # libtpu refuses a program that alone exceeds the chip, and says how large it is.
    if not (used := _USED.search(str(error))):
      raise
    temporaries = float(used[1]) * _GIB / 1024 ** "GMK".index(used[2]) - arguments
  else:
    temporaries = (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
                   + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  return Program(temporaries, work, time.process_time() - start, chips)
