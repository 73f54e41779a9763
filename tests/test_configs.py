"""Every file in configs/ loads, is locked, and says how to run it."""

import importlib.util
import pathlib

import pytest

import axpo_jax
from axpo_jax.config import base_config
from axpo_jax.config_checks import validate
from axpo_jax.config_queries import engine_length, fields
from axpo_jax.errors import ConfigError
from axpo_jax.eval.benchmarks import BENCHMARKS
from axpo_jax.rl.recipes import RECIPES
from tests import sizes

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
FOLDER = REPO / "configs"
# Those under experiments/ made the shipped miniature.
FILES = sorted((*FOLDER.glob("*.py"), *REPO.glob("experiments/miniworld/*_tiny.py")))
LARGE = ("axpo_2b", "axpo_4b", "axpo_8b", "eval_8b", "grpo_8b", "sft_8b")


def load(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def ready(tmp_path):
  """A config whose folders and files exist, as a user's command line would give them."""
  def fill(config):
    (tmp_path / "file.jsonl").touch()
    sizes.write(tmp_path)
    if not config.model.preset:
      config.model.checkpoint = str(tmp_path)
    fields = [(config.data, "path"), (config.data, "eval_path")]
    if config.sft.source == "jsonl":
      fields.append((config.sft, "path"))
    for section, field in fields:
      section[field] = str(tmp_path / "file.jsonl")
    config.eval.folder = str(tmp_path)
    for name in config.eval.benchmarks:
      (tmp_path / name).mkdir(exist_ok=True)
    return config

  return fill


def test_the_promised_configs_are_there():
  assert {path.stem for path in FILES} >= {*LARGE, "axpo_tiny", "grpo_tiny", "sft_tiny",
                                           "warmstart_tiny"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_locked_and_valid(path, ready):
  module = load(path)
  config = module.get_config()
  assert config.is_locked
  with pytest.raises((AttributeError, KeyError)):
    config.rl.rolouts = 16
  validate(ready(config))


@pytest.mark.parametrize("name", LARGE)
def test_large_config_without_checkpoint_names_the_field(name):
  with pytest.raises(ConfigError, match=r"config.model.checkpoint"):
    validate(load(FOLDER / f"{name}.py").get_config())


def test_values_of_the_paper():
  c = load(FOLDER / "axpo_8b.py").get_config()
  assert c.rl.recipe == "axpo"
  assert (c.rl.num_rollouts, c.rl.resample.k, c.rl.resample.ratio) == (8, 4, 0.25)
  assert (c.rl.loss.clip_low, c.rl.loss.clip_high, c.rl.loss.kl_coef) == (0.2, 0.4, 1e-3)
  assert (c.agent.max_turns, c.rollout.temperature) == (3, 1.0)
  e = c.eval
  assert (e.rollouts, e.max_turns, e.max_response_tokens) == (4, 5, 32_768)
  # No turn is cut before the response is, and the prompt has room beside it.
  assert e.max_new_tokens == 32_768 < e.max_total_tokens
  assert (e.temperature, e.top_p, e.top_k, e.presence_penalty) == (0.7, 0.8, 20, 1.5)
  assert load(FOLDER / "grpo_8b.py").get_config().rl.recipe == "grpo"
  assert load(FOLDER / "sft_8b.py").get_config().stages == ("sft",)
  # Out go questions solved 4 of 4 by the policy, and 0 of 4 by the teacher.
  assert (c.teach.rollouts, c.screen.rollouts) == (4, 4)
  assert (c.rl.filter.solved, c.rl.filter.hopeless) == (1.0, 0.0)


def test_evaluation_of_the_paper():
  c = load(FOLDER / "eval_8b.py").get_config()
  assert set(c.eval.benchmarks) == BENCHMARKS.keys() and len(c.eval.benchmarks) == 9
  assert (c.stages, c.eval.rollouts, c.eval.max_turns) == (("eval",), 4, 5)


@pytest.mark.parametrize("name", [*LARGE, "axpo_32b"])
def test_large_configs_offer_what_their_prompt_speaks_of(name):
  c = load(FOLDER / f"{name}.py").get_config()
  assert set(c.agent.tools) == {"image_zoom_in", "python", "tavily-search"}
  assert set(c.agent.scopes) == {"read_image", "execute", "network"}
  assert (c.rollout.engine, c.agent.system_prompt) == ("sglang", "full")


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_engine_holds_the_longest_episode_of_the_stages(engine):
  config = load(FOLDER / "axpo_8b.py").get_config()
  config.rollout.engine = engine
  training, evaluation = config.agent.max_total_tokens, config.eval.max_total_tokens
  assert training == 24_576 and evaluation == 49_152
  assert engine_length(config) == evaluation  # RL evaluates
  config.eval.every = -1
  assert engine_length(config) == training
  config.stages = ("screen", "rl")
  config.screen.max_total_tokens = 30_000
  assert engine_length(config) == 30_000
  assert (config.agent.max_total_tokens, config.teach.max_total_tokens) == (24_576, 24_576)
  config.agent.max_total_tokens = 20_000
  assert config.teach.max_total_tokens == 20_000  # it follows training's


@pytest.mark.parametrize("field, value, named", [
  ("model.preset", "8b", "config.model.checkpoint"),
  ("model.checkpoint", "/no/such/folder", "config.model.checkpoint"),
  ("model.tokenizer", "/no/such/folder", "config.model.tokenizer"),
  ("stages", ("sft", "dpo"), "dpo"),
  ("data.source", "csv", "config.data.source"),
  ("data.path", "", "config.data.path"),
  ("data.path", "/no/such/file", "config.data.path"),
  ("data.eval_path", "", "config.data.eval_path"),
  ("rl.recipe", "ppo", "config.rl.recipe"),
  ("agent.max_total_tokens", 100_000, "config.batch.length"),
  ("rollout.embedded.length", 24_576, "config.eval.max_total_tokens=49152"),
  ("eval.max_response_tokens", 50_000, "config.eval.max_response_tokens=50000"),
  ("eval.max_new_tokens", 0, "config.eval.max_new_tokens=0"),
  ("rl.filter.policy", "/no/such/folder", "config.rl.filter.policy"),
])
def test_what_cannot_work_names_its_field(ready, field, value, named):
  config = ready(base_config())
  validate(config)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ConfigError, match=named):
    validate(config)


@pytest.mark.parametrize("name, changes, named", [
  ("eval_8b", {"eval.folder": ""}, "config.eval.folder"),
  ("eval_8b", {"eval.benchmarks": ("vstar", "mmlu")}, "mmlu"),
  ("eval_8b", {"eval.folder": "/no/such/folder"}, "config.eval.folder.*mathvision"),
  ("eval_8b", {"eval.judge.url": "http://localhost:8000/v1"}, "config.eval.judge.model"),
  ("chain_tiny", {"teach.engine": "human"}, "config.teach.engine"),
  ("chain_tiny", {"teach.engine": "openai"}, "config.teach.url"),
  ("chain_tiny", {"data.source": "jsonl"}, "config.teach.engine"),
  ("chain_tiny", {"stages": ("sft", "teach")}, "config.sft.path"),
  ("chain_tiny", {"sft.source": "dreams"}, "config.sft.source"),
])
def test_stage_that_cannot_work_names_its_field(ready, name, changes, named):
  config = ready(load(FOLDER / f"{name}.py").get_config())
  validate(config)
  config.sft.path = ""
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=named):
    validate(config)


def test_evaluation_needs_no_questions_but_its_benchmarks(ready):
  config = ready(load(FOLDER / "eval_8b.py").get_config())
  config.data.path = config.data.eval_path = ""
  validate(config)
  config.eval.benchmarks = ()
  with pytest.raises(ConfigError, match=r"config.data.eval_path is empty"):
    validate(config)


def test_sft_alone_needs_no_questions(ready):
  config = ready(load(FOLDER / "sft_8b.py").get_config())
  config.data.path = config.data.eval_path = ""
  validate(config)
  config.sft.path = ""
  with pytest.raises(ConfigError, match=r"config.sft.path"):
    validate(config)


def test_a_recipe_sets_its_fields_by_name(ready):
  """Every name that rl.recipes knows; a config file may have set them otherwise; other fields are free."""
  for name, overrides in RECIPES.items():
    config = ready(load(FOLDER / "axpo_tiny.py").get_config())
    config.rl.recipe, config.rl.resample.ratio, config.rl.loss.clip_high = name, 0.5, 0.3
    validate(config)
    found = dict(fields(config.rl))
    assert {field: found[field] for field in overrides} == dict(overrides), name
    assert found["loss.clip_high"] == overrides.get("loss.clip_high", 0.3)
    assert found["resample.ratio"] == overrides.get("resample.ratio", 0.5)
