"""Readers: every form of a good record, and every fault by its place."""

import base64
import io
import json
import re

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axpo_jax.data import readers
from axpo_jax.data.question import load_image

RED = (200, 10, 20)
LENIENT = readers.ReaderConfig(max_bad_share=1.0)


def png(size=(6, 4), colour=RED):
  stream = io.BytesIO()
  PIL.Image.new("RGB", size, colour).save(stream, "png")
  return stream.getvalue()


def noise_png():
  """Random pixels: the file is long, so cutting it loses pixels and not only the end mark."""
  stream = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  PIL.Image.fromarray(pixels).save(stream, "png")
  return stream.getvalue()


def write(path, *records):
  lines = [record if isinstance(record, bytes) else json.dumps(record).encode()
           for record in records]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


def record(**fields):
  return {"question": "How many?", "answer": "3", **fields}


def read(path, config=LENIENT):
  report = readers.ReadReport()
  return list(readers.read_questions(path, config, report)), report


def test_reads_all_fields(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(png())
  path = write(tmp_path / "q.jsonl", record(
      id=7, images=["images/a.png"], answer=["B", 2], kind="choice", options=["one", "two"],
      category="perception", source="mine", acting="decline", passes=3))
  (question,), report = read(path, readers.ReaderConfig(meta=("passes",)))
  assert (question.id, question.answers, question.kind) == ("7", ("B", "2"), "choice")
  assert (question.options, question.category) == (("one", "two"), "perception")
  assert (question.source, question.meta) == ("mine", {"passes": 3})
  assert question.acting == "decline"
  assert load_image(question.images[0]).getpixel((0, 0)) == RED
  assert (report.records, report.bad) == (1, 0)


def test_columns_map_nested_fields_and_boxes_come_off(tmp_path):
  path = write(tmp_path / "q.jsonl", {"extra": {"q": "2+2?"}, "reward": {"gold": "\\boxed{4}"}})
  columns = readers.Columns(text="extra.q", answers="reward.gold")
  (question,), _ = read(path, readers.ReaderConfig(columns=columns))
  assert (question.id, question.text, question.answers) == ("q-1", "2+2?", ("4",))
  (boxed,), _ = read(path, readers.ReaderConfig(columns=columns, unbox=False))
  assert boxed.answers == ("\\boxed{4}",)


@pytest.mark.parametrize("form", [
    base64.b64encode(png()).decode(), "data:image/png;base64," + base64.b64encode(png()).decode()])
def test_base64_images(tmp_path, form):
  (question,), _ = read(write(tmp_path / "q.jsonl", record(images=form)))
  assert load_image(question.images[0]).size == (6, 4)


def test_parquet_bytes_in_many_row_groups(tmp_path):
  rows = [record(id=str(i), images=[{"bytes": png(), "path": None}], unused="x") for i in range(150)]
  path = tmp_path / "q.parquet"
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
  questions, report = read(path)
  assert [question.id for question in questions] == [str(i) for i in range(150)]
  assert load_image(questions[-1].images[0]).getpixel((0, 0)) == RED
  assert report.records == 150


def test_parquet_reads_only_the_mapped_columns(tmp_path):
  path = tmp_path / "q.parquet"
  pq.write_table(pa.Table.from_pylist([record(reward={"gold": "1"}, big="x" * 1000)]), path)
  config = readers.ReaderConfig(columns=readers.Columns(answers="reward.gold"))
  choose = readers._columns(path, config, readers.OWN)
  assert choose(["question", "answer", "reward", "big"]) == ["question", "reward"]
  (question,), _ = read(path, config)
  assert question.answers == ("1",)


FAULTS = {
    "broken json": (b'{"question": "a", ', "not JSON"),
    "not utf-8": (b'{"question": "\xff\xfe"}', "not UTF-8"),
    "not an object": (b"[1, 2]", "must be an object, not list"),
    "no text": ({"answer": "1"}, "'question' .* missing"),
    "blank text": (record(question="  "), "'question' .* missing"),
    "no answer": ({"question": "a"}, "'answer' .* missing"),
    "empty answers": (record(answer=["", None]), "'answer' .* missing"),
    "answer of a wrong type": (record(answer={"a": 1}), "'answer' must hold texts"),
    "unknown kind": (record(kind="essay"), "kind 'essay'"),
    "id of a wrong type": (record(id=[1]), "'id' must be a text"),
    "missing image": (record(images=["nowhere.png"]), "image 0: image file .*nowhere.png"),
    "no image": (record(images=["notes.txt"]), "image 0: .*no known format"),
    "bad base64": (record(images="data:image/png;base64,@@"), "image 0: not base64"),
    "corrupt bytes": (record(images="iVBORw0KGgo" + "A" * 89), "image 0: .*no known format|opened"),
    "image of a wrong type": (record(images=[3]), "image 0: expected a path"),
    "marks without images": (record(question="<image> how many?"), "1 <image> marks but 0 images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_record_is_skipped_and_reported_with_its_place(tmp_path, fault):
  bad, reason = FAULTS[fault]
  (tmp_path / "notes.txt").write_text("not an image at all")
  path = write(tmp_path / "q.jsonl", record(id="a"), bad, record(id="c"))
  questions, report = read(path)
  assert [question.id for question in questions] == ["a", "c"]
  assert (report.records, report.bad) == (3, 1)
  (place,) = report.examples
  assert (place.file, place.row) == (str(path), 2)
  assert re.search(reason, place.reason)


def test_rows_are_lines_of_the_file(tmp_path):
  path = write(tmp_path / "q.jsonl", record(), b"", b"{", record())
  assert read(path)[1].examples[0].row == 3


def test_a_cut_image_is_found_by_decoding(tmp_path):
  whole = noise_png()
  (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
  path = write(tmp_path / "q.jsonl", record(images="cut.png"))
  assert read(path)[1].bad == 0
  config = readers.ReaderConfig(max_bad_share=1.0, image_check="decode")
  assert "cannot be decoded" in read(path, config)[1].examples[0].reason


def test_corrupt_bytes_in_parquet(tmp_path):
  rows = [record(id="a", images=[{"bytes": png()}]), record(id="b", images=[{"bytes": b"\x00" * 9}])]
  path = tmp_path / "q.parquet"
  pq.write_table(pa.Table.from_pylist(rows), path)
  questions, report = read(path)
  assert [question.id for question in questions] == ["a"]
  assert (report.examples[0].row, report.bad) == (2, 1)
  assert "9 bytes" in report.examples[0].reason


def test_repeated_ids_are_bad_across_files(tmp_path):
  paths = [write(tmp_path / name, record(id="same")) for name in ("a.jsonl", "b.jsonl")]
  questions, report = read(paths)
  assert len(questions) == 1
  assert "already used at" in report.examples[0].reason
  assert str(paths[0]) in report.examples[0].reason


def test_too_many_bad_records_at_the_end_name_the_counts(tmp_path):
  path = write(tmp_path / "q.jsonl", *[record(id=str(i)) for i in range(9)], b"{")
  message = r"(?s)1 of 10 records are bad \(10.0%.*max_bad_share.*row 10: not JSON"
  with pytest.raises(readers.TooManyBadRecords, match=message):
    read(path, readers.ReaderConfig(max_bad_share=0.05))
  assert len(read(path, readers.ReaderConfig(max_bad_share=0.1))[0]) == 9


def test_too_many_bad_records_stop_on_the_way(tmp_path):
  path = write(tmp_path / "q.jsonl", *[b"{"] * 1000)
  report = readers.ReadReport()
  with pytest.raises(readers.TooManyBadRecords, match="50 of 50 records"):
    list(readers.read_questions(path, readers.ReaderConfig(min_records=50), report))
  assert report.records == 50
  assert len(report.examples) < report.bad


def test_reading_is_lazy(tmp_path):
  path = write(tmp_path / "q.jsonl", *[record(id=str(i)) for i in range(500)])
  report = readers.ReadReport()
  stream = readers.read_questions(path, readers.ReaderConfig(), report)
  assert next(stream).id == "0"
  assert report.records == 1


@pytest.mark.parametrize("name, content, message", [
    ("missing.jsonl", None, "is not a file"),
    ("q.csv", b"a,b", "unknown type '.csv'"),
    ("q.json", b"[]", "use .jsonl or .parquet"),
    ("q.parquet", b"not parquet", "cannot be read as parquet"),
])
def test_files_that_cannot_be_read(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(readers.ReaderError, match=message):
    read(path)


def test_a_parquet_without_the_mapped_column_says_what_there_is(tmp_path):
  path = tmp_path / "q.parquet"
  pq.write_table(pa.Table.from_pylist([{"problem": "a", "answer": "1"}]), path)
  with pytest.raises(readers.ReaderError, match=r"no column 'question'; it has \['problem'"):
    read(path)


@pytest.mark.parametrize("fields, message", [
    ({"image_check": "look"}, "'look' is not one of"), ({"max_bad_share": 5}, "max_bad_share=5")])
def test_bad_configs(fields, message):
  with pytest.raises(readers.ReaderError, match=message):
    readers.ReaderConfig(**fields)
