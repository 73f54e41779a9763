"""Teaches the warm start to copy, which searching and computing rest on: for `axpo_tiny.py`.

  python launch/main.py --config=configs/groundwork_tiny.py --workdir=runs/groundwork

The warm start has never had to copy a name or a number. Here it repeats lines, looks facts up in short
texts and writes the sum that a question asks for, besides the tasks it knows; under the agent's own
prompt, tools listed, but without using any. Expect 15 to 20 minutes on two cores; the loss falls from
0.85 to 0.05 nats a token. The result, runs/groundwork/sft/policy, is what `axpo_jax/assets/groundwork`
holds.
"""

from ml_collections import ConfigDict

from axpo_jax.config import ASSETS
from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("sft",)
  c.model.checkpoint = str(ASSETS / "warm_start")
  c.data.miniworld.train_size = 10_000_000
  c.data.miniworld.marks = (1, 4)
  c.data.miniworld.families.update(perception=0.35, search=0.40, reasoning=0.25)
  c.sft.steps = 1300
  c.sft.kinds = ConfigDict(dict(
    where=.30, what_at=.15, list=.15, read_crop=.20, read_large=.20,
    repeat=.5, look_up=.5, prices=.4, formula=.6))
  c.sft.optimizer.update(learning_rate=5e-3, warmup=0.01)
  c.checkpoint.every = 200
  return c
