"""Files of questions from strangers: a bad record costs itself and no more, and names no file elsewhere."""

import json
import os
import re

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axpo_jax import paths
from axpo_jax.data import files, readers
from axpo_jax.data.question import ImageError, load_image
from tests.hostile import corpus

GOOD = '{"id": "good", "question": "How many?", "answer": "3"}'


def read(path, **config):
  report = readers.ReadReport(quiet=True)
  config = readers.ReaderConfig(max_bad_share=1.0, **config)
  return list(readers.read_questions(path, config, report)), report


@pytest.fixture
def folders(tmp_path):
  """A folder of questions, and one beside it that they must not reach."""
  inside, outside = tmp_path / "inside", tmp_path / "outside"
  inside.mkdir()
  outside.mkdir()
  PIL.Image.new("RGB", (6, 4)).save(outside / "secret.png")
  (inside / "link.png").symlink_to(outside / "secret.png")
  (inside / "linked").symlink_to(outside)
  os.mkfifo(inside / "pipe.png")
  return inside, outside


def line(case, outside) -> str:
  text = case.get("before", "") + case["text"] * case.get("times", 1)
  if "after" in case:
    text += "]" * case["times"] + "}"
  return (text + case.get("end", "")).replace("OUTSIDE", str(outside))


@pytest.mark.parametrize("case", corpus.cases("records"))
def test_records(case, folders):
  inside, outside = folders
  (inside / "q.jsonl").write_text(f"{line(case, outside)}\n{GOOD}\n")
  with corpus.bounds(seconds=5):
    questions, report = read(inside / "q.jsonl", meta=("notes",))
  assert [question.id for question in questions] == ["good"]
  assert (report.bad, report.examples[0].row) == (1, 1)
  assert re.search(case["reason"], report.examples[0].reason)


@pytest.mark.parametrize("name", ["link.png", "linked/secret.png", "../outside/secret.png"])
def test_images_anywhere_where_the_config_says_so(folders, name):
  inside, _ = folders
  (inside / "q.jsonl").write_text(json.dumps({"question": "?", "answer": "1", "images": name}))
  (question,), _ = read(inside / "q.jsonl", image_anywhere=True)
  assert load_image(question.images[0]).size == (6, 4)


def test_a_folder_that_holds_all_is_wide_enough(folders):
  inside, outside = folders
  (inside / "q.jsonl").write_text(json.dumps(
    {"question": "?", "answer": "1", "images": [str(outside / "secret.png"), "inside/link.png"]}))
  (question,), _ = read(inside / "q.jsonl", image_folder=str(inside.parent))
  assert len(question.images) == 2


def test_the_cache_of_huggingface_hub_is_links_alone(tmp_path):
  """snapshots/<revision>/a.png is a link into blobs/, beside it."""
  snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc" / "data", tmp_path / "hub" / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  PIL.Image.new("RGB", (6, 4)).save(blobs / "123", "png")
  (snapshot / "a.png").symlink_to("../../../blobs/123")
  (snapshot / "q.jsonl").write_text(json.dumps({"question": "?", "answer": "1", "images": "a.png"}))
  (question,), report = read(snapshot / "q.jsonl")
  assert (report.bad, load_image(question.images[0]).size) == (0, (6, 4))


@pytest.mark.parametrize("name, stays", [
  ("a/b.png", True), ("gs://other/x.png", True), ("/etc/passwd", False), ("../x.png", False),
  ("a/../../x.png", False)])
def test_names_on_a_store(name, stays):
  """A name with a scheme is one more name in the folder."""
  pytest.importorskip("gcsfs")
  folder = paths.parse("gs://bucket/data")
  if stays:
    assert str(paths.within(folder, name)).startswith("gs://bucket/data/")
  else:
    with pytest.raises(ValueError, match="leaves gs://bucket/data"):
      paths.within(folder, name)


def test_a_byte_order_mark_belongs_to_no_record(tmp_path):
  for name, text in (("q.jsonl", GOOD), ("q.json", f"[{GOOD}]"),
                     ("q.tsv", "id\tquestion\tanswer\ngood\tHow many?\t3\n")):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    ((_, record),) = files.records(tmp_path / name, list)
    assert record == json.loads(GOOD)


def test_a_line_without_end(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "LONGEST", 100)
  for long in (100, 101, 250):
    (tmp_path / "q.jsonl").write_text(f"{'x' * long}\n{GOOD}\n{'x' * long}")
    questions, report = read(tmp_path / "q.jsonl")
    assert [question.id for question in questions] == ["good"]
    assert [(bad.row, "a line of more than" in bad.reason) for bad in report.examples] == [
      (1, True), (3, True)]
  exactly = GOOD + " " * (99 - len(GOOD)) + "\n"
  (tmp_path / "q.jsonl").write_text(exactly)
  assert len(read(tmp_path / "q.jsonl")[0]) == 1


def test_parquet_with_bytes_that_are_no_text(tmp_path):
  """Writers exist that check no UTF-8: the column says string, its bytes are not."""
  texts = pa.array([b"one?", b"\xff\xfe", b"three?"]).cast(pa.binary())
  strings = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
  table = pa.table({"question": strings, "answer": pa.array(["1", "2", "3"])})
  pq.write_table(table, tmp_path / "q.parquet")
  questions, report = read(tmp_path / "q.parquet")
  assert [question.text for question in questions] == ["one?", "three?"]
  assert (report.bad, report.examples[0].row) == (1, 2)
  assert "cannot be read: 'utf-8' codec" in report.examples[0].reason


def test_parquet_with_a_date_that_python_has_not(tmp_path):
  days = pa.array([0, 2**40, 1], pa.timestamp("s"))
  pq.write_table(pa.table({"question": ["a?", "b?", "c?"], "answer": days}), tmp_path / "q.parquet")
  questions, report = read(tmp_path / "q.parquet")
  assert [question.text for question in questions] == ["a?", "c?"]
  assert (report.bad, report.examples[0].row) == (1, 2)


def test_json_of_brackets_is_a_broken_file(tmp_path):
  (tmp_path / "q.json").write_text("[" * 200_000)
  with pytest.raises(files.ReaderError, match="is not JSON"):
    list(files.records(tmp_path / "q.json", list))


@pytest.mark.parametrize("name", ["pipe.jsonl", "null.jsonl"])
def test_files_that_never_end_are_none(tmp_path, name):
  os.mkfifo(tmp_path / "pipe.jsonl")
  (tmp_path / "null.jsonl").symlink_to("/dev/zero")
  with corpus.bounds(seconds=5), pytest.raises(readers.ReaderError, match="is not a file"):
    read(tmp_path / name)


def test_a_pipe_is_no_image(folders):
  with corpus.bounds(seconds=5), pytest.raises(ImageError, match="no regular file"):
    load_image(folders[0] / "pipe.png")
