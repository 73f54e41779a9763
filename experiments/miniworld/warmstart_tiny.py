"""Makes the warm start that the tiny configs begin with: a policy that has learnt to see.

  python launch/main.py --config=experiments/miniworld/warmstart_tiny.py --workdir=runs/warmstart

About one million random parameters learn from dense perception tasks (where is ...? what is at ...?
list the marks; read this crop) to point and to read. No tools and no agent prompt: those come in
SFT. The result, runs/warmstart/sft/policy, is what `axpo_jax/assets/warm_start` holds.
"""

from ml_collections import ConfigDict

from axpo_jax.config import ASSETS
from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("sft",)
  c.model.checkpoint, c.model.preset = "", "tiny"
  c.model.tokenizer = str(ASSETS / "tiny_tokenizer")
  c.images.zoom_min_pixels, c.images.zoom_max_pixels = 48 * 48, 72 * 72  # as when it was run
  c.data.miniworld.train_size = 10_000_000
  c.data.miniworld.families.update(search=0.0, reasoning=0.0)
  c.agent.system_prompt, c.agent.tools = "", ()
  c.batch.update(rows=16, length=192)
  c.data.miniworld.marks = (1, 4)  # one mark alone shows where it is before colours must be told apart
  c.sft.update(steps=5000, examples=32, max_length=192)
  c.sft.kinds = ConfigDict(dict(where=.25, what_at=.15, list=.20, read_crop=.20, read_large=.20))
  # AdamW stays on a plateau for tens of thousands of examples here; Muon leaves it within a few.
  c.sft.optimizer.update(name="muon", learning_rate=5e-3, warmup=0.01, b2=0.98)
  c.checkpoint.every = 200
  return c
