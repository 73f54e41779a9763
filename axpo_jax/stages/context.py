"""What every stage of a run shares: the model's sizes, the chat format, the mesh.

In: a config. Out: a RunContext. It holds no parameters: each stage loads its own and frees them.
"""

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.errors import ConfigError
from axpo_jax.model import hf, sharding
from axpo_jax.model.chat import Chat
from axpo_jax.model.config import LoraConfig, ModelConfig
from axpo_jax.model.images import ImageProcessor
from axpo_jax.model.presets import PRESETS
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.stages import sections
from axpo_jax.stages.trackers import Tracker


@dataclasses.dataclass(frozen=True)
class RunContext:
  """What every stage of a run shares.

  Attributes:
    folder: of the run, for the audit log of tool calls; None: no log.
    lora: adapters that are trained instead of the model's own parameters; None: no adapters.
    trackers: experiment trackers; empty in all processes but the main one.
  """

  model_config: ModelConfig
  graphdef: nnx.GraphDef
  chat: Chat
  processor: ImageProcessor
  mesh: jax.sharding.Mesh
  rules: sharding.Rules
  folder: epath.Path | None = None
  lora: LoraConfig | None = None
  trackers: Sequence[Tracker] = ()

  @property
  def trained_config(self) -> ModelConfig:
    """The model's config with adapters, for learners. All others use `model_config`."""
    return dataclasses.replace(self.model_config, lora=self.lora)


def run_context(config: ConfigDict, folder: epath.Path | None = None) -> RunContext:
  """Reads the checkpoint's (or preset's) sizes, its tokenizer and image processor.

  Raises:
    ConfigError: a file is missing or damaged, or the mesh does not fit the devices.
  """
  named = config.model.tokenizer or config.model.checkpoint
  files = paths.local(named, hf.SMALL_FILES)
  try:
    chat = Chat.from_pretrained(files)
  except Exception as error:  # the tokenizer's libraries raise any for a broken folder
    raise ConfigError(f"config.model.{'tokenizer' if config.model.tokenizer else 'checkpoint'}={named!r}: "
                      f"its tokenizer cannot be loaded: {error}") from error
  model_config = _model_config(config, chat)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3VL(model_config, rngs=nnx.Rngs(0))))
  return RunContext(model_config, graphdef, chat, ImageProcessor.from_checkpoint(files),
                    _mesh(config, params), sharding.DEFAULT_RULES, folder, sections.lora(config))


def _mesh(config: ConfigDict, params: nnx.State) -> jax.sharding.Mesh:
  """The mesh, which must divide the model's sizes."""
  try:
    mesh = sharding.make_mesh(dict(config.mesh))
    sharding.param_shardings(params, mesh)
  except sharding.ShardingError as error:
    raise ConfigError(f"config.mesh={dict(config.mesh)}: {error}") from error
  return mesh


def _model_config(config: ConfigDict, chat: Chat) -> ModelConfig:
  m = config.model
  if m.checkpoint:
    base = ModelConfig.from_hf(paths.local(m.checkpoint, hf.SMALL_FILES))
  else:
    base = PRESETS[m.preset]
    if m.preset.startswith("tiny"):
      base = _with_tokenizer(base, chat)
  if chat.vocab_size > base.text.vocab_size:
    raise ConfigError(
      f"config.model.{'tokenizer' if m.tokenizer else 'checkpoint'}: its tokenizer has {chat.vocab_size} ids, "
      f"the model {base.text.vocab_size}: take the tokenizer that belongs to the checkpoint")
  return sections.computed_as(base, m)


def _with_tokenizer(base: ModelConfig, chat: Chat) -> ModelConfig:
  """A tiny preset with the vocabulary of the run's tokenizer."""
  return dataclasses.replace(
    base, text=dataclasses.replace(base.text, vocab_size=chat.vocab_size),
    image_token_id=chat.image_pad_id, video_token_id=chat.video_pad_id,
    vision_start_token_id=chat.vision_start_id, vision_end_token_id=chat.vision_end_id)
