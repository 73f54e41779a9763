"""Folders that the library `datasets` saved, read by pyarrow alone."""

import io

import datasets
import pytest
from PIL import Image

from axpo_jax.data import files, inspect, readers
from axpo_jax.data.question import load_image


def picture(shade):
  buffer = io.BytesIO()
  Image.new("RGB", (40, 30), (shade, 9, 9)).save(buffer, "PNG")
  return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def saved(tmp_path):
  """Two Arrow files, images as the library keeps them, and a column that nobody asked for."""
  made = datasets.Dataset.from_dict({
    "id": [f"q{i}" for i in range(40)], "question": ["Which?"] * 40, "answer": [str(i) for i in range(40)],
    "images": [[picture(i)] for i in range(40)], "other": [0] * 40,
  }, features=datasets.Features({
    "id": datasets.Value("string"), "question": datasets.Value("string"), "answer": datasets.Value("string"),
    "images": datasets.List(datasets.Image()), "other": datasets.Value("int64")}))
  made.save_to_disk(tmp_path / "set", num_shards=2)
  return tmp_path / "set", made


def test_records_are_those_of_the_library(saved):
  folder, made = saved
  found = list(readers.read_questions(folder))
  assert [(q.id, q.text, q.answers) for q in found] == [(r["id"], r["question"], (r["answer"],)) for r in made]
  for question, record in zip(found, made, strict=True):
    assert load_image(question.images[0]).tobytes() == record["images"][0].convert("RGB").tobytes()


def test_a_shuffled_selection_is_saved_in_its_order(saved):
  folder, made = saved
  chosen = made.shuffle(seed=3).select(range(7))
  chosen.save_to_disk(folder.parent / "chosen")
  assert [q.id for q in readers.read_questions(folder.parent / "chosen")] == chosen["id"]


def test_one_split_is_read_and_several_are_named(saved):
  folder, made = saved
  datasets.DatasetDict({"train": made}).save_to_disk(folder.parent / "one")
  assert len(list(readers.read_questions(folder.parent / "one"))) == 40
  datasets.DatasetDict({"train": made, "test": made}).save_to_disk(folder.parent / "two")
  with pytest.raises(files.ReaderError, match=r"train.*test.*name the folder of one"):
    list(readers.read_questions(folder.parent / "two"))


def test_the_inspector_shows_it(saved, capsys):
  assert inspect.main(["--source", "datasets", str(saved[0]), "--sheet", ""]) == 0
  assert "40 questions of 40 records, 0 bad" in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [
  ("state.json", "{"), ("state.json", "[]"), ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}'),
  ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}'), ("dataset_dict.json", '{"splits": ["../.."]}'),
  ("state.json", '{"_data_files": [], "_indices_files": ["i.arrow"]}')])
def test_a_damaged_folder_is_one_error(saved, name, text):
  (saved[0] / name).write_text(text)
  with pytest.raises(files.ReaderError) as error:
    list(readers.read_questions(saved[0]))
  assert "\n" not in str(error.value) and str(saved[0]) in str(error.value)


@pytest.mark.parametrize("at", [40, 400, 1500])
def test_a_damaged_file_is_one_error_or_bad_records(saved, at):
  (first, *_) = sorted(saved[0].glob("*.arrow"))
  data = bytearray(first.read_bytes())
  data[at:at + 64] = b"\xff" * 64
  first.write_bytes(data)
  with pytest.raises(readers.ReaderError):
    list(readers.read_questions(saved[0]))
