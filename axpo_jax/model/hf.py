"""Hugging Face checkpoints of Qwen3-VL, in and out.

`hf_names.name_table` says which tensors of a checkpoint each parameter is made of. Converting reshapes and
transposes only, so values survive a round trip bit for bit (bfloat16 through float32 and back included).

Loading reads one tensor at a time and keeps only the parts that this process's devices hold;
saving fetches one shard file at a time. Peak host memory is one stacked parameter's local part, or
one shard.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.expert_files import ReleasedLayout
from axpo_jax.model.hf_names import EMBEDDING, HEAD, Entry, Path_, name_table
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.model.tensor_files import INDEX_FILE, SINGLE_FILE, CheckpointError, Reader

# What a tokenizer or image processor leaves beside the weights; copied as they are.
_COMPANIONS = (
  "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
  "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
  "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json",
)
CONFIG_FILE = "config.json"
# What must be there to make prompts of a checkpoint, without its weights.
SMALL_FILES = (*_COMPANIONS, CONFIG_FILE)


class CheckpointMismatch(CheckpointError):
  """A checkpoint's tensors are not those of the config; the message lists every one."""


def stored_dtype(path: str | os.PathLike) -> str | None:
  """"bfloat16" if all tensors of a checkpoint folder are: parameters then lose nothing in it. Else
  None.

  Raises: FileNotFoundError if the folder holds no safetensors.
  """
  with Reader(Path(path)) as reader:
    return "bfloat16" if reader.dtypes() == {"BF16"} else None


def abstract_params(config: ModelConfig) -> nnx.State:
  """Shapes, dtypes and logical axes of the parameters, without making any."""
  return nnx.eval_shape(lambda: nnx.state(Qwen3VL(config, rngs=nnx.Rngs(0)), nnx.Param))


def load_params(
  path: str | os.PathLike,
  config: ModelConfig,
  *,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules | None = None,
) -> nnx.State:
  """Reads a checkpoint folder (one safetensors file, or shards with an index).

  Parameters get config.param_dtype and, with a mesh, the sharding that their logical axes ask for
  (else they are uncommitted on the default device). Merge them with the graph of any `Qwen3VL(config)`.

  Raises:
    CheckpointMismatch: lists all unknown, missing and misshapen tensors, before anything is read.
    CheckpointError: a file is cut or damaged, holds other numbers than floats, NaN or infinity, or a
      head that differs from the embedding to which the config ties it.
    FileNotFoundError: the folder holds no safetensors.
  """
  abstract = abstract_params(config)
  trees = [abstract]
  if mesh is not None:
    trees.append(sharding.param_shardings(abstract, mesh, rules))
  with Reader(Path(path)) as files:
    reader, table = ReleasedLayout(files, config.text), name_table(config)
    _check(reader.shapes(), table, tied=config.text.tie_word_embeddings)
    entries: dict[Path_, list[Entry]] = {}
    for entry in table:
      entries.setdefault(entry.path, []).append(entry)
    if config.text.tie_word_embeddings:
      _check_tied(reader)

    def load(path, leaf, target=None):
      return _load_leaf(reader.read, entries[_names(path)], leaf, target)

    return jax.tree_util.tree_map_with_path(load, *trees)


def check_checkpoint(path: str | os.PathLike, config: ModelConfig) -> None:
  """Reads the headers of a folder's files alone. Raises: what `load_params` raises."""
  with Reader(Path(path)) as reader:
    _check(ReleasedLayout(reader, config.text).shapes(), name_table(config), tied=config.text.tie_word_embeddings)


def save_checkpoint_hf(
  path: str | os.PathLike,
  params: Qwen3VL | nnx.State,
  config: ModelConfig,
  *,
  max_shard_bytes: int = 5_000_000_000,
  dtype: str | None = None,
  tokenizer_from: str | os.PathLike | None = None,
) -> None:
  """Writes a checkpoint folder that `transformers` and SGLang load.

  The folder appears complete or not at all. In a run of several processes all of them must call
  this; the first one writes.

  Args:
    params: a model or its parameters; pure dicts and optimizer wrappers are not accepted.
    max_shard_bytes: a larger model is split over several files with an index.
    dtype: of the written tensors, "bfloat16" or "float32"; None keeps config.param_dtype.
    tokenizer_from: a folder whose tokenizer, chat template and processor files are copied.
  Raises: FileExistsError if the folder exists and is not empty.
  """
  path, dtype = Path(path), dtype or config.param_dtype
  leader = jax.process_index() == 0
  if leader and path.exists() and any(path.iterdir()):
    raise FileExistsError(f"{path} is not empty; save to a new folder or remove it first")
  state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
  leaves = by_path(state)
  table = name_table(config)
  shards = plan_shards(table, jnp.dtype(dtype), max_shard_bytes)
  staging = path.with_name(path.name + ".partial")
  if leader:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
  for file, members in shards.items():
    tensors = {e.name: e.to_hf(fetch(leaves[e.path], e.layer, dtype)) for e in members}
    if leader:
      save_file(tensors, staging / file, metadata={"format": "pt"})
  if leader:
    _write_rest(staging, config, dtype, shards, tokenizer_from)
    if path.exists():
      path.rmdir()
    staging.rename(path)


# Loading --------------------------------------------------------------------------------------


def _check_tied(reader: ReleasedLayout) -> None:
  """A head that is stored beside a tied embedding must be equal to it."""
  if HEAD in reader and not np.array_equal(reader.read(HEAD), reader.read(EMBEDDING)):
    raise CheckpointError(
      f"{HEAD} differs from {EMBEDDING}, and config.json ties them: one of the two files belongs to another "
      'checkpoint; if the head is right, write "tie_word_embeddings": false')


def _check(found: Mapping[str, tuple[int, ...]], table: list[Entry], *, tied: bool) -> None:
  wanted = {entry.name: entry.shape for entry in table}
  # Some writers store the tied head a second time; it is the embedding.
  ignored = {HEAD} if tied else set()
  problems = {
    "missing": [f"{n} {list(s)}" for n, s in wanted.items() if n not in found],
    "unknown": [f"{n} {list(s)}" for n, s in found.items() if n not in wanted.keys() | ignored],
    "misshapen": [
      f"{n} is {list(found[n])}, the config needs {list(s)}"
      for n, s in wanted.items()
      if n in found and found[n] != s
    ],
  }
  lines = [f"  {kind}: {item}" for kind, items in problems.items() for item in sorted(items)]
  if set(wanted) - set(found) == {HEAD}:
    hint = ('if the embedding is the head too, config.json must say "tie_word_embeddings": true at its top '
            "level, not in text_config alone")
  else:
    hint = "is it this checkpoint's config.json?"
  if lines:
    raise CheckpointMismatch(
      f"{len(lines)} tensors do not fit the config ({hint}):\n" + "\n".join(lines))


Bounds = tuple[tuple[int, int], ...]  # (start, stop) of every axis


def _load_leaf(read, entries, leaf, target: jax.sharding.Sharding | None) -> jax.Array:
  """One parameter, of which only this process's parts are kept."""
  if target is None:
    whole = tuple((0, n) for n in leaf.shape)
    return jnp.asarray(_read_parts(read, entries, leaf, {whole})[whole])
  bounds = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
    for device, index in target.addressable_devices_indices_map(leaf.shape).items()
  }
  parts = _read_parts(read, entries, leaf, set(bounds.values()))
  arrays = [jax.device_put(parts[b], device) for device, b in bounds.items()]
  return jax.make_array_from_single_device_arrays(leaf.shape, target, arrays)


def _read_parts(
  read: Callable[[str], np.ndarray], entries: list[Entry], leaf: Any, wanted: set[Bounds]
) -> dict[Bounds, np.ndarray]:
  """The wanted parts of one parameter; each tensor of the checkpoint is read once."""
  parts = {b: np.empty([stop - start for start, stop in b], leaf.dtype) for b in wanted}
  for entry in entries:
    if entry.layer is None:
      tensor = entry.to_ours(read(entry.name), leaf.shape)
      for bounds, part in parts.items():
        part[...] = tensor[_window(bounds)]
      continue
    holders = [b for b in wanted if b[0][0] <= entry.layer < b[0][1]]
    if holders:
      tensor = entry.to_ours(read(entry.name), leaf.shape[1:])
    for bounds in holders:
      parts[bounds][entry.layer - bounds[0][0]] = tensor[_window(bounds[1:])]
  return parts


def _window(bounds: Bounds) -> tuple[slice, ...]:
  return tuple(slice(*b) for b in bounds)


def _names(path) -> Path_:
  """A jax key path as names, without nnx.Variable's own level."""
  names = (getattr(k, "key", getattr(k, "name", None)) for k in path)
  return tuple(n for n in names if isinstance(n, str) and n not in ("value", "raw_value"))


# Saving ---------------------------------------------------------------------------------------


def by_path(params: nnx.State) -> dict[Path_, jax.Array]:
  """The parameters by the paths that `Entry.path` names."""
  return {_names(p): v for p, v in jax.tree_util.tree_flatten_with_path(params)[0]}


def fetch(leaf: jax.Array, layer: int | None, dtype: str) -> np.ndarray:
  """One layer of a parameter (all of it if it is not stacked), whole, on this host.

  In a run of several processes all of them must call this, in the same order.
  """
  value = leaf.astype(dtype) if layer is None else _take_layer(leaf, layer, dtype)
  if not value.is_fully_addressable:
    return multihost_utils.process_allgather(value, tiled=True)
  return np.asarray(value)


def gather(leaf: jax.Array, layer: int | None, dtype: str) -> jax.Array:
  """`fetch`, left on the devices: each of them holds all of it."""
  value = leaf.astype(dtype) if layer is None else _take_layer(leaf, layer, dtype)
  whole = jax.sharding.NamedSharding(value.sharding.mesh, jax.sharding.PartitionSpec())
  return jax.jit(_same, out_shardings=whole)(value)


def _same(x: jax.Array) -> jax.Array:
  return x


# The layer is traced: as a Python integer in an index it would be one compilation a layer.
@functools.partial(jax.jit, static_argnames="dtype")
def _take_layer(stacked: jax.Array, layer: int, dtype: str) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False).astype(dtype)


def plan_shards(table: list[Entry], dtype: np.dtype, limit: int) -> dict[str, list[Entry]]:
  """File name -> its tensors, filled in order; a tensor larger than the limit has its own file."""
  groups: list[list[Entry]] = [[]]
  room = limit
  for entry in table:
    size = math.prod(entry.shape) * dtype.itemsize
    if size > room and groups[-1]:
      groups.append([])
      room = limit
    groups[-1].append(entry)
    room -= size
  if len(groups) == 1:
    return {SINGLE_FILE: groups[0]}
  return {f"model-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}


def _write_rest(folder: Path, config, dtype, shards, tokenizer_from) -> None:
  if len(shards) > 1:
    total = sum(math.prod(e.shape) for g in shards.values() for e in g) * jnp.dtype(dtype).itemsize
    weight_map = {e.name: file for file, group in shards.items() for e in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
  # Both spellings: transformers 5 and SGLang read `dtype`, transformers 4 `torch_dtype`.
  raw = {**config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
  (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2))
  for name in _COMPANIONS if tokenizer_from is not None else ():
    source = Path(tokenizer_from) / name
    if source.exists():
      shutil.copy(source, folder / name)
