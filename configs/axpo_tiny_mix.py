"""The miniature with all its families: perception, search (two hops) and reasoning (python).

  python launch/main.py --config=configs/axpo_tiny_mix.py --workdir=runs/axpo_tiny_mix

Expect about ten minutes on two cores, and a table with a row per family. The mechanics of all three
tools run for real, learning does not yet: the warm start that ships with the package has only learnt to
see, so that after SFT about one search in six and hardly any computation ends in a right answer.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.data.miniworld.families.update(perception=1.0, search=1.0, reasoning=1.0)
  c.agent.tools = ("image_zoom_in", "python", "tavily-search")
  c.agent.scopes = ("read_image", "execute", "network")
  c.agent.search.backend = "miniworld"  # an index in this process
  c.agent.overlap_tools = False         # so that a run repeats to the last bit
  return c
