"""How much memory a policy takes on the servers, and so how many GPUs and sequences; no JAX.

In: sizes of a `ModelConfig`. Out: bytes, counts, and the table of docs/sidecar.md. Everything is in
16 bits (bfloat16), as on GPUs; GB are 1e9 bytes.
"""

from axpo_jax.engine.sglang.server.spec import SidecarError, model_config
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.presets import PRESETS

_BYTES = 2
LONGEST = 24_576  # tokens of the paper's longest training episode


def parameters(config: ModelConfig) -> int:
  """How many numbers the weights are."""
  text, vision = config.text, config.vision
  d, head = text.hidden_size, text.head_dim
  attention = d * head * (2 * text.num_heads + 2 * text.num_kv_heads) + 2 * head
  mlp = 3 * d * text.intermediate_size
  if text.experts:
    mlp = text.experts.count * d * (3 * text.experts.intermediate_size + 1)
  layer = attention + mlp + 2 * d
  tables = text.vocab_size * d * (1 if text.tie_word_embeddings else 2)
  return text.num_layers * layer + tables + d + _vision_parameters(vision)


def _vision_parameters(vision) -> int:
  v, wide, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
  block = 4 * v * v + 4 * v + 2 * v * wide + wide + v + 4 * v  # attention, MLP, two norms; all biased
  merged = v * vision.merge_unit
  merger = merged * merged + merged + merged * out + out
  taps = len(vision.deepstack_layers)
  norms = 2 * v + taps * 2 * merged  # the last merger's norm is before merging, the taps' after
  inputs = vision.patch_dim * v + v + vision.num_position_embeddings * v
  return vision.depth * block + (1 + taps) * merger + norms + inputs


def kv_bytes_per_token(config: ModelConfig) -> int:
  """Keys and values of all layers."""
  text = config.text
  return 2 * text.num_layers * text.num_kv_heads * text.head_dim * _BYTES


def tokens_that_fit(config: ModelConfig, gpus: int, gpu_gb: float, mem_fraction: float) -> int:
  """Size of one server's KV pool; negative if not even the weights fit."""
  room = gpus * gpu_gb * 1e9 * mem_fraction - parameters(config) * _BYTES
  return int(room // kv_bytes_per_token(config))


def gpus_needed(model: str, device: str, gpu_gb: float, mem_fraction: float) -> int:
  """Fewest GPUs (1, 2, 4, 8) whose KV pool holds four of the longest episodes; 1 on a CPU."""
  if device == "cpu":
    return 1
  config = model_config(model)
  for gpus in (1, 2, 4, 8):
    if tokens_that_fit(config, gpus, gpu_gb, mem_fraction) >= 4 * LONGEST:
      return gpus
  raise SidecarError(f"{model} does not fit on 8 GPUs of {gpu_gb:g} GB; see --tensor_parallel")


def table(gpu_gb: float, mem_fraction: float) -> str:
  """Markdown: one line a preset and number of GPUs."""
  lines = [
    "| policy | GPUs | weights, GB | KV a token, KiB | KV pool, tokens | "
    f"episodes of {LONGEST:,} tokens |",
    "|---|---|---|---|---|---|",
  ]
  for name in ("2b", "4b", "8b", "32b", "30b_a3b"):
    config, title = PRESETS[name], name.upper().replace("_", "-")
    for gpus in (1, 2, 4):
      tokens = tokens_that_fit(config, gpus, gpu_gb, mem_fraction)
      if tokens > 0:
        weights = parameters(config) * _BYTES / 1e9
        lines.append(
          f"| {title} | {gpus} | {weights:.1f} | {kv_bytes_per_token(config) / 1024:.0f} | "
          f"{tokens:,} | {tokens // LONGEST} |"
        )
  return "\n".join(lines)
