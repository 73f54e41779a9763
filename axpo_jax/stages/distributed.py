"""Several processes: all of them train; the main one also samples, writes files and prints.

Every process runs the same loop on the same examples and packs the same micro-batches; each puts its own
devices' rows on them. What must happen once (rollouts with their tools and servers, files, the terminal)
happens in the main process, which shares the result (`on_main`). Nothing else differs between one process and
many, so a run may be resumed with another number of them.

The alternative, questions of its own for every process, would spread the work of the host. But plan, budget
and packing are decisions about a whole step. So all processes get a step's tokens (`Collected.for_training`),
and each gets the pixels of its own rows (`train.pictures` has the numbers). Sampling, which grows with the
speed of a run, happens in servers.
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

# Seconds without a heartbeat until a process counts as dead; seconds that a process waits for the others
# when it ends.
_HEARTBEAT, _SHUTDOWN = 120, 60


def initialize(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
  """Joins the processes of a run; call it before anything touches a device.

  Args:
    coordinator: host:port that process 0 listens on, on that address alone. Empty: from the environment (a
      TPU pod, Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS); without one there, a single process.
    processes: how many; 0: from the environment; 1: a single process in any environment.
    process: the number of this one, from 0.

  Raises:
    ConfigError: one of the three is given, and another is neither given nor in the environment.
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

  Anyone who reaches that port can end the run and read what processes exchange. So the default is used only
  if the address is not one of this machine (the name of a service, a forwarded port), with a warning.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    return None  # jax reports the error
  host = host.strip("[]")
  try:
    for family, _, _, _, (address, *_) in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
      with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
      return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
  except OSError:
    logging.warning("--coordinator=%s is no address of this machine, so process 0 listens on all of its "
                    "interfaces: restrict access to port %s with a firewall", coordinator, port)
  return None


def on_main(function: Callable[..., T], *args: Any) -> T:
  """Calls function(*args) in the main process; all processes get its result, or its exception."""
  return processes.share(processes.attempt(function, *args) if is_main() else None)


async def on_main_async(function: Callable[[], Awaitable[T]], sent: Callable[[T], T] | None = None
                        ) -> T:
  """`on_main` of a coroutine function. Other tasks of the event loop run meanwhile.

  Args:
    sent: result -> what the other processes get; None: the result.

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
  """Gathers parameters that are split over all processes onto `mesh` of the main one; None in the others. Call
  it in all processes."""
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
  """Updates the sampler's weights, for every kind of engine; all processes call it at the same point.

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
  """The embedded engine of a run of several processes: it runs in the main one, on that one's devices.

  It decides what to compute by what its episodes wait for, and several processes could not decide alike.
  """

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
  """Takes the place of the engine in all processes but the main one.

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
