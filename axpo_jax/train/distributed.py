"""Several processes: all of them train, the main one alone talks to the world.

Every process runs the same loop on the same examples and packs the same micro-batches; each puts only
its own devices' rows on them. What cannot be done twice (rollouts with their tools and servers, files,
the terminal) the main process does, and shares the outcome: `on_main`. Nothing else differs between
one process and many, so a run may be resumed with another number of them.

The alternative, every process with its own questions, would spread the host's work, but plan, budget
and packing are decisions about a whole step. What is shared is transcripts and images, a few hundred
megabytes a step at the paper's sizes; what grows with a run's speed, sampling, lives in servers.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.rollout.embedded import EmbeddedEngine
from axpo_jax.train.metrics import MetricsWriter, NoMetrics

T = TypeVar("T")

# Bytes that are broadcast at once: they stand on every device.
_PIECE = 1 << 26
# Seconds that processes wait for the main one: a step's rollouts, an evaluation.
_PATIENCE = 24 * 3600
_places = itertools.count()


def initialize(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
  """Joins the processes of a run; call it before anything touches a device.

  Args:
    coordinator: host:port that process 0 listens on; empty: what the environment says (a TPU pod,
      Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS), and if it says nothing, the process
      is alone.
    processes: how many; 0: what the environment says; 1: alone, whatever it says.
    process: this one's number, from 0.

  Raises:
    ValueError: some of the three are given and some are neither given nor in the environment.
  """
  if processes == 1:
    return
  given = {"coordinator_address": coordinator or None, "num_processes": processes or None,
           "process_id": process if process >= 0 else None}
  try:
    # One process a host has all of its devices; on a TPU pod there is no other way.
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=300)
  except ValueError as error:
    if any(value is not None for value in given.values()):
      raise ValueError(f"{error} Give --coordinator=<host>:<port>, --processes and --process_id, all "
                       "three.") from error


def is_main() -> bool:
  """Whether this process talks to tools, servers, files and the terminal."""
  return jax.process_index() == 0


def on_main(function: Callable[..., T], *args: Any) -> T:
  """function(*args), called by the main process; all get its result, or its exception."""
  return _share(_outcome(function, *args) if is_main() else None)


async def on_main_async(function: Callable[[], Awaitable[T]]) -> T:
  """`on_main` of a coroutine function. Others on the event loop go on meanwhile."""
  outcome = None
  if is_main():
    try:
      outcome = await function(), None
    except Exception as error:
      if jax.process_count() == 1:
        raise
      outcome = None, error
  return await asyncio.to_thread(_share, outcome)


def barrier() -> None:
  """Waits for all processes, on the host: devices do not wait, so it may take hours."""
  if jax.process_count() > 1:
    # jax offers a wait among its devices only, and those give up after a while.
    from jax._src import distributed
    distributed.global_state.client.wait_at_barrier(f"axpo_{next(_places)}", _PATIENCE * 1000)


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


class LocalEngine(EmbeddedEngine):
  """The embedded engine of the main process, on its own devices: it decides what to compute by what its
  episodes wait for, which several processes cannot do in step."""

  def __init__(self, model_config: ModelConfig, graphdef: nnx.GraphDef, params: nnx.State, *,
               rules: sharding.Rules, **options: Any):
    self._local, self._rules = local_mesh(), rules
    params = whole_on_main(params, self._local, rules)
    super().__init__(model_config, graphdef, params, mesh=self._local, rules=rules, **options)

  async def update_weights(self, params: Any, version: int) -> None:
    params = await asyncio.to_thread(whole_on_main, params, self._local, self._rules)
    await super().update_weights(params, version)


class Follower:
  """Stands where the main process has its engine, in the others.

  Args:
    take_part: (params, version) -> what all processes must do when the engine takes weights.
  """

  def __init__(self, take_part: Callable[[Any, int], Any]):
    self._take_part = take_part

  async def update_weights(self, params: Any, version: int) -> None:
    await asyncio.to_thread(self._take_part, params, version)

  async def close(self) -> None:
    pass


def _outcome(function: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
  if jax.process_count() == 1:
    return function(*args), None
  try:
    return function(*args), None
  except Exception as error:  # whatever it is, the other processes must not wait for it
    return None, error


def _share(outcome: tuple[T | None, Exception | None] | None) -> T:
  if jax.process_count() > 1:
    outcome = _broadcast(outcome)
  result, error = outcome
  if error is not None:
    raise error
  return result


def _broadcast(value: Any) -> Any:
  """The main process's value, in all of them."""
  data = np.frombuffer(_pickled(value) if is_main() else b"", np.uint8)
  barrier()
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.uint32)))
  pieces = []
  for start in range(0, size, _PIECE):
    length = min(_PIECE, size - start)
    piece = data[start:start + length] if is_main() else np.zeros(length, np.uint8)
    pieces.append(np.asarray(multihost_utils.broadcast_one_to_all(piece)))
  return value if is_main() else pickle.loads(np.concatenate(pieces).tobytes())


def _pickled(value: Any) -> bytes:
  try:
    return pickle.dumps(value)
  except Exception:
    result, error = value
    if error is None:
      raise
    return pickle.dumps((result, RuntimeError(f"{type(error).__name__}: {error}")))
