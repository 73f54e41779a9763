"""AXPO of Qwen3-VL-8B with the paper's values (arXiv 2605.28774, section 5).

  python launch/main.py --config=configs/axpo_8b.py --workdir=gs://bucket/axpo_8b \
    --config.model.checkpoint=/models/Qwen3-VL-8B-SFT \
    --config.data.path=rl.jsonl --config.data.eval_path=eval.jsonl

All three of the paper's tools are offered: python runs in a sandbox, and search needs a key in
TAVILY_API_KEY (or --config.agent.search.backend=local and a corpus; docs/tools.md). Rollouts come from
SGLang servers: the run says how many GPUs they take, or names running ones in --config.rollout.urls
(docs/sidecar.md).

The checkpoint is any Qwen3-VL folder in Hugging Face layout; the paper starts from its own SFT model
(`sft_8b.py` trains one from your trajectories). What to expect, from the paper's Table 1, averaged over
nine benchmarks: Pass@1 60.5 -> 62.3 and Pass@4 74.0 -> 75.8 against GRPO, tool use 69.0 -> 82.9 %.
"""

from ml_collections import ConfigDict

from axpo_jax.config import base_config


def get_config() -> ConfigDict:
  c = base_config()  # the paper's numbers
  c.agent.tools = ("image_zoom_in", "python", "tavily-search")  # what its system prompt speaks of
  c.agent.scopes = ("read_image", "execute", "network")
  # At this size samplers have devices of their own. Without config.rollout.urls the run starts servers
  # on half of this machine's GPUs and trains on the others.
  c.rollout.engine = "sglang"
  # A row for each of four GPUs, since two do not fit 80 GB (docs/performance.md); more devices get one each.
  c.batch.update(rows=4, image_rows=4)
  return c
