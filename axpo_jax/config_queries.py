"""What a config says of its run: its fields by name, the stages that sample, and the limits of their episodes.

In: a tree of `config.base_config`. Out: names, sections and sizes. Nothing is checked (`config_checks` does that).
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from axpo_jax.config import STAGES
from axpo_jax.errors import ConfigError
from axpo_jax.rl import recipes


def fields(config: ConfigDict, path: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of every field of the tree."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from fields(value, f"{path}{name}.")
    else:
      yield path + name, value


def apply_recipe(config: ConfigDict) -> None:
  """Sets the fields of `config.rl` that its recipe names, whatever a config file says of them."""
  try:
    config.rl.update_from_flattened_dict(recipes.overrides(config.rl.recipe))
  except ValueError as error:
    raise ConfigError(f"config.rl.recipe={error}") from error


def limits(config: ConfigDict, stage: str) -> ConfigDict:
  """The section with the `LIMITS` of episodes that a stage samples; "sft" and "rl" are training."""
  return config[stage] if stage in ("teach", "screen", "eval") else config.agent


def sampling_stages(config: ConfigDict) -> tuple[str, ...]:
  """Stages of the run whose episodes the engine of config.rollout samples, and "eval" where RL
  evaluates."""
  stages = set(config.stages) & {"screen", "rl", "eval"}
  if "teach" in config.stages and config.teach.engine == "policy":
    stages.add("teach")
  if "rl" in stages and config.eval.every >= 0:
    stages.add("eval")
  return tuple(stage for stage in STAGES if stage in stages)


def reads_held_out(config: ConfigDict) -> bool:
  """Whether a stage measures the held-out questions of config.data."""
  return bool(("rl" in config.stages and config.eval.every >= 0)
              or ("eval" in config.stages and not config.eval.benchmarks))


def longest_episode(config: ConfigDict) -> tuple[int, str]:
  """Tokens of the longest episode that the engine samples, and the field that says so."""
  fields = {"agent" if limits(config, stage) is config.agent else stage
            for stage in sampling_stages(config)} or {"agent"}
  return max((config[name].max_total_tokens, f"config.{name}.max_total_tokens") for name in fields)


def engine_length(config: ConfigDict) -> int:
  """Tokens of the longest sequence that the engine of config.rollout must hold."""
  return config.rollout[config.rollout.engine].length or longest_episode(config)[0]
