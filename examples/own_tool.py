"""A tool of your own: how bright a part of the image is.

    PYTHONPATH=examples axpo-train --config=configs/axpo_tiny.py --workdir=runs/own_tool \
      --config.agent.tools="('image_zoom_in','own_tool:brightness')" \
      --config.stages="('rl',)" --config.rl.steps=2 --config.rl.questions=4 --config.eval.every=-1

Two steps, in a minute. Without the last line of the command it is the whole run, with SFT before and an evaluation
behind.

The type hints become the schema that the policy reads, and calls are checked against it. The parameter of type
`EpisodeState` is given the calling episode. What the function raises becomes an error that the policy reads.
"""

import numpy as np

from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.agent.tools.function import tool


@tool(scope="read_image")
def brightness(left: int, right: int, episode: EpisodeState) -> str:
  """Measures the mean brightness between two columns of the first image.

  Args:
    left: the first column, from 0 to 1000.
    right: the column behind the last one, from 0 to 1000.
  """
  image = np.asarray(episode.images[0].convert("L"))
  first, last = (image.shape[1] * column // 1000 for column in (left, right))
  if not 0 <= first < last <= image.shape[1]:
    raise ValueError(f"the columns {left} to {right} hold no pixels; give 0 <= left < right <= 1000")
  return f"{image[:, first:last].mean():.1f} of 255"
