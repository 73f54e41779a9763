"""A model's parameters or gradients as a checkpoint of Hugging Face names them."""

import numpy as np

from axpo_jax.model import hf, hf_names


def by_name(params, config) -> dict[str, np.ndarray]:
  """Tensors in their own dtypes."""
  leaves = hf.by_path(params)
  return {entry.name: entry.to_hf(hf.fetch(leaf, entry.layer, str(leaf.dtype)))
          for entry in hf_names.name_table(config) for leaf in [leaves[entry.path]]}
