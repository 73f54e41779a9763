"""Sweeps: real runs of the micro job, resumed and with one that fails, which are also the comparison of
docs/results_40_steps.md at its smallest; points that wait for others; and the table."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

import axpo_jax
from axpo_jax.stages.metrics import read_metrics
from tests import children

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
MICRO = "tests/stages/micro_config.py"
TINY = (
  # A policy that calls, and is often wrong: something is resampled, and recovered.
  f"--config.model.checkpoint={REPO / 'axpo_jax' / 'assets' / 'practised'}",
  "--config.data.source=miniworld", "--config.rl.steps=1",
  "--config.rl.questions=4", "--config.rl.num_rollouts=2", "--config.rl.updates=2",
  # As in configs/evidence_tiny.py: no SFT; evaluated once, after training, and with calls forced.
  "--config.stages=('rl','eval')", "--config.eval.every=-1", "--config.eval.forced=True",
  "--config.eval.questions=1")
SWEEP = ("--sweep=config.seed=0,1", "--sweep=config.rl.recipe=axpo,grpo")


def sweep(workdir, *flags, common=TINY) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "launch/sweep.py", f"--config={MICRO}", f"--workdir={workdir}", *flags, "--",
     *common], cwd=REPO, text=True, capture_output=True, timeout=1800,
    env=children.environment(1))


@pytest.mark.slow
def test_two_algorithms_of_one_seed(tmp_path):
  """First with one point that cannot work (a folder of another config), then again without it."""
  flags = ("--sweep=config.seed=1", "--sweep=config.rl.recipe=axpo,grpo")
  axpo, broken = (tmp_path / f"seed=1,rl.recipe={name}" for name in ("axpo", "grpo"))
  broken.mkdir()
  (broken / "config.json").write_text("{}")
  done = sweep(tmp_path, *flags)
  assert done.returncode == 1
  assert "FAILED seed=1,rl.recipe=grpo" in done.stderr and "another configuration" in done.stderr
  assert re.search(r"rl.recipe=axpo \| 1 of 1 +\| \d\.\d{4} ", done.stdout)
  assert re.search(r"rl.recipe=grpo \| 0 of 1 +\| - ", done.stdout)
  (broken / "config.json").unlink()
  before = (axpo / "metrics.jsonl").stat().st_mtime_ns
  again = sweep(tmp_path, *flags)
  assert again.returncode == 0, again.stderr
  assert "2 points, 1 of them done before" in again.stdout
  assert again.stdout.count("1 of 1") == 2
  assert (axpo / "metrics.jsonl").stat().st_mtime_ns == before
  _is_a_pair(read_metrics(broken), read_metrics(axpo))


def _is_a_pair(grpo, axpo) -> None:
  """Mechanics, never outcomes: runs of one seed differ by the resampling alone, and it is credited."""
  for lines in (grpo, axpo):
    trained, evaluated = lines
    assert [line["step"] for line in lines] == [1, 1]
    assert ["eval/pass_at_1" in line for line in lines] == [False, True]
    assert 0 <= evaluated["eval/forced_opened_rate"] <= 1
    assert trained["train/sequences"] == 8 + trained["axpo/continuations"]
  (before, _), (after, _) = grpo, axpo
  names = [name for name in before if name.startswith("rollout/") and not name.endswith("_after")]
  assert len(names) > 20 and [before[name] for name in names] == [after[name] for name in names]
  assert before["axpo/triggered"] == after["axpo/triggered"] > 0
  assert (before["axpo/budget"], after["axpo/budget"]) == (0, 2)  # floor(0.5 * 4 * 2 / 2)
  assert before["axpo/prefixes"] == 0 < after["axpo/prefixes"] <= 2
  assert after["axpo/continuations"] == 2 * after["axpo/prefixes"]
  _recovers(before, 0)
  _recovers(after, after["axpo/recovered"])
  # Credit `any`: only a prefix with a right continuation can be worth more than its group.
  assert after["axpo/prefix_advantage_positive_share"] <= after["axpo/prefix_recovered_share"]
  assert (after["axpo/prefix_recovered_share"] > 0) == (after["axpo/recovered"] > 0)


def _recovers(line, recovered: float) -> None:
  """All tool rollouts are wrong in the triggered questions, and afterwards in those not recovered."""
  left = 1 - recovered / line["axpo/triggered"]
  assert 0 <= left <= 1 and line["axpo/recovered"] == recovered
  assert line["rollout/tool_all_wrong_rate_after"] == pytest.approx(
    left * line["rollout/tool_all_wrong_rate"])


def test_commands_for_a_scheduler(tmp_path):
  done = sweep(tmp_path / "runs", *SWEEP, "--print")
  lines = done.stdout.splitlines()
  assert len(lines) == 4 and not (tmp_path / "runs").exists()
  assert all("launch/main.py" in line and "--config.rl.steps=1" in line for line in lines)
  assert "--config.seed=1 --config.rl.recipe=grpo" in lines[3]
  assert len({re.search(r"--workdir=(\S+)", line)[1] for line in lines}) == 4


def test_points_of_a_file(tmp_path):
  file = tmp_path / "points.py"
  file.write_text("def points():\n  return [{'config.rl.num_rollouts': n, 'config.rl.resample.k': n // 2}"
                  " for n in (4, 8)]\n")
  lines = sweep(tmp_path, f"--points={file}", "--print").stdout.splitlines()
  assert [line.split()[-2:] for line in lines] == [
    [f"--config.rl.num_rollouts={n}", f"--config.rl.resample.k={n // 2}"] for n in (4, 8)]


def points_file(folder: pathlib.Path, points: list[dict]) -> pathlib.Path:
  file = folder / "points.py"
  file.write_text(f"def points():\n  return {points!r}\n")
  return file


def test_points_with_names_that_begin_with_what_others_made(tmp_path):
  file = points_file(tmp_path, [
    {"name": "sft-0", "config.seed": 0},
    {"name": "rl-0", "after": "sft-0", "config.model.checkpoint": "{workdir}/sft-0/sft/policy"},
    {"name": "rl-1", "after": "sft-0", "config.seed": 1}])
  flags = (f"--points={file}", "--print")
  lines = sweep(tmp_path / "runs", *flags).stdout.splitlines()
  assert [re.search(r"--workdir=(\S+)", line)[1] for line in lines] == [
    str(tmp_path / "runs" / name) for name in ("sft-0", "rl-0", "rl-1")]
  assert lines[1].endswith(f"--config.model.checkpoint={tmp_path}/runs/sft-0/sft/policy")
  only = sweep(tmp_path / "runs", *flags, "--only=*-1,sft-*").stdout.splitlines()
  assert only == [lines[0], lines[2]]
  assert "nothing" in sweep(tmp_path / "runs", *flags, "--only=nothing").stderr


@pytest.mark.parametrize("point, named", [
  ({"name": "a", "after": "b"}, "b"), ({"name": "a", "seed": 1}, "seed")])
def test_points_that_make_no_sense_are_refused(point, named, tmp_path):
  done = sweep(tmp_path, f"--points={points_file(tmp_path, [point])}", "--print")
  assert done.returncode not in (0, None) and repr(named) in done.stderr


@pytest.fixture(scope="module")
def module():
  spec = importlib.util.spec_from_file_location("sweep", REPO / "launch" / "sweep.py")
  loaded = importlib.util.module_from_spec(spec)
  known = set(flags.FLAGS)
  spec.loader.exec_module(loaded)
  yield loaded
  for name in set(flags.FLAGS) - known:  # other programs of launch/ have flags of the same names
    if not (flags.FLAGS.find_module_defining_flag(name) or "").startswith("absl"):
      delattr(flags.FLAGS, name)


def test_a_point_runs_when_the_one_before_it_is_done(module, tmp_path):
  """Processes that only look for each other's files: the order of the list is not that of need."""
  def point(name, program, after=None):
    return module.Point({}, tmp_path / name, (sys.executable, "-c", program),
                        tmp_path / after if after else None)

  needs = f"assert open({str(tmp_path / 'first' / 'made')!r}).read() == 'x'"
  makes = f"open({str(tmp_path / 'first' / 'made')!r}, 'w').write('x')"
  points = [point("second", needs, "first"), point("third", needs, "first"), point("first", makes),
            point("broken", "raise SystemExit('no luck')"), point("never", "pass", "broken")]
  failures = module._run(points, 2)
  assert failures.keys() == {"broken", "never"}
  assert "no luck" in failures["broken"] and "broken is not done" in failures["never"]
  assert [one.done for one in points] == [True, True, True, False, False]
  noted = json.loads((tmp_path / "first" / "made_by.json").read_text())
  assert noted.keys() == {"commit", "machine"} and noted["machine"]
  assert "broken is not done" in module._run(points[4:], 1)["never"]  # alone, too


@pytest.mark.parametrize("flags, named", [
  ((), "--sweep"), (("--sweep=seed=0,1",), "seed=0,1"), (("--sweep=config.seed",), "config.seed"),
  (("--sweep=config.seed=1,1",), "twice")])
def test_what_is_no_sweep_is_refused(flags, named, tmp_path):
  done = sweep(tmp_path, *flags)
  assert done.returncode not in (0, None)
  assert named in done.stdout + done.stderr


@pytest.mark.parametrize("flags, said", [
  (("--sweep=config.rl.kk=1,2",), "point rl.kk=1: --config.rl.kk: there is no such field"),
  (("--sweep=config.rl.resample.choice=random,rnd",),
   "point rl.resample.choice=rnd: config.rl.resample.choice='rnd'; choose one of"),
  (("--points=nowhere.py",), "--points=nowhere.py: there is no such file"),
])
def test_point_that_cannot_run_is_refused_before_the_first_one_runs(flags, said, tmp_path):
  done = sweep(tmp_path / "runs", *flags)
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert said in line
  assert not (tmp_path / "runs").exists()


def test_table_has_the_interval_of_student(tmp_path):
  """Three seeds with 0.1, 0.2, 0.3: mean 0.2, t(2) = 4.303, s = 0.1: 4.303 * 0.1 / sqrt(3). A fourth that
  is not done does not count."""
  flags = ("--sweep=config.seed=0,1,2,3", "--sweep=config.rl.recipe=axpo")
  commands = sweep(tmp_path, *flags, "--print").stdout.splitlines()
  for seed, command in enumerate(commands):
    folder = pathlib.Path(re.search(r"--workdir=(\S+)", command)[1])
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
      json.dumps({"step": 0, "eval/pass_at_1": 0.9}) + "\n"
      + json.dumps({"step": 1, "eval/pass_at_1": 0.1 * (seed + 1)}) + "\n"
      + json.dumps({"step": 2, "train/loss": 0.0}) + "\n")
    if seed < 3:
      (folder / "sweep_done.json").write_text(json.dumps(shlex.split(command)))
  done = sweep(tmp_path, *flags, "--parallel=0", "--metrics=eval/pass_at_1,eval/other")
  assert re.search(r"rl.recipe=axpo \| 3 of 4 +\| 0.2000 ± 0.2484 +\| - ", done.stdout)
