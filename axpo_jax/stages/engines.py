"""The sampler that a config names: the embedded engine, or SGLang servers and their client."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from axpo_jax import paths
from axpo_jax.engine.embedded.engine import EmbeddedEngine
from axpo_jax.engine.protocol import Engine
from axpo_jax.engine.sglang.engine import SGLangEngine
from axpo_jax.engine.sglang.server.sidecar import Sidecar
from axpo_jax.engine.sglang.server.spec import API_KEY_VARIABLE, SidecarError
from axpo_jax.engine.sglang.weight_push import PushFolder
from axpo_jax.errors import ConfigError
from axpo_jax.model.config import LoraConfig
from axpo_jax.stages import distributed, sections
from axpo_jax.stages.context import RunContext


@contextlib.contextmanager
def servers(config: ConfigDict, policy: str, folder: epath.Path) -> Iterator[tuple[str, ...]]:
  """URLs of the SGLang servers; none with another engine.

  They are the config's, or else servers that start here with the policy's checkpoint and stop at the
  end of the context.

  Raises:
    ConfigError: the servers cannot be started; the message says what to install or to change.
  """
  section = config.rollout
  if section.engine != "sglang" or section.urls:
    yield tuple(section.urls)
    return
  with contextlib.ExitStack() as stack:
    yield distributed.on_main(_start_servers, stack, config, policy, folder)


def _start_servers(stack: contextlib.ExitStack, config: ConfigDict, policy: str, folder: epath.Path
                   ) -> tuple[str, ...]:
  try:
    # A server does not answer while it loads weights, and must not count as hanging.
    spec = sections.sidecar(config, str(paths.local(policy)),
                            hang_after=max(config.rollout.sglang.load_s, 300.0),
                            api_key=os.environ.get(API_KEY_VARIABLE, ""))
    return tuple(stack.enter_context(Sidecar(spec, paths.scratch(folder / "sidecar"))).urls)
  except SidecarError as error:
    raise ConfigError(f"config.rollout.sidecar: {error}") from error


def make_engine(config: ConfigDict, context: RunContext, params: nnx.State, urls: Sequence[str],
                folder: epath.Path) -> Engine:
  """The sampler that the config names. Call `update_weights` before it samples.

  In a run of several processes each of them calls this and `update_weights` of the result; only the main
  process samples.

  Args:
    urls: of the servers, see `servers`.
    folder: of the stage. Weights reach servers through it unless the config names another.
  """
  if config.rollout.engine == "embedded":
    return _embedded(config, context, params)
  made = sections.sglang(
    config, os.path.abspath(config.rollout.sglang.push_folder or paths.scratch(folder / "push")),
    skip_vision=vision_is_frozen(config, context.lora))
  if not distributed.is_main():
    return distributed.Follower(PushFolder(made.push, context.model_config).write)
  if not config.rollout.urls and not made.image_folder:
    # Servers of this machine read files, which spares both sides base64 in JSON at every turn.
    images = paths.scratch(folder / "images")
    shutil.rmtree(images, ignore_errors=True)  # of a run that was killed
    made = dataclasses.replace(made, image_folder=os.path.abspath(images))
  kind = SGLangEngine if jax.process_count() == 1 else distributed.RemoteEngine
  return kind(urls, context.model_config, dataclasses.replace(
    made, api_key=os.environ.get(API_KEY_VARIABLE, "")))


def _embedded(config: ConfigDict, context: RunContext, params: nnx.State) -> Engine:
  args = context.model_config, context.graphdef, params
  options = {"config": sections.embedded(config), "rules": context.rules}
  if jax.process_count() == 1:
    return EmbeddedEngine(*args, mesh=context.mesh, **options)
  if distributed.is_main():
    return distributed.LocalEngine(*args, **options)
  mesh = distributed.local_mesh()
  distributed.whole_on_main(params, mesh, context.rules)
  return distributed.Follower(
    lambda params, _version: distributed.whole_on_main(params, mesh, context.rules))


def weights_dtype(config: ConfigDict) -> str | None:
  """Dtype of the weights that the sampler takes; None: the model's own."""
  rollout = config.rollout
  return rollout.embedded.dtype if rollout.engine == "embedded" else rollout.sglang.push_dtype


def vision_is_frozen(config: ConfigDict, adapters: LoraConfig | None) -> bool:
  """Whether RL trains nothing in the vision tower."""
  return config.model.freeze_vision or (adapters is not None and not adapters.in_vision)
