"""Changes single weights of a running SGLang server. Runs in SGLang's processes: torch, nothing of ours.

In: a folder that `weight_push` wrote, with "<tensor>:gaps" and "<tensor>:values" of tensors of which some
values changed, and whole tensors of which most did. Out: the model's parameters, changed in place.

A rank holds slices of fused tensors, and only SGLang's own loaders know which. So they are given a tensor
that is NaN wherever nothing changed, and their copies skip NaN:

  gaps 2 3, values a b   ->   nan nan a nan nan b nan   ->   load_weights: slice, fuse   ->   copy what is not NaN
"""

import pathlib

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode


class _SkipNaN(TorchDispatchMode):
  """`target.copy_(source)` leaves values of `target` for which `source` has NaN."""

  def __torch_dispatch__(self, func, types, args=(), kwargs=None):
    if func is not torch.ops.aten.copy_.default:
      return func(*args, **(kwargs or {}))
    target, source = args[:2]
    source = source.to(device=target.device, dtype=target.dtype)
    return target.copy_(torch.where(source.isnan(), target, source))


def apply(model, named_tensors) -> None:
  """SGLang's interface of a custom loader; the name of the only tensor is the folder.

  Raises:
    OSError, ValueError: the folder is gone or damaged. SGLang then ends the server, which starts again.
  """
  ((folder, nothing),) = named_tensors
  files = sorted(pathlib.Path(folder).glob("*.safetensors"))
  if not pathlib.Path(folder).is_dir():
    raise FileNotFoundError(f"{folder} is gone, or this host does not see it")
  with torch.no_grad(), _SkipNaN():
    for file in files:
      model.load_weights(_tensors(file, nothing.device))


def _tensors(file: pathlib.Path, device):
  """(name, tensor) of all tensors in a file, one at a time; NaN where nothing changed."""
  with safe_open(file, framework="pt") as handle:
    shapes = handle.metadata()
    for key in handle.keys():  # noqa: SIM118
      name, _, part = key.partition(":")
      if not part:
        yield name, handle.get_tensor(key).to(device)
      elif part == "values":
        values = handle.get_tensor(key).to(device)
        shape = [int(size) for size in shapes[name].split(",")]
        tensor = torch.full(shape, torch.nan, dtype=values.dtype, device=device)
        gaps = handle.get_tensor(f"{name}:gaps").to(device=device, dtype=torch.int64)
        tensor.view(-1)[gaps.cumsum(0)] = values
        yield name, tensor
