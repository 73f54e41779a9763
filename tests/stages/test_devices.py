"""What the devices at hand cannot do is refused before anything is allocated."""

import pytest

from axpo_jax.config import ASSETS
from axpo_jax.errors import ConfigError
from axpo_jax.stages import devices
from axpo_jax.stages.context import run_context
from configs.axpo_tiny import get_config


@pytest.fixture
def config():
  config = get_config()
  config.model.update(checkpoint="", preset="tiny", tokenizer=str(ASSETS / "tiny_tokenizer"))
  config.stages = ("rl",)
  return config


def test_the_embedded_sampler_must_fit(config):
  devices.check(config, run_context(config))
  config.rollout.embedded.rows = 10_000_000
  context = run_context(config)
  with pytest.raises(ConfigError, match=r"beside the .* of training.*embedded\.rows \(now 10000000\)"):
    devices.check(config, context)
  config.stages = ("sft",)
  devices.check(config, context)
  config.stages, config.rollout.engine = ("rl",), "sglang"
  devices.check(config, context)


def test_collecting_ahead_needs_devices_of_its_own(config):
  """Two threads would start programs with collectives on the same devices."""
  config.rollout.staleness = 1
  with pytest.raises(ConfigError, match=r"staleness=1 .* config\.mesh has 8: set staleness=0, or .*sglang"):
    devices.check(config, run_context(config))
  config.rollout.engine = "sglang"
  devices.check(config, run_context(config))


def test_a_mesh_that_does_not_divide_the_model(config):
  config.mesh.update(fsdp=1, tensor=8)
  with pytest.raises(ConfigError, match=r"config.mesh=.*'tensor': 8.*axis .* cannot be split"):
    run_context(config)
  config.mesh.update(fsdp=3, tensor=1)
  with pytest.raises(ConfigError, match="8 devices cannot be filled"):
    run_context(config)
