"""The miniature with all its families: perception, search (two hops) and reasoning (python).

  python launch/main.py --config=configs/axpo_tiny_mix.py --workdir=runs/axpo_tiny_mix

Expect about ten minutes on two cores, and a table with a row per family. It begins with a policy that
has learnt to see and to copy (`configs/groundwork_tiny.py` makes it). After SFT tools are used in about
45 % of the rollouts, and in about 45 % of the groups that use them every such rollout is wrong. In the
20 AXPO steps of one run (seed 0) a third of the triggered questions were recovered, Pass@1 rose from
34 to 39 %, the tool rate stayed where it was, and searching got no better.
"""

from ml_collections import ConfigDict

from axpo_jax.config import ASSETS
from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.model.checkpoint = str(ASSETS / "groundwork")
  c.data.miniworld.families.update(perception=1.0, search=1.0, reasoning=1.0)
  c.agent.tools = ("image_zoom_in", "python", "tavily-search")
  c.agent.scopes = ("read_image", "execute", "network")
  c.agent.search.backend = "miniworld"  # an index in this process
  c.agent.overlap_tools = False         # so that a run repeats to the last bit
  return c
