"""Checkpoints of a run: state, data iterator and host values, each written whole or not at all.

A checkpoint is written under a temporary name and renamed when it is complete; on an object store, which cannot
rename, a last object marks it as complete (orbax does both). So a run that is killed during a save resumes from
the checkpoint before; the incomplete one is deleted by the next save at the latest. Writing happens in the
background: the arrays are copied before `save` returns, so the state may be donated at once.

Restoring is exact (every array bit for bit) and uses the shardings of the running mesh, which may differ from
the mesh that saved. A checkpoint also holds checksums of all arrays, the step and the iterator's position
(`train.checksums`): a damaged one is not restored but the one before it, with a warning. The checksums are of
arrays and not of files, so they work on object stores and read no files: on an accelerator they cost one pass
over the state in its memory, on a CPU about a second a GB.

  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(step, state, host={"config": ...}, iterator=iterator)
    restored = checkpoints.restore(learner.abstract_state(), iterator=iterator)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Awaitable, Mapping
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from axpo_jax import paths, processes
from axpo_jax.model import sharding
from axpo_jax.train.checksums import checksums

# Names inside a checkpoint folder.
_STATE, _ITERATOR, _HOST = "state", "iterator", "host"
# A key without a reader. Checkpoints from before November 2026 hold it.
_UNREAD = "rng"
# Replicas share the writing of large arrays only: cutting small ones costs a compilation each.
_MIN_SLICE_BYTES = 1 << 26


class CheckpointError(RuntimeError):
  """A checkpoint is missing or damaged, or does not fit the state to restore."""


class _DamagedError(Exception):
  """A checkpoint differs from what was saved; the message says where."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """step: of the checkpoint. state: like the abstract state. host: what `save` was given."""

  step: int
  state: Any
  host: dict[str, Any]


class Checkpoints:
  """The newest `keep` checkpoints of one folder, numbered by optimizer or RL step."""

  def __init__(self, folder: str | os.PathLike, keep: int = 2):
    if keep < 1:
      raise ValueError(f"checkpoint.keep={keep} must be at least 1")
    self._orbax = ocp.training.Checkpointer(
      _absolute(folder), context=_context(), cleanup_tmp_directories=True,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))
    self._pending = None
    self._damaged: set[int] = set()  # steps that could not be restored

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    self.wait()
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  def latest(self) -> int | None:
    """The newest of them; all processes call it. The main one decides, since a listing on NFS may be stale."""
    return processes.share((max(self.steps(), default=None), None))

  def save(self, step: int, state: Any, *, host: Mapping[str, Any], iterator: Any = None) -> None:
    """Starts writing a checkpoint; waits only for the save before it.

    Args:
      state: a pytree of jax arrays. Copied before this returns.
      host: JSON values, such as the stage and metrics.
      iterator: a grain iterator. Its state at this call is stored: set it to the last trained batch first if
        batches are prefetched. All processes pass iterators of one state, and any number of processes can
        restore it.

    Raises:
      CheckpointError: the step has a checkpoint already, and that is not known to be damaged.
      Exception: the error of the save before this one.
    """
    self.wait()
    if step in self._damaged:
      self._orbax.delete(step)
      self._damaged.remove(step)
    if step in self.steps():
      raise CheckpointError(f"step {step} has a checkpoint already in {self._orbax.directory}")
    record = {"step": step, "host": host, "arrays": _describe(state), "checksums": checksums(_flat(state))}
    items = {_STATE: _nested(state)}
    if iterator is not None:
      items[_ITERATOR] = position = _Json(iterator.get_state())
      record["iterator"] = position.checksum
    items[_HOST] = _Json(record)
    # Forced: orbax would skip a save that it finds too early, and the caller decides here.
    self._pending = self._orbax.save_checkpointables_async(step, items, force=True)

  def restore(self, abstract_state: Any, *, step: int | None = None, iterator: Any = None
              ) -> Restored:
    """Reads a checkpoint.

    Args:
      abstract_state: pytree of ShapeDtypeStructs with shardings (`Learner.abstract_state`).
      step: default the newest that is not damaged; damaged ones are logged.
      iterator: set to the saved position, in place.

    Raises:
      CheckpointError: there is no undamaged checkpoint; it lacks the iterator that is asked for; or its arrays
        differ from `abstract_state` (the message lists all).
    """
    steps = processes.share((self.steps(), None))
    if step not in steps and (step is not None or not steps):
      raise CheckpointError(f"{self._orbax.directory} has no checkpoint of step {step}; it has {steps}")
    reasons: list[str] = []
    for candidate in reversed(steps) if step is None else [step]:
      try:
        restored, position = self._read(candidate, abstract_state, iterator is not None)
      except CheckpointError:  # undamaged but it does not fit: nor would older ones
        raise
      except Exception as error:  # orbax and the libraries below it raise many types
        self._damaged.add(candidate)
        reasons.append(" ".join(f"{candidate}: {type(error).__name__}: {error}".split())[:500])
        continue
      if position is not None:
        iterator.set_state(position)
      if reasons and processes.is_main():
        logging.warning("%s: resuming from checkpoint %d; newer ones are damaged: %s",
                        self._orbax.directory, candidate, "; ".join(reasons))
      return restored
    raise CheckpointError(f"{self._orbax.directory}: every checkpoint is damaged: {'; '.join(reasons)}. Put a copy "
                          "back, or begin with another --workdir")

  def _read(self, step: int, abstract_state: Any, with_iterator: bool) -> tuple[Restored, Any]:
    """A checkpoint and the iterator's position in it.

    Raises:
      CheckpointError: it does not fit.
      Exception: it is damaged; in all processes, whichever of them saw it.
    """
    file = _Json()
    self._load(step, {_HOST: file})
    record = file.loaded()
    if record.get("step", step) != step:
      raise _DamagedError(f"it is that of step {record['step']}, renamed")
    wanted = _nested(abstract_state)
    if record["arrays"].pop(_UNREAD, None):
      wanted[_UNREAD] = jax.ShapeDtypeStruct((2,), "uint32", sharding=wanted["step"].sharding)
    _check_arrays(f"checkpoint {step}", record["arrays"], _describe(abstract_state))
    position = None
    if with_iterator:
      if not (self._orbax.directory / str(step) / _ITERATOR).exists():
        raise CheckpointError(f"checkpoint {step} holds no data iterator; restore without one")
      self._load(step, {_ITERATOR: (file := _Json())})
      position = file.loaded()
      if record.get("iterator", file.checksum) != file.checksum:
        raise _DamagedError("its data iterator is another checkpoint's")
    nested = self._load(step, {_STATE: wanted})[_STATE]
    state = _unnested(nested, abstract_state)
    if (saved := record.get("checksums")) is None:
      logging.warning("checkpoint %d was written without checksums: it is taken as it is", step)
    else:
      found = checksums(_flat(state))
      if wrong := [name for name in found if saved[name] != found[name]]:
        raise _DamagedError(f"{len(wrong)} of {len(saved)} arrays are not those that were saved ({wrong[0]})")
    return Restored(step, state, record["host"]), position

  def wait(self) -> None:
    """Returns when the running save is complete; raises what made it fail."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    self.wait()
    self._orbax.close()

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint. An error in one process is raised in all."""
    path, loaded = self._orbax.directory / str(step), {}

    def load():
      with _alone():
        loaded.update(ocp.load_checkpointables(path, wanted))

    processes.on_all(load)
    return loaded


class _Json:
  """A JSON value that orbax saves and loads as a part of a checkpoint, with a checksum of its own."""

  def __init__(self, value: Any = None):
    # Made into text now, so that changes after `save` returns do not reach the file.
    self._text = json.dumps(value, sort_keys=True)

  @property
  def checksum(self) -> int:
    return zlib.crc32(self._text.encode())

  async def save(self, directory: Any) -> Awaitable[None]:
    async def write():
      folder = await directory.await_creation()
      if jax.process_index() == 0:
        (folder / "value.json").write_text(f'{{"crc32": {self.checksum}, "value": {self._text}}}')

    return write()

  async def load(self, directory: Any) -> Awaitable[None]:
    async def read():
      self._file = (directory / "value.json").read_bytes()

    return read()

  def loaded(self) -> Any:
    """The value that was loaded. Not checked in `load`: orbax makes another error of what is raised there."""
    held = json.loads(self._file)
    checked = isinstance(held, dict) and held.keys() == {"crc32", "value"}  # older ones have none
    value = held["value"] if checked else held
    self._text = json.dumps(value, sort_keys=True)
    if checked and held["crc32"] != self.checksum:
      raise _DamagedError("a value.json is not what was saved")
    return value


def _context() -> ocp.Context:
  saving = ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
  return ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving))


def _alone() -> contextlib.AbstractContextManager:
  """Within it orbax does not wait for other processes, so that an error in one of them reaches all."""
  if jax.process_count() == 1:
    return contextlib.nullcontext()
  me = jax.process_index()
  return ocp.Context(multiprocessing_options=ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone_{me}"))


def _absolute(path: str | os.PathLike) -> str:
  """orbax wants absolute paths; an object store's URL is one."""
  return str(path) if paths.is_remote(path) else os.path.abspath(path)


def _flat(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def _nested(tree: Any) -> dict[str, Any]:
  """Plain nested dicts by path, so that files do not depend on flax's or optax's own classes."""
  out: dict[str, Any] = {}
  for name, leaf in _flat(tree).items():
    *parents, last = name.split("/")
    at = out
    for parent in parents:
      at = at.setdefault(parent, {})
    at[last] = leaf
  return out


def _unnested(nested: Mapping[str, Any], like: Any) -> Any:
  flat = _flat(nested)
  return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


def _describe(tree: Any) -> dict[str, str]:
  """Path -> "dtype[shape]" of every array."""
  return {name: f"{x.dtype}{list(x.shape)}" for name, x in _flat(tree).items()}


def _check_arrays(where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
  lines = [f"  {name}: not in the checkpoint" for name in sorted(wanted.keys() - found.keys())]
  lines += [f"  {name}: only in the checkpoint" for name in sorted(found.keys() - wanted.keys())]
  lines += [f"  {name}: {found[name]} in the checkpoint, {wanted[name]} wanted"
            for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
  if lines:
    raise CheckpointError(
      f"{where} does not fit the model and optimizer of this run:\n" + "\n".join(lines))
