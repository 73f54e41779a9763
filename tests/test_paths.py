"""Object stores, by the packages that reach the real ones, from servers on loopback: gs:// for all that a
run writes, s3:// for what it reads."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import axpo_jax
from axpo_jax import paths
from axpo_jax.agent.tools import audit
from axpo_jax.data.question import load_image
from axpo_jax.data.readers import read_questions
from axpo_jax.errors import ConfigError
from axpo_jax.stages.metrics import MetricsWriter, read_metrics
from axpo_jax.train.checkpoint import Checkpoints
from tests import gcs

REPO = pathlib.Path(axpo_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def store():
  with gcs.running():
    yield paths.parse(gcs.BUCKET)


@pytest.mark.parametrize(("text", "message"), [
  ("gs:/bucket/run", "names no bucket: write gs://bucket"),
  ("gs://", "names no bucket"),
  ("hdfs://host/run", "hdfs: is no store that can be used"),
  ("file:///runs/one", "file: is no store"),
  ("s3://bucket/run", "checkpoints cannot be written to s3://"),
  ("gs://nobody/run", "cannot be written to .FileNotFoundError: .*: is there such a bucket"),
])
def test_workdir_that_cannot_work_is_refused_in_one_line(store, text, message):
  with pytest.raises(ConfigError, match=message) as error:
    paths.check_store(paths.workdir(text))
  assert str(error.value).startswith(f"--workdir={text!r}") and "\n" not in str(error.value)


def test_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"needs the package gcsfs: pip install -e '\.\[gcs\]'"):
    paths.parse("gs://bucket/run")
  assert paths.parse("runs/one").name == "one"


def test_files_and_folders(store, tmp_path):
  """The same on a store as in a folder whose name is a pattern."""
  for root in (store / "a [b]", paths.parse(tmp_path / "a [b]")):
    paths.make(root / "deep")
    for name in ("x.json", "y.json", "z.txt", "deep/x.json"):
      paths.write_text(root / name, name)
    paths.write_text(root / "x.json", "new")
    assert (root / "x.json").read_text() == "new"
    assert [path.name for path in paths.glob(root, "*.json")] == ["x.json", "y.json"]
    assert paths.glob(root / "none", "*") == []
    assert [str(path)[len(str(root)):] for path in paths.files_below(root)] == [
      "/deep/x.json", "/x.json", "/y.json", "/z.txt"]
    copy = paths.local(root)
    assert (copy / "deep" / "x.json").read_text() == "deep/x.json"
    assert paths.local(root / "y.json").read_text() == "y.json"
  assert {file.name for file in paths.local(store / "a [b]", ["x.json", "none"]).iterdir()} == {"x.json"}
  assert paths.local(root) == pathlib.Path(root) == paths.scratch(root)


def test_folder_is_sent_with_the_file_that_says_so_last(store, tmp_path, monkeypatch):
  for name in ("a.json", "config.json", "weights/0"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  system, _ = fsspec.core.url_to_fs(str(store))
  sent, put = [], system.put
  monkeypatch.setattr(system, "put", lambda files, targets: (
    sent.append([pathlib.Path(file).name for file in files]), put(files, targets)))
  paths.upload(tmp_path, store / "policy", last="config.json")
  assert sent == [["a.json", "0"], ["config.json"]]
  assert {path.name: path.read_text() for path in paths.files_below(store / "policy")} == {
    "a.json": "a.json", "config.json": "config.json", "0": "weights/0"}


def test_folder_that_is_moved_is_not_taken_for_whole_meanwhile(store, tmp_path):
  for root in (store / "moved", paths.parse(tmp_path)):
    for name in ("config.json", "weights"):
      paths.make(root / "policy")
      paths.write_text(root / "policy" / name, name)
    paths.move(root / "policy", root / "policy_2", first="config.json")
    assert not (root / "policy").exists()
    assert {path.name: path.read_text() for path in paths.files_below(root / "policy_2")} == {
      "config.json": "config.json", "weights": "weights"}


def test_metrics_resume_at_a_step(store):
  folder = store / "metrics"
  for steps, resume in ((range(6), None), (range(4, 8), 3)):
    with MetricsWriter(folder, resume_step=resume, tensorboard=False) as writer:
      for step in steps:
        writer.write(step, {"x": step / 3})
        assert read_metrics(folder)[-1]["step"] == step  # it is there, whatever happens next
  assert read_metrics(folder) == [{"step": step, "x": step / 3} for step in range(8)]


def test_audit_log_grows_in_parts(store, monkeypatch):
  monkeypatch.setattr(audit, "_PART_BYTES", 200)
  monkeypatch.setattr(audit, "_EVERY", 0.01)
  path = store / "run" / "audit.jsonl"
  for run in ("first", "second"):
    log = audit.AuditLog(path, run)
    for turn in range(50):
      log({"turn": turn})
      if turn == 25:
        log.flush()
        assert list(audit.read(path))[-1]["turn"] == 25
    log.close()
  assert [(entry["run"], entry["turn"]) for entry in audit.read(path)] == [
    (run, turn) for run in ("first", "second") for turn in range(50)]
  assert len(paths.glob(path, "*.jsonl")) > 2
  assert list(audit.read(store / "run" / "none.jsonl")) == []


_KILLED = """
  import sys, time
  import jax.numpy as jnp
  import numpy as np
  from axpo_jax.train.checkpoint import Checkpoints
  checkpoints = Checkpoints(sys.argv[1])
  checkpoints.save(1, {"x": jnp.full(8, 1.0)}, host={"step": 1})
  checkpoints.wait()
  noise = jnp.asarray(np.random.default_rng(0).normal(size=1 << 25).astype("float32"))
  checkpoints.save(2, {"x": noise}, host={"step": 2})
  print("started", flush=True)
  time.sleep(60)
"""


def test_kill_in_mid_save_leaves_the_checkpoint_before(store):
  folder = store / "checkpoints"
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder)], stdout=subprocess.PIPE, text=True,
    cwd=REPO, env=os.environ)
  assert process.stdout.readline() == "started\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not (folder / "2" / "commit_success.txt").exists(), "the save was over before the kill"
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(jax.eval_shape(lambda: {"x": jnp.zeros(8)}))
    np.testing.assert_array_equal(restored.state["x"], np.ones(8))
    for step in (2, 3):  # the step that was torn, and one for which the oldest is removed
      checkpoints.save(step, {"x": jnp.zeros(8)}, host={})
    assert checkpoints.steps() == [2, 3]


def test_a_damaged_checkpoint_on_a_store_is_passed_over(store, caplog):
  """A state of another step, whose files are whole: only the arrays' own checksums tell."""
  folder, target = store / "damaged", jax.eval_shape(lambda: {"x": jnp.zeros(8)})
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"x": jnp.full(8, float(step))}, host={"step": step})
  for file in paths.files_below(folder / "1" / "state"):
    (folder / "2" / "state" / file.relative_to(folder / "1" / "state")).write_bytes(file.read_bytes())
  with Checkpoints(folder) as checkpoints:
    restored = checkpoints.restore(target)
    assert restored.host == {"step": 1} and restored.state["x"][0] == 1
    checkpoints.save(2, {"x": jnp.full(8, 3.0)}, host={"step": 2})
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore(target).state["x"][0] == 3
  assert "resuming from checkpoint 1; newer ones are damaged: 2: " in caplog.text


def test_questions_are_read_from_s3(tmp_path, monkeypatch):
  import boto3  # a second to import, and no other test's
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.setenv(name, "none")
  monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
  try:
    boto3.client("s3").create_bucket(Bucket="bucket")
    folder = paths.parse("s3://bucket/data")
    Image.new("RGB", (8, 4), (1, 2, 3)).save(tmp_path / "a.png")
    paths.write_bytes(folder / "images" / "a.png", (tmp_path / "a.png").read_bytes())
    record = {"question": "What <image>?", "answer": "A", "images": "images/a.png"}
    paths.write_text(folder / "x.jsonl", json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    paths.write_bytes(folder / "x.parquet", (tmp_path / "x.parquet").read_bytes())
    for path in (folder / "x.jsonl", folder):  # of a folder, the parquet files
      (question,) = read_questions(path)
      assert load_image(question.images[0]).getpixel((0, 0)) == (1, 2, 3)
  finally:
    server.stop()
    gcs.forget()


def test_threads_write_one_file_at_once(tmp_path):
  """Shards that end together show the same picture; each write is whole, and none fails."""
  path, data = paths.parse(str(tmp_path / "picture.png"), "path"), [bytes([i]) * 200_000 for i in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for _ in range(20):
      list(pool.map(lambda one: paths.write_bytes(path, one), data))
      assert path.read_bytes() in data
  assert list(tmp_path.iterdir()) == [tmp_path / "picture.png"]
