"""The vision tower: packed patches of any images in, merged tokens and DeepStack features out.

Under jit it sees arrays only (`VisionInputs`), never a grid. All blocks are one scan; the blocks
that DeepStack taps write into a small carried buffer.

Legend: R rows, P patches in a row, D vision width, H heads, N DeepStack taps, M merged tokens of
all rows (R * P / merge^2), O text width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from axpo_jax.model import attention, rope
from axpo_jax.model.attention_xla import Tags, block
from axpo_jax.model.config import ModelConfig, VisionConfig
from axpo_jax.model.layers import LayerNorm, Linear, Maker, remat, scan_layers
from axpo_jax.model.sharding import constrain
from axpo_jax.model.text import Intermediates
from axpo_jax.model.vision_inputs import VisionInputs

_ROW = ("vision_rows", "patches", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionFeatures:
  """embeds_MxD: what replaces image pads. deepstack_NxMxD: what the first N text layers add."""

  embeds_MxD: jax.Array
  deepstack_NxMxD: jax.Array


class VisionBlock(nnx.Module):
  """Full attention inside an image, then an MLP with tanh GELU; pre-norm, biases everywhere."""

  def __init__(self, config: VisionConfig, make: Maker):
    D, H, h, F = config.hidden_size, config.num_heads, config.head_dim, config.intermediate_size
    self.norm1 = LayerNorm(make, D)
    self.qkv = Linear(
      make, (D, 3, H, h), ("vision_embed", None, "vision_heads", "head_dim"), bias=True
    )
    self.proj = Linear(
      make, (H, h, D), ("vision_heads", "head_dim", "vision_embed"), fan_in=2, bias=True
    )
    self.norm2 = LayerNorm(make, D)
    self.fc1 = Linear(make, (D, F), ("vision_embed", "vision_mlp"), bias=True)
    self.fc2 = Linear(make, (F, D), ("vision_mlp", "vision_embed"), bias=True)

  def __call__(self, x_RxPxD, angles, sees):
    qkv_RxPx3xHxD = self.qkv(self.norm1(x_RxPxD))
    q, k, v = (
      constrain(qkv_RxPx3xHxD[:, :, i], ("vision_rows", "patches", "act_heads", None))
      for i in range(3)
    )
    out_RxPxHxD = attention.attend(
      rope.rotate(q, angles), [block(rope.rotate(k, angles), v)], sees)
    x_RxPxD = constrain(x_RxPxD + self.proj(out_RxPxHxD), _ROW)
    y_RxPxF = jax.nn.gelu(self.fc1(self.norm2(x_RxPxD)), approximate=True)
    y_RxPxF = constrain(y_RxPxF, ("vision_rows", "patches", "act_mlp"))
    return constrain(x_RxPxD + self.fc2(y_RxPxF), _ROW)


class Merger(nnx.Module):
  """Four patches to one token of the text's width, with the exact (erf) GELU.

  The main merger norms each patch, DeepStack's mergers norm the four together.
  """

  def __init__(self, config: VisionConfig, make: Maker, *, norm_merged: bool):
    merged = config.hidden_size * config.merge_unit
    self.merged = merged
    self.norm_merged = norm_merged
    self.norm = LayerNorm(make, merged if norm_merged else config.hidden_size)
    self.fc1 = Linear(make, (merged, merged), ("vision_embed", "vision_mlp"), bias=True)
    self.fc2 = Linear(
      make, (merged, config.out_hidden_size), ("vision_mlp", "vision_embed"), bias=True
    )

  def __call__(self, x_RxPxD: jax.Array) -> jax.Array:
    rows = x_RxPxD.shape[0]
    if not self.norm_merged:
      x_RxPxD = self.norm(x_RxPxD)
    y_RxMxD = x_RxPxD.reshape(rows, -1, self.merged)
    if self.norm_merged:
      y_RxMxD = self.norm(y_RxMxD)
    y_RxMxF = jax.nn.gelu(self.fc1(constrain(y_RxMxD, _ROW)), approximate=False)
    y_RxMxO = self.fc2(constrain(y_RxMxF, ("vision_rows", "patches", "act_mlp")))
    return constrain(y_RxMxO, _ROW).reshape(-1, y_RxMxO.shape[-1])


class VisionTower(nnx.Module):
  """Patch embedding, learned positions, blocks, mergers."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    vision, dtype = config.vision, config.param_dtype
    make = Maker(rngs, dtype)
    self.patch = Linear(
      make, (vision.patch_dim, vision.hidden_size), ("patch", "vision_embed"), bias=True
    )
    self.positions = make.normal(
      (vision.num_position_embeddings, vision.hidden_size), (None, "vision_embed"),
      vision.hidden_size,
    )
    self.blocks = VisionBlock(vision, Maker(rngs, dtype, vision.depth))
    self.merger = Merger(vision, make, norm_merged=False)
    taps = len(vision.deepstack_layers)
    self.deepstack = Merger(vision, Maker(rngs, dtype, taps), norm_merged=True) if taps else None

  def __call__(self, inputs: VisionInputs, taps: Intermediates | None = None) -> VisionFeatures:
    """Encodes all rows. Tokens of padding patches are finite and mean nothing.

    `taps` collects named intermediates.
    """
    vision = self.config.vision
    x_RxPxD = constrain(self._embed(inputs), _ROW)
    angles = rope.vision_rope(
      inputs.positions_RxPx2, head_dim=vision.head_dim, theta=vision.rope_theta)
    image_RxP = jnp.asarray(inputs.segments_RxP)
    tags = Tags(image_RxP, jnp.where(image_RxP > 0, image_RxP + 1, 0))
    sees = attention.visibility(tags, [tags], self.config.attention_chunk)
    block_fn = remat(VisionBlock.__call__, self.config.remat)

    def step(block, carry, writes_N):
      x_RxPxD, tapped_NxRxPxD = carry
      x_RxPxD = block_fn(block, x_RxPxD, angles, sees)
      tapped_NxRxPxD = _write_taps(tapped_NxRxPxD, x_RxPxD, writes_N)
      return (x_RxPxD, tapped_NxRxPxD), None if taps is None else x_RxPxD

    writes_LxN = np.arange(vision.depth)[:, None] == np.asarray(vision.deepstack_layers, int)
    tapped = jnp.zeros((writes_LxN.shape[1], *x_RxPxD.shape), x_RxPxD.dtype)
    (out_RxPxD, tapped), blocks = scan_layers(
      self.blocks, step, (x_RxPxD, tapped), jnp.asarray(writes_LxN),
      unroll=self.config.unrolls(vision.depth),
    )
    merge = remat(Merger.__call__, self.config.remat)
    features = VisionFeatures(merge(self.merger, out_RxPxD), self._merge_taps(tapped, merge))
    if taps is not None:
      taps.update({"vision.embed": x_RxPxD, "vision.blocks": blocks})
      taps.update({"vision.merged": features.embeds_MxD})
      taps.update({"vision.deepstack": features.deepstack_NxMxD})
    return features

  def _embed(self, inputs: VisionInputs) -> jax.Array:
    x_RxPxD = self.patch(jnp.asarray(inputs.patches_RxPxC).astype(self.config.dtype))
    # One corner at a time: [R, P, 4, D] would be the largest array of the tower.
    table_GxD = constrain(self.positions[...], (None, None))
    for corner in range(4):
      weight_RxP = jnp.asarray(inputs.corner_weight_RxPx4)[..., corner]
      corner_RxPxD = table_GxD[jnp.asarray(inputs.corner_index_RxPx4)[..., corner]]
      x_RxPxD += (corner_RxPxD * weight_RxP[..., None]).astype(x_RxPxD.dtype)
    return x_RxPxD

  def _merge_taps(self, tapped_NxRxPxD: jax.Array, merge: Callable) -> jax.Array:
    if self.deepstack is None:
      merged = (tapped_NxRxPxD.shape[1] * tapped_NxRxPxD.shape[2]) // self.config.vision.merge_unit
      return jnp.zeros((0, merged, self.config.text.hidden_size), tapped_NxRxPxD.dtype)
    _, out_NxMxO = scan_layers(
      self.deepstack, lambda merger, _, x: (None, merge(merger, x)), None, tapped_NxRxPxD
    )
    return out_NxMxO


# Checkpointed, because `where` would leave its condition, as large as the buffer, in every layer.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _write_taps(tapped_NxRxPxD, x_RxPxD, writes_N):
  tapped_NxRxPxD = jnp.where(writes_N[:, None, None, None], x_RxPxD, tapped_NxRxPxD)
  return constrain(tapped_NxRxPxD, (None, *_ROW))
