"""Reads the tensors of a checkpoint folder's safetensors files, which are untrusted.

In: a folder with one file, or with shards and an index. Out: shapes, dtypes and values by name; or a
CheckpointError that names the file: it is damaged, an index leaves the folder, tensors are no floats,
or values are not finite.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# What parameters may be stored as, in safetensors' words.
_DTYPES = ("F32", "BF16", "F16")
_AT_ONCE = 1 << 18  # values that are checked together


class CheckpointError(ValueError):
  """A file of a checkpoint that is damaged or does not fit the others; the message names it."""


class Reader(contextlib.ExitStack):
  """All tensors of a folder, by name; files are memory-mapped.

  Raises:
    CheckpointError: see the module docstring; of values only by `read`.
    FileNotFoundError: the folder holds no safetensors, or not all that its index names.
  """

  def __init__(self, folder: Path):
    super().__init__()
    self._files, self._paths = {}, {}
    for path in _safetensors_files(folder):
      try:
        file = self.enter_context(safe_open(path, framework="numpy"))
      except SafetensorError as error:
        raise CheckpointError(f"{path} is cut or damaged ({error}): copy it again") from error
      self._files.update(dict.fromkeys(file.keys(), file))
      self._paths.update(dict.fromkeys(file.keys(), path))
    if wrong := [name for name in self._files if self._dtype(name) not in _DTYPES]:
      raise CheckpointError(
        f"{folder}: {len(wrong)} tensors are not of {', '.join(_DTYPES)} ({wrong[0]} is of "
        f"{self._dtype(wrong[0])}); a quantised checkpoint cannot be trained: take the one it was made from")

  def __contains__(self, name: str) -> bool:
    return name in self._files

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {n: tuple(f.get_slice(n).get_shape()) for n, f in self._files.items()}

  def dtypes(self) -> set[str]:
    return {self._dtype(name) for name in self._files}

  def read(self, name: str) -> np.ndarray:
    tensor = self._files[name].get_tensor(name)
    if not _is_finite(tensor):
      raise CheckpointError(f"{self._paths[name]}: {name} holds NaN or infinity: the model had diverged when "
                            "it was saved, or the file is damaged")
    return tensor

  def _dtype(self, name: str) -> str:
    return self._files[name].get_slice(name).get_dtype()


def _safetensors_files(folder: Path) -> list[Path]:
  if (folder / INDEX_FILE).exists():
    try:
      names = set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values())
      files = [folder / name for name in sorted(names)]
      if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{outside[0]!r} leaves the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise CheckpointError(f"{folder / INDEX_FILE} is no index with a weight_map of tensors to files "
                            f"({type(error).__name__}: {error}): copy it again") from error
  else:
    files = [folder / SINGLE_FILE]
  if lost := [str(f) for f in files if not f.exists()]:
    raise FileNotFoundError(
      f"no {', '.join(lost)}; a checkpoint folder holds {SINGLE_FILE}, or {INDEX_FILE} and the "
      "shards that it names"
    )
  return files


def _is_finite(tensor: np.ndarray) -> bool:
  """By the bits, in pieces that a cache holds: NumPy's isfinite is slow for bfloat16."""
  bits = np.dtype(f"u{tensor.itemsize}")
  infinity, without_sign = np.array(np.inf, tensor.dtype).view(bits), bits.type(np.iinfo(bits).max >> 1)
  flat = tensor.reshape(-1).view(bits)
  return not any(((flat[at:at + _AT_ONCE] & without_sign) >= infinity).any()
                 for at in range(0, flat.size, _AT_ONCE))
