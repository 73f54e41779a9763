"""Compiling for TPUs on a machine that has none."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import axpo_jax
from axpo_jax.config import ConfigError
from axpo_jax.train import slice_plan
from axpo_jax.train.aot import TopologyError
from configs import axpo_8b
from tests import children

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
# The compiler does not look for the fastest program, which takes several times as long.
HURRY = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0", "XLA_FLAGS": ""}
# The real step of the smallest model.
SMALL = ("--config=configs/axpo_8b.py", "--config.model.preset=tiny", "--config.batch.rows=4",
         "--config.batch.length=256", "--config.images.max_pixels=16384",
         "--config.rollout.engine=sglang")


def compile_for(topology, *flags) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "launch/compile.py", f"--topology={topology}", *flags], cwd=REPO, text=True,
    capture_output=True, timeout=1800, env={**children.environment(1), **HURRY})


@pytest.fixture(scope="module")
def compiled():
  pytest.importorskip("libtpu", reason="NOT TESTED HERE: compiling for TPUs. libtpu is not installed")
  done = compile_for("v5e:2x2", *SMALL)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def cells(text, row) -> list[str]:
  (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} ")]
  return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_step_compiles_for_a_slice(compiled):
  assert "4 chips as v5e:2x2, mesh data 1 x fsdp 4 x context 1 x tensor 1; 3 layers" in compiled
  assert "4 rows x 256 = 1,024 tokens" in compiled
  assert "**Fits**" in compiled
  assert set(cells(compiled, "limit")) == {"15.75"}
  score, accumulate, apply = (float(x) for x in cells(compiled, "core seconds to compile"))
  assert min(score, accumulate, apply) >= 0
  # Sharded parameters are gathered, and gradients scattered or reduced: something crosses.
  assert re.search(r"sent by a chip, all-", compiled)
  assert re.search(r"Largest micro-batch that fits: [\d,]{9,} tokens", compiled)
  assert re.search(r"MFU at most \d+ %", compiled)


def test_the_8b_compiles_at_three_layers():
  """All its widths, and as many tokens a chip as 131,072 on 64 chips are. Scoring is a part of what
  `accumulate` does, so it is left to the small step."""
  pytest.importorskip("libtpu")
  done = compile_for(
    "v5p:2x2x1", "--config=configs/axpo_8b.py", "--config.model.preset=8b", "--layers=3", "--nobudget",
    "--functions=accumulate,apply",
    "--config.batch.rows=4", "--config.batch.length=2048", "--config.images.max_pixels=262144")
  assert done.returncode == 0, done.stderr[-4000:]
  assert "3 layers; micro-batches of 4 rows x 2,048 = 8,192 tokens, 2,048 a chip" in done.stdout
  assert "**Fits**" in done.stdout and set(cells(done.stdout, "limit")) == {"95.74"}
  # A quarter of 3 layers of 192,946,432 parameters, a vocabulary of 151,936 x 4,096 twice and the vision
  # tower of 0.58 billion, in float32.
  parameters = (3 * 192_946_432 + 2 * 151_936 * 4096 + 0.58e9) / 4 * 4 / 2**30
  assert float(cells(done.stdout, "parameters")[0]) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("topology, changes, layers, named", [
  ("v4:2x2x1", {"preset": "8b"}, 0, "v5p:4x4x4"),
  ("v5e:2x2", {}, 0, "--config.model.preset=8b"),
  ("v5e:2x2", {"preset": "8b"}, 2, "--layers=2"),
])
def test_what_cannot_be_compiled_is_said(topology, changes, layers, named):
  pytest.importorskip("libtpu")
  config = axpo_8b.get_config()
  config.model.update(changes)
  with pytest.raises((ConfigError, TopologyError), match=re.escape(named)):
    slice_plan.Plan.from_config(config, topology, layers=layers)


def test_a_command_that_cannot_be_done_ends_with_one_line():
  pytest.importorskip("libtpu")
  done = compile_for("v5e:2x2", "--config=configs/axpo_8b.py", "--config.model.preset=9b")
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert "9b" in done.stderr.splitlines()[-1]


def test_without_the_compiler_one_is_told_what_to_install(tmp_path):
  (tmp_path / "libtpu.py").write_text("raise ImportError('not here')")
  done = subprocess.run(
    [sys.executable, "launch/compile.py", "--topology=v5e:2x2", "--config=configs/axpo_8b.py",
     "--config.model.preset=8b"], cwd=REPO, text=True, capture_output=True, timeout=300,
    env={**os.environ, "PYTHONPATH": str(tmp_path)})
  assert done.returncode == 1
  assert ".[aot]" in done.stderr.splitlines()[-1]
