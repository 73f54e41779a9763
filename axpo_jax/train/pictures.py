"""Pixels of a step's images in a run of several processes: each process gets those that its devices need.

Every process plans the step from tokens and the sizes of images (`rollouts.groups.for_training`), and packs the
same micro-batches. Then it knows which images its rows of the vision tower hold, and gets their pixels from the
main process, which has sampled them.

Bytes of a step with the paper's sizes on 16 hosts (1,280 trajectories of 6,000 tokens, an image for each of 128
questions and a crop for two of three trajectories, a megapixel each):

  tokens    20 a token: 150 MB, to every host. Packing compares all of them, to share prefixes.
  pixels    3 a pixel: 3.1 GB in total; a host gets about a sixteenth, 190 MB. An image that several
            micro-batches or hosts need is sent once to each of these hosts.
  patches   24 a pixel, made by each host for its own rows when a micro-batch is placed: nothing is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from axpo_jax import processes
from axpo_jax.model.images import ProcessedImage
from axpo_jax.train.batch import Batch
from axpo_jax.train.packing import Example


def fetched(batches: Sequence[Batch], examples: Iterable[Example]) -> list[Batch]:
  """The batches with the pixels of this process's vision rows. Call it in all processes.

  Args:
    examples: what the batches are packed from; images of the main process have their pixels.
  """
  if jax.process_count() == 1:
    return list(batches)
  have = {image.key: image for example in examples for image in example.images}
  mine = {image.key: image for batch in batches if batch.vision is not None
          for image in batch.vision.patches_RxPxC.images}
  missing = [key for key, image in mine.items() if image.pixels_HxWx3 is None]
  asked = processes.on_all(lambda: missing)
  data = processes.deal(lambda: [
    b"".join(have[key].pixels_HxWx3.tobytes() for key in keys) for keys in asked])
  at = 0
  for key in missing:
    width, height = mine[key].size
    pixels_HxWx3 = np.frombuffer(data, np.uint8, 3 * width * height, at).reshape(height, width, 3)
    mine[key] = dataclasses.replace(mine[key], pixels_HxWx3=pixels_HxWx3)
    at += pixels_HxWx3.nbytes
  return [_with_images(batch, mine) for batch in batches]


def _with_images(batch: Batch, images: dict[str, ProcessedImage]) -> Batch:
  if batch.vision is None:
    return batch
  patches = batch.vision.patches_RxPxC.map(lambda image: images[image.key])
  return dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, patches_RxPxC=patches))
