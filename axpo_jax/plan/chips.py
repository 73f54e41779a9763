"""TPU slices and GPU servers to compile for, on a machine that has none.

In: a topology such as "v5p:4x4x4" or "h100:8". Out: its Chip, and a Mesh of abstract devices. The compiler
is the real one, from the package libtpu or from jax's CUDA plugin.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from axpo_jax.model import sharding
from axpo_jax.stages.machine import GPU_SHARE

_GIB = 2.0**30


class TopologyError(ValueError):
  """The topology does not exist, or its compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip or GPU.

  Attributes:
    memory: bytes that a program may use.
    flops: peak FLOPs a second, dense, in bfloat16.
    gpu: fields of XLA's description of a GPU; None for a TPU.
  """

  memory: float
  flops: float
  gpu: Mapping[str, object] | None = None


def _gpu(name: str, flops: float, memory: int, **fields: object) -> Chip:
  fields |= {"name": name, "device_memory_size": memory}
  return Chip(GPU_SHARE * memory, flops, fields)


_HOPPER = dict(core_count=132, fpus_per_core=128, shared_memory_per_core=233_472,
               shared_memory_per_block_optin=232_448, l2_cache_size=52_428_800, clock_rate_ghz=1.98,
               capability="major: 9 feature_extension: ACCELERATED_FEATURES")
# TPUs: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read in November 2026; usable memory is what libtpu's
# compiler reports when a program exceeds it.
# GPUs: XLA's own descriptions (xla/backends/gpu/target_config/specs); FLOPs are NVIDIA's.
CHIPS = {
  "v5e": Chip(15.75 * _GIB, 197e12),
  "v5p": Chip(95.74 * _GIB, 459e12),
  "v6e": Chip(31.25 * _GIB, 918e12),
  "a100": _gpu("NVIDIA A100-SXM4-80GB", 312e12, 85_100_068_864,
               core_count=108, fpus_per_core=64, shared_memory_per_core=167_936,
               shared_memory_per_block_optin=166_912, l2_cache_size=41_943_040,
               clock_rate_ghz=1.41, memory_bandwidth=2_039_040_000_000, capability="major: 8"),
  "h100": _gpu("NVIDIA H100 80GB HBM3", 989e12, 84_942_979_072,
               memory_bandwidth=3_352_320_000_000, **_HOPPER),
  "h200": _gpu("NVIDIA H200 141GB HBM3e", 989e12, 151_397_597_184,
               memory_bandwidth=4_800_000_000_000, **_HOPPER),
  "b200": _gpu("NVIDIA B200", 2250e12, 191_514_411_008,
               core_count=148, fpus_per_core=128, shared_memory_per_core=233_472,
               shared_memory_per_block_optin=232_448, l2_cache_size=132_644_864,
               clock_rate_ghz=1.965, memory_bandwidth=7_672_320_000_000,
               capability="major: 10 feature_extension: ACCELERATED_FEATURES"),
}
# The same for every GPU above.
_GPU_TEXT = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  core_count: {core_count} fpus_per_core: {fpus_per_core} clock_rate_ghz: {clock_rate_ghz}
  memory_bandwidth: {memory_bandwidth} l2_cache_size: {l2_cache_size}
  device_memory_size: {device_memory_size} cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""


def parse(topology: str) -> tuple[str, int, int]:
  """(kind of chip, hosts, GPUs of one host); the last two are 0 for a slice of TPUs.

  Raises:
    TopologyError: an unknown kind of chip, or GPUs that are not written as a number.
  """
  kind, _, sizes = topology.partition(":")
  if kind not in CHIPS:
    raise TopologyError(f"--topology={topology!r}: chips are {sorted(CHIPS)}, as in v5p:4x4x4 "
                        "(a slice), h100:8 (one host) and h100:4x8 (hosts x GPUs)")
  if not CHIPS[kind].gpu:
    return kind, 0, 0
  if not (found := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", sizes)):
    raise TopologyError(f"--topology={topology!r}: write the GPUs of one host (h100:8), or hosts x "
                        "GPUs of each (h100:4x8)")
  return kind, int(found[1] or 1), int(found[2])


def slice_mesh(topology: str, shape: Mapping[str, int]) -> jax.sharding.Mesh:
  """The mesh over all chips of a slice or of GPU servers. Google Cloud calls v5p:4x4x4 v5p-128: it counts
  the two cores of each of the 64 chips.

  Raises:
    TopologyError: no compiler is installed, or there is no such slice.
    ShardingError: the mesh does not fit the number of chips.
  """
  kind, hosts, gpus = parse(topology)
  devices = _gpus(kind, hosts, gpus) if gpus else _tpus(topology)
  return sharding.make_mesh(shape, devices)


def better_mesh(mesh: jax.sharding.Mesh) -> dict[str, int] | None:
  """Axis sizes to use where `fsdp` alone spans all three dimensions of a torus, else None. libtpu gathers
  weights by all-reduces there, at twice the bytes: see `sharding.torus_side`."""
  side = sharding.torus_side([*mesh.devices.flat])
  if side == 1 or mesh.shape["fsdp"] < mesh.size:
    return None
  return {"data": side, "fsdp": mesh.size // side}


# Without these libtpu queries the cloud's metadata server, and refuses a second process.
_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8",
          "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}


def _tpus(topology: str) -> list[jax.Device]:
  try:
    import libtpu  # noqa: F401 (jax imports it by itself; its error does not name the package)
  except ImportError as error:
    raise TopologyError("compiling for TPUs needs the package libtpu: "
                        "pip install -e '.[aot]'") from error
  for name, value in _ALONE.items():
    os.environ.setdefault(name, value)
  return _devices(topology, topology, platform="tpu")


def _gpus(kind: str, hosts: int, gpus: int) -> list[jax.Device]:
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    raise TopologyError("compiling for GPUs needs jax's CUDA plugin, though no GPU: "
                        "pip install -e '.[aot-gpu]'")
  jax.devices()  # registers the plugin
  shape = f"1x{hosts}x{gpus}"  # slices x hosts x GPUs
  return _devices(f"{kind}:{hosts}x{gpus}", shape, platform="cuda", topology=shape,
                  target_config=_GPU_TEXT.format(**CHIPS[kind].gpu))


def _devices(asked: str, name: str, **options: str) -> list[jax.Device]:
  try:
    return list(topologies.get_topology_desc(name, **options).devices)
  except Exception as error:
    raise TopologyError(f"--topology={asked!r}: {error}") from error
