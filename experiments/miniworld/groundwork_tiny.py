"""Teaches the warm start to copy and to call, which searching and computing rest on.

  python launch/main.py --config=experiments/miniworld/groundwork_tiny.py --workdir=runs/groundwork

The warm start has never had to copy a name or a number. Here it repeats lines, looks facts up in short
texts and writes the sum that a question asks for, besides the tasks it knows; and it sees a teacher
that always calls a tool where one is needed, and never errs. When to call is not taught here: that is
left to SFT, whose teacher mostly thinks instead, and to RL. Expect 25 to 30 minutes on two cores; the
loss falls from 8.9 to 0.06 nats a token. `practice_tiny.py` goes on from the result,
runs/groundwork/sft/policy.
"""

from ml_collections import ConfigDict

from axpo_jax.config import ASSETS
from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.stages = ("sft",)
  c.model.checkpoint = str(ASSETS / "warm_start")
  c.images.zoom_min_pixels, c.images.zoom_max_pixels = 48 * 48, 72 * 72  # as when it was run
  c.data.miniworld.train_size = 10_000_000
  c.data.miniworld.marks = (1, 4)
  c.data.miniworld.families.update(perception=0.35, search=0.40, reasoning=0.25)
  c.sft.steps = 1800
  c.sft.kinds = ConfigDict(dict(
    where=.30, what_at=.15, list=.15, read_crop=.20, read_large=.20,
    repeat=.5, look_up=.5, prices=.4, formula=.6,
    read=.5, two_hop=.5, total=.5))
  # Where a tool is needed it is used, and used well: when to act is left to SFT and RL.
  c.sft.teacher = ConfigDict(dict(
    p_tool_small=1.0, p_tool_large=0.0, p_wrong_mark=0.0, p_off_cell=0.0,
    p_search=1.0, p_stop_short=0.0, p_wrong_query=0.0,
    p_python_hard=1.0, p_python_easy=0.0, p_wrong_code=0.0, p_broken_code=0.0,
    p_malformed=0.0))
  c.sft.optimizer.update(learning_rate=5e-3, warmup=0.01)
  c.checkpoint.every = 200
  return c
