"""Policies as folders: parameters from a checkpoint, and a trained policy to a folder of its own."""

import dataclasses

from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax import paths, processes
from axpo_jax.model import hf, lora
from axpo_jax.stages import distributed
from axpo_jax.stages.context import RunContext
from axpo_jax.train.state import init_params, with_adapters


def frozen_dtype(context: RunContext, checkpoint: str | epath.Path) -> str:
  """Dtype of parameters that are not trained: the checkpoint's own.

  bfloat16 there loses nothing and takes half of float32's memory.
  """
  own = context.model_config.param_dtype
  return (hf.stored_dtype(paths.local(checkpoint)) or own) if checkpoint else own


def load_params(context: RunContext, checkpoint: str | epath.Path, seed: int) -> nnx.State:
  """Sharded parameters in `frozen_dtype`, from a checkpoint folder; random ones if `checkpoint` is "".

  A learner casts those that it trains.
  """
  if checkpoint:
    stored = dataclasses.replace(context.model_config, param_dtype=frozen_dtype(context, checkpoint))
    return hf.load_params(paths.local(checkpoint), stored, mesh=context.mesh, rules=context.rules)
  return init_params(context.model_config, seed, context.mesh, context.rules)


def trained_params(context: RunContext, checkpoint: str | epath.Path, seed: int) -> nnx.State:
  """`load_params`, with new adapters if the run trains adapters."""
  params = load_params(context, checkpoint, seed)
  if context.lora is None:
    return params
  return with_adapters(params, context.trained_config, seed, context.mesh, context.rules)


def export(params: nnx.State, config: ConfigDict, context: RunContext, policy: str | epath.Path,
           folder: epath.Path) -> epath.Path:
  """Saves a trained policy in Hugging Face layout, adapters merged in; returns `folder`.

  Args:
    policy: the folder that training started from. Tokenizer and processor files are copied from it.
  """
  # On an object store config.json is uploaded last: a stage that has that file is finished. Only the main
  # process writes to `on_disk`.
  on_disk = paths.scratch(folder)
  hf.save_checkpoint_hf(on_disk, lora.merge(params, context.lora, config.model.export_dtype),
                        context.model_config,
                        dtype=config.model.export_dtype,
                        tokenizer_from=paths.local(config.model.tokenizer or policy, hf.SMALL_FILES))
  if paths.is_remote(folder):
    distributed.on_main(
      lambda: paths.upload(on_disk, folder, last=hf.CONFIG_FILE, stays=True))
  processes.barrier()  # the next stage reads what the main process has written
  return folder
