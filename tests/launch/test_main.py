"""The command line: what is wrong is said at once, by name, and before jax is loaded."""

import pathlib
import subprocess
import sys

import pytest

import axpo_jax

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
# Runs launch/main.py with sys.argv[1:] and fails if that loaded jax.
PROGRAM = f"""
import atexit, os, runpy, sys
atexit.register(lambda: "jax" in sys.modules and os._exit(99))
sys.argv[0] = {str(REPO / "launch" / "main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main(*flags) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True,
                        cwd=REPO, timeout=120)


@pytest.mark.parametrize("flags, named", [
  ([], "--config"),
  (["--config=configs/axpo_8b.py"], "--workdir"),
  (["--config=configs/axpo_8b.py", "--workdir={tmp}/run"], "config.model.checkpoint"),
  (["--config=configs/axpo_8b.py", "--workdir={tmp}/run", "--config.model.checkpoint={tmp}"],
   "config.data.path"),
  (["--config=configs/axpo_8b.py", "--workdir={tmp}/run", "--config.rl.rolouts=16"], "rolouts"),
  (["--config=configs/axpo_8b.py", "--workdir={tmp}/run", "--config.rl.num_rollouts=many"],
   "num_rollouts"),
  (["--config=configs/axpo_8b.py", "--workdir={tmp}/run", "rl.num_rollouts=16"],
   "rl.num_rollouts=16"),
])
def test_wrong_command_is_refused_by_name(flags, named, tmp_path):
  done = main(*(flag.format(tmp=tmp_path) for flag in flags))
  assert done.returncode not in (0, 99)
  assert named in done.stdout + done.stderr
  assert not (tmp_path / "run").exists()


def test_missing_checkpoint_is_one_line_and_no_traceback(tmp_path):
  done = main("--config=configs/axpo_8b.py", f"--workdir={tmp_path}/run")
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert done.stderr.startswith("configuration error: set config.model.checkpoint")


def test_print_config_shows_overrides():
  done = main("--config=configs/axpo_8b.py", "--print_config", "--config.rl.resample.k=8",
              "--config.rl.loss.dual_clip=3.0")
  assert done.returncode == 0
  assert "k: 8" in done.stdout
  assert "dual_clip: 3.0" in done.stdout
