"""The reward and the environment that a config names.

In: the agent section. Out: objects. Equal sections give the same object, since a judge keeps its verdicts and
an environment its connections.
"""

import functools
import importlib
import json

from ml_collections import ConfigDict

from axpo_jax.agent import reward_functions, reward_terms
from axpo_jax.agent.environment import QUESTION, Environment
from axpo_jax.agent.judge import ChatJudge
from axpo_jax.errors import ConfigError

_rewards: dict[str, reward_functions.RewardSum] = {}


def reward(config: ConfigDict) -> reward_functions.RewardSum:
  """The reward that config.agent names.

  Raises:
    ConfigError: it names no function, or a judge without an address.
  """
  agent = config.agent
  key = json.dumps([agent.reward, agent.reward_time_limit, agent.reward_failure, agent.judge.to_json()])
  if key not in _rewards:
    known = {}
    if agent.judge.url:
      known["judge"] = reward_terms.judged(functools.partial(ChatJudge, **agent.judge))
    try:
      _rewards[key] = reward_functions.parse(
        agent.reward, time_limit=agent.reward_time_limit, known=known,
        leave_out=agent.reward_failure == "leave_out")
    except reward_functions.RewardError as error:
      hint = "" if known else " (the reward judge needs config.agent.judge.url and .model)"
      raise ConfigError(f"config.agent.reward: {error}{hint}") from error
  return _rewards[key]


def environment(config: ConfigDict) -> Environment:
  """The environment of a run's episodes.

  Raises:
    ConfigError: the name is not an environment, or its class does not accept the arguments.
  """
  agent = config.agent
  return _environment(agent.environment, agent.environment_args) if agent.environment else QUESTION


@functools.cache
def _environment(name: str, arguments: str) -> Environment:
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except Exception as error:  # of the user's module
    raise ConfigError(f"config.agent.environment={name!r} cannot be imported: "
                      f"{type(error).__name__}: {error}") from error
  try:
    arguments = json.loads(arguments)
    found = found(**arguments) if callable(found) else found
  except Exception as error:  # of the user's class
    raise ConfigError(f"config.agent.environment={name!r} cannot be made with "
                      f"config.agent.environment_args={arguments!r}: {error}") from error
  if not isinstance(found, Environment):
    raise ConfigError(f"config.agent.environment={name!r} is {type(found)} and no "
                      "axpo_jax.agent.environment.Environment")
  return found
