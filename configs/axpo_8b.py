"""AXPO of Qwen3-VL-8B with the paper's values (arXiv 2605.28774, section 5).

  python launch/main.py --config=configs/axpo_8b.py --workdir=gs://bucket/axpo_8b \
    --config.model.checkpoint=/models/Qwen3-VL-8B-SFT \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

The checkpoint is any Qwen3-VL folder in Hugging Face layout; the paper starts from its own SFT model
(`sft_8b.py` trains one from your trajectories). What to expect, from the paper's Table 1, averaged over
nine benchmarks: Pass@1 60.5 -> 62.3 and Pass@4 74.0 -> 75.8 against GRPO, tool use 69.0 -> 82.9 %.
"""

from ml_collections import ConfigDict

from axpo_jax.config import base_config


def get_config() -> ConfigDict:
  return base_config()  # the base is the paper's 8B recipe
