"""The optimizer of a stage's learner, and the shapes of its batches, from the config."""

from typing import Any

import jax
from ml_collections import ConfigDict

from axpo_jax.model import sharding
from axpo_jax.model.attention import reads_key_blocks
from axpo_jax.model.config import LoraConfig, ModelConfig
from axpo_jax.stages import sections
from axpo_jax.stages.context import RunContext
from axpo_jax.train.batch import Batch, batch_shards, vision_rows_here
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import Example, check_example, pack
from axpo_jax.train.state import Optimizer, make_optimizer


def optimizer(section: ConfigDict, total_steps: int, freeze_vision: bool,
              adapters: LoraConfig | None = None) -> Optimizer:
  """The optimizer of a section such as config.optimizer or config.sft.optimizer."""
  return make_optimizer(OptimizerConfig(**section, total_steps=total_steps,
                                        freeze_vision=freeze_vision, adapters=bool(adapters)))


def pack_examples(config: ConfigDict, context: RunContext, batch: list[Example]) -> list[Batch]:
  """Micro-batches in the static shapes of the config, so that few programs are compiled."""
  return pack(batch, banned_ids=context.chat.banned_ids,
              vocab_size=context.model_config.text.vocab_size,
              image_rows_here=vision_rows_here(context.mesh, context.rules),
              **pack_options(config, context.model_config, context.mesh, context.rules))


def pack_options(config: ConfigDict, model: ModelConfig, mesh: jax.sharding.Mesh,
                 rules: sharding.Rules | None = None) -> dict[str, Any]:
  """The options of `pack` that determine shapes. A run has no others (benchmarks/programs.py)."""
  text, section = model.text, config.batch
  with sharding.use(mesh, rules):
    list_blocks = reads_key_blocks(model.attention, section.length, text.num_heads,
                                   text.num_kv_heads, text.head_dim)
  return dict(
    rows=section.rows, length=section.length, share_prefixes=section.share_prefixes,
    vision_config=model.vision, list_blocks=list_blocks,
    patch_buckets=sections.patch_rows(config, model.vision),
    rows_multiple_of=batch_shards(mesh, rules),
    image_rows_multiple_of=sharding.parts("vision_rows", mesh, rules),
    row_buckets=[section.image_rows << doubled for doubled in range(16)])


def check_packable(example: Example, config: ConfigDict, context: RunContext) -> None:
  """Raises PackingError for an example that no batch of the config can hold."""
  check_example(example, config.batch.length, context.chat.banned_ids,
                max(sections.patch_rows(config, context.model_config.vision)),
                context.model_config.text.vocab_size)
