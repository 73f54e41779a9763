"""The train step for a slice of TPUs that is not here: compiled ahead of time, then measured.

In: a Learner's parts and a topology such as "v5p:4x4x4". Out: Programs (one for each function of the
step), with the memory of a chip, the FLOPs and the bytes that they move. Nothing is allocated and no
TPU is needed; the compiler comes with the package libtpu.

  mesh = slice_mesh("v5p:4x4x4", {"fsdp": -1})
  programs = compile_step(Learner(..., mesh), abstract_batch(...))
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from axpo_jax.model import sharding
from axpo_jax.model.config import VisionConfig
from axpo_jax.model.vision_inputs import PATCH_BUCKETS, VisionInputs
from axpo_jax.train import flops
from axpo_jax.train.batch import Batch, shardings
from axpo_jax.train.hlo import Traffic, read_traffic
from axpo_jax.train.step import Learner

# The functions of a step, and what of the memory that lasts each of them takes as arguments.
FUNCTIONS = {
  "score": ("parameters", "batch"),
  "accumulate": ("parameters", "gradients", "batch"),
  "apply": ("parameters", "optimizer", "gradients"),
}
_GIB = 2.0**30
_USED = re.compile(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm")


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip.

  Attributes:
    hbm: bytes that the compiler lets a program use.
    flops: bfloat16, a second.
    hbm_bandwidth, ici_bandwidth: bytes a second; the latter out of one chip, all links together.
  """

  hbm: float
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read in November 2026; the interconnect's figures there
# count both directions. Usable HBM is what libtpu's compiler says when a program exceeds it.
CHIPS = {
  "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 200e9),
  "v5p": Chip(95.74 * _GIB, 459e12, 2765e9, 600e9),
  "v6e": Chip(31.25 * _GIB, 918e12, 1640e9, 400e9),
}


class TopologyError(ValueError):
  """A slice that does not exist, or one that cannot be compiled for here."""


@dataclasses.dataclass(frozen=True)
class Program:
  """One function of the step, compiled. Bytes are of one chip.

  Attributes:
    temporaries: bytes besides the arguments: activations above all, outputs that replace no argument,
      and the program's own text.
    flops: matrix products, all chips together.
    traffic: None if the function alone exceeds the chip: then the compiler tells only by how much.
    seconds: of one core, to compile.
  """

  temporaries: float
  flops: float
  traffic: Traffic | None
  seconds: float


def chip_of(topology: str) -> Chip:
  """Raises TopologyError for an unknown kind."""
  kind = topology.partition(":")[0]
  if kind not in CHIPS:
    raise TopologyError(f"--topology={topology!r}: chips are {sorted(CHIPS)}, as in v5p:4x4x4")
  return CHIPS[kind]


def slice_mesh(topology: str, shape: Mapping[str, int]) -> jax.sharding.Mesh:
  """The mesh over a slice's chips. v5p:4x4x4 is what Google Cloud calls v5p-128: 64 chips of two
  cores each.

  Raises:
    TopologyError: no compiler, or no such slice.
  """
  chip_of(topology)
  try:
    import libtpu  # noqa: F401 (jax finds it by itself, and says nothing useful if it cannot)
  except ImportError as error:
    raise TopologyError("compiling for TPUs needs the package libtpu: "
                        "pip install -e '.[aot]'") from error
  # Else libtpu asks the cloud's metadata server who it is, and refuses a second process.
  for name, value in _ALONE.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:
    raise TopologyError(f"--topology={topology!r}: {error}") from error
  return sharding.make_mesh(shape, list(devices))


_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
          "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}


def abstract_batch(mesh: jax.sharding.Mesh, vision: VisionConfig, *, rows: int, length: int,
                   image_pixels: int, image_share: float, scored: bool,
                   rules: sharding.Rules | None = None) -> Batch:
  """The shapes of the fullest micro-batch: every place is a token and is scored once.

  Args:
    image_pixels: of the largest image; it decides the length of a vision row.
    image_share: of the tokens that show an image; decides how many vision rows there are.
    scored: with the reference's log-probabilities.
  """
  shards = sharding.parts("vision_rows", mesh, rules)
  largest = image_pixels // vision.patch_size**2
  patches = min((b for b in PATCH_BUCKETS if b >= largest), default=max(PATCH_BUCKETS))
  images = rows * length * image_share * vision.merge_unit / patches
  vision_rows = -(-int(images) // shards) * shards

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


def compile_step(learner: Learner, batch: Batch, names: Sequence[str] = FUNCTIONS
                 ) -> dict[str, Program]:
  """Compiles the named functions of a step."""
  held, traced = held_bytes(learner, batch), learner.trace(batch)
  return {name: _compile(traced[name], sum(held[kind] for kind in FUNCTIONS[name]))
          for name in names}


def held_bytes(learner: Learner, batch: Batch) -> dict[str, float]:
  """Bytes of a chip that stay between the functions of a step, by kind."""
  state = learner.abstract_state()
  trained = learner.optimizer.split(state.params)[0]
  return {"parameters": shard_bytes(state.params), "optimizer": shard_bytes(state.opt_state),
          "gradients": shard_bytes(trained, jnp.float32), "batch": shard_bytes(batch)}


def shard_bytes(tree: Any, dtype: Any = None) -> float:
  """Bytes of one chip's part of abstract arrays, of their own dtype or another."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize
                   for x in jax.tree.leaves(tree)))


def _compile(traced: jax.stages.Traced, arguments: float) -> Program:
  work, start = flops.count(traced.jaxpr), time.process_time()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if not (used := _USED.search(str(error))):
      raise
    bytes_used = float(used[1]) * _GIB / 1024 ** "GMK".index(used[2])
    return Program(bytes_used - arguments, work, None, time.process_time() - start)
  seconds, memory = time.process_time() - start, compiled.memory_analysis()
  temporaries = (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
                 + memory.output_size_in_bytes - memory.alias_size_in_bytes)
  return Program(temporaries, work, read_traffic(compiled.as_text()), seconds)
