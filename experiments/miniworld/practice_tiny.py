"""Teaches what `groundwork_tiny.py` has made to read its crops: the last step before SFT.

  python launch/main.py --config=experiments/miniworld/practice_tiny.py --workdir=runs/practice \
    --config.model.checkpoint=runs/groundwork/sft/policy

After the groundwork the policy points well when it zooms, but what is written in the crop it guesses:
the mark was drawn across four tokens, and few examples had a crop. Here a crop is 48 pixels wide, so
that its middle token holds the letter, and most examples have one. Of zooms at small letters 40 %
are then right, 11 % before. Expect five to ten minutes on two cores. The result,
runs/practice/sft/policy, is what `axpo_jax/assets/practised` holds and `configs/axpo_tiny.py` begins with.
"""

from ml_collections import ConfigDict

from experiments.miniworld.groundwork_tiny import get_config as groundwork_tiny


def get_config() -> ConfigDict:
  c = groundwork_tiny()
  c.model.checkpoint = ""
  c.images.zoom_min_pixels, c.images.zoom_max_pixels = 32 * 32, 48 * 48
  c.data.miniworld.large_share = 0.1
  c.data.miniworld.families.update(perception=0.8, search=0.1, reasoning=0.1)
  c.sft.steps = 250
  c.sft.kinds.update(
    where=.1, what_at=.05, list=.05, read_crop=.4, read_large=.05, read=.5)
  c.sft.optimizer.learning_rate = 3e-3
  return c
