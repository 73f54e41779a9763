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


@pytest.mark.parametrize("flag, said", [
  ("--config.seed=0", "configuration error: set config.model.checkpoint"),
  ("--config.rl.rolouts=16", "configuration error: --config.rl.rolouts: there is no such field"),
  ("--config.rl.num_rollouts=1", "configuration error: config.rl.num_rollouts=1 must be 2 or more"),
])
def test_what_needs_no_jax_is_said_before_it_is_loaded(flag, said, tmp_path):
  """`test_mistakes` has the others."""
  done = main("--config=configs/axpo_8b.py", f"--workdir={tmp_path}/run", flag)
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith(said)


def test_print_config_shows_overrides():
  done = main("--config=configs/axpo_8b.py", "--print_config", "--config.rl.resample.k=8",
              "--config.rl.loss.dual_clip=3.0")
  assert done.returncode == 0
  assert "k: 8" in done.stdout
  assert "dual_clip: 3.0" in done.stdout
