"""What a run needs of its machine: GPUs for its servers, the servers' environment, keys.

In: a checked config. Out: the config with the servers' GPUs in it, and CUDA_VISIBLE_DEVICES with the trainer's.
Call it before JAX initialises its devices.

  8 GPUs, 4 servers of 1    0 1 2 3 | 4 5 6 7
                            trainer   servers
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from axpo_jax.config_queries import sampling_stages
from axpo_jax.engine.sglang.server import environment
from axpo_jax.engine.sglang.server.spec import SidecarError
from axpo_jax.errors import ConfigError

# Of a GPU's memory that the trainer may take; the rest is left to the driver, NCCL's buffers and kernels.
GPU_SHARE = 0.92
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECTION = "config.rollout.sidecar"
_INSTEAD = ("Or name running servers in config.rollout.urls, or set config.rollout.engine=embedded to "
            "sample in this process (small models)")


@dataclasses.dataclass(frozen=True)
class Split:
  """GPUs by their ids, as CUDA_VISIBLE_DEVICES takes them."""

  servers: int
  theirs: tuple[str, ...]
  trainers: tuple[str, ...]


def prepare(config: ConfigDict) -> None:
  """Checks what the run needs of this machine, and gives its SGLang servers GPUs of their own.

  It sets config.rollout.sidecar.servers and .gpus, and CUDA_VISIBLE_DEVICES of this process. If the trainer
  shares no GPU with a server, it may fill its GPUs up to GPU_SHARE; jax's default is three quarters.

  Raises:
    ConfigError: a key, the servers' environment or GPUs are missing; says what to set.
  """
  _check_keys(config)
  if not visible_gpus():
    # The extra aot-gpu installs jax's CUDA plugin as a compiler. Without a GPU jax does not use it, but logs a
    # traceback first.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
  if not (starts_servers(config) and _place_servers(config)):
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))


def _place_servers(config: ConfigDict) -> bool:
  """Whether the servers share GPUs with the trainer."""
  section = config.rollout.sidecar
  try:
    environment.find_python(section.device)
  except SidecarError as error:
    raise ConfigError(f"{_SECTION}: {error}") from error
  if section.device != "cuda":
    section.servers = section.servers or 1
    print(f"rollouts: {section.servers} SGLang server(s) on this machine's CPUs ({_SECTION})")
    return False
  found = split(visible_gpus(), section.servers, section.tensor_parallel,
                tuple(map(str, section.gpus)), trains_on_gpus=_jax_may_use_gpus())
  section.servers, section.gpus = found.servers, found.theirs
  if found.trainers:
    os.environ[_VISIBLE] = ",".join(found.trainers)
  print(f"rollouts: {found.servers} SGLang server(s) of {section.tensor_parallel} GPU(s) each, on GPUs "
        f"{','.join(found.theirs)}; the trainer has {','.join(found.trainers) or 'none'} ({_SECTION})")
  return not set(found.theirs).isdisjoint(found.trainers)


def check_processes(config: ConfigDict, processes: int) -> None:
  """Raises ConfigError if one of several processes would start servers on GPUs: it would have fewer GPUs left
  than the others."""
  if processes > 1 and starts_servers(config) and config.rollout.sidecar.device == "cuda":
    raise ConfigError(
      f"a run of {processes} processes does not start SGLang servers on GPUs, since its processes need "
      "equally many: start them with launch/sidecar.py and name them in config.rollout.urls")


def starts_servers(config: ConfigDict) -> bool:
  """Whether the run starts SGLang servers on this machine."""
  return (config.rollout.engine == "sglang" and not config.rollout.urls
          and bool(sampling_stages(config)))


def visible_gpus() -> tuple[str, ...]:
  """Ids of the GPUs that this process may use; none where there are none."""
  named = os.environ.get(_VISIBLE)
  if named is not None:
    return tuple(name.strip() for name in named.split(",") if name.strip())
  # A container has device nodes for its own GPUs only, numbered from 0.
  return tuple(map(str, range(len(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))))))


def split(gpus: Sequence[str], servers: int, tensor_parallel: int, named: Sequence[str] = (), *,
          trains_on_gpus: bool = True) -> Split:
  """Divides a machine's GPUs between servers and trainer.

  Args:
    gpus: ids of all.
    servers: how many; 0: as many as half of the GPUs hold, or as `named` holds.
    tensor_parallel: GPUs of one server.
    named: ids of the servers' GPUs. The trainer has the others of `gpus`, and shares them where none is
      left. Empty: the last ones.
    trains_on_gpus: whether the trainer needs any.

  Raises:
    ConfigError: they do not suffice; says what to set.
  """
  if named:
    count = servers or max(1, len(named) // tensor_parallel)
    if count * tensor_parallel != len(named):
      raise ConfigError(
        f"{_SECTION}.gpus={tuple(named)} are {len(named)}, but servers={count} x tensor_parallel="
        f"{tensor_parallel} take {count * tensor_parallel}: name so many")
    return Split(count, tuple(named), tuple(gpu for gpu in gpus if gpu not in named) or tuple(gpus))
  if not gpus:
    raise ConfigError(f"{_SECTION}.device='cuda' starts SGLang servers on this machine, which has no GPU: "
                      f"set {_SECTION}.device=cpu for a small model. {_INSTEAD}")
  room = len(gpus) // 2 if trains_on_gpus else len(gpus)
  count = servers or room // tensor_parallel
  needed = max(1, count) * tensor_parallel
  if not count or needed > len(gpus) - trains_on_gpus:
    raise ConfigError(
      f"{max(1, count)} SGLang server(s) of {_SECTION}.tensor_parallel={tensor_parallel} GPU(s) take "
      f"{needed} of this machine's {len(gpus)} GPU(s), and the trainer needs its own: set fewer "
      f"{_SECTION}.servers, or share with {_SECTION}.gpus=\"('{gpus[0]}',)\" (docs/sidecar.md). {_INSTEAD}")
  return Split(count, tuple(gpus[-needed:]), tuple(gpus[:-needed]))


def _jax_may_use_gpus() -> bool:
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return not platforms or "cuda" in platforms or "gpu" in platforms


def _check_keys(config: ConfigDict) -> None:
  stages = set(config.stages) - {"sft"}
  offered = {*(config.agent.tools if stages else ()),
             *(config.eval.extra_tools if "eval" in sampling_stages(config) else ())}
  if ("tavily-search" in offered and config.agent.search.backend == "tavily"
      and not os.environ.get("TAVILY_API_KEY")):
    raise ConfigError(
      "config.agent.tools offers 'tavily-search', whose key is not in the variable TAVILY_API_KEY: set "
      "it, or config.agent.search.backend to 'local' (with a corpus) or 'recorded', or offer other tools")
