"""A policy in one's own program: it acts, and it learns from what it did (docs/api.md).

`import axpo_jax` offers what is here, and the records around it, without loading JAX before it is needed.
"""

from __future__ import annotations

import pathlib
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from axpo_jax import repository
from axpo_jax.agent.rollout import Rollout
from axpo_jax.agent.transcript import Transcript
from axpo_jax.config_queries import apply_recipe
from axpo_jax.data.question import Question
from axpo_jax.errors import ConfigError
from axpo_jax.rl.credit import Credit
from axpo_jax.rollouts import collect
from axpo_jax.rollouts.collect import Group
from axpo_jax.rollouts.dump import dump_groups
from axpo_jax.stages import policies, rl, sections
from axpo_jax.stages.context import run_context


def load_config(file: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The config of a file such as "configs/axpo_8b.py", one's own or a shipped one.

  Args:
    overrides: field -> value, such as {"model.checkpoint": "/models/Qwen3-VL-8B-Thinking"}.

  Raises:
    ConfigError: there is no such file, no `get_config` in it, or no such field.
  """
  path = next((path for path in (pathlib.Path(file), repository.FOLDER / file) if path.is_file()), None)
  if path is None:
    raise ConfigError(f"{file}: there is no such file, and no shipped config of that name")
  sys.path.append(str(repository.FOLDER))  # configs derive from each other
  try:
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
      raise ConfigError(f"{path} has no function get_config() that returns a config")
    config = get_config()
  finally:
    sys.path.remove(str(repository.FOLDER))
  try:
    config.update_from_flattened_dict(overrides or {})
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"overrides of {file}: {error}") from error
  return config


def load_policy(config: ConfigDict) -> Policy:
  """The policy of config.model.checkpoint, with config.agent's tools and the sampler of config.rollout.

  Raises:
    ConfigError: a field cannot work; the message names it.
  """
  return Policy(config)


class Policy:
  """A policy that acts and learns. Its sampler lives from `async with` to the end of the block.

  Attributes:
    config: as given; its recipe is applied.
    steps_done: training steps so far.
  """

  def __init__(self, config: ConfigDict):
    if config.rollout.engine != "embedded" and not config.rollout.urls:
      raise ConfigError("config.rollout.urls is empty: start servers (axpo-sidecar) and name them, or use "
                        "config.rollout.engine='embedded'")
    apply_recipe(config)
    sections.check(config)
    self.config = config
    self._folder = tempfile.TemporaryDirectory(prefix="axpo-")
    self._loop = rl.Loop(config, run_context(config), config.model.checkpoint, epath.Path(self._folder.name),
                         tuple(config.rollout.urls), questions=iter(()))

  async def __aenter__(self) -> Policy:
    await self._loop.sync()
    return self

  async def __aexit__(self, *_: Any) -> None:
    await self._loop.engine.close()
    self._folder.cleanup()

  @property
  def steps_done(self) -> int:
    return self._loop.steps_done

  def start(self, question: Question) -> Transcript:
    """The prompt of a question. Raises ImageError, ChatError or EnvironmentFailed for one that cannot be asked."""
    return self._loop.actor.start(question)

  async def continue_episode(self, transcript: Transcript, question: Question, seed: int = 0) -> Rollout:
    """Thinks, acts and observes from the end of `transcript` to the answer, which is scored.

    A prompt (`start`), a cut rollout (`rollout.transcript.cut(end)`) and an interrupted one continue alike.
    A failure of the machine is a rollout with `failed` set, and no exception.
    """
    return await self._loop.actor.roll(transcript, question, seed)

  async def sample(self, questions: Sequence[Question], seed: int = 0) -> list[Group]:
    """config.rl.num_rollouts rollouts of every question, and the continuations that AXPO adds to them."""
    groups = await collect.sample_groups(self._loop.actor, questions, self.config.rl.num_rollouts, seed)
    await collect.resample(self._loop.actor, groups, self._loop.recipe.resample, seed)
    return groups

  def credit(self, groups: Sequence[Group]) -> list[Credit]:
    """Advantage and region of every rollout and continuation, group by group."""
    return self._loop.policy_update.credits(list(groups))

  async def train_step(self, groups: Sequence[Group]) -> dict[str, float]:
    """One step of RL on these groups; the sampler then has the new weights. Returns docs/metrics.md's metrics."""
    metrics = self._loop.update(list(groups))
    self._loop.steps_done += 1
    await self._loop.sync()
    return metrics

  def write_log(self, groups: Sequence[Group], file: str) -> None:
    """Writes all rollouts as JSON lines, and beside them as readable text with their images."""
    dump_groups(file, list(groups), self.credit(groups), self._loop.context.chat)

  def save(self, folder: str) -> None:
    """Writes the policy as a folder in Hugging Face layout."""
    loop = self._loop
    policies.export(loop.state.params, self.config, loop.context, self.config.model.checkpoint, epath.Path(folder))
