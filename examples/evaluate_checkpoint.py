"""A config of your own: a checkpoint is measured on a file of questions, and nothing is trained.

    axpo-train --config=examples/evaluate_checkpoint.py --workdir=runs/evaluated \
      --config.model.checkpoint=runs/own_reward/rl/policy --config.data.eval_path=questions.jsonl

The checkpoint is a folder in Hugging Face layout or, for this config's parent `axpo_8b`, a name on the hub such as
Qwen/Qwen3-VL-8B-Thinking. The run prints Pass@1 and Pass@4 with standard errors, and leaves eval/results.json, with
every question's outcome and its rollouts in files beside it; `axpo-report runs/evaluated` makes a page of them.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as parent  # configs.axpo_8b for the real models


def get_config() -> ConfigDict:
  c = parent()
  c.stages = ("eval",)
  c.data.source = "jsonl"  # docs/data.md: id, question, answer, images
  c.agent.tools = ("image_zoom_in",)
  c.agent.scopes = ("read_image",)
  c.eval.update(questions=4, rollouts=4)
  return c
