"""Compiling for TPUs on a machine that has none."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import axpo_jax

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
# The real step of the smallest model: what the compiler is asked for does not depend on the depth.
SMALL = ("--config=configs/axpo_8b.py", "--config.model.preset=tiny", "--config.batch.rows=4",
         "--config.batch.length=256", "--config.images.max_pixels=16384",
         "--config.rollout.engine=sglang")


def compile_for(topology, *flags) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "launch/compile.py", f"--topology={topology}", *flags], cwd=REPO, text=True,
    capture_output=True, timeout=1800, env={**os.environ, "XLA_FLAGS": ""})


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


@pytest.mark.parametrize("topology, flags, named", [
  ("v4:2x2x1", ["--config.model.preset=8b"], "v5p:4x4x4"),
  ("v5e:2x2", [], "--config.model.preset=8b"),
  ("v5e:2x2", ["--config.model.preset=9b"], "9b"),
  ("v5e:2x2", ["--config.model.preset=8b", "--layers=2"], "--layers=2"),
])
def test_what_cannot_be_compiled_is_said(topology, flags, named):
  pytest.importorskip("libtpu")
  done = compile_for(topology, "--config=configs/axpo_8b.py", *flags)
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert named in done.stderr


def test_without_the_compiler_one_is_told_what_to_install(tmp_path):
  (tmp_path / "libtpu.py").write_text("raise ImportError('not here')")
  done = subprocess.run(
    [sys.executable, "launch/compile.py", "--topology=v5e:2x2", "--config=configs/axpo_8b.py",
     "--config.model.preset=8b"], cwd=REPO, text=True, capture_output=True, timeout=300,
    env={**os.environ, "PYTHONPATH": str(tmp_path)})
  assert done.returncode == 1
  assert ".[aot]" in done.stderr.splitlines()[-1]
