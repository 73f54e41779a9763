"""Several processes on this machine: a run of two gives the numbers of a run of one."""

import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from axpo_jax.engine.sglang.server.spec import free_port
from axpo_jax.stages import learners
from axpo_jax.stages.context import run_context
from axpo_jax.stages.metrics import read_metrics
from axpo_jax.stages.questions import question_batches
from axpo_jax.train.checkpoint import Checkpoints
from axpo_jax.train.step import Learner, supervised_objective
from tests import children
from tests.stages import micro_config, rigged
from tests.stages.rigged import untimed

CONFIG = "tests/stages/micro_config.py"


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict:
  """Of the micro config. Parameters are split over both processes, and so are the rows of a batch; most
  of the time goes into compiling, hence few sizes."""
  policy = rigged.write_policy(tmp_path_factory.mktemp("policy"), layers=1)
  questions = rigged.write_questions(tmp_path_factory.mktemp("data"))
  return {
    "stages": ("rl",), "model.checkpoint": str(policy), "data.path": str(questions),
    "data.eval_path": str(questions), "mesh.fsdp": 2, "mesh.tensor": 2, "batch.rows": 4,
    "rl.steps": 2, "rl.questions": 2, "eval.questions": 1, "eval.rollouts": 1, "eval.every": 0,
    "checkpoint.every": 1, "log.dump_every": 0}


def run(workdir: pathlib.Path, changes: dict, count: int) -> list[str]:
  """A run of `count` processes with four devices in all; what each wrote to its standard output."""
  with children.job(CONFIG, workdir, changes, count, free_port("127.0.0.1")) as job:
    assert job.wait() == [0] * count, str(job)
    return job.outputs()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(changes, tmp_path):
  """Two devices each against four of one: every metric of two steps, and all that they save."""
  run(tmp_path / "one", changes, 1)
  main, other = run(tmp_path / "two", changes, 2)
  # One of them talks. Gloo's own lines come from several threads at once, in pieces.
  ours = ("tool-attempt rate", "metrics:", "it/s")
  assert "tool-attempt rate" in main and not [word for word in ours if word in other]
  one, two = (untimed(read_metrics(tmp_path / name)) for name in ("one", "two"))
  assert [line["step"] for line in two] == [0, 1, 2]
  assert two[1]["train/grad_norm"] > 0
  assert sum(line["axpo/continuations"] for line in two[1:]) > 0
  assert_close(two, one)
  (want, want_place), (got, place) = (restored(tmp_path / name, changes) for name in ("one", "two"))
  assert place == want_place
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def assert_close(lines, wanted):
  """Equal up to the order of sums."""
  for line, want in zip(lines, wanted, strict=True):
    assert line.keys() == want.keys()
    for name in want:
      # Sampler against trainer is nothing but rounding.
      tolerance = {"abs": 1e-5} if name.startswith("train/logp_gap") else {"rel": 1e-4, "abs": 1e-6}
      assert line[name] == pytest.approx(want[name], **tolerance), name


def restored(workdir: pathlib.Path, changes: dict):
  """What the last checkpoint holds, read by this process alone: the state, and the place in the
  questions."""
  config: ConfigDict = micro_config.get_config()
  config.update_from_flattened_dict(changes | {"mesh.data": 2})  # all eight devices of this process
  context = run_context(config)
  learner = Learner(
    context.model_config, learners.optimizer(config.optimizer, 2, config.model.freeze_vision),
    supervised_objective(), context.mesh, context.rules)
  questions = question_batches(config)
  with Checkpoints(workdir / "rl" / "checkpoints") as checkpoints:
    found = checkpoints.restore(learner.abstract_state(), iterator=questions)
  assert found.step == 2 and found.state.step == 2
  return jax.device_get(found.state), questions.get_state()
