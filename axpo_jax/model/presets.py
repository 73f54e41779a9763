"""Sizes by name: those of the released Qwen3-VL models, and small ones for one CPU."""

import dataclasses

from axpo_jax.model.config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig


def _preset(hidden, layers, heads, mlp, tied, vision, kv_heads=8, experts=None) -> ModelConfig:
  depth, vision_hidden, vision_mlp, deepstack = vision
  return ModelConfig(
    text=TextConfig(
      vocab_size=151_936, hidden_size=hidden, intermediate_size=mlp, num_layers=layers,
      num_heads=heads, num_kv_heads=kv_heads, tie_word_embeddings=tied,
      experts=experts,
    ),
    vision=VisionConfig(
      depth=depth, hidden_size=vision_hidden, intermediate_size=vision_mlp,
      out_hidden_size=hidden, deepstack_layers=deepstack,
    ),
  )


_SMALL_VISION = (24, 1024, 4096, (5, 11, 17))
_LARGE_VISION = (27, 1152, 4304, (8, 16, 24))

PRESETS: dict[str, ModelConfig] = {
  "2b": _preset(2048, 28, 16, 6144, True, _SMALL_VISION),
  "4b": _preset(2560, 36, 32, 9728, True, _SMALL_VISION),
  "8b": _preset(4096, 36, 32, 12288, False, _LARGE_VISION),
  "32b": _preset(5120, 64, 64, 25600, False, _LARGE_VISION),
  "30b_a3b": _preset(2048, 48, 32, 6144, False, _LARGE_VISION, 4, ExpertsConfig(128, 8, 768)),
  # For one CPU. Vocabulary and ids are placeholders: `dataclasses.replace` them with a
  # tokenizer's (the large presets' ids are those of the released tokenizer).
  "tiny": ModelConfig(
    text=TextConfig(
      vocab_size=1536, hidden_size=96, intermediate_size=288, num_layers=3, num_heads=4,
      num_kv_heads=2, head_dim=32, mrope_section=(8, 4, 4), tie_word_embeddings=True,
      max_positions=8192,
    ),
    vision=VisionConfig(
      depth=3, hidden_size=64, intermediate_size=128, out_hidden_size=96, num_heads=4,
      patch_size=8, num_position_embeddings=144, deepstack_layers=(0, 1, 2),
    ),
    image_token_id=3, video_token_id=4, vision_start_token_id=1, vision_end_token_id=2,
    dtype="float32",
  ),
}
PRESETS["tiny_moe"] = dataclasses.replace(PRESETS["tiny"], text=dataclasses.replace(
  PRESETS["tiny"].text, experts=ExpertsConfig(count=8, per_token=2, intermediate_size=144)))
