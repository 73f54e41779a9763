"""Who gets which GPUs of a machine, and what is said where they do not suffice."""

import logging
import os

import pytest

from axpo_jax.config import base_config
from axpo_jax.errors import ConfigError
from axpo_jax.stages import machine

EIGHT = tuple("01234567")


@pytest.fixture(autouse=True)
def no_share_of_memory(monkeypatch):
  """`prepare` sets the variable: it is put back as it was."""
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
  del os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]


@pytest.mark.parametrize("gpus, servers, tensor, named, expected", [
  (EIGHT, 0, 1, (), (4, "4567", "0123")),         # by itself: one half each
  (EIGHT, 0, 2, (), (2, "4567", "0123")),
  (EIGHT, 2, 1, (), (2, "67", "012345")),
  (("2", "5", "7"), 0, 1, (), (1, "7", "25")),    # what a scheduler has left us
  (EIGHT, 0, 1, ("0", "1"), (2, "01", "234567")),
  (tuple("0123"), 4, 1, tuple("4567"), (4, "4567", "0123")),
  (("0",), 0, 1, ("0",), (1, "0", "0")),          # shared, if that is asked for
])
def test_servers_and_trainer_have_gpus_of_their_own(gpus, servers, tensor, named, expected):
  found = machine.split(gpus, servers, tensor, named)
  assert (found.servers, "".join(found.theirs), "".join(found.trainers)) == expected


def test_trainer_elsewhere_leaves_all_gpus_to_servers():
  found = machine.split(EIGHT, 0, 2, trains_on_gpus=False)
  assert (found.servers, found.theirs, found.trainers) == (4, EIGHT, ())


@pytest.mark.parametrize("gpus, servers, tensor, named, said", [
  ((), 0, 1, (), "no GPU"),
  (("0",), 0, 1, (), r"take 1 of this machine's 1 GPU"),
  (EIGHT, 8, 1, (), r"take 8 of this machine's 8 GPU"),
  (EIGHT, 0, 8, (), r"take 8 of this machine's 8 GPU"),
  (EIGHT, 3, 1, ("0", "1"), r"are 2, but servers=3 x tensor_parallel=1 take 3"),
])
def test_too_few_gpus_is_said_in_one_line(gpus, servers, tensor, named, said):
  with pytest.raises(ConfigError, match=said) as error:
    machine.split(gpus, servers, tensor, named)
  assert "config.rollout.sidecar" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def config():
  c = base_config()
  c.rollout.engine = "sglang"
  return c


def test_run_says_how_many_gpus_its_servers_take(config, monkeypatch, capsys):
  monkeypatch.setattr(machine.environment, "find_python", lambda device: "python")
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the user's
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
  machine.prepare(config)
  assert (config.rollout.sidecar.servers, config.rollout.sidecar.gpus) == (2, ("2", "3"))
  assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
  assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
  assert "2 SGLang server(s) of 1 GPU(s) each, on GPUs 2,3; the trainer has 0,1" in capsys.readouterr().out


@pytest.mark.parametrize("gpus, share", [(("1",), "0.92"), (("0",), None)])
def test_trainer_fills_gpus_that_it_does_not_share(config, monkeypatch, gpus, share):
  monkeypatch.setattr(machine.environment, "find_python", lambda device: "python")
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if share is None else "0,1")
  config.rollout.sidecar.gpus = gpus
  machine.prepare(config)
  assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == share


def test_nothing_is_divided_where_nothing_starts(config, monkeypatch, capsys):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
  for change in ({"rollout.urls": ("http://gpu:30000",)}, {"stages": ("sft",)},
                 {"rollout.engine": "embedded"}):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    machine.prepare(changed)
    machine.check_processes(changed, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3" and not capsys.readouterr().out


def test_missing_environment_and_key_are_named(config, monkeypatch, tmp_path):
  monkeypatch.setenv("AXPO_CACHE", str(tmp_path))
  monkeypatch.delenv("AXPO_SIDECAR_PYTHON", raising=False)
  with pytest.raises(ConfigError, match=r"config.rollout.sidecar: no environment .* --install"):
    machine.prepare(config)
  monkeypatch.delenv("TAVILY_API_KEY", raising=False)
  config.agent.tools = ("tavily-search",)
  with pytest.raises(ConfigError, match="TAVILY_API_KEY"):
    machine.prepare(config)


def test_several_processes_need_servers_that_run(config):
  with pytest.raises(ConfigError, match=r"config.rollout.urls"):
    machine.check_processes(config, 2)
  machine.check_processes(config, 1)
  config.rollout.sidecar.device = "cpu"
  machine.check_processes(config, 2)


def test_jax_does_not_complain_of_a_missing_gpu(monkeypatch):
  """The extra aot-gpu installs a CUDA plugin that cannot start here; with a GPU its reasons are told."""
  told = logging.getLogger("jax._src.xla_bridge")
  monkeypatch.setattr(told, "level", logging.WARNING)
  told.setLevel(logging.WARNING)  # clears what the logger remembers
  config = base_config()
  monkeypatch.setattr(machine, "visible_gpus", lambda: EIGHT)
  machine.prepare(config)
  assert told.isEnabledFor(logging.ERROR)
  monkeypatch.setattr(machine, "visible_gpus", lambda: ())
  machine.prepare(config)
  assert not told.isEnabledFor(logging.ERROR)
