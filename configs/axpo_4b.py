"""AXPO of Qwen3-VL-4B: the recipe of `axpo_8b.py`, which the paper uses for all sizes.

  python launch/main.py --config=configs/axpo_4b.py --workdir=runs/axpo_4b \
    --config.model.checkpoint=/models/Qwen3-VL-4B-SFT \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

Sizes are read from the checkpoint. What to expect, from the paper's Table 1 (Pass@1 / Pass@4, mean of
nine benchmarks): GRPO 58.8 / 71.7, AXPO 60.2 / 74.1.
"""

from ml_collections import ConfigDict

from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  return axpo_8b()
