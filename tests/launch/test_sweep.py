"""Sweeps: real runs of the micro job at four points, resumed and with one that fails; and the table."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import axpo_jax

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
MICRO = "tests/train/micro_config.py"
TINY = (
  f"--config.model.checkpoint={REPO / 'axpo_jax' / 'assets' / 'warm_start'}",
  "--config.data.source=miniworld", "--config.sft.steps=1", "--config.rl.steps=1",
  "--config.rl.questions=2", "--config.rl.num_rollouts=2", "--config.eval.questions=1")
SWEEP = ("--sweep=config.seed=0,1", "--sweep=config.rl.algorithm=axpo,grpo")


def sweep(workdir, *flags, common=TINY) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "launch/sweep.py", f"--config={MICRO}", f"--workdir={workdir}", *flags, "--",
     *common], cwd=REPO, text=True, capture_output=True, timeout=1800,
    env={**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
         "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"})


def test_two_seeds_of_two_algorithms(tmp_path):
  """First with one point that cannot work (a folder of another config), then again without it."""
  broken = tmp_path / "seed=1,rl.algorithm=grpo"
  broken.mkdir()
  (broken / "config.json").write_text("{}")
  done = sweep(tmp_path, *SWEEP)
  assert done.returncode == 1
  assert "FAILED seed=1,rl.algorithm=grpo" in done.stderr and "another configuration" in done.stderr
  assert re.search(r"rl.algorithm=axpo \| 2 of 2 +\| \d\.\d{4} ± \d", done.stdout)
  assert re.search(r"rl.algorithm=grpo \| 1 of 2 +\| \d\.\d{4} ", done.stdout)
  (broken / "config.json").unlink()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed=0*/metrics.jsonl")}
  again = sweep(tmp_path, *SWEEP)
  assert again.returncode == 0, again.stderr
  assert "4 points, 3 of them done before" in again.stdout
  assert again.stdout.count("2 of 2") == 2
  assert len(before) == 2
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_commands_for_a_scheduler(tmp_path):
  done = sweep(tmp_path / "runs", *SWEEP, "--print")
  lines = done.stdout.splitlines()
  assert len(lines) == 4 and not (tmp_path / "runs").exists()
  assert all("launch/main.py" in line and "--config.rl.steps=1" in line for line in lines)
  assert "--config.seed=1 --config.rl.algorithm=grpo" in lines[3]
  assert len({re.search(r"--workdir=(\S+)", line)[1] for line in lines}) == 4


def test_points_of_a_file(tmp_path):
  file = tmp_path / "points.py"
  file.write_text("def points():\n  return [{'config.rl.num_rollouts': n, 'config.rl.resample.k': n // 2}"
                  " for n in (4, 8)]\n")
  lines = sweep(tmp_path, f"--points={file}", "--print").stdout.splitlines()
  assert [line.split()[-2:] for line in lines] == [
    [f"--config.rl.num_rollouts={n}", f"--config.rl.resample.k={n // 2}"] for n in (4, 8)]


@pytest.mark.parametrize("flags, named", [
  ((), "--sweep"), (("--sweep=seed=0,1",), "seed=0,1"), (("--sweep=config.seed",), "config.seed"),
  (("--sweep=config.seed=1,1",), "twice")])
def test_what_is_no_sweep_is_refused(flags, named, tmp_path):
  done = sweep(tmp_path, *flags)
  assert done.returncode not in (0, None)
  assert named in done.stdout + done.stderr


def test_table_has_the_interval_of_student(tmp_path):
  """Three seeds with 0.1, 0.2, 0.3: mean 0.2, t(2) = 4.303, s = 0.1: 4.303 * 0.1 / sqrt(3)."""
  flags = ("--sweep=config.seed=0,1,2", "--sweep=config.rl.algorithm=axpo")
  commands = sweep(tmp_path, *flags, "--print").stdout.splitlines()
  for seed, command in enumerate(commands):
    folder = pathlib.Path(re.search(r"--workdir=(\S+)", command)[1])
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
      json.dumps({"step": 0, "eval/pass_at_1": 0.9}) + "\n"
      + json.dumps({"step": 1, "eval/pass_at_1": 0.1 * (seed + 1)}) + "\n"
      + json.dumps({"step": 2, "train/loss": 0.0}) + "\n")
    (folder / "sweep_done.json").write_text(json.dumps(command.split()))
  done = sweep(tmp_path, *flags, "--parallel=0", "--metrics=eval/pass_at_1,eval/other")
  assert re.search(r"rl.algorithm=axpo \| 3 of 3 +\| 0.2000 ± 0.2484 +\| - ", done.stdout)
