"""SFT in miniature: the first stage of `axpo_tiny.py` alone.

  python launch/main.py --config=configs/sft_tiny.py --workdir=runs/sft_tiny

The warm start learns the agent's format from the scripted teacher. Expect the loss per token
(`sft/nll`) to fall steeply within the first dozen steps and slowly from there. The result is
runs/sft_tiny/sft/policy.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("sft",)
  return c
