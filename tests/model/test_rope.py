"""Rotary tables against transformers' own modules, far down a sequence too."""

import dataclasses

import numpy as np
import pytest

from axpo_jax.model import rope
from axpo_jax.model.presets import PRESETS


@pytest.mark.parametrize("dim, theta", [
  (128, 5e6), (128, 5e5), (64, 1e6), (36, 1e4), (32, 1e4), (24, 1e4)])
def test_frequencies_are_torchs(dim, theta):
  """On any CPU. NumPy's float32 power is 2 ulp off in up to 14 places where there is AVX-512."""
  import torch

  theirs = (1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))).numpy()
  ours = rope._inverse_frequencies(dim, theta)
  assert ours.dtype == np.float32
  off = np.abs(ours - theirs) / np.spacing(theirs)
  assert off.max() <= 1 and (off > 0).sum() <= 1


def test_cosines_and_sines_of_a_long_sequence_are_those_of_transformers():
  import torch
  from transformers import Qwen3VLConfig
  from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

  config = PRESETS["8b"]
  positions_BxTx3 = np.broadcast_to(np.arange(16_384)[None, :, None], (1, 16_384, 3))
  ours = rope.text_rope(positions_BxTx3, theta=config.text.rope_theta,
                        section=config.text.mrope_section)
  reference = Qwen3VLTextRotaryEmbedding(Qwen3VLConfig(**config.to_hf()).text_config)
  theirs = reference(torch.zeros(1), torch.tensor(positions_BxTx3).permute(2, 0, 1))
  for mine, full in zip(ours, theirs, strict=True):
    want = full[..., :mine.shape[-1]].numpy()
    assert np.linalg.norm(mine - want) / np.linalg.norm(want) < 5e-6


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_angles_of_the_tower_are_those_of_transformers(theta):
  import torch
  from transformers import Qwen3VLConfig
  from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding

  vision = dataclasses.replace(PRESETS["8b"].vision, rope_theta=theta)
  config = dataclasses.replace(PRESETS["8b"], vision=vision)
  grid_Px2 = np.stack(np.meshgrid(np.arange(40), np.arange(60), indexing="ij"), -1).reshape(-1, 2)
  ours = rope.vision_rope(grid_Px2[None], head_dim=vision.head_dim, theta=theta)
  reference = Qwen3VLVisionRotaryEmbedding(Qwen3VLConfig(**config.to_hf()).vision_config)
  theirs = reference(torch.zeros(1), torch.tensor(grid_Px2))
  for mine, full in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine[0], full[:, :mine.shape[-1]].numpy(), rtol=0, atol=1e-5)
