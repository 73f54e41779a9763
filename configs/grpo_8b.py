"""GRPO of Qwen3-VL-8B: `axpo_8b.py` without resampling, the paper's baseline.

  python launch/main.py --config=configs/grpo_8b.py --workdir=runs/grpo_8b \
    --config.model.checkpoint=/models/Qwen3-VL-8B-SFT \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

What to expect, from the paper's Table 1: Pass@1 60.5, Pass@4 74.0, and tool use that does not grow.
"""

from ml_collections import ConfigDict

from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  c = axpo_8b()
  c.rl.recipe = "grpo"
  return c
