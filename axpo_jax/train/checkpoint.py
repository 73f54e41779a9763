"""Checkpoints of a run: state, data iterator and host facts, whole or not at all.

A checkpoint is written beside its final name and renamed when it is complete; on an object store,
which cannot rename, it gets a last object that says so (orbax does either). So a run killed in
mid-save finds the one before; the remains are deleted, at the latest by the next save. Writing goes on in the
background: the arrays are copied before `save` returns, so the state may be donated at once.

Restoring is exact (every array bit for bit) and places arrays with the shardings of the running
mesh, which may differ from the mesh that saved.

  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(step, state, host={"config": ...}, iterator=iterator)
    restored = checkpoints.restore(learner.abstract_state(), iterator=iterator)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Awaitable, Mapping
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from axpo_jax import paths, processes
from axpo_jax.model import sharding

# Names inside a checkpoint folder.
_STATE, _ITERATOR, _HOST = "state", "iterator", "host"
# Replicas share the writing of large arrays only: cutting small ones costs a compilation each.
_MIN_SLICE_BYTES = 1 << 26


class CheckpointError(RuntimeError):
  """A checkpoint that is missing, or does not fit what it is restored to."""


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

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    self.wait()
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  def latest(self) -> int | None:
    """The newest of them; all processes call it. One decides: on NFS a listing may be old."""
    return processes.share((max(self.steps(), default=None), None))

  def save(self, step: int, state: Any, *, host: Mapping[str, Any], iterator: Any = None) -> None:
    """Starts writing a checkpoint; waits only for the save before it.

    Args:
      state: a pytree of jax arrays. Copied before this returns.
      host: JSON values: config, seeds, the frontier of the data that was trained on.
      iterator: a grain iterator. Its state at this call is what is stored; if it runs ahead of
        training (prefetch), put the state of the last trained batch into `host` instead. All
        processes pass iterators of one state, and another number of them can restore it.
    Raises:
      CheckpointError: the step has a checkpoint already.
      Exception: whatever made the save before this one fail.
    """
    self.wait()
    if step in self.steps():
      raise CheckpointError(f"step {step} has a checkpoint already in {self._orbax.directory}")
    items = {_STATE: _nested(state), _HOST: _Json({"host": host, "arrays": _describe(state)})}
    if iterator is not None:
      items[_ITERATOR] = _Json(iterator.get_state())
    # Forced: orbax would skip a save that it finds too early, and the caller decides here.
    self._pending = self._orbax.save_checkpointables_async(step, items, force=True)

  def restore(self, abstract_state: Any, *, step: int | None = None, iterator: Any = None
              ) -> Restored:
    """Reads a checkpoint.

    Args:
      abstract_state: pytree of ShapeDtypeStructs with shardings (`Learner.abstract_state`).
      step: default the newest.
      iterator: set to the saved position, in place.
    Raises:
      CheckpointError: no checkpoint, one without the iterator that is asked for, or arrays that
        differ from `abstract_state`; the message lists every difference.
    """
    step = self.latest() if step is None else step
    if step not in (steps := self.steps()):
      raise CheckpointError(f"{self._orbax.directory} has no checkpoint of step {step}; it has {steps}")
    record = _Json(None)
    self._load(step, {_HOST: record})
    _check_arrays(f"checkpoint {step}", record.value["arrays"], _describe(abstract_state))
    if iterator is not None:
      if not (self._orbax.directory / str(step) / _ITERATOR).exists():
        raise CheckpointError(f"checkpoint {step} holds no data iterator; restore without one")
      position = _Json(None)
      self._load(step, {_ITERATOR: position})
      iterator.set_state(position.value)
    nested = self._load(step, {_STATE: _nested(abstract_state)})[_STATE]
    return Restored(step, _unnested(nested, abstract_state), record.value["host"])

  def wait(self) -> None:
    """Returns when the running save is complete; raises what made it fail."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    self.wait()
    self._orbax.close()

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    return self._orbax.load_checkpointables(step, wanted)


def save_tree(path: str | os.PathLike, tree: Any) -> None:
  """Writes a pytree of jax arrays once, whole or not at all: e.g. the fixed reference policy.

  What stands at `path` is replaced. Blocks.
  """
  items = {_STATE: _nested(tree), _HOST: _Json({"arrays": _describe(tree)})}
  with _context():
    ocp.save_checkpointables(_absolute(path), items, overwrite=True)


def load_tree(path: str | os.PathLike, abstract_tree: Any) -> Any:
  """Reads what `save_tree` wrote, placed like `abstract_tree`.

  Raises:
    CheckpointError: nothing there, or arrays that differ.
  """
  path = _absolute(path)
  if not ocp.is_orbax_checkpoint(path):
    raise CheckpointError(f"{path} does not exist or is not complete")
  record = _Json(None)
  ocp.load_checkpointables(path, {_HOST: record})
  _check_arrays(path, record.value["arrays"], _describe(abstract_tree))
  nested = ocp.load_checkpointables(path, {_STATE: _nested(abstract_tree)})[_STATE]
  return _unnested(nested, abstract_tree)


class _Json:
  """A JSON value that orbax saves and loads as a part of a checkpoint."""

  def __init__(self, value: Any):
    # Made into text now, so that changes after `save` returns do not reach the file.
    self._text = json.dumps(value, sort_keys=True)

  @property
  def value(self) -> Any:
    return json.loads(self._text)

  async def save(self, directory: Any) -> Awaitable[None]:
    async def write():
      folder = await directory.await_creation()
      if jax.process_index() == 0:
        (folder / "value.json").write_text(self._text)

    return write()

  async def load(self, directory: Any) -> Awaitable[None]:
    async def read():
      self._text = (directory / "value.json").read_text()

    return read()


def _context() -> ocp.Context:
  saving = ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
  return ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving))


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
