"""The trainer's weights as files in a folder that the servers read.

In: the trainer's parameters, sharded over devices and perhaps over processes. Out: a `Push`: a folder
of safetensors shards under Hugging Face's names, and the names of what changed since the push before.
The folder lies where trainer and servers both see it: tmpfs on one machine, NFS or a bucket mount on
several. A push has every tensor but a frozen vision tower's, which the servers started with.

Deltas. In bfloat16 a step of RL changes about one value in 700. So the first push is whole, and the next
ones (with `PushConfig.delta`) hold changed values alone, each relative to the push before:

  push 0          push 1         push 2              a server that holds push 1 loads  2
  all tensors ◀── changed ◀───── changed             one that has just started         0, 1, 2

Once the deltas together are half as large as a whole push, the next push is whole again.

Shards are written by a few threads, each of which holds one shard. Without deltas there is no second copy
of the model in host memory; with them the values that were pushed last stay there, to be compared with. In a
run of several processes all of them call `write`; a tensor is gathered on the devices, and each shard fetched,
compared and written by one process. What fails in one of them fails in all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import pathlib
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from axpo_jax import processes
from axpo_jax.engine.settings import PushConfig
from axpo_jax.model import hf, hf_names
from axpo_jax.model.config import ModelConfig

_PREFIX = "weights-"
_APPEARS_S = 60.0  # what one host has written, others see after seconds on NFS


class WrongParameters(ValueError):
  """Parameters that do not belong to the engine's model."""


@dataclasses.dataclass(frozen=True)
class Push:
  """Weights on disk.

  Attributes:
    version: the trainer's number.
    tag: what the servers call them; no two different weights share one, over restarts too.
    folder: with every tensor, or with what differs from `previous`.
    previous: the push that must be loaded before; None if the folder has every tensor.
    changed: names of the tensors that differ from the push before; None for the first.
    bytes_written: by all processes.
    seconds: that writing took.
  """

  version: int
  tag: str
  folder: pathlib.Path
  previous: Push | None = dataclasses.field(repr=False)
  changed: frozenset[str] | None
  bytes_written: int
  seconds: float

  def after(self, tag: str | None) -> list[Push]:
    """What a server that holds the weights `tag` must load, in this order."""
    return list(itertools.takewhile(lambda push: push.tag != tag, self._chain()))[::-1]

  def folders(self) -> set[pathlib.Path]:
    """That a server without any weights reads."""
    return {push.folder for push in self._chain()}

  def _chain(self) -> Iterator[Push]:
    push: Push | None = self
    while push is not None:
      yield push
      push = push.previous


class PushFolder:
  """Writes pushes, and removes old ones.

  Args:
    config: see PushConfig.
    model_config: sizes; what the tensors are called.
  """

  def __init__(self, config: PushConfig, model_config: ModelConfig):
    self.config, self._model = config, model_config
    self._root = pathlib.Path(config.folder)
    self._table = [entry for entry in hf_names.name_table(model_config)
                   if not (config.skip_vision and entry.path[0] == "vision")]
    self._shards = hf.plan_shards(self._table, jnp.dtype(config.dtype), config.shard_bytes)
    self._shapes = {path: leaf.shape
                    for path, leaf in hf.by_path(hf.abstract_params(model_config)).items()}
    # What a server must hold, in its own names; the tower too where pushes leave it out.
    self.server_names = server_names(entry.name for entry in hf_names.name_table(model_config))
    self._sums: dict[str, int] = {}  # tensor -> checksum of what was written last
    self._pushed: dict[str, np.ndarray] = {}  # the same tensors, where deltas are written; of this process's shards
    self._last: Push | None = None
    self._whole_bytes = self._delta_bytes = 0  # of the last whole push; of all deltas since
    self._begun = False

  def write(self, params: nnx.State, version: int) -> Push:
    """Writes `params` and returns what servers must load. Blocks; call it in all processes.

    The folder appears complete or not at all. A version that was written last is not written again.

    Raises:
      WrongParameters: paths or shapes are not those of the model.
      OSError: the folder cannot be written.
    """
    if self._last is not None and version == self._last.version:
      return self._last
    begin = time.perf_counter()
    leaves = self._checked(params)
    previous = self._last if self.config.delta and 2 * self._delta_bytes < self._whole_bytes else None
    nonce, *_ = processes.on_all(self._prepare)
    tag = f"{version}-{nonce}"
    staging = self._root / f"{_PREFIX}{tag}.partial"
    try:
      # What the shards hold is swapped and not read from the folder: on NFS a listing may be old.
      written = processes.on_all(self._write_shards, leaves, staging, previous is not None)
      shards = [shard for shards in written for shard in shards]
      folder = self._root / f"{_PREFIX}{tag}"
      processes.on_all(_move, staging, folder, [shard.file for shard in shards if shard.bytes])
    except BaseException:
      self._last = None  # `_pushed` is ahead of the files: the next push must be whole
      raise
    size = sum(shard.bytes for shard in shards)
    if previous is None:
      self._whole_bytes, self._delta_bytes = size, 0
    else:
      self._delta_bytes += size
    sums = {name: total for shard in shards for name, total in shard.sums.items()}
    changed = frozenset(name for name in sums if sums[name] != self._sums.get(name))
    self._last = Push(version, tag, folder, previous, changed if self._sums else None, size,
                      time.perf_counter() - begin)
    self._sums = sums
    return self._last

  def remove_old(self) -> None:
    """Removes every push but the last and those that it builds on, once no server reads them."""
    if self._last is None or not processes.is_main():
      return
    kept = self._last.folders()
    for folder in self._root.glob(f"{_PREFIX}*"):
      if folder not in kept:
        shutil.rmtree(folder, ignore_errors=True)

  def remove_all(self) -> None:
    """Removes what this run wrote."""
    if self._begun and processes.is_main():
      for folder in self._root.glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)

  def _prepare(self) -> str:
    """An empty folder at the run's first push; random digits for the push's name."""
    if not self._begun:
      self._begun = True
      if processes.is_main():
        self._root.mkdir(parents=True, exist_ok=True)
        self.remove_all()  # of a run that ended without cleaning up
    return secrets.token_hex(4)

  def _checked(self, params: nnx.State) -> dict:
    leaves = hf.by_path(params)
    found = {path: leaf.shape for path, leaf in leaves.items()}
    if found != self._shapes:
      wrong = [f"{'.'.join(path)}: {found.get(path)} instead of {self._shapes.get(path)}"
               for path in sorted(found.keys() | self._shapes.keys())
               if found.get(path) != self._shapes.get(path)]
      raise WrongParameters(f"{len(wrong)} parameters are not the model's: {'; '.join(wrong[:5])}")
    return leaves

  def _write_shards(self, leaves: dict, staging: pathlib.Path, delta: bool) -> list[_Shard]:
    """Writes this process's shards; what they hold. An error comes last, behind all gathering."""
    slots = threading.Semaphore(self.config.writers)  # shards in host memory
    with concurrent.futures.ThreadPoolExecutor(self.config.writers) as pool:
      jobs = []
      for number, (file, entries) in enumerate(self._shards.items()):
        mine = number % jax.process_count() == jax.process_index()
        if mine:
          slots.acquire()
        values = [_fetch(leaves[entry.path], entry.layer, self.config.dtype, mine)
                  for entry in entries]
        if mine:
          job = pool.submit(self._write_shard, staging / file, entries, values, delta)
          job.add_done_callback(lambda _: slots.release())
          jobs.append(job)
        del values
      return [job.result() for job in jobs]

  def _write_shard(self, file: pathlib.Path, entries: list[hf_names.Entry], values: list, delta: bool) -> _Shard:
    """Writes a file with these tensors, or with what changed in them; none if nothing did."""
    tensors, shapes, shard = {}, {}, _Shard(file.name)
    for index, entry in enumerate(entries):
      name, tensor = entry.name, np.ascontiguousarray(entry.to_hf(values[index]))
      values[index] = None  # the shard's memory moves over, tensor by tensor
      shard.sums[name] = zlib.crc32(tensor.view(np.uint8))
      parts = delta_of(name, self._pushed[name], tensor) if delta else {name: tensor}
      if name not in parts:
        shapes[name] = ",".join(map(str, tensor.shape))
      tensors |= parts
      if self.config.delta:
        self._pushed[name] = tensor
    shard.bytes = sum(tensor.nbytes for tensor in tensors.values())
    if tensors:
      file.parent.mkdir(parents=True, exist_ok=True)
      save_file(tensors, file, metadata={"format": "pt"} | shapes)
    return shard


def delta_of(name: str, old: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
  """What a file says of a tensor: nothing, the values that changed, or all of it where that is shorter.

  "<name>:values" are the changed values in the order of the flattened tensor, "<name>:gaps" how far each
  lies behind the one before (the first one: its index). Compares bits, so NaN and -0.0 count as they are.
  """
  bits = np.dtype(f"u{new.itemsize}")
  (where,) = np.nonzero(new.reshape(-1).view(bits) != old.reshape(-1).view(bits))
  if not len(where):
    return {}
  gaps = np.diff(where, prepend=0)
  gaps = gaps.astype(np.uint16 if gaps.max() <= np.iinfo(np.uint16).max else np.int64)
  if gaps.nbytes + len(where) * new.itemsize >= new.nbytes:
    return {name: new}
  return {f"{name}:gaps": gaps, f"{name}:values": new.reshape(-1)[where]}


@dataclasses.dataclass
class _Shard:
  """A file of a push: its name, its bytes (0: nothing was written), and a checksum of each tensor."""

  file: str
  bytes: int = 0
  sums: dict[str, int] = dataclasses.field(default_factory=dict)


def _fetch(leaf: jax.Array, layer: int | None, dtype: str, mine: bool) -> np.ndarray | None:
  """One layer of a parameter on this host if it is `mine`; all processes must ask."""
  if leaf.is_fully_addressable:
    return hf.fetch(leaf, layer, dtype) if mine else None
  gathered = hf.gather(leaf, layer, dtype)
  return np.asarray(gathered.addressable_data(0)) if mine else None


def _move(staging: pathlib.Path, folder: pathlib.Path, files: Sequence[str]) -> None:
  """Gives a staged push of these files its name. One process does."""
  if not processes.is_main():
    return
  staging.mkdir(parents=True, exist_ok=True)  # nothing may have changed
  deadline = time.monotonic() + _APPEARS_S
  while missing := [file for file in files if not (staging / file).exists()]:
    if time.monotonic() > deadline:
      raise OSError(f"{staging} lacks {missing[0]}, which another process has written: push_folder must "
                    "be one folder that all hosts of the trainer see")
    time.sleep(0.1)
  staging.rename(folder)


# What a server calls them ----------------------------------------------------------------------

# SGLang fuses these matrices; a fused tensor changes when any of its parts does.
_FUSED = {
  "self_attn.q_proj": "self_attn.qkv_proj", "self_attn.k_proj": "self_attn.qkv_proj",
  "self_attn.v_proj": "self_attn.qkv_proj", "mlp.gate_proj": "mlp.gate_up_proj",
  "mlp.up_proj": "mlp.gate_up_proj", "attn.qkv": "attn.qkv_proj",
}  # fmt: skip
_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}


def server_name(name: str) -> str:
  """The parameter of SGLang's model that the checkpoint's tensor `name` ends up in."""
  name = name.removeprefix("model.").replace("language_model.", "model.", 1)
  head, _, kind = name.rpartition(".")
  if head.endswith(".experts"):
    return f"{head}.{_EXPERTS[kind]}"
  for part, whole in _FUSED.items():
    if head.endswith(f".{part}"):
      head = head.removesuffix(part) + whole
  return f"{head}.{kind}"


def server_names(names: Iterable[str]) -> frozenset[str]:
  return frozenset(map(server_name, names))
