"""The trainer's weights as files in a folder that the servers read.

In: the trainer's parameters, sharded over devices and perhaps over processes. Out: a `Push`: folders
of safetensors shards under Hugging Face's names, and what changed since the push before. The folder
lies where trainer and servers both see it: tmpfs on one machine, NFS or a bucket mount on several.

A push is a base (every tensor) and perhaps a delta (the tensors that differ from the base). The
next push compares each tensor with what was written last, in the written dtype, and writes those
that differ: with a frozen tower, or a few trained layers, that is a part of the model; when all
of them differ, which is usual for full training, the delta is complete and becomes the new base. A
server that holds any push of this base loads the delta alone; a new one loads base, then delta. No
tensor is split: SGLang's `/update_weights_from_disk` takes some of the tensors, never a part of one.

Shards are written by a few threads, each of which holds one shard: there is no second copy of
the model in host memory. In a run of several processes all of them call `write`; a tensor is gathered
on the devices and each shard fetched and written by one process. What fails in one of them fails in all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from axpo_jax import processes
from axpo_jax.model import hf
from axpo_jax.model.config import ModelConfig

_PREFIX = "weights-"
_APPEARS_S = 60.0  # what one host has written, others see after seconds on NFS


class WrongParameters(ValueError):
  """Parameters that do not belong to the engine's model."""


@dataclasses.dataclass(frozen=True)
class PushConfig:
  """How weights are written.

  Attributes:
    folder: a folder of its own for this run, which trainer and servers see under this path. What an
      earlier run left in it is removed.
    dtype: of the written tensors. "bfloat16" unless the servers run in float32.
    skip_vision: leave the vision tower out: it is frozen, and the servers started with it.
    delta: compare with the last push and write only what changed. It reads that push again, which may
      cost more than it saves where the folder is a bucket; switched off, every push is whole.
    shard_bytes: size of a file.
    writers: files written at once; each holds `shard_bytes` (for a moment twice) of host memory.
  """

  folder: str
  dtype: str = "bfloat16"
  skip_vision: bool = False
  delta: bool = True
  shard_bytes: int = 1 << 30
  writers: int = 4

  def __post_init__(self):
    if not self.folder:
      raise ValueError("folder is empty: name one that trainer and servers both see")
    if self.dtype not in ("bfloat16", "float32"):
      raise ValueError(f"dtype={self.dtype!r}: servers load 'bfloat16' or 'float32'")
    if self.shard_bytes < 1 or self.writers < 1:
      raise ValueError(f"shard_bytes={self.shard_bytes} and writers={self.writers} must be positive")


@dataclasses.dataclass(frozen=True)
class Push:
  """Weights on disk.

  Attributes:
    version: the trainer's number.
    tag: what the servers call them; no two different weights share one, over restarts too.
    base: folder with every tensor.
    delta: folder with the tensors that differ from the base; None: none does.
    previous: tag of the push before; None for the first.
    tags_of_base: of the pushes that have this base: a server that holds one needs only the delta.
    changed: names of the tensors that changed since the push before; None if they were not compared.
    changed_share: share of the values that changed since then; 1 if they were not compared.
    bytes_written: by all processes.
    bytes_share: of what a push of every tensor takes.
    seconds: that writing took.
  """

  version: int
  tag: str
  base: pathlib.Path
  delta: pathlib.Path | None
  previous: str | None
  tags_of_base: frozenset[str]
  changed: frozenset[str] | None
  changed_share: float
  bytes_written: int
  bytes_share: float
  seconds: float


class PushFolder:
  """Writes pushes, and removes those that nobody needs any more.

  Args:
    config: see PushConfig.
    model_config: sizes; what the tensors are called.
  """

  def __init__(self, config: PushConfig, model_config: ModelConfig):
    self.config, self._model = config, model_config
    self._root = pathlib.Path(config.folder)
    self._table = [entry for entry in hf.name_table(model_config)
                   if not (config.skip_vision and entry.path[0] == "vision")]
    self._shards = hf.plan_shards(self._table, jnp.dtype(config.dtype), config.shard_bytes)
    self._shapes = {path: leaf.shape
                    for path, leaf in hf.by_path(hf.abstract_params(model_config)).items()}
    # What a server must hold, in its own names; the tower too where pushes leave it out.
    self.server_names = server_names(entry.name for entry in hf.name_table(model_config))
    self._latest: dict[str, pathlib.Path] = {}  # tensor -> the file that holds it
    self._last: Push | None = None
    self._begun = False

  def write(self, params: nnx.State, version: int) -> Push:
    """Writes `params` and returns what servers must load. Blocks; call it in all processes.

    The folders appear complete or not at all. Weights that equal the last push in every tensor
    write nothing and keep its tag.

    Raises:
      WrongParameters: paths or shapes are not those of the model.
      OSError: the folder cannot be written.
    """
    begin = time.perf_counter()
    leaves = self._checked(params)
    nonce, *_ = processes.on_all(self._prepare)
    tag = f"{version}-{nonce}"
    staging = self._root / f"{_PREFIX}{tag}.partial"
    # What the shards hold is swapped and not read from the folder: on NFS a listing may be old.
    written = processes.on_all(self._write_shards, leaves, staging)
    parts = [part for parts in written for part in parts]
    self._last = self._finish(staging, tag, version, parts, time.perf_counter() - begin)
    return self._last

  def remove_old(self) -> None:
    """Removes every push but the last, once no server reads them."""
    if self._last is None or not processes.is_main():
      return
    kept = {self._last.base, self._last.delta}
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

  def _write_shards(self, leaves: dict, staging: pathlib.Path) -> list[_Part]:
    """Writes this process's shards; what they hold. An error comes last, behind all gathering."""
    places = threading.Semaphore(self.config.writers)  # shards in host memory
    with concurrent.futures.ThreadPoolExecutor(self.config.writers) as pool:
      jobs = []
      for number, (file, entries) in enumerate(self._shards.items()):
        mine = number % jax.process_count() == jax.process_index()
        if mine:
          places.acquire()
        values = [_fetch(leaves[entry.path], entry.layer, self.config.dtype, mine)
                  for entry in entries]
        if mine:
          job = pool.submit(self._write_shard, staging / file, entries, values)
          job.add_done_callback(lambda _: places.release())
          jobs.append(job)
        del values
      return [job.result() for job in jobs]

  def _write_shard(self, file: pathlib.Path, entries: list[hf.Entry], values: list) -> _Part:
    """The tensors of one shard that changed."""
    part, kept = _Part(), {}
    for place, entry in enumerate(entries):
      tensor = entry.to_hf(values[place])
      values[place] = None  # the shard's memory moves over, tensor by tensor
      different = self._different(entry.name, tensor)
      part.values += tensor.size
      part.changed_values += different
      if different:
        part.changed.append(entry.name)
      if different or self._in_delta(entry.name):
        kept[entry.name] = tensor
        part.kept.append(entry.name)
        part.bytes += tensor.nbytes
    if kept:
      file.parent.mkdir(parents=True, exist_ok=True)
      save_file(kept, file, metadata={"format": "pt"})
      part.file = file.name
    return part

  def _different(self, name: str, tensor: np.ndarray) -> int:
    """Number of values that differ from the last push, bit by bit; all of them without one."""
    if not (self.config.delta and name in self._latest):
      return tensor.size
    with safe_open(self._latest[name], framework="numpy") as handle:
      before = handle.get_tensor(name)
    bits = np.dtype(f"u{tensor.itemsize}")
    return int(np.count_nonzero(tensor.view(bits) != before.view(bits)))

  def _in_delta(self, name: str) -> bool:
    """What once left the base stays in the delta, even if it equals the base again: servers may
    hold the other value."""
    delta = self._last.delta if self._last else None
    return delta is not None and self._latest[name].parent == delta

  def _finish(self, staging, tag, version, parts, seconds) -> Push:
    """From the staged shards to the push; the same in all processes."""
    last = self._last
    changed = None
    if self.config.delta and last is not None:
      changed = frozenset(name for part in parts for name in part.changed)
    kept = frozenset(name for part in parts for name in part.kept)
    values, written = sum(part.values for part in parts), sum(part.bytes for part in parts)
    numbers = dict(
      version=version, previous=last.tag if last else None, changed=changed, seconds=seconds,
      changed_share=sum(part.changed_values for part in parts) / values, bytes_written=written,
      bytes_share=written / (values * jnp.dtype(self.config.dtype).itemsize))
    if changed is not None and not changed:
      processes.on_all(_move, staging, None, [])
      return dataclasses.replace(last, **numbers)
    folder = self._root / f"{_PREFIX}{tag}"
    processes.on_all(_move, staging, folder, [part.file for part in parts if part.file])
    for file, entries in self._shards.items():
      self._latest |= {entry.name: folder / file for entry in entries if entry.name in kept}
    if len(kept) == len(self._table):
      return Push(tag=tag, base=folder, delta=None, tags_of_base=frozenset({tag}), **numbers)
    return Push(tag=tag, base=last.base, delta=folder, tags_of_base=last.tags_of_base | {tag},
                **numbers)


@dataclasses.dataclass
class _Part:
  """What one shard of a push holds; `file` is empty if nothing of it was written."""

  file: str = ""
  values: int = 0
  changed_values: int = 0
  bytes: int = 0
  changed: list[str] = dataclasses.field(default_factory=list)
  kept: list[str] = dataclasses.field(default_factory=list)


def _fetch(leaf: jax.Array, layer: int | None, dtype: str, mine: bool) -> np.ndarray | None:
  """One layer of a parameter on this host if it is `mine`; all processes must ask."""
  if leaf.is_fully_addressable:
    return hf.fetch(leaf, layer, dtype) if mine else None
  gathered = hf.gather(leaf, layer, dtype)
  return np.asarray(gathered.addressable_data(0)) if mine else None


def _move(staging: pathlib.Path, folder: pathlib.Path | None, files: Sequence[str]) -> None:
  """Gives a staged push of these files its name, or removes it. One process does."""
  if not processes.is_main():
    return
  if folder is None:
    shutil.rmtree(staging, ignore_errors=True)
    return
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


def server_name(name: str) -> str:
  """The parameter of SGLang's model that the checkpoint's tensor `name` ends up in."""
  name = name.removeprefix("model.").replace("language_model.", "model.", 1)
  head, _, kind = name.rpartition(".")
  for part, whole in _FUSED.items():
    if head.endswith(f".{part}"):
      head = head.removesuffix(part) + whole
  return f"{head}.{kind}"


def server_names(names: Iterable[str]) -> frozenset[str]:
  return frozenset(map(server_name, names))
