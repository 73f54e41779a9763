"""Recipes as whole runs by their names, and what two of the switches keep over a kill."""

import functools
import json
import math
import signal

import jax
import pytest

from axpo_jax.model import sharding
from axpo_jax.rl.recipes import overrides
from axpo_jax.stages import experiment
from axpo_jax.stages.metrics import read_metrics
from tests import children
from tests.stages import micro_config, rigged
from tests.stages.rigged import untimed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [
  "gmpo", "sapo", "dppo", "icepop", "rloo", "dr_grpo", "axpo+gspo", "axpo+dr_grpo"])
def test_a_recipe_trains_by_its_name(name, inputs, tmp_path, monkeypatch):
  """One step of two updates: in the second the ratio is no longer one, so that each surrogate is met."""
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
  config = micro_config.get_config()
  for flag in rigged.flags(inputs):
    field, value = flag.removeprefix("--config.").split("=")
    config.update_from_flattened_dict({field: value})
  config.stages = ("rl",)
  config.rl.update(recipe=name, steps=1, updates=2, old_logprobs="trainer")
  config.optimizer.learning_rate = 1e-3
  config.eval.every = -1
  experiment.run(config, tmp_path)
  (line,) = read_metrics(tmp_path)
  written = json.loads((tmp_path / "config.json").read_text())["rl"]
  for field, value in overrides(name).items():
    section, _, leaf = field.rpartition(".")
    assert (written[section] if section else written)[leaf] == value, field
  assert math.isfinite(line["train/loss"]) and line["train/grad_norm"] > 0
  assert line["train/ratio_max"] != 1.0
  assert (line["axpo/continuations"] > 0) == name.startswith("axpo+")
  assert (tmp_path / "rl" / "policy" / "model.safetensors").exists()


def test_a_killed_run_keeps_what_its_switches_have_learned(inputs, tmp_path):
  """Prefixes chosen by the run's own record of recoveries, and questions sampled until enough can teach."""
  flags = [*rigged.flags(inputs), "--config.stages=('rl',)", "--config.rl.steps=4", "--config.eval.every=-1",
           "--config.rl.resample.choice=recoverable", "--config.rl.dynamic.rounds=2", "--config.rl.questions=3",
           "--config.rl.dynamic.oversample=1.5", "--config.checkpoint.every=3"]
  whole = children.launch(tmp_path / "whole", flags)
  assert whole.returncode == 0, whole.stderr[-4000:]
  died = children.launch(tmp_path / "killed", flags, program=children.dying(4))  # behind the checkpoint of step 3
  assert died.returncode == -signal.SIGKILL, died.stderr[-4000:]
  assert children.launch(tmp_path / "killed", flags).returncode == 0
  unbroken = read_metrics(tmp_path / "whole")
  assert untimed(read_metrics(tmp_path / "killed")) == untimed(unbroken)
  assert any(line["rollout/kept_share"] < 1 for line in unbroken)
  assert unbroken[-1]["axpo/prefixes"] > 0
  learned = {(run, step): record(tmp_path / run, step) for run in ("whole", "killed") for step in (3, 4)}
  assert learned["killed", 3] and learned["killed", 3] != learned["killed", 4] == learned["whole", 4]
  policy = "rl/policy/model.safetensors"
  assert (tmp_path / "killed" / policy).read_bytes() == (tmp_path / "whole" / policy).read_bytes()


def record(run, step):
  """The record of recoveries in a checkpoint."""
  file = run / "rl" / "checkpoints" / str(step) / "host" / "value.json"
  return json.loads(file.read_text())["value"]["host"]["recovery"]
