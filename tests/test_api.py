"""The public API as docs/api.md shows it, on a checkpoint made here."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import axpo_jax
from tests import children
from tests.stages import rigged

REPO = pathlib.Path(__file__).parents[1]
MICRO = REPO / "tests" / "stages" / "micro_config.py"


def _code(text: str) -> str:
  return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def test_every_block_of_the_document_is_in_the_example():
  example = _code((REPO / "examples" / "own_program.py").read_text())
  blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "api.md").read_text(), flags=re.DOTALL)
  assert len(blocks) >= 6
  for block in blocks:
    assert _code(block) in example


def test_every_public_name_is_documented():
  page = (REPO / "docs" / "api.md").read_text()
  assert {name for name in axpo_jax.__all__ if f"`{name}`" not in page} == set()


@pytest.mark.slow
def test_the_example_acts_learns_and_reads_its_log(tmp_path):
  policy = rigged.write_policy(tmp_path / "policy")
  questions = rigged.write_questions(tmp_path)
  done = subprocess.run([sys.executable, "examples/own_program.py", MICRO, policy, questions, tmp_path / "out"], cwd=REPO,
                        env=children.environment(1) | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  lines = [json.loads(line) for line in (tmp_path / "out" / "step.jsonl").read_text().splitlines()]
  assert len(lines) > 16  # of four questions, and AXPO's continuations
  assert "step 2: gradient norm" in done.stdout
  assert re.search(r"^16 rollouts, [1-9]\d* calls$", done.stdout, re.MULTILINE)
  assert any(line["extra"]["advantage"] for line in lines)
  assert (tmp_path / "out" / "policy" / "model.safetensors").read_bytes() != (policy / "model.safetensors").read_bytes()


def test_a_config_that_is_not_there_is_one_clear_error(tmp_path):
  (tmp_path / "mine.py").write_text("steps = 3\n")
  with pytest.raises(axpo_jax.ConfigError, match="no function get_config"):
    axpo_jax.load_config(str(tmp_path / "mine.py"))
  with pytest.raises(axpo_jax.ConfigError, match="no shipped config"):
    axpo_jax.load_config("configs/axpo_9b.py")
  with pytest.raises(axpo_jax.ConfigError, match="rolouts"):
    axpo_jax.load_config("configs/axpo_8b.py", {"rl.rolouts": 3})
