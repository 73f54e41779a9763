"""The metrics file: exact after resume, never torn, always JSON."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from axpo_jax.stages.metrics import METRICS_FILE, MetricsWriter, read_metrics


def _write(folder, steps, **options):
  with MetricsWriter(folder, tensorboard=False, **options) as writer:
    for step in steps:
      writer.write(step, {"train/loss": 1 / (step + 1), "pack/images": step})
      if step % 2 == 0:
        writer.write(step, {"eval/pass_at_1": 0.1 * step})


def test_a_resumed_file_equals_an_unbroken_one(tmp_path):
  _write(tmp_path / "unbroken", range(1, 9))
  _write(tmp_path / "broken", range(1, 7))  # the checkpoint was at 4; 5 and 6 are done again
  with open(tmp_path / "broken" / METRICS_FILE, "a") as file:
    file.write('{"step": 7, "train/lo')  # killed in mid-write
  _write(tmp_path / "broken", range(5, 9), resume_step=4)
  assert ((tmp_path / "broken" / METRICS_FILE).read_bytes()
          == (tmp_path / "unbroken" / METRICS_FILE).read_bytes())


def test_no_file_has_no_lines(tmp_path):
  assert read_metrics(tmp_path) == [] == read_metrics(tmp_path / "none")


def test_a_new_run_drops_an_old_file(tmp_path):
  _write(tmp_path, range(5))
  _write(tmp_path, [0])
  assert [line["step"] for line in read_metrics(tmp_path)] == [0, 0]


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(3, {"a/b": np.float32(0.5), "a/c": jnp.ones(()), "a/d": float("nan"),
                   "a/e": float("inf"), "a/f": np.int64(7), "a/g": True})
  line = json.loads((tmp_path / METRICS_FILE).read_text())
  assert line == {"step": 3, "a/b": 0.5, "a/c": 1.0, "a/d": None, "a/e": None, "a/f": 7, "a/g": 1}
  writer.close()


def test_a_broken_line_in_the_middle_is_reported(tmp_path):
  (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"st\n{"step": 2}\n')
  with pytest.raises(ValueError, match="line 2"):
    MetricsWriter(tmp_path, resume_step=2, tensorboard=False)


def test_values_must_be_numbers(tmp_path):
  with MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="'a/b' is 'x'"):
      writer.write(0, {"a/b": "x"})
    with pytest.raises(ValueError, match="step"):
      writer.write(0, {"step": 1})


def test_tensorboard_gets_the_same_numbers(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(2, {"train/loss": 0.25})
  events = list((tmp_path / "tensorboard").glob("events.*"))
  assert len(events) == 1 and b"train/loss" in events[0].read_bytes()
