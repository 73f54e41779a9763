"""The mistakes that users make, and what each is answered with: one line that names the value and the
field or file, exit code 1, before the run's folder is touched.

All of them go through launch/main.py in this process, a few through the real command too.
"""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import time

import pytest
from absl import flags
from PIL import Image

import axpo_jax
from axpo_jax.config import ASSETS
from axpo_jax.errors import RunStopped
from axpo_jax.stages import experiment
from tests import children

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
MAIN = str(REPO / "launch" / "main.py")
TINY = "--config=configs/axpo_tiny.py"
# A real command is refused in 2 to 4 seconds where nothing else runs; a busy machine takes longer.
MOST_SECONDS = 60


def setting(name, value):
  return (TINY, f"--config.{name}={value}")


def from_file(name, *more):
  """Questions of a file in the ground."""
  return (TINY, "--config.data.source=jsonl", f"--config.data.path={{ground}}/{name}",
          f"--config.data.eval_path={{ground}}/{name}", *more)


def checkpoint(name):
  """The shipped checkpoint with one file replaced or removed."""
  return (TINY, f"--config.model.checkpoint={{ground}}/{name}")


COMMANDS = {
  "no config": ((), "--config"),
  "no such config": (("--config=configs/nope.py",), "configs/nope.py"),
  "config that is no Python": (("--config={ground}/syntax.py",), "syntax.py", "SyntaxError"),
  "config with a misspelt field": (("--config={ground}/misspelt.py",), "misspelt.py, line 6", "rolouts"),
  "stray argument": ((TINY, "rl.num_rollouts=16"), "rl.num_rollouts=16", "--config.<field>"),
  "unknown flag": ((TINY, "--wrkdir=x"), "wrkdir"),
  "misspelt field": (setting("rl.rolouts", 16), "rl.rolouts", "did you mean --config.rl.num_rollouts"),
  "field that the recipe sets otherwise": (
    (TINY, "--config.rl.recipe=grpo_x2", "--config.rl.num_rollouts=12"), "rl.num_rollouts=12",
    "'grpo_x2' sets it to 16"),
  "misspelt section": (setting("optimiser.learning_rate", 1), "optimiser.learning_rate",
                       "--config.optimizer.learning_rate"),
  "section": (setting("rl.resample", 3), "rl.resample", "is a section"),
  "no number": (setting("rl.num_rollouts", "many"), "rl.num_rollouts", "many"),
}
VALUES = {
  "stages": [("()", "is empty"), ("('sft','dpo')", "dpo"), ("('sft','sft')", "twice")],
  "rl.resample.choice": [("rnd", "'rnd'; choose one of")],
  "rl.resample.k": [("1", "at least 2")],
  "rl.credit.prefix_credit": [("all", "'all'; choose one of")],
  "rl.loss.kl_coef": [("nan", "nan is not a finite number")],
  "rl.loss.clip_low": [("2", "0 <= low <= 1")],
  "rl.shaping.tool_penalty": [("much", "'much'; choose")],
  "rl.num_rollouts": [("1", "must be 2 or more")],
  "rl.old_logprobs": [("foo", "'foo'; choose one of")],
  "rl.recipe": [("ppo", "'ppo'; choose one of")],
  "rl.steps": [("0", "must be 1 or more")],
  "optimizer.name": [("adam", "'adam'; choose one of ('adamw'")],
  "optimizer.b2": [("1.0", "must be in [0, 1)")],
  "optimizer.schedule": [("linear", "'linear'; choose one of")],
  "optimizer.learning_rate": [("inf", "inf is not a finite number"), ("-1", "must be 0 or more")],
  "sft.optimizer.warmup": [("3", "0 to 1")],
  "model.dtype": [("fp16", "'fp16'; choose one of")],
  "model.export_dtype": [("int8", "'int8'; choose one of")],
  "model.preset": [("tiny", "preset='tiny'")],
  "mesh.tensor": [("0", "sizes are 1 or more"), ("-1", "only one axis may be -1")],
  "lora.rank": [("-1", "must be positive")],
  "batch.length": [("500", "multiple of 64"), ("64", "raise")],
  "images.min_pixels": [("99999", "images.max_pixels")],
  "rollout.engine": [("vllm", "'vllm'; choose one of")],
  "rollout.temperature": [("0", "above 0")],
  "rollout.embedded.rows": [("0", "at least 1, got 0")],
  "rollout.embedded.max_running": [("999", "rows=256")],
  "rollout.embedded.length": [("64", "max_total_tokens=512")],
  "eval.top_p": [("0", "must be in (0, 1], got 0")],
  "eval.max_response_tokens": [("512", "no room for a prompt")],
  "sft.teacher.p_search": [("1.5", "1.5 is not a probability")],
  "data.miniworld.marks": [("(9,2)", "(9, 2)")],
  "data.source": [("csv", "'csv'; choose one of")],
  "agent.tools": [("('zoom',)", "['zoom']")],
  "agent.python.isolation": [("docker", "'docker'; choose")],
  "agent.python.url": [("sandbox-1:8400", "write http://host:port")],
  "agent.search.backend": [("tavily", "TAVILY_API_KEY"), ("bing", "'bing'; choose one of")],
  "checkpoint.every": [("0", "must be 1 or more")],
}
FILES = {
  "no such checkpoint": (checkpoint("nowhere"), "config.model.checkpoint", "nowhere"),
  "empty checkpoint": (checkpoint("empty"), "config.model.checkpoint", "config.json is missing"),
  "config.json is no JSON": (checkpoint("no_json"), "no_json/config.json", "not JSON"),
  "no text_config": (checkpoint("no_text"), "no_text/config.json", "text_config is missing"),
  "no vision_config": (checkpoint("no_vision"), "no_vision/config.json", "vision_config is missing"),
  "no deepstack": (checkpoint("no_taps"), "no_taps/config.json", "deepstack_visual_indexes=None"),
  "no number of layers": (checkpoint("no_layers"), "text_config.num_hidden_layers=None"),
  "another model": (checkpoint("llama"), "llama/config.json", "model_type='llama'"),
  "cut safetensors": (checkpoint("cut"), "cut/model.safetensors", "cut or damaged"),
  "safetensors that are none": (checkpoint("noise"), "noise/model.safetensors", "cut or damaged"),
  "no safetensors": (checkpoint("no_weights"), "no_weights/model.safetensors"),
  "index that is none": (checkpoint("index"), "index/model.safetensors.index.json", "weight_map"),
  "index of a file that is not there": (checkpoint("lost"), "lost/model-1.safetensors"),
  "weights of another size": (checkpoint("wider"), "tensors do not fit", "embed_tokens"),
  "another patch size": (checkpoint("patches"), "patches/preprocessor_config.json", "patch_size=14",
                         "vision_config.patch_size is 8"),
  "no preprocessor": (checkpoint("no_processor"), "preprocessor_config.json is missing"),
  "no tokenizer": (checkpoint("no_tokenizer"), "config.model.checkpoint", "tokenizer"),
  "broken tokenizer": (checkpoint("broken_tokenizer"), "config.model.checkpoint", "tokenizer"),
  "no such questions": (from_file("nowhere.jsonl"), "config.data.path", "nowhere.jsonl"),
  "no questions": (from_file("empty.jsonl"), "config.data.path", "empty.jsonl", "no question"),
  "fewer questions than a step takes": (from_file("good.jsonl"), "config.data.path", "holds 1 questions",
                                        "config.rl.questions=16"),
  "questions of an unknown type": (from_file("questions.csv"), "questions.csv", "'.csv'"),
  "bad lines": (from_file("bad.jsonl"), "bad.jsonl, row 2", "not JSON"),
  "missing image": (from_file("no_image.jsonl"), "gone.png does not exist"),
  "no gold answer": (from_file("no_answer.jsonl"), "row 1", "'answer'", "missing or empty"),
  "text that is a number": (from_file("number.jsonl"), "'question'", "must be a text, not int"),
  "gold that is no option": (from_file("choice.jsonl"), "('E',) is none of the options"),
  "misspelt column": (from_file("good.jsonl", "--config.data.columns.text=prompt"), "'prompt'"),
  "SFT of other lines": ((TINY, "--config.sft.source=jsonl", "--config.sft.path={ground}/good.jsonl"),
                         "config.sft.path", "good.jsonl, byte 0", "no dump of rollouts"),
  "SFT of nothing": ((TINY, "--config.sft.source=jsonl", "--config.sft.path={ground}/empty.jsonl"),
                     "config.sft.path", "no trajectory"),
  "SFT of a folder without shards": (
    (TINY, "--config.sft.source=shards", "--config.sft.path={ground}/empty"), "config.sft.path", "empty"),
  "filter without shards": (setting("rl.filter.policy", "{ground}/empty"), "config.rl.filter.policy",
                            "no sampled shards"),
  "benchmarks of no folder": ((TINY, "--config.stages=('eval',)", "--config.eval.benchmarks=('vstar',)"),
                              "config.eval.folder", "vstar"),
  "mesh of more devices": (setting("mesh.tensor", 16), "config.mesh=", "'tensor': 16", "8 devices"),
  "workdir in a file": ((TINY, "--workdir={ground}/good.jsonl/run"), "--workdir=", "cannot be written"),
  "workdir of another run": ((TINY, "--workdir={ground}/other", "--config.seed=3"), "other",
                             "seed: 0 there, 3 here"),
}
TABLE = [(name, *row) for name, row in (COMMANDS | FILES).items()] + [
  (f"{field}={value}", setting(field, value), field, said)
  for field, rows in VALUES.items() for value, said in rows]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> pathlib.Path:
  """Files with mistakes in them."""
  folder = tmp_path_factory.mktemp("ground")
  (folder / "empty").mkdir()
  (folder / "syntax.py").write_text("def get_config(:\n")
  (folder / "misspelt.py").write_text(
    "from axpo_jax.config import base_config\n\n\ndef get_config():\n  c = base_config()\n"
    "  c.rl.rolouts = 16\n  return c\n")
  _write_questions(folder)
  _write_checkpoints(folder)
  (folder / "other").mkdir()
  from configs.axpo_tiny import get_config
  (folder / "other" / "config.json").write_text(get_config().to_json_best_effort())
  return folder


def _write_questions(folder):
  Image.new("RGB", (64, 64)).save(folder / "there.png")
  good = {"id": "a", "question": "What?", "images": ["there.png"], "answer": "B"}
  rows = {"good": good, "no_image": good | {"images": ["gone.png"]}, "number": good | {"question": 3},
          "no_answer": {**good, "answer": ""},
          "choice": good | {"kind": "choice", "options": ["x", "y"], "answer": "E"}}
  for name, row in rows.items():
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
  (folder / "bad.jsonl").write_text(json.dumps(good) + "\n{'id': 3}\n")
  (folder / "empty.jsonl").touch()
  (folder / "questions.csv").write_text("id,question\n")


def _write_checkpoints(folder):
  source = ASSETS / "practised"
  raw = json.loads((source / "config.json").read_text())
  processor = json.loads((source / "preprocessor_config.json").read_text())
  weights = (source / "model.safetensors").read_bytes()
  text, vision = raw["text_config"], raw["vision_config"]

  def without(section, name):
    return json.dumps(raw | {section: {k: v for k, v in raw[section].items() if k != name}})

  index = "model.safetensors.index.json"
  changed = {
    "no_json": {"config.json": "{"}, "llama": {"config.json": json.dumps(raw | {"model_type": "llama"})},
    "no_text": {"config.json": json.dumps({k: v for k, v in raw.items() if k != "text_config"})},
    "no_vision": {"config.json": json.dumps({k: v for k, v in raw.items() if k != "vision_config"})},
    "no_taps": {"config.json": without("vision_config", "deepstack_visual_indexes")},
    "no_layers": {"config.json": without("text_config", "num_hidden_layers")},
    "wider": {"config.json": json.dumps(raw | {"text_config": text | {
      "vocab_size": text["vocab_size"] + 64}})},
    "cut": {"model.safetensors": weights[:len(weights) // 2]}, "noise": {"model.safetensors": b"\0" * 999},
    "no_weights": {"model.safetensors": None}, "index": {index: "[]"},
    "lost": {index: json.dumps({"weight_map": {"a": "model-1.safetensors"}})},
    "patches": {"preprocessor_config.json": json.dumps(processor | {"patch_size": 14})},
    "no_processor": {"preprocessor_config.json": None},
    "no_tokenizer": {"tokenizer.json": None, "tokenizer_config.json": None},
    "broken_tokenizer": {"tokenizer.json": "{}"},
  }
  assert vision["patch_size"] == 8
  for name, files in changed.items():
    (folder / name).mkdir()
    for path in source.iterdir():
      if path.name not in files:
        (folder / name / path.name).symlink_to(path)
    for file, content in files.items():
      if content is not None:
        (folder / name / file).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def main(monkeypatch, capfd):
  """launch/main.py in this process: flags -> (exit code, text of stderr). No stage may begin."""
  def began(*_):
    raise AssertionError("the run began")

  monkeypatch.setattr(experiment, "_STAGES", dict.fromkeys(experiment._STAGES, began))
  monkeypatch.setenv("GLIBC_TUNABLES", "as it is")  # the program does not start itself again
  monkeypatch.delenv("TAVILY_API_KEY", raising=False)
  monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
  monkeypatch.chdir(REPO)

  def run(*arguments):
    known = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [MAIN, *arguments, "--processes=1"])
    code, text = 0, ""
    try:
      runpy.run_path(MAIN, run_name="__main__")
    except SystemExit as error:  # a text is printed at the end of the process, with code 1
      code, text = (1, str(error.code)) if isinstance(error.code, str) else (error.code or 0, "")
    finally:
      for name in set(flags.FLAGS) - known:  # absl's own are defined once
        module = flags.FLAGS.find_module_defining_flag(name) or ""
        if name.startswith("config.") or not module.startswith("absl"):
          delattr(flags.FLAGS, name)
    return code, capfd.readouterr().err + text

  return run


@pytest.mark.parametrize("arguments, named", [(row[1], row[2:]) for row in TABLE], ids=[
  re.sub(r"\W+", "_", row[0]) for row in TABLE])
def test_mistake_is_one_line(arguments, named, ground, main, tmp_path):
  arguments = [argument.format(ground=ground) for argument in arguments]
  before = _listing(ground)
  if not any(argument.startswith("--workdir") for argument in arguments):
    arguments.append(f"--workdir={tmp_path}/run")
  code, said = main(*arguments)
  assert code == 1, said
  assert len(said.strip().splitlines()) == 1, said
  for part in named:
    assert part in said
  assert "Traceback" not in said
  assert not (tmp_path / "run").exists()
  assert _listing(ground) == before


def test_the_table_is_long_and_a_command_without_mistakes_begins(main, tmp_path, python_isolation):
  assert len(TABLE) >= 80
  command = (TINY, f"--workdir={tmp_path}/run", f"--config.agent.python.isolation={python_isolation}")
  with pytest.raises(AssertionError, match="the run began"):
    main(*command)
  claimed = tmp_path / "run" / "config.json"
  assert json.loads(claimed.read_text())["checkpoint"]["every"] == 10
  # It goes on with other fields that leave its numbers alone, and with no others.
  with pytest.raises(AssertionError, match="the run began"):
    main(*command, "--config.checkpoint.every=5", "--config.rl.steps=30")
  assert json.loads(claimed.read_text())["checkpoint"]["every"] == 5
  code, said = main(*command, "--config.seed=3")
  assert code == 1 and "rl.steps: 30 there, 20 here" not in said and "seed: 0 there, 3 here" in said


def _listing(folder) -> dict[str, float]:
  return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [
  "rl.resample.choice=rnd", "misspelt field", "empty checkpoint", "cut safetensors", "SFT of other lines",
  "bad lines", "mesh.tensor=4"])
def test_real_command(name, ground, tmp_path):
  rows = {row[0]: row[1:] for row in TABLE} | {
    "mesh.tensor=4": (setting("mesh.tensor", 4), "config.mesh=", "'tensor': 4", "1 devices")}
  arguments, *named = rows[name]
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, MAIN, *(argument.format(ground=ground) for argument in arguments),
     f"--workdir={tmp_path}/run"],
    cwd=REPO, capture_output=True, text=True, timeout=300, env=children.environment(1))
  seconds = time.monotonic() - start
  print(f"{name}: {seconds:.1f} s")
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert all(part in line for part in named)
  assert seconds < MOST_SECONDS
  assert not os.listdir(tmp_path)


def test_run_that_stops_itself_says_why_in_one_line(main, monkeypatch, tmp_path):
  def stops(*_):
    raise RunStopped("sampler and trainer differ by 9 nats")

  monkeypatch.setattr(experiment, "_STAGES", dict.fromkeys(experiment._STAGES, stops))
  code, said = main(TINY, f"--workdir={tmp_path}/run", "--config.agent.tools=('image_zoom_in',)")
  assert (code, said) == (1, "stopped: sampler and trainer differ by 9 nats")
