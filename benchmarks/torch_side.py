"""The side that the main job is compared with: PyTorch as one would use it without this project.

In: token ids and processed images of our own pipeline, so that both sides see the same pixels. Out:
samples and optimizer steps. This folder and the tests are the only places that import torch.

Legend: B rows, T tokens, P patches, C values of a patch, V vocabulary.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from axpo_jax.model.images import ProcessedImage


def choose_threads(call: Callable[[], object]) -> int:
  """Sets one thread or all cores, whichever runs `call` faster: small matrices can lose by threads.

  Two timed calls each, in turns, after one that warms up; the better one of each counts.
  """
  call()
  seconds = {1: [], os.cpu_count(): []}
  for _ in range(2):
    for threads, measured in seconds.items():
      torch.set_num_threads(threads)
      start = time.perf_counter()
      call()
      measured.append(time.perf_counter() - start)
  best = min(seconds, key=lambda threads: min(seconds[threads]))
  torch.set_num_threads(best)
  return best


class PyTorch:
  """transformers' own model and `generate`, SDPA attention; threads: see `choose_threads`.

  dtype, device: of the model; `inputs` are made there.

  Sampling: inference mode, dynamic KV cache, left padding, temperature 1, top-k and top-p off (no
  logits processor at all), no end token.
  Training: right padding, one trajectory a row, all rows in one pass; cross-entropy of the same
  targets, gradient clipping, fused AdamW. Positions, as usual, are the model's own business.
  """

  def __init__(self, policy: pathlib.Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    self.model = Qwen3VLForConditionalGeneration.from_pretrained(
      policy, dtype=dtype, attn_implementation="sdpa").to(device)
    self._device = device
    self._image_id = self.model.config.image_token_id

  def inputs(self, rows: Sequence[tuple[Sequence[int], Sequence[ProcessedImage]]], *,
             left: bool) -> dict[str, torch.Tensor]:
    """Expanded ids and images of every row as the model's arguments."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BxT = np.zeros((len(rows), longest), np.int64)
    mask_BxT = np.zeros_like(ids_BxT)
    for row, (ids, _) in enumerate(rows):
      here = slice(longest - len(ids), None) if left else slice(len(ids))
      ids_BxT[row, here], mask_BxT[row, here] = ids, 1
    images = [image for _, images in rows for image in images]
    arrays = {
      "input_ids": ids_BxT, "attention_mask": mask_BxT,
      "mm_token_type_ids": (ids_BxT == self._image_id).astype(np.int64),
    }
    if images:
      arrays |= {"pixel_values": np.concatenate([image.patches() for image in images]),
                 "image_grid_thw": np.array([(1, *image.grid_hw) for image in images])}
    return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}

  def generate(self, inputs: dict[str, torch.Tensor], new_tokens: int) -> None:
    options = GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
      use_cache=True, eos_token_id=None, pad_token_id=0)
    self.model.eval()
    with torch.inference_mode():
      out = self.model.generate(**inputs, generation_config=options)
    assert out.shape[1] == inputs["input_ids"].shape[1] + new_tokens

  def trainer(self, section: ConfigDict) -> Callable[[dict, torch.Tensor], float]:
    """The function (inputs, labels_BxT, -100 = no target) -> loss, one optimizer step."""
    model = self.model.train()
    optimizer = torch.optim.AdamW(
      model.parameters(), lr=section.learning_rate, betas=(section.b1, section.b2),
      eps=section.eps, weight_decay=section.weight_decay, fused=True)

    def step(inputs, labels_BxT):
      logits_BxTxV = model(**inputs, use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(
        logits_BxTxV[:, :-1].flatten(0, 1), labels_BxT[:, 1:].flatten())
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
      optimizer.step()
      return loss.item()

    return step
