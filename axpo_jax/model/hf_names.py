"""Names, shapes and layout of the tensors of a Qwen3-VL checkpoint, beside those of our parameters.

`name_table` lists for every parameter of ours the tensors of a checkpoint that it is made of. Loading, saving
and weight pushes all read it. Two things differ, and both are only reshapes and transposes:

  there                                     here
  a matrix        [out, in...]              [in, out...]
  every layer     a tensor of its own       one array of all layers, the first axis

Legend: D model, F hidden size of the MLP, h head.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from axpo_jax.model.config import ModelConfig, TextConfig

Path_ = tuple[str, ...]
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a checkpoint.

  name, shape: the tensor's, there.
  path: our parameter. layer: its index in the stacked parameter, None if not stacked.
  matrix: [out, in...] there and transposed here; else the same order of values. Experts are
    [expert, in, out] there too.
  """

  name: str
  shape: tuple[int, ...]
  path: Path_
  layer: int | None = None
  matrix: bool = False

  def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor as one layer of our parameter, whose shape without the stack is `shape`."""
    if self.matrix:
      tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(shape)

  def to_hf(self, ours: np.ndarray) -> np.ndarray:
    """One layer of our parameter as the checkpoint's tensor, contiguous."""
    if self.matrix:
      ours = ours.reshape(-1, self.shape[0]).T
    return np.ascontiguousarray(ours.reshape(self.shape))


def name_table(config: ModelConfig) -> list[Entry]:
  """Every tensor of a checkpoint of this config, in the order of the forward pass."""
  return [*_vision_entries(config), *_text_entries(config)]


def _vision_entries(config: ModelConfig) -> list[Entry]:
  v, root = config.vision, "model.visual"
  D, F, merged = v.hidden_size, v.intermediate_size, v.hidden_size * v.merge_unit
  conv = (D, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
  out = _linear(f"{root}.patch_embed.proj", ("vision", "patch"), conv)
  positions = (v.num_position_embeddings, D)
  out.append(Entry(f"{root}.pos_embed.weight", positions, ("vision", "positions")))
  for i in range(v.depth):
    hf, ours = f"{root}.blocks.{i}", ("vision", "blocks")
    out += _norm(f"{hf}.norm1", (*ours, "norm1"), D, i)
    out += _linear(f"{hf}.attn.qkv", (*ours, "qkv"), (3 * D, D), i)
    out += _linear(f"{hf}.attn.proj", (*ours, "proj"), (D, D), i)
    out += _norm(f"{hf}.norm2", (*ours, "norm2"), D, i)
    out += _linear(f"{hf}.mlp.linear_fc1", (*ours, "fc1"), (F, D), i)
    out += _linear(f"{hf}.mlp.linear_fc2", (*ours, "fc2"), (D, F), i)
  mergers = [(f"{root}.merger", ("vision", "merger"), D, None)]
  for i in range(len(v.deepstack_layers)):
    mergers.append((f"{root}.deepstack_merger_list.{i}", ("vision", "deepstack"), merged, i))
  for hf, ours, norm_size, i in mergers:
    out += _norm(f"{hf}.norm", (*ours, "norm"), norm_size, i)
    out += _linear(f"{hf}.linear_fc1", (*ours, "fc1"), (merged, merged), i)
    out += _linear(f"{hf}.linear_fc2", (*ours, "fc2"), (v.out_hidden_size, merged), i)
  return out


def _text_entries(config: ModelConfig) -> list[Entry]:
  t, root = config.text, "model.language_model"
  D, F, h = t.hidden_size, t.intermediate_size, t.head_dim
  matrices = {
    "q": ("self_attn.q_proj", (t.num_heads * h, D)),
    "k": ("self_attn.k_proj", (t.num_kv_heads * h, D)),
    "v": ("self_attn.v_proj", (t.num_kv_heads * h, D)),
    "o": ("self_attn.o_proj", (D, t.num_heads * h)),
  }
  if not t.experts:
    matrices |= {
      "gate": ("mlp.gate_proj", (F, D)),
      "up": ("mlp.up_proj", (F, D)),
      "down": ("mlp.down_proj", (D, F)),
    }
  norms = {
    "attn_norm": ("input_layernorm", D),
    "mlp_norm": ("post_attention_layernorm", D),
    "q_norm": ("self_attn.q_norm", h),
    "k_norm": ("self_attn.k_norm", h),
  }
  table = (t.vocab_size, D)
  out = [Entry(EMBEDDING, table, ("text", "embedding"))]
  for i in range(t.num_layers):
    hf, ours = f"{root}.layers.{i}", ("text", "layers")
    for name, (theirs, size) in norms.items():
      out.append(Entry(f"{hf}.{theirs}.weight", (size,), (*ours, name, "scale"), i))
    for name, (theirs, shape) in matrices.items():
      out += _linear(f"{hf}.{theirs}", (*ours, name), shape, i, bias=False)
    if t.experts:
      out += _expert_entries(t, f"{hf}.mlp", (*ours, "experts"), i)
  out.append(Entry(f"{root}.norm.weight", (D,), ("text", "norm", "scale")))
  if not t.tie_word_embeddings:
    out.append(Entry(HEAD, table, ("text", "head")))
  return out


def _expert_entries(text: TextConfig, hf: str, path: Path_, layer: int) -> list[Entry]:
  """In the layout of the released files; others are read as this one (`expert_files`)."""
  E, D, F = text.experts.count, text.hidden_size, text.experts.intermediate_size
  return [*_linear(f"{hf}.gate", (*path, "router"), (E, D), layer, bias=False),
          Entry(f"{hf}.experts.gate_up_proj", (E, D, 2 * F), (*path, "gate_up"), layer),
          Entry(f"{hf}.experts.down_proj", (E, F, D), (*path, "down"), layer)]


def _linear(hf: str, path: Path_, shape, layer: int | None = None, bias=True) -> list[Entry]:
  weight = Entry(f"{hf}.weight", shape, (*path, "kernel"), layer, matrix=True)
  return [weight, *([Entry(f"{hf}.bias", shape[:1], (*path, "bias"), layer)] if bias else [])]


def _norm(hf: str, path: Path_, size: int, layer: int | None = None) -> list[Entry]:
  return [
    Entry(f"{hf}.weight", (size,), (*path, "scale"), layer),
    Entry(f"{hf}.bias", (size,), (*path, "bias"), layer),
  ]
