"""The text decoder: Qwen3 layers with M-RoPE and DeepStack, as one scanned stack.

In: embedded tokens, positions, ends (see `attention`), DeepStack features, perhaps a cache. Out: the
final hidden states (after the last norm) and the cache with the new tokens.

Legend: B batch, T new tokens, S cache slots, D model, H heads, K kv heads, L layers,
N DeepStack features, M merged image tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

import jax
import jax.numpy as jnp
from flax import nnx

from axpo_jax.model import attention, rope
from axpo_jax.model.attention_xla import Tags, block
from axpo_jax.model.cache import DecodeCache, KVCache
from axpo_jax.model.config import ModelConfig, TextConfig
from axpo_jax.model.experts import Experts, Load
from axpo_jax.model.layers import Linear, Maker, RMSNorm, each_layer, remat, scan_layers
from axpo_jax.model.sharding import constrain

Cache = KVCache | DecodeCache
Intermediates = MutableMapping[str, jax.Array]
# Every device looks up all rows in its part of the width; an all-to-all then gives each its rows. So no device
# ever holds the whole table or its gradient.
_LOOKUP = ("lookup_batch", "length", "lookup_embed")


class DecoderLayer(nnx.Module):
  """Attention with per-head q/k norms, then SwiGLU, or experts of it; pre-norm, no biases."""

  def __init__(self, config: TextConfig, make: Maker):
    D, H, K, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    self.attn_norm = RMSNorm(make, D, config.rms_norm_eps)
    self.q = Linear(make, (D, H, h), ("embed", "heads", "head_dim"))
    self.k = Linear(make, (D, K, h), ("embed", "kv_heads", "head_dim"))
    self.v = Linear(make, (D, K, h), ("embed", "kv_heads", "head_dim"))
    self.o = Linear(make, (H, h, D), ("heads", "head_dim", "embed"), fan_in=2)
    self.q_norm = RMSNorm(make, h, config.rms_norm_eps)
    self.k_norm = RMSNorm(make, h, config.rms_norm_eps)
    self.mlp_norm = RMSNorm(make, D, config.rms_norm_eps)
    if config.experts:
      self.experts = Experts(config, make)
      return
    self.experts = None
    self.gate = Linear(make, (D, config.intermediate_size), ("embed", "mlp"))
    self.up = Linear(make, (D, config.intermediate_size), ("embed", "mlp"))
    self.down = Linear(make, (config.intermediate_size, D), ("mlp", "embed"))

  def __call__(self, x_BxTxD, angles, sees, cached, real_BxT):
    """
    Args:
      cached: this layer's blocks of (keys, values).
      real_BxT: which tokens are no padding; read by experts alone, else None.

    Returns: x, the new (keys, values), and the experts' Load or None.
    """
    out_BxTxHxD, new = self._attention(self.attn_norm(x_BxTxD), angles, sees, cached)
    x_BxTxD = constrain(x_BxTxD + self.o(out_BxTxHxD), ("batch", "length", "act_embed"))
    y_BxTxD, load = self._mlp(self.mlp_norm(x_BxTxD), real_BxT)
    return constrain(x_BxTxD + y_BxTxD, ("batch", "length", "act_embed")), new, load

  def _mlp(self, y_BxTxD, real_BxT):
    if self.experts:
      return self.experts(y_BxTxD, real_BxT)
    y_BxTxF = jax.nn.silu(self.gate(y_BxTxD)) * self.up(y_BxTxD)
    y_BxTxF = constrain(y_BxTxF, ("batch", "length", "act_mlp"))
    return self.down(y_BxTxF), None

  def _attention(self, y_BxTxD, angles, sees, cached):
    q_BxTxHxD = rope.rotate(self.q_norm(self.q(y_BxTxD)), angles)
    k_BxTxKxD = rope.rotate(self.k_norm(self.k(y_BxTxD)), angles)
    q_BxTxHxD = constrain(q_BxTxHxD, ("batch", "length", "act_heads", None))
    k_BxTxKxD = constrain(k_BxTxKxD, ("batch", "length", "act_kv_heads", None))
    v_BxTxKxD = constrain(self.v(y_BxTxD), ("batch", "length", "act_kv_heads", None))
    new = block(k_BxTxKxD, v_BxTxKxD)
    out = attention.attend(q_BxTxHxD, [*cached, new], sees)
    return constrain(out, ("batch", "length", "act_heads", None)), new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeepStack:
  """What the first N layers add: features_NxMxD at image_index_BxT (-1: nothing)."""

  features_NxMxD: jax.Array
  image_index_BxT: jax.Array

  def add(self, x_BxTxD: jax.Array, layer: jax.Array) -> jax.Array:
    """x plus the feature of `layer`, or x from layer N on.

    A branch on the layer number keeps all layers in one scan. Two scans, of the first N layers and of
    the rest, would split the stacked parameters, gradients and cache, which copies each of them.
    """
    count = self.features_NxMxD.shape[0]

    def added(x_BxTxD):
      feature_MxD = self.features_NxMxD[jnp.minimum(layer, count - 1)]
      return x_BxTxD + gather_image(feature_MxD, self.image_index_BxT, 0).astype(x_BxTxD.dtype)

    return jax.lax.cond(layer < count, added, lambda x: x, x_BxTxD)


def gather_image(features_MxD: jax.Array, index_BxT: jax.Array, otherwise_BxTxD) -> jax.Array:
  """features[index] where index >= 0, else `otherwise`: [B, T, D]."""
  # In two steps: in one, the compiler would gather all features whole where `data` is split too.
  features_MxD = constrain(features_MxD, ("lookup_batch", "lookup_embed"))
  features_MxD = constrain(features_MxD, (None, "lookup_embed"))
  taken_BxTxD = constrain(features_MxD[jnp.maximum(index_BxT, 0)], _LOOKUP)
  taken_BxTxD = constrain(taken_BxTxD, ("batch", "length", "act_embed"))
  return jnp.where(index_BxT[..., None] >= 0, taken_BxTxD, otherwise_BxTxD)


class TextDecoder(nnx.Module):
  """Embedding table, layers, final norm, and the head if it is not tied to the table."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    text, make = config.text, Maker(rngs, config.param_dtype)
    table = ((text.vocab_size, text.hidden_size), ("vocab", "embed"), text.hidden_size)
    self.embedding = make.normal(*table)
    self.layers = DecoderLayer(text, Maker(rngs, config.param_dtype, text.num_layers))
    self.norm = RMSNorm(make, text.hidden_size, text.rms_norm_eps)
    self.head = None if text.tie_word_embeddings else make.normal(*table)

  def unstack(self) -> None:
    """Makes the stack of layers a list, whose parameters are arrays of their own.

    For a loop over tokens inside of jit: a stack would be cut into layers again at every token.
    """
    graphdef, stacked = nnx.split(self.layers)
    self.layers = nnx.List([
      nnx.merge(graphdef, jax.tree.map(lambda x, at=number: x[at], stacked))
      for number in range(self.config.text.num_layers)])

  @property
  def unstacked(self) -> bool:
    return isinstance(self.layers, nnx.List)

  def embed(self, tokens_BxT: jax.Array) -> jax.Array:
    """[B, T, D] in the compute dtype."""
    x_BxTxD = constrain(self.embedding[...][tokens_BxT], _LOOKUP)
    return constrain(x_BxTxD.astype(self.config.dtype), ("batch", "length", "act_embed"))

  def __call__(
    self,
    x_BxTxD: jax.Array,
    positions_BxTx3: jax.Array,
    ends_BxT: jax.Array,
    *,
    key_blocks_BxCxN: jax.Array | None = None,
    deepstack: DeepStack | None = None,
    cache: Cache | None = None,
    taps: Intermediates | None = None,
    loads: list[Load] | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """See `Qwen3VL.__call__`."""
    text = self.config.text
    x_BxTxD = constrain(x_BxTxD, ("batch", "length", "act_embed"))
    angles = rope.text_rope(positions_BxTx3, theta=text.rope_theta, section=text.mrope_section)
    sees = _visibility(ends_BxT, key_blocks_BxCxN, cache, self.config)
    layer_fn = remat(DecoderLayer.__call__, self.config.remat)
    real_BxT = ends_BxT > 0 if text.experts else None

    def step(layer, x_BxTxD, number):
      cached = () if cache is None else cache.layer(number)
      x_BxTxD, new, load = layer_fn(layer, x_BxTxD, angles, sees, cached, real_BxT)
      if deepstack is not None:
        # Checkpointed: the branch would save arrays as large as x for the backward pass in every layer.
        x_BxTxD = jax.checkpoint(deepstack.add, prevent_cse=False)(x_BxTxD, number)
      return x_BxTxD, (new if cache is not None else None, None if taps is None else x_BxTxD,
                       None if loads is None else load)

    if self.unstacked:
      x_BxTxD, (new, hidden_LxBxTxD, load) = each_layer(self.layers, step, x_BxTxD)
    else:
      x_BxTxD, (new, hidden_LxBxTxD, load) = scan_layers(
        self.layers, step, x_BxTxD, jnp.arange(text.num_layers),
        unroll=cache is None and self.config.unrolls(text.num_layers))
    if load is not None:
      loads.append(load)
    x_BxTxD = self.norm(x_BxTxD)
    if taps is not None:
      taps.update({"text.layers": hidden_LxBxTxD, "text.norm": x_BxTxD})
    return x_BxTxD, None if cache is None else cache.append(*new, ends_BxT > 0)

  def unembedding(self) -> jax.Array:
    """The [V, D] table of the output head, in its parameter dtype."""
    return (self.embedding if self.head is None else self.head)[...]


def _visibility(ends_BxT, key_blocks_BxCxN, cache: Cache | None, config: ModelConfig
                ) -> attention.Visibility:
  if cache is None:
    text = config.text
    backend = attention.choose_backend(config.attention, ends_BxT.shape[1], text.num_heads,
                                       text.num_kv_heads, text.head_dim)
    return attention.row_visibility(ends_BxT, config.attention_chunk, key_blocks_BxCxN, backend)
  order_BxT = jnp.broadcast_to(jnp.arange(ends_BxT.shape[1]), ends_BxT.shape)
  # With a cache a row is one sequence: every new token attends to all filled slots.
  def seen_to_the_end(order, real):
    return Tags(order, jnp.where(real, ends_BxT.shape[1], 0))

  new = seen_to_the_end(order_BxT, ends_BxT > 0)
  old = [seen_to_the_end(jnp.zeros(filled_BxS.shape, jnp.int32), filled_BxS)
         for filled_BxS in cache.filled]
  return attention.visibility(new, [*old, new], config.attention_chunk)
