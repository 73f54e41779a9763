"""GRPO in miniature: `axpo_tiny.py` without resampling, for comparison.

  python launch/main.py --config=configs/grpo_tiny.py --workdir=runs/grpo_tiny

It gives, to the last bit, the metrics of `axpo_tiny.py --config.rl.resample.ratio=0`.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.rl.recipe = "grpo"
  return c
