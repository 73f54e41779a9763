"""Floating-point operations of a traced function, and the least that a model needs.

Only matrix products are counted, since all else is small beside them. Unlike the compiler's own count, this one
multiplies a scan's body by its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from axpo_jax.model.config import ModelConfig


def count(jaxpr: Any, rounds: int | None = None) -> float:
  """FLOPs of all matrix products of a (closed) jaxpr, all devices together; of branches the
  costliest counts.

  Args:
    rounds: of loops that end when the data says so.

  Raises:
    ValueError: such a loop holds a matrix product, and `rounds` is None.
  """
  return sum(_of(equation, rounds) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of(equation: Any, rounds: int | None) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  if name == "ragged_dot_general":
    (contracted, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (ragged,) = params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    # Rows of each group meet that group's matrix alone; a product over the rows has one result a group.
    each = out[1:] if ragged in contracted else out
    return 2.0 * math.prod(each) * math.prod(lhs[i] for i in contracted)
  if name == "pallas_call" and params.get("cost_estimate") is not None:
    return float(params["cost_estimate"].flops)
  inner = [count(jaxpr, rounds) for jaxpr in _jaxprs(params)]
  if name == "cond":
    return max(inner)
  if name == "while" and sum(inner):
    if rounds is None:
      raise ValueError("a while loop holds matrix products; how often it runs is not known")
    return sum(inner) * rounds
  if name == "shard_map":
    return sum(inner) * params["mesh"].size
  if name == "pallas_call":
    return sum(inner) * math.prod(params["grid_mapping"].grid)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(getattr(item, "jaxpr", item), "eqns"):
        yield item


# Dense bfloat16 FLOPs a second, by words of the driver's name for the device; the first match counts. TPUs:
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs: NVIDIA's data sheets.
PEAKS = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "B200": 2250e12, "H200": 989e12,
         "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak(device_kind: str) -> float | None:
  """PEAKS of a `jax.Device.device_kind`; None if it is not known."""
  return next((found for words, found in PEAKS.items()
               if all(word in device_kind for word in words.split())), None)


def needed(config: ModelConfig, *, tokens: int, targets: int, patches: int, seen: float,
           seen_patches: float) -> float:
  """The least FLOPs of one forward pass: every weight once a token, and attention to visible tokens alone.
  Training needs three times as much; recomputation is not counted.

  Args:
    tokens: of the text, image tokens included.
    targets: that are scored over the vocabulary.
    patches: of the vision tower.
    seen, seen_patches: tokens (patches) that one attends to, on average.
  """
  text, vision = config.text, config.vision
  width, heads = text.hidden_size, text.num_heads * text.head_dim
  kv = text.num_kv_heads * text.head_dim
  mlp = 3 * text.intermediate_size
  if text.experts:  # those that a token goes through, and the router
    mlp = 3 * text.experts.per_token * text.experts.intermediate_size + text.experts.count
  layer = width * (2 * heads + 2 * kv + mlp) + 2 * seen * heads
  block = (4 * vision.hidden_size + 2 * vision.intermediate_size + 2 * seen_patches)
  merged = vision.hidden_size * vision.merge_unit
  mergers = (1 + len(vision.deepstack_layers)) * merged * (merged + vision.out_hidden_size)
  return 2.0 * (tokens * text.num_layers * layer + targets * text.vocab_size * width
                + patches * (vision.depth * vision.hidden_size * block
                             + vision.patch_dim * vision.hidden_size + mergers / vision.merge_unit))
