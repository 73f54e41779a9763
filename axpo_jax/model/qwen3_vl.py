"""Qwen3-VL, the policy: vision tower and text decoder as one Flax NNX module.

Callers split it once and merge it inside jit:

  graphdef, params = nnx.split(Qwen3VL(config, rngs=nnx.Rngs(0)))

  @jax.jit
  def forward(params, tokens, positions, ends, vision, image_index):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(tokens, positions, ends, vision=vision, image_index_BxT=image_index)
    return model.logits(hidden)

`hidden` and `unembedding` are separate from `logits`, so that a loss over a large vocabulary can
go chunk by chunk.

Legend: B batch, T tokens, D model, V vocabulary, M merged image tokens, N DeepStack features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from axpo_jax.model.cache import DecodeCache, KVCache
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.experts import Load
from axpo_jax.model.lora import adapt
from axpo_jax.model.sharding import stays, with_stored
from axpo_jax.model.text import Cache, DeepStack, Intermediates, TextDecoder, gather_image
from axpo_jax.model.vision import VisionFeatures, VisionTower
from axpo_jax.model.vision_inputs import VisionInputs

__all__ = ["DecodeCache", "KVCache", "Qwen3VL", "VisionFeatures"]


class Qwen3VL(nnx.Module):
  """A Qwen3-VL policy. New parameters are normal(fan_in^-0.5), norms one, biases zero."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.vision = VisionTower(config, rngs=rngs)
    self.text = TextDecoder(config, rngs=rngs)
    if config.lora is not None:
      adapt(self, config.lora, rngs)

  def encode_images(self, vision: VisionInputs) -> VisionFeatures:
    """Runs the vision tower: embeds [M, D] and DeepStack features [N, M, D]."""
    return self.vision(vision)

  def __call__(
    self,
    tokens_BxT: jax.Array,
    positions_BxTx3: jax.Array,
    ends_BxT: jax.Array,
    *,
    key_blocks_BxCxN: jax.Array | None = None,
    vision: VisionInputs | VisionFeatures | None = None,
    image_index_BxT: jax.Array | None = None,
    cache: Cache | None = None,
    taps: Intermediates | None = None,
    loads: list[Load] | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden states of every token, after the final norm.

    Args:
      tokens_BxT: int32; ids at image positions are ignored.
      positions_BxTx3: int32 (time, height, width); see `mrope_positions`.
      ends_BxT: int32, 0 for padding. Without a cache a token attends to itself and to the earlier
        tokens of its row whose end is greater than its index. So one row may hold several
        trajectories, one after the other (the end is the trajectory's) or as a tree, depth first
        (the end is the subtree's): see `model.attention`. With a cache a row is one sequence: its
        new tokens come first, then padding, and any end above 0 will do.
      key_blocks_BxCxN: from `attention_blocks.key_blocks`, for long rows of many trajectories.
      vision: packed patches, or features of an earlier `encode_images`.
      image_index_BxT: int32, -1 for ordinary tokens, else the token's index in the M merged image
        tokens. It is a gather: several tokens may have the same index.
      cache: the earlier tokens. New tokens attend to them and are appended, and the lengths
        advance by the number of real tokens. The caller keeps lengths + T within the cache.
      taps: a dict that receives named intermediates (see `intermediates`).
      loads: a list that receives the Load of a mixture of experts, of all layers in one.
    Returns: hidden [B, T, D] in the compute dtype, and the cache with the new tokens or None.
    """
    if (vision is None) != (image_index_BxT is None):
      raise ValueError("pass vision and image_index_BxT together, or neither")
    x_BxTxD = self.text.embed(tokens_BxT)
    deepstack = None
    if vision is not None:
      features = self.vision(vision, taps) if isinstance(vision, VisionInputs) else vision
      embeds_MxD = features.embeds_MxD.astype(x_BxTxD.dtype)
      x_BxTxD = gather_image(embeds_MxD, image_index_BxT, x_BxTxD)
      if features.deepstack_NxMxD.shape[0]:
        deepstack = DeepStack(features.deepstack_NxMxD, image_index_BxT)
    if taps is not None:
      taps["text.embed"] = x_BxTxD
    return self.text(
      x_BxTxD, positions_BxTx3, ends_BxT, key_blocks_BxCxN=key_blocks_BxCxN, deepstack=deepstack,
      cache=cache, taps=taps, loads=loads,
    )

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., V] float32 of hidden [..., D]."""
    table_VxD = self.unembedding().astype(hidden.dtype)

    def product(hidden):
      return jnp.einsum("...d,vd->...v", hidden, table_VxD, preferred_element_type=jnp.float32)

    if stays(table_VxD, hidden):
      return with_stored(product, hidden, ("embed", "vocab"), 1)
    return product(hidden)

  def unembedding(self) -> jax.Array:
    """The output head's [V, D] table (the embedding table if tied), in its parameter dtype."""
    return self.text.unembedding()

  def intermediates(self, *args, **kwargs) -> dict[str, jax.Array]:
    """Named intermediates of one call, for comparing with another implementation.

    text.embed [B, T, D] (with the images), text.layers [L, B, T, D] (each after its DeepStack
    feature), text.norm, logits, and with vision inputs vision.embed [R, P, D], vision.blocks
    [depth, R, P, D], vision.merged [M, D], vision.deepstack [N, M, D].
    """
    taps: dict[str, jax.Array] = {}
    hidden_BxTxD, _ = self(*args, taps=taps, **kwargs)
    return {**taps, "logits": self.logits(hidden_BxTxD)}
