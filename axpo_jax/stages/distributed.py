"""Several processes: all of them train, the main one alone talks to the world.

Every process runs the same loop on the same examples and packs the same micro-batches; each puts only
its own devices' rows on them. What cannot be done twice (rollouts with their tools and servers, files,
the terminal) the main process does, and shares the outcome: `on_main`. Nothing else differs between
one process and many, so a run may be resumed with another number of them.

The alternative, every process with its own questions, would spread the host's work, but plan, budget
and packing are decisions about a whole step. So all processes get a step's tokens (`Collected.for_training`),
and each the pixels that its own rows show (`pictures`, which has the figures). What grows with a run's
speed, sampling, lives in servers.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import jax
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from axpo_jax import processes
from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.sglang.engine import SGLangEngine
from axpo_jax.errors import ConfigError
from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.processes import is_main
from axpo_jax.stages.metrics import MetricsWriter, NoMetrics
from axpo_jax.train import preemption

T = TypeVar("T")

# Seconds without a sign of life after which a process counts as dead, and those that one that ends
# waits for the others.
_HEARTBEAT, _SHUTDOWN = 120, 60


def initialize(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
  """Joins the processes of a run; call it before anything touches a device.

  Args:
    coordinator: host:port that process 0 listens on, on that address alone; empty: what the environment says (a TPU pod,
      Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS), and if it says nothing, the process
      is alone.
    processes: how many; 0: what the environment says; 1: alone, whatever it says.
    process: this one's number, from 0.

  Raises:
    ConfigError: some of the three are given and some are neither given nor in the environment.
  """
  if processes == 1:
    return
  given = {"coordinator_address": coordinator or None, "num_processes": processes or None,
           "process_id": process if process >= 0 else None,
           "coordinator_bind_address": bind_address(coordinator) if process == 0 else None}
  try:
    # One process a host has all of its devices; on a TPU pod there is no other way.
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT,
                               shutdown_timeout_seconds=_SHUTDOWN)
  except ValueError as error:
    if any(value is not None for value in given.values()):
      raise ConfigError(f"{error} Give --coordinator=<host>:<port>, --processes and --process_id, all "
                       "three.") from error


def bind_address(coordinator: str) -> str | None:
  """Where process 0 listens so that others reach it at `coordinator`; None: JAX's default, all interfaces.

  Whoever reaches that port can end the run and read what processes exchange, so the default is taken only
  where the address is none of this machine's (the name of a service, a forwarded port), and said.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    return None  # jax says what is wrong with it
  host = host.strip("[]")
  try:
    for family, _, _, _, (address, *_) in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
      with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
      return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
  except OSError:
    logging.warning("--coordinator=%s is no address of this machine, so process 0 listens on all of its "
                    "interfaces: let a firewall keep strangers from port %s", coordinator, port)
  return None


def on_main(function: Callable[..., T], *args: Any) -> T:
  """function(*args), called by the main process; all get its result, or its exception."""
  return processes.share(processes.attempt(function, *args) if is_main() else None)


async def on_main_async(function: Callable[[], Awaitable[T]], sent: Callable[[T], T] | None = None
                        ) -> T:
  """`on_main` of a coroutine function. Others on the event loop go on meanwhile.

  Args:
    sent: result -> what the other processes get of it; None: all.

  Raises:
    preemption.Stopped: in all processes, if any was asked to stop before the coroutine ended.
  """
  if jax.process_count() == 1:
    return await preemption.cancel_on_stop(function)
  outcome = result = None
  if is_main():
    try:
      result = await preemption.cancel_on_stop(function)
      outcome = (sent(result) if sent else result), None
    except Exception as error:
      outcome = None, error
  shared = await asyncio.to_thread(processes.share, outcome)
  return result if is_main() else shared


def whole_on_main(params: Any, mesh: jax.sharding.Mesh, rules: sharding.Rules) -> Any:
  """Parameters that are spread over all processes, copied onto `mesh` of the main one; None in the
  others. Call it in all of them."""
  def copy(leaf, target):
    value = multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_put(value, target) if is_main() else None

  return jax.tree.map(copy, params, sharding.param_shardings(params, mesh, rules))


def local_mesh() -> jax.sharding.Mesh:
  """A mesh over this process's devices."""
  return sharding.make_mesh({"fsdp": -1}, jax.local_devices())


def metrics_writer(root: str | os.PathLike, **options: Any) -> MetricsWriter | NoMetrics:
  """The run's MetricsWriter in the main process, one that writes nothing in the others."""
  return MetricsWriter(root, **options) if is_main() else NoMetrics(root)


# The sampler ------------------------------------------------------------------------------------


async def update_weights(hand_over: Callable[[Any, int], T], install: Callable[[T], Awaitable[None]],
                         params: Any, version: int) -> None:
  """One update of the sampler's weights, whatever the engine; all processes call it at the same place.

      main     hand_over ┐ install ┐
      others   hand_over ┘ (wait)  ┘ all go on, or all raise what went wrong

  Args:
    hand_over: (params, version) -> what the engine installs. All processes run it at once, so it may
      gather parameters and write files.
    install: gives it to the engine. The main process alone runs it.
  """
  weights = await asyncio.to_thread(hand_over, params, version)
  await on_main_async(lambda: install(weights))


class LocalEngine(EmbeddedEngine):
  """The embedded engine of the main process, on its own devices: it decides what to compute by what its
  episodes wait for, which several processes cannot do in step."""

  def __init__(self, model_config: ModelConfig, graphdef: nnx.GraphDef, params: nnx.State, *,
               rules: sharding.Rules, **options: Any):
    local = local_mesh()
    params = whole_on_main(params, local, rules)
    super().__init__(model_config, graphdef, params, mesh=local, rules=rules, **options)
    self._hand_over = lambda params, _version: whole_on_main(params, local, rules)

  async def update_weights(self, params: Any, version: int) -> None:
    install = functools.partial(super().update_weights, version=version)
    await update_weights(self._hand_over, install, params, version)


class RemoteEngine(SGLangEngine):
  """The main process's client of SGLang servers: all processes write the weights, this one installs
  them."""

  async def update_weights(self, params: Any, version: int) -> None:
    await update_weights(self.folder.write, self.install, params, version)


class Follower:
  """Stands where the main process has its engine, in the others.

  Args:
    hand_over: as in `update_weights`.
  """

  def __init__(self, hand_over: Callable[[Any, int], Any]):
    self._hand_over = hand_over

  async def update_weights(self, params: Any, version: int) -> None:
    await update_weights(self._hand_over, _nothing, params, version)

  async def close(self) -> None:
    pass


async def _nothing(_: Any) -> None:
  raise AssertionError("the main process alone installs weights")
