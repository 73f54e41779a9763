"""SFT of Qwen3-VL-8B on a teacher's trajectories, with the paper's values.

  python launch/main.py --config=configs/sft_8b.py --workdir=runs/sft_8b \
    --config.model.checkpoint=/models/Qwen3-VL-8B-Thinking --config.sft.path=trajectories.jsonl

Trajectories are rollout dumps as this package writes them (docs/data.md). The paper has 64,274 of
them from Qwen3-VL-32B-Thinking, about a quarter with a tool call, all with the right answer: three
epochs at 128 a step are 1,500 steps. The paper's Table 1: Pass@1 54.4 -> 58.5, Pass@4 69.6 -> 72.2.
"""

from ml_collections import ConfigDict

from configs.axpo_8b import get_config as axpo_8b


def get_config() -> ConfigDict:
  c = axpo_8b()
  c.stages = ("sft",)
  return c
