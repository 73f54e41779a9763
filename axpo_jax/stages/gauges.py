"""Use of the machine: memory and model FLOPs; and an overview of the parameters.

In: the devices of this process, the batches of an update, a tree of parameters. Out: metrics and a table.
"""

from __future__ import annotations

import collections
import os
import pathlib
import resource
import sys
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx

from axpo_jax import markdown, paths
from axpo_jax.model import flops
from axpo_jax.model.config import ModelConfig
from axpo_jax.train.batch import Batch
from axpo_jax.train.state import Optimizer

_GB = 1e9
_BACKWARD = 3  # forward and backward passes, in forward passes; recomputation is not counted


def memory() -> dict[str, float]:
  """Gigabytes in use: of the fullest device of this process, if the backend reports it (CPUs do not), and of the
  process itself."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  out = {}
  for name, key in (("memory/device_gb", "bytes_in_use"), ("memory/device_peak_gb", "peak_bytes_in_use"),
                    ("memory/device_limit_gb", "bytes_limit")):
    if found := [one[key] for one in stats if one and key in one]:
      out[name] = max(found) / _GB
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  out["memory/host_peak_gb"] = peak * (1 if sys.platform == "darwin" else 1024) / _GB
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():
    out["memory/host_gb"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / _GB
  return out


def utilisation(config: ModelConfig, batches: Sequence[Batch], seconds: float, devices: Sequence[jax.Device]
                ) -> dict[str, float]:
  """Speed of an update in model FLOPs: time/model_tflops_per_s of one device and, if the device's bfloat16 peak is
  known, the share time/mfu of it.

  Args:
    batches: of the update, on the host.
    seconds: duration of the update, scoring of log-probabilities and transfers included.
    devices: that it ran on.
  """
  devices = list(devices)
  per_second = sum(_BACKWARD * _forward(config, batch) for batch in batches) / seconds / len(devices)
  out = {"time/model_tflops_per_s": per_second / 1e12}
  if peak := flops.peak(devices[0].device_kind):
    out["time/mfu"] = per_second / peak
  return out


def _forward(config: ModelConfig, batch: Batch) -> float:
  """FLOPs of one forward pass of a batch, without padding."""
  ends_BxT = np.asarray(batch.ends_BxT)
  there_BxT = ends_BxT > 0
  tokens = int(there_BxT.sum())
  # A token is attended to from its own position up to its end.
  seen = (ends_BxT - np.arange(ends_BxT.shape[1]))[there_BxT].sum() / max(tokens, 1)
  patches, seen_patches = 0, 0.0
  if batch.vision is not None:
    segments_RxP = np.asarray(batch.vision.segments_RxP)
    sizes = [int((row == image).sum()) for row in segments_RxP for image in np.unique(row[row > 0])]
    patches, seen_patches = sum(sizes), sum(size * size for size in sizes) / max(sum(sizes), 1)
  return flops.needed(config, tokens=tokens, targets=int((np.asarray(batch.weights_BxG) != 0).sum()),
                      patches=patches, seen=float(seen), seen_patches=seen_patches)


def overview(trained: nnx.State, frozen: nnx.State) -> tuple[str, str]:
  """One line about the parameters of a model, and a table with a row for each of its parts."""
  parts: dict[tuple[str, str], list[jax.Array]] = collections.defaultdict(list)
  for state, params in (("trained", trained), ("frozen", frozen)):
    for path, variable in nnx.to_flat_state(params):
      parts[".".join(map(str, path[:2])), state].append(variable[...])
  rows = [("part", "", "number", "GB", "dtype")]
  for (name, state), values in sorted(parts.items()):
    rows.append((name, state, f"{_count(values):,}", f"{_bytes(values) / _GB:.3f}",
                 ", ".join(sorted({str(value.dtype) for value in values}))))
  sums = {state: [value for (_, own), values in parts.items() if own == state for value in values]
          for state in ("trained", "frozen")}
  every = sums["trained"] + sums["frozen"]
  rows.append(("all", "", f"{_count(every):,}", f"{_bytes(every) / _GB:.3f}", ""))
  line = (f"{_count(every):,} parameters, {_count(sums['trained']):,} of them trained; {_bytes(every) / _GB:.2f} GB "
          "without gradients and optimizer state")
  return line, markdown.table(rows)


def write_overview(params: nnx.State, optimizer: Optimizer, folder: epath.Path) -> None:
  """Prints the line, and writes the table to parameters.md of a stage's folder."""
  line, table = overview(*optimizer.split(params))
  print(f"{folder.name}: {line}", flush=True)
  paths.make(folder)
  paths.write_text(folder / "parameters.md", f"{line}\n\n{table}\n")


def _count(values: Sequence[jax.Array]) -> int:
  return sum(value.size for value in values)


def _bytes(values: Sequence[jax.Array]) -> int:
  return sum(value.size * value.dtype.itemsize for value in values)
