"""A run's programs for chips that are not here: compiled ahead of time, then measured.

In: a Learner over a mesh of `chips.slice_mesh`, or the embedded engine's sizes. Out: a Program for each
function of the train step and of the engine, with the memory of a chip, the FLOPs and the
collectives. Nothing is allocated.

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
from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.vision_inputs import VisionInputs
from axpo_jax.plan import flops
from axpo_jax.plan.hlo import Collective, collectives
from axpo_jax.train.batch import Batch, shardings
from axpo_jax.train.step import Learner

# The functions of a step, and what of the memory that lasts each of them takes as arguments.
FUNCTIONS = {
  "score": ("parameters", "batch"),
  "accumulate": ("parameters", "gradients", "batch"),
  "apply": ("parameters", "optimizer", "gradients"),
}
# Of the embedded engine.
SAMPLER = ("prefill", "decode")
_GIB = 2.0**30
_USED = re.compile(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm")


@dataclasses.dataclass(frozen=True)
class Program:
  """One function, compiled. Bytes are of one chip.

  Attributes:
    temporaries: bytes besides the arguments: activations above all, outputs that replace no argument,
      and the program's own text.
    flops: matrix products, all chips together.
    collectives: None if the function alone exceeds the chip: then the compiler tells only by how much.
    seconds: of one core, to compile.
    chips: that run it together.
  """

  temporaries: float
  flops: float
  collectives: Sequence[Collective] | None
  seconds: float
  chips: int = 1


def abstract_batch(mesh: jax.sharding.Mesh, options: Mapping[str, Any], *, image_share: float,
                   scored: bool, largest: bool = False, rules: sharding.Rules | None = None) -> Batch:
  """The shapes of the fullest micro-batch: every place is a token and is scored once.

  Args:
    options: of `pack`, see `build.pack_options`.
    image_share: of the tokens that show an image; decides how many vision rows there are.
    scored: with the reference's log-probabilities.
    largest: with an image of the largest size among the others; it decides the length of a vision row.
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
  """Compiles the named functions of the embedded engine, each at its largest: prompts that fill a row,
  computed for as many rows as `prefill_tokens` allows, and a block of all running sequences with full rows.

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
  """Bytes of a chip that stay between the functions of a step, by kind."""
  state = learner.abstract_state()
  trained = learner.optimizer.split(state.params)[0]
  return {"parameters": sharding.local_bytes(state.params), "optimizer": sharding.local_bytes(state.opt_state),
          "gradients": sharding.local_bytes(trained, jnp.float32), "batch": sharding.local_bytes(batch)}


def _compile(traced: jax.stages.Traced, chips: int, arguments: float, rounds: int | None = None
             ) -> Program:
  """
  Args:
    rounds: of loops that end when the data says so.
  """
  work, start = flops.count(traced.jaxpr, rounds), time.process_time()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if not (used := _USED.search(str(error))):
      raise
    bytes_used = float(used[1]) * _GIB / 1024 ** "GMK".index(used[2])
    return Program(bytes_used - arguments, work, None, time.process_time() - start, chips)
  seconds, memory = time.process_time() - start, compiled.memory_analysis()
  temporaries = (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
                 + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  return Program(temporaries, work, collectives(compiled.as_text(), rounds or 1), seconds, chips)
