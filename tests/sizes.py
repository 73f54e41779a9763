"""A checkpoint's small files without its weights: what checks of a config read."""

import json
import pathlib

from axpo_jax.model.config import ModelConfig
from axpo_jax.model.presets import PRESETS


def write(folder: pathlib.Path, model: ModelConfig = PRESETS["8b"]) -> pathlib.Path:
  """config.json and preprocessor_config.json of a model of these sizes; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(model.to_hf()))
  (folder / "preprocessor_config.json").write_text(json.dumps({
    "patch_size": model.vision.patch_size, "temporal_patch_size": model.vision.temporal_patch_size,
    "merge_size": model.vision.spatial_merge_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
  return folder
