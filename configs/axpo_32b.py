"""AXPO of Qwen3-VL-32B on a pod slice: the recipe of `axpo_8b.py` and how it is spread.

  python launch/compile.py --config=configs/axpo_32b.py --config.model.preset=32b --topology=v5p:4x4x4
  python launch/main.py --config=configs/axpo_32b.py --workdir=gs://bucket/axpo_32b \
    --config.model.checkpoint=/models/Qwen3-VL-32B-SFT --config.rollout.urls=http://sampler:30000 \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

The first command needs no TPU and says what the second needs. Sampling is done by
servers: the slice is the trainer's. The paper has no figures for this size.
"""

from ml_collections import ConfigDict

from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  c = axpo_8b()
  c.mesh.tensor = 4
  c.batch.rows = 16
  c.rollout.sidecar.tensor_parallel = 2  # GPUs of one server: 67 GB of weights leave no room on one
  return c
