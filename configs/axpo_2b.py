"""AXPO of Qwen3-VL-2B: the recipe of `axpo_8b.py`, which the paper uses for all sizes.

  python launch/main.py --config=configs/axpo_2b.py --workdir=runs/axpo_2b \
    --config.model.checkpoint=/models/Qwen3-VL-2B-SFT \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

Sizes are read from the checkpoint. What to expect, from the paper's Table 1 (Pass@1 / Pass@4, mean of
nine benchmarks): GRPO 50.7 / 66.8, AXPO 51.8 / 69.6.
"""

from ml_collections import ConfigDict

from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  return axpo_8b()
