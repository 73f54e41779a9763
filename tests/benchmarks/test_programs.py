"""Realistic steps need few programs; kernels fewer, since key blocks are none of theirs."""

import dataclasses

import jax
import pytest

from axpo_jax.model import sharding
from axpo_jax.model.presets import PRESETS
from axpo_jax.stages import learners
from benchmarks import programs
from configs import axpo_8b, axpo_tiny


def test_steps_of_the_tiny_run():
  config, model = axpo_tiny.get_config(), PRESETS["tiny"]
  mesh, counted = sharding.make_mesh({}, jax.devices()[:1]), programs.Counted()
  for examples in programs.steps(12, programs.WORKLOADS["tiny"], config, model):
    counted.add(programs.packed(examples, config, model, mesh), examples)
  assert sum(counted.shapes.values()) == 12 and 1 <= len(counted.shapes) <= 3
  assert counted.row().startswith(f"{len(counted.shapes)} | 8 x 512 tokens, 512 targets, ")


def test_a_step_of_the_8b():
  """Fewer questions, so that it takes a moment. The rows are those of eight GPUs."""
  config = axpo_8b.get_config()
  config.rl.questions = 8
  mesh = sharding.make_mesh({"fsdp": 8})
  examples, = programs.steps(1, programs.WORKLOADS["8b"], config, PRESETS["8b"])
  for backend, lists in (("xla", True), ("gpu", False), ("tpu", False)):
    model = dataclasses.replace(PRESETS["8b"], attention=backend)
    batch = programs.packed(examples, config, model, mesh)[0]
    assert (batch.key_blocks_BxCxN is not None) == lists
    assert batch.tokens_BxT.shape == batch.targets_BxG.shape == (8, 24_576)
  options = learners.pack_options(config, PRESETS["8b"], mesh)
  # 1280 x 28 x 28 pixels of a question's image, up to 12,845,056 of a crop, in patches of 16 x 16.
  assert options["patch_buckets"] == (3920, 7840, 15_680, 31_360, 50_176)
  assert options["rows_multiple_of"] == options["image_rows_multiple_of"] == 8


@pytest.mark.parametrize(("context", "listed"), [(1, True), (2, False)])
def test_rows_that_are_split_have_no_lists(context, listed):
  mesh = sharding.make_mesh({"fsdp": -1, "context": context})
  assert learners.pack_options(axpo_8b.get_config(), PRESETS["8b"], mesh)["list_blocks"] == listed
