"""What users plug in, in whole runs with the policy of `rigged`: environments and rewards by flags alone."""

import functools
import json
import pathlib

import jax
import pytest

import axpo_jax
from axpo_jax.config_checks import validate
from axpo_jax.errors import ConfigError
from axpo_jax.model import sharding
from axpo_jax.stages import experiment, plugins
from axpo_jax.stages.metrics import read_metrics
from tests.agent import openenv_server
from tests.stages import micro_config, rigged

REPO = pathlib.Path(axpo_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return rigged.write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", functools.partial(
    sharding.make_mesh, devices=jax.devices()[:1]))
  monkeypatch.syspath_prepend(str(REPO / "examples"))


def config_of(checkpoint, folder, **changes):
  config = micro_config.get_config()
  questions = str(rigged.write_questions(folder))
  config.model.checkpoint = str(checkpoint)
  config.data.update(path=questions, eval_path=questions)
  config.stages = ("rl",)
  config.rl.update(steps=2)
  config.eval.every = -1
  config.log.dump_every = 1
  config.update_from_flattened_dict({f"agent.{name}": value for name, value in changes.items()})
  config.agent.update(max_turns=3, max_new_tokens=24)
  return config


def run(checkpoint, folder, *, turn_weight=0.0, **changes):
  """Metrics of both steps and the dumped rollouts of the last."""
  config = config_of(checkpoint, folder, **changes)
  config.rl.credit.turn_weight = turn_weight
  experiment.run(config, folder / "run")
  lines = [line for line in read_metrics(folder / "run") if "rollout/reward_mean" in line]
  dumped = [json.loads(line) for line in
            (folder / "run" / "rl" / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(line["train/logp_gap_abs_max"] < 1e-4 for line in lines)
  return lines, dumped


@pytest.mark.slow
def test_a_guessing_game_with_a_reward_of_ones_own(checkpoint, tmp_path):
  lines, dumped = run(checkpoint, tmp_path, environment="own_environment:GuessingGame",
                      environment_args='{"per_guess": -0.25}', turn_weight=0.5, reward="environment + own_reward:care")
  assert all(line["rollout/failed"] == 0 for line in lines)
  assert any(line.get("rollout/stop/done", 0) > 0 for line in lines)
  assert {"rollout/reward/environment", "rollout/reward/care/failed_calls",
          "rollout/reward/care/length"} <= lines[0].keys()
  for rollout in dumped:
    paid = rollout["transcript"].get("rewards", [])
    assert rollout["reward"] == pytest.approx(sum(paid) + sum(
      value for name, value in rollout["reward_parts"].items() if name.startswith("care/")))
  several = [rollout for rollout in dumped if len(rollout["transcript"].get("rewards", [])) > 1]
  assert several and any(rollout["turn_metadata"] for rollout in several)
  assert any(line.get("axpo/continuations", 0) for line in lines)


@pytest.mark.slow
def test_a_server_of_openenv(checkpoint, tmp_path):
  with openenv_server.serving() as (url, sessions):
    lines, dumped = run(
      checkpoint, tmp_path, environment="axpo_jax.agent.environments.openenv:OpenEnv",
      environment_args=json.dumps({"url": url, "action": "said"}), reward="environment")
    assert not sessions
  assert all(line["rollout/failed"] == 0 for line in lines)
  assert {rollout["stop"] for rollout in dumped} >= {"done"}


@pytest.mark.slow
def test_a_shell_in_the_sandbox(checkpoint, tmp_path):
  lines, _ = run(checkpoint, tmp_path, tools=("image_zoom_in", "shell"), scopes=("read_image", "execute"))
  assert all(line["rollout/failed"] == 0 for line in lines)


@pytest.mark.parametrize("changes, says", [
  ({"reward": "exat"}, "there is no reward 'exat'"),
  ({"reward": "judge"}, "needs config.agent.judge.url"),
  ({"reward": "no_such_module:f"}, "cannot be imported"),
  ({"reward_failure": "crash"}, "choose one of"),
  ({"environment": "GuessingGame"}, "cannot be imported"),
  ({"environment": "own_environment:Missing"}, "cannot be imported"),
  ({"environment": "own_environment:Step"}, "no axpo_jax.agent.environment.Environment"),
  ({"environment": "own_environment:GuessingGame", "environment_args": "{"}, "environment_args"),
  ({"environment": "own_environment:GuessingGame", "environment_args": '{"gold": 1}'}, "environment_args"),
  ({"judge.url": "http://x"}, "set both or neither")])
def test_names_that_cannot_work_stop_a_run_at_once(tmp_path, changes, says):
  with pytest.raises(ConfigError, match=says):
    validate(config_of(rigged.TOKENIZER, tmp_path, **changes))


def test_one_object_for_the_same_section(tmp_path):
  config = config_of(rigged.TOKENIZER, tmp_path, environment="own_environment:GuessingGame")
  assert plugins.environment(config) is plugins.environment(config)
  assert plugins.reward(config) is plugins.reward(config)
