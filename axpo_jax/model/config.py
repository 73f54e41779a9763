"""Sizes and options of a Qwen3-VL policy; no JAX, no weights.

In: a Hugging Face `config.json` (path, folder or dict). Out: one frozen,
hashable `ModelConfig`, which is static under `jit`. Options that the model does not implement
are refused here, where the file is read, not deep inside a forward pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REMAT_POLICIES = ("none", "full", "dots")
ATTENTION = ("auto", "xla", "tpu", "gpu")
DTYPES = ("float32", "bfloat16")
# Linear layers that can have adapters, by the names of the model's modules.
_MLP_TARGETS = ("gate", "up", "down")
TEXT_TARGETS = ("q", "k", "v", "o", *_MLP_TARGETS)
VISION_TARGETS = ("qkv", "proj", "fc1", "fc2")


class UnsupportedConfig(ValueError):
  """A config asks for something that this port of Qwen3-VL does not do."""


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
  """A mixture of experts: in every layer a router picks a few small MLPs for each token.

  Attributes:
    count: MLPs of a layer.
    per_token: how many of them a token is sent to.
    intermediate_size: width of one.
  """

  count: int
  per_token: int
  intermediate_size: int

  def __post_init__(self):
    if not 0 < self.per_token <= self.count:
      raise UnsupportedConfig(
        f"num_experts_per_tok={self.per_token} must lie between 1 and num_experts={self.count}")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The decoder.

  mrope_section: how many rotary frequencies time, height and width have.
  experts: in the place of each layer's MLP; None: a dense model. `intermediate_size` is then not used.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int = 128
  rope_theta: float = 5_000_000.0
  mrope_section: tuple[int, int, int] = (24, 20, 20)
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  max_positions: int = 262_144
  experts: ExpertsConfig | None = None

  def __post_init__(self):
    if self.experts and self.hidden_size in (self.experts.intermediate_size, 2 * self.experts.intermediate_size):
      raise UnsupportedConfig(
        f"hidden_size={self.hidden_size} and moe_intermediate_size={self.experts.intermediate_size}: where one "
        "is the other or twice it, a checkpoint's shapes do not say which axis of an expert is which")
    if self.num_heads % self.num_kv_heads:
      raise UnsupportedConfig(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
    if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
      raise UnsupportedConfig(
        f"mrope_section={self.mrope_section} must be three counts that sum to "
        f"head_dim / 2 = {self.head_dim // 2}"
      )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The vision tower. `num_position_embeddings` is a square number: the learned position grid."""

  depth: int
  hidden_size: int
  intermediate_size: int
  out_hidden_size: int
  num_heads: int = 16
  patch_size: int = 16
  temporal_patch_size: int = 2
  spatial_merge_size: int = 2
  in_channels: int = 3
  num_position_embeddings: int = 2304
  deepstack_layers: tuple[int, ...] = (5, 11, 17)
  rope_theta: float = 10_000.0

  def __post_init__(self):
    if self.hidden_size % (4 * self.num_heads):
      raise UnsupportedConfig(
        f"vision hidden_size={self.hidden_size} must be a multiple of 4 * num_heads="
        f"{4 * self.num_heads}: rotary splits a head into (row, column) halves"
      )
    if self.grid_side**2 != self.num_position_embeddings:
      raise UnsupportedConfig(
        f"num_position_embeddings={self.num_position_embeddings} must be a square number"
      )
    taps = self.deepstack_layers
    if list(taps) != sorted(set(taps)) or any(not 0 <= i < self.depth for i in taps):
      raise UnsupportedConfig(
        f"deepstack_layers={taps} must be ascending block numbers below depth={self.depth}"
      )

  @property
  def grid_side(self) -> int:
    return round(self.num_position_embeddings**0.5)

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def merge_unit(self) -> int:
    """Patches per merged token."""
    return self.spatial_merge_size**2

  @property
  def patch_dim(self) -> int:
    """Values per flattened patch, in (channel, time, row, column) order."""
    return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters beside linear layers (`model.lora`).

  Attributes:
    rank: of the products that are added to kernels.
    alpha: the products are scaled by alpha / rank.
    targets: which layers have an adapter, of TEXT_TARGETS and VISION_TARGETS: in all blocks, and "fc1" and
      "fc2" in the mergers too.
  """

  rank: int
  alpha: float = 32.0
  targets: tuple[str, ...] = TEXT_TARGETS

  def __post_init__(self):
    if self.rank < 1 or self.alpha <= 0:
      raise UnsupportedConfig(f"lora.rank={self.rank} and lora.alpha={self.alpha} must be positive")
    known = (*TEXT_TARGETS, *VISION_TARGETS)
    if not self.targets or set(self.targets) - set(known):
      raise UnsupportedConfig(f"lora.targets={self.targets}: name some of {known} and no others")

  @property
  def in_vision(self) -> bool:
    """Whether the vision tower has adapters."""
    return bool(set(self.targets) & set(VISION_TARGETS))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A whole policy.

  dtype: of activations and matmuls; norms, softmax and logits are always float32.
  param_dtype: of stored parameters.
  remat: "none" keeps all activations for the backward pass, "full" keeps one hidden state a
    layer, "dots" also keeps the outputs of the weight matmuls.
  attention: of text without a cache. "tpu" and "gpu" are Pallas kernels, "xla" computes the same
    anywhere, and "auto" is "tpu" where it runs, else "xla". See `model.attention`.
  attention_chunk: with "xla", queries per attention chunk. Longer sequences are computed chunk by chunk with
    recomputation, so that scores take [heads, chunk, keys] instead of [heads, T, keys]. 0: never.
  lora: adapters to train; None: none. Checkpoints and samplers hold policies without them.
  """

  text: TextConfig
  vision: VisionConfig
  image_token_id: int = 151655
  video_token_id: int = 151656
  vision_start_token_id: int = 151652
  vision_end_token_id: int = 151653
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  attention_chunk: int = 512
  lora: LoraConfig | None = None

  def __post_init__(self):
    if self.remat not in REMAT_POLICIES:
      raise UnsupportedConfig(f"remat={self.remat!r}; choose one of {REMAT_POLICIES}")
    if self.attention not in ATTENTION:
      raise UnsupportedConfig(f"attention={self.attention!r}; choose one of {ATTENTION}")
    if self.attention_chunk < 0:
      raise UnsupportedConfig(f"attention_chunk={self.attention_chunk} must be 0 (all at once) or more")
    for field in ("dtype", "param_dtype"):
      if getattr(self, field) not in DTYPES:
        raise UnsupportedConfig(f"{field}={getattr(self, field)!r}; choose one of {DTYPES}")
    if self.vision.out_hidden_size != self.text.hidden_size:
      raise UnsupportedConfig(
        f"vision out_hidden_size={self.vision.out_hidden_size} must equal text hidden_size="
        f"{self.text.hidden_size}: merged patches enter the text's residual stream"
      )
    if self.text.experts and self.lora and (no := set(self.lora.targets) & set(_MLP_TARGETS)):
      raise UnsupportedConfig(f"lora.targets={self.lora.targets}: experts have no adapters; leave "
                              f"{', '.join(sorted(no))} out")
    for field in _TOKEN_ID_FIELDS:
      if not 0 <= getattr(self, field) < self.text.vocab_size:
        raise UnsupportedConfig(f"{field}={getattr(self, field)} is outside the vocabulary of "
                                f"{self.text.vocab_size}")
    if len(self.vision.deepstack_layers) > self.text.num_layers:
      raise UnsupportedConfig(
        f"{len(self.vision.deepstack_layers)} DeepStack features need as many text layers, "
        f"there are {self.text.num_layers}"
      )

  def unrolls(self, layers: int) -> bool:
    """Whether so few layers are unrolled instead of scanned.

    A scan copies whatever the backward pass needs into arrays over all layers and out again, which on a CPU
    takes a quarter of a small model's step. With remat the scan stays: without it the compiler would merge the
    recomputation with the first pass.
    """
    return layers < 4 and self.remat == "none"

  @classmethod
  def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike, **options) -> ModelConfig:
    """Reads a Hugging Face Qwen3-VL config (dict, `config.json` or the folder that holds it).

    `options` are this class's own fields (dtype, param_dtype, remat, attention, ...).

    Raises:
      UnsupportedConfig: the file is not a Qwen3-VL that we implement; names file and field.
      FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping):
      return cls._from_raw(source, options)
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
      return cls._from_raw(_read_json(path), options)
    except UnsupportedConfig as error:
      raise UnsupportedConfig(f"{path}: {error}") from error

  @classmethod
  def _from_raw(cls, raw: Mapping[str, Any], options: Mapping[str, Any]) -> ModelConfig:
    if raw.get("model_type") not in ("qwen3_vl", "qwen3_vl_moe"):
      raise UnsupportedConfig(
        f"model_type={raw.get('model_type')!r}; only 'qwen3_vl' (dense Qwen3-VL) and 'qwen3_vl_moe' are "
        "implemented"
      )
    text, vision = (_section(raw, name) for name in ("text_config", "vision_config"))
    # The top level alone counts, as for transformers and SGLang, whatever text_config says.
    tied = raw.get("tie_word_embeddings", False)
    ids = {k: raw[k] for k in _TOKEN_ID_FIELDS if k in raw}
    experts = _experts_from_hf(text) if raw["model_type"] == "qwen3_vl_moe" else None
    return cls(text=_text_from_hf(text, tied, experts), vision=_vision_from_hf(vision), **{**ids, **options})

  def to_hf(self) -> dict[str, Any]:
    """The `config.json` of a Hugging Face checkpoint of this model (the released files' layout)."""
    text, vision = self.text, self.vision
    kind = "qwen3_vl_moe" if text.experts else "qwen3_vl"
    return {
      "architectures": [f"Qwen3VL{'Moe' if text.experts else ''}ForConditionalGeneration"],
      "model_type": kind,
      **{k: getattr(self, k) for k in _TOKEN_ID_FIELDS},
      "tie_word_embeddings": text.tie_word_embeddings,
      "text_config": {
        "model_type": f"{kind}_text",
        **{hf: getattr(text, ours) for ours, hf in _TEXT_FIELDS.items()},
        "rope_theta": text.rope_theta,
        "rope_scaling": {
          "rope_type": "default",
          "mrope_interleaved": True,
          "mrope_section": list(text.mrope_section),
        },
        "tie_word_embeddings": text.tie_word_embeddings,
        **_TEXT_FIXED,
        **_experts_to_hf(text.experts),
      },
      "vision_config": {
        "model_type": kind,
        **{hf: getattr(vision, ours) for ours, hf in _VISION_FIELDS.items()},
        "deepstack_visual_indexes": list(vision.deepstack_layers),
        **_vision_rope_to_hf(vision.rope_theta),
        **_VISION_FIXED,
      },
    }


_TOKEN_ID_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

# Our field -> Hugging Face's, for both directions.
_RENAMED = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads", "max_positions": "max_position_embeddings"}
_TEXT_FIELDS = {name: _RENAMED.get(name, name) for name in (
  "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
  "rms_norm_eps", "max_positions")}
_VISION_FIELDS = {name: name for name in (
  "depth", "hidden_size", "intermediate_size", "out_hidden_size", "num_heads", "patch_size",
  "temporal_patch_size", "spatial_merge_size", "in_channels", "num_position_embeddings")}
# What the architecture fixes: written out, and checked when a file states it.
_TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}
# Every layer is routed, for the layers are one stack; and transformers always normalises the chosen weights.
_EXPERTS_FIXED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_EXPERTS_FIELDS = {"count": "num_experts", "per_token": "num_experts_per_tok",
                   "intermediate_size": "moe_intermediate_size"}


def _experts_from_hf(raw: Mapping[str, Any]) -> ExpertsConfig:
  # transformers 5 may write the number of experts by its second name.
  raw = {"num_experts": raw.get("num_local_experts"), **raw}
  if raw.get("mlp_only_layers") is None:
    raw.pop("mlp_only_layers", None)
  _check_fixed("text_config", raw, _EXPERTS_FIXED)
  return ExpertsConfig(**_sizes("text_config", raw, _EXPERTS_FIELDS))


def _experts_to_hf(experts: ExpertsConfig | None) -> dict[str, Any]:
  if experts is None:
    return {}
  return {hf: getattr(experts, ours) for ours, hf in _EXPERTS_FIELDS.items()} | _EXPERTS_FIXED


def _text_from_hf(raw: Mapping[str, Any], tied: bool, experts: ExpertsConfig | None) -> TextConfig:
  _check_fixed("text_config", raw, _TEXT_FIXED)
  # transformers 4 writes rope_theta + rope_scaling, transformers 5 one rope_parameters.
  rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  theta = rope.get("rope_theta", raw.get("rope_theta"))
  if rope_type not in ("default", "mrope") or not rope.get("mrope_interleaved", True):
    raise UnsupportedConfig(
      f"text_config's rotary settings {rope} are not Qwen3-VL's interleaved M-RoPE"
    )
  if theta is None:
    raise UnsupportedConfig("text_config gives no rope_theta; Qwen3-VL's is 5000000")
  # Files may leave the size of a head out; transformers then takes this one, whatever the widths are.
  raw = {"head_dim": TextConfig.head_dim, **raw}
  return TextConfig(
    **_sizes("text_config", raw, _TEXT_FIELDS),
    rope_theta=float(theta),
    mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
    tie_word_embeddings=bool(tied),
    experts=experts,
  )


def _vision_from_hf(raw: Mapping[str, Any]) -> VisionConfig:
  _check_fixed("vision_config", raw, _VISION_FIXED)
  taps = raw.get("deepstack_visual_indexes")
  if not isinstance(taps, Sequence):
    raise UnsupportedConfig(
      f"vision_config.deepstack_visual_indexes={taps!r}: write the list of the checkpoint's blocks, such "
      "as [8, 16, 24]"
    )
  return VisionConfig(**_sizes("vision_config", raw, _VISION_FIELDS), deepstack_layers=tuple(taps),
                      rope_theta=_vision_theta(raw))


def _vision_theta(raw: Mapping[str, Any]) -> float:
  """transformers 5 writes rope_parameters; the released files say nothing."""
  rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
  kind = rope.get("rope_type", rope.get("type", "axial"))
  theta = rope.get("rope_theta", raw.get("rope_theta", VisionConfig.rope_theta))
  if kind not in ("axial", "default") or not isinstance(theta, (int, float)) or theta <= 0:
    raise UnsupportedConfig(f"vision_config's rotary settings {rope}: only rope_type 'axial' with a "
                            "positive rope_theta is implemented")
  return float(theta)


def _vision_rope_to_hf(theta: float) -> dict[str, Any]:
  """Nothing where the released files, and readers that know no such field, say nothing."""
  if theta == VisionConfig.rope_theta:
    return {}
  return {"rope_parameters": {"rope_type": "axial", "rope_theta": theta}}


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  if not isinstance(raw.get(name), Mapping):
    raise UnsupportedConfig(f"{name} is missing: take the config.json of the model that this folder is "
                            "based on")
  return raw[name]


def _sizes(where: str, raw: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
  """Our fields from Hugging Face's, which must be numbers."""
  for name in fields.values():
    if not isinstance(raw.get(name), (int, float)):
      raise UnsupportedConfig(f"{where}.{name}={raw.get(name)!r} is not a number")
  return {ours: raw[hf] for ours, hf in fields.items()}


def _check_fixed(where: str, raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
  for key, value in fixed.items():
    if raw.get(key, value) != value:
      raise UnsupportedConfig(f"{where}.{key}={raw[key]!r}; only {value!r} is implemented")


def _read_json(path: Path) -> Mapping[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} is missing: name a folder with a checkpoint's config.json, "
                            "*.safetensors and tokenizer")
  try:
    raw = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise UnsupportedConfig(f"not JSON: {error}") from error
  if not isinstance(raw, Mapping):
    raise UnsupportedConfig(f"not a JSON object but {type(raw).__name__}")
  return raw
