"""Which configs a run's folder accepts, what it says of others, and what a failed start leaves."""

import json

import pytest

from axpo_jax.config import base_config
from axpo_jax.errors import ConfigError
from axpo_jax.stages import claim


@pytest.fixture
def config():
  c = base_config()
  c.stages = ("sft", "rl")
  return c


@pytest.fixture
def run(tmp_path, config):
  """The folder of a run of that config, and a function that asks for the same with changes."""
  claim.take(tmp_path / "run", config)

  def again(**changes):
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    claim.check(tmp_path / "run", config)
    return tmp_path / "run"

  return again


@pytest.mark.parametrize("changes, said", [
  ({"rl__num_rollouts": 16}, "rl.num_rollouts: 8 there, 16 here"),
  ({"seed": 1, "rl__loss__kl_coef": 0.0}, "rl.loss.kl_coef: 0.001 there, 0.0 here; seed: 0 there, 1 here"),
  ({"rl__loss__tis_cap": None}, "rl.loss.tis_cap: 2.0 there, none here"),
  ({"rollout__engine": "sglang"}, 'rollout.engine: "embedded" there, "sglang" here'),
  ({"rollout__embedded__dtype": "float32"}, 'rollout.embedded.dtype: "bfloat16" there, "float32" here'),
  ({"stages": ("rl",)}, 'stages: ["sft", "rl"] there, ["rl"] here'),
  # SFT's rate falls along a cosine.
  ({"sft__steps": 2000}, r"sft.steps: 1500 there, 2000 here \(its learning rate depends on them"),
])
def test_what_defines_the_numbers_is_refused_field_by_field(run, changes, said):
  with pytest.raises(ConfigError, match=f"holds a run with another configuration: {said}".replace(
      "[", r"\[").replace("]", r"\]")):
    run(**changes)


@pytest.mark.parametrize("changes", [
  {}, {"rl__steps": 400}, {"log__dump_every": 0, "log__gap_alarm": 0.1}, {"checkpoint__every": 1},
  {"mesh__tensor": 4, "batch__rows": 16, "model__remat": "dots"}, {"rollout__urls": ("http://a:1",)},
  {"rollout__sglang__request_s": 60.0, "rollout__sidecar__servers": 2}, {"data__image_cache": "/tmp/x"},
  {"stages": ("sft", "rl", "eval")}, {"eval__every": 10},
])
def test_what_leaves_the_numbers_may_change(run, changes):
  run(**changes)
  with pytest.raises(ConfigError, match=r"configuration: seed: 0 there, 1 here\. Resume"):
    run(seed=1)  # and is not named beside what may not


def test_sections_of_stages_that_did_not_run_may_change(config, tmp_path):
  config.stages = ("sft",)
  claim.take(tmp_path / "run", config)
  config.stages = ("sft", "rl")
  config.rl.num_rollouts, config.optimizer.warmup, config.eval.rollouts = 16, 0.1, 8
  claim.check(tmp_path / "run", config)
  config.sft.examples = 64
  with pytest.raises(ConfigError, match=r"configuration: sft.examples: 128 there, 64 here\. "):
    claim.check(tmp_path / "run", config)


def test_constant_rate_with_warmup_depends_on_the_steps(run):
  with pytest.raises(ConfigError, match=r"optimizer.warmup: 0.0 there.*rl.steps: 300 there, 400 here .its"):
    run(rl__steps=400, optimizer__warmup=0.1)


def test_steps_cannot_change_behind_or_before_what_was_done(run, tmp_path):
  root = tmp_path / "run"
  (root / "rl" / "checkpoints" / "20").mkdir(parents=True)
  run(rl__steps=20)
  with pytest.raises(ConfigError, match=r"rl.steps: 300 there, 10 here .it has done 20"):
    run(rl__steps=10)
  (root / "eval").mkdir()
  with pytest.raises(ConfigError, match=r"stage 'eval' has started from its policy"):
    run(rl__steps=400, stages=("sft", "rl", "eval"))


def test_finished_stage_goes_on_with_more_steps(config, tmp_path, capsys):
  root = tmp_path / "run"
  (root / "rl" / "policy").mkdir(parents=True)
  (root / "rl" / "checkpoints" / "300").mkdir(parents=True)
  (root / "sft" / "policy").mkdir(parents=True)
  claim.reopen(root, config)
  assert (root / "rl" / "policy").exists() and not capsys.readouterr().out
  config.rl.steps = 301
  claim.reopen(root, config)
  assert not (root / "rl" / "policy").exists() and (root / "rl" / "policy_300").exists()
  assert (root / "sft" / "policy").exists()
  assert "rl: continues from step 300" in capsys.readouterr().out


def test_field_that_an_older_version_did_not_write_has_its_default(run, config, tmp_path):
  path = tmp_path / "run" / "config.json"
  older = json.loads(path.read_text())
  del older["rl"]["updates"], older["rl"]["resample"]["k"]
  older["rl"]["removed_since"] = 3
  path.write_text(json.dumps(older))
  run()
  with pytest.raises(ConfigError, match=r"configuration: rl.resample.k: 4 there, 8 here\. "):
    run(rl__resample__k=8)


def test_mix_without_a_kind_is_another_mix(run, config):
  with config.unlocked():
    del config.sft.kinds["total"]
  with pytest.raises(ConfigError, match=r"sft.kinds.total: 1.0 there, none here"):
    run()


def test_folder_that_cannot_be_written_is_said(config, tmp_path):
  (tmp_path / "file").touch()
  for root in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ConfigError, match=r"--workdir=.*file.*cannot be written"):
      claim.check(root, config)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{")
  with pytest.raises(ConfigError, match=r"config.json is damaged"):
    claim.check(tmp_path / "run", config)
