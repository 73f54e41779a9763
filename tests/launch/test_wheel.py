"""The wheel: console scripts, shipped configs and the miniature, outside of a checkout."""

import pytest

from tests.launch.conftest import run_installed as run


@pytest.mark.slow
def test_scripts_run_in_an_empty_folder(installed, tmp_path):
  where = run(installed, tmp_path, "python", "-c", "import axpo_jax; print(axpo_jax.__file__)")
  assert where.stdout.startswith(str(installed.parent)), where.stderr
  # A shipped config that derives from another, with a field set.
  shown = run(installed, tmp_path, "axpo-train", "--config=configs/grpo_tiny.py", "--print_config", "--config.seed=7")
  assert shown.returncode == 0, shown.stderr
  assert "recipe: grpo" in shown.stdout and "seed: 7" in shown.stdout
  wrong = run(installed, tmp_path, "axpo-train", "--config=configs/axpo_8b.py", "--workdir=run")
  assert wrong.returncode == 1
  assert wrong.stderr.startswith("configuration error: set config.model.checkpoint")
  printed = run(installed, tmp_path, "axpo-sweep", "--config=configs/axpo_tiny.py", "--workdir=sweep", "--print",
                "--sweep", "config.seed=0,1")
  assert printed.returncode == 0, printed.stderr
  assert [line.rpartition("=")[2] for line in printed.stdout.splitlines()] == ["0", "1"]
  sizing = run(installed, tmp_path, "axpo-sidecar", "--print_sizing")
  assert sizing.returncode == 0 and "8b" in sizing.stdout.lower(), sizing.stderr
  for name, said in {"axpo-report": "usage", "axpo-diagnose": "usage", "axpo-inspect": "usage",
                     "axpo-compile": "--topology"}.items():
    assert said in run(installed, tmp_path, name, "--help").stdout
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_miniature_trains_from_the_wheel(installed, tmp_path):
  """One step of SFT, from the checkpoint and the teacher that the wheel ships."""
  done = run(installed, tmp_path, "axpo-train", "--config=configs/axpo_tiny.py", "--config.stages=('sft',)",
             "--config.sft.steps=1", "--config.sft.examples=2", "--config.batch.rows=1", "--workdir=run")
  assert done.returncode == 0, done.stderr[-3000:]
  assert (tmp_path / "run" / "sft" / "policy" / "model.safetensors").exists()
  assert "sft/nll" in (tmp_path / "run" / "metrics.jsonl").read_text()
