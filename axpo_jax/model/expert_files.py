"""The three ways in which checkpoints store experts, read as one.

  released         ...mlp.experts.gate_up_proj [E, D, 2F]    ...down_proj [E, F, D]
  transformers 5   ...mlp.experts.gate_up_proj [E, 2F, D]    ...down_proj [E, D, F]
  one by one       ...mlp.experts.7.gate_proj.weight [F, D], up_proj [F, D], down_proj [D, F]

The first is that of the released Qwen3-VL files, which transformers and SGLang read, and the one that we write.
`save_pretrained` of transformers 5 writes the second, which SGLang misreads.

Legend: E experts, D model, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from axpo_jax.model.config import TextConfig
from axpo_jax.model.tensor_files import Reader


class ReleasedLayout:
  """A Reader's tensors, with experts in the released layout. Each is made when it is read."""

  def __init__(self, reader: Reader, text: TextConfig):
    self._reader, self._text = reader, text
    self._shapes = reader.shapes()
    self._made: dict[str, Callable[[], np.ndarray]] = {}
    for layer in range(text.num_layers if text.experts else 0):
      self._find(f"model.language_model.layers.{layer}.mlp.experts")

  def __contains__(self, name: str) -> bool:
    return name in self._shapes

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    return self._made[name]() if name in self._made else self._reader.read(name)

  def _find(self, root: str) -> None:
    experts, D = self._text.experts, self._text.hidden_size
    E, F = experts.count, experts.intermediate_size
    for name, shape, parts in (("gate_up_proj", (E, D, 2 * F), ("gate_proj", "up_proj")),
                               ("down_proj", (E, F, D), ("down_proj",))):
      whole = f"{root}.{name}"
      single = {f"{root}.{e}.{part}.weight": (shape[2] // len(parts), shape[1]) for e in range(E) for part in parts}
      if self._shapes.get(whole) == (shape[0], shape[2], shape[1]):
        self._add(whole, shape, lambda whole=whole: self._reader.read(whole).transpose(0, 2, 1))
      elif all(self._shapes.get(part) == size for part, size in single.items()):
        self._add(whole, shape, lambda root=root, parts=parts: self._stacked(root, parts))
        for part in single:
          del self._shapes[part]

  def _add(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
    self._shapes[name], self._made[name] = shape, make

  def _stacked(self, root: str, parts: tuple[str, ...]) -> np.ndarray:
    return np.stack([
      np.concatenate([self._reader.read(f"{root}.{e}.{part}.weight").T for part in parts], axis=1)
      for e in range(self._text.experts.count)])
