"""The command that looks at data: counts, sizes, bad rows, the contact sheet, its status."""

import json
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

from axpo_jax.data import inspect
from axpo_jax.data.contact_sheet import contact_sheet
from axpo_jax.data.question import Question

CONFIG = """from axpo_jax.config import base_config
def get_config():
  c = base_config()
  c.data.path = {path!r}
  c.data.columns.text = "problem"
  c.data.max_bad_share = {share}
  return c
"""


@pytest.fixture
def folder(tmp_path):
  PIL.Image.new("RGB", (640, 480), (200, 10, 20)).save(tmp_path / "a.png")
  PIL.Image.new("RGB", (20, 1000)).save(tmp_path / "b.png")
  rows = [{"id": "q0", "problem": "Which?", "answer": "B", "options": ["x", "y"], "images": "a.png"},
          {"id": "q1", "problem": "How many?", "answer": 3, "images": ["a.png", "b.png"]},
          {"id": "q2", "problem": "What is x?", "answer": "\\frac{1}{2}", "category": "maths"},
          {"id": "q3", "problem": "Who?", "answer": ["Ada", "A. L."], "acting": "act"},
          {"id": "q4", "problem": "Where?", "answer": "there", "images": "gone.png"}]
  (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return tmp_path


def counted(output, name):
  """Rows of a table of the output, as {entry: count}."""
  block = output.split(f"\n{name}:\n")[1].split("\n\n")[0]
  return {line.split()[0]: int(line.split()[-2]) for line in block.splitlines()}


def test_what_it_shows(folder, capsys):
  sheet = folder / "sheet.png"
  status = inspect.main([str(folder / "q.jsonl"), "--column", "text=problem", "--sheet", str(sheet)])
  output = capsys.readouterr().out
  assert status == 1  # one bad record of five is more than a run allows
  assert output.startswith("4 questions of 5 records, 1 bad")
  assert counted(output, "gold answer") == {"letter": 1, "number": 1, "mathematics": 1, "words": 1}
  assert counted(output, "images") == {"0": 2, "1": 1, "2": 1}
  assert counted(output, "acting") == {"either": 3, "act": 1}
  assert counted(output, "category") == {"(none)": 3, "maths": 1}
  assert "width: 20 least, 640 median, 640 most pixels" in output
  assert "height: 480 least, 480 median, 1000 most pixels" in output
  assert "1 have a side shorter than 32 pixels" in output
  assert f"{folder}/q.jsonl, row 5: image 0: image file {folder}/gone.png does not exist" in output
  assert "A run would stop: 20.0% of the records are bad, and max_bad_share is 1.0%" in output
  with PIL.Image.open(sheet) as drawn:
    assert drawn.size == (4 * 330 + 10, 348)
    # The first question's image lies in the middle of its cell.
    assert drawn.convert("RGB").getpixel((10 + 160, 10 + 110)) == (200, 10, 20)


def test_a_config_says_what_to_read_and_where_to_stop(folder, capsys):
  (folder / "c.py").write_text(CONFIG.format(path=str(folder / "q.jsonl"), share=0.5))
  assert inspect.main(["--config", str(folder / "c.py"), "--sheet", ""]) == 0
  assert "A run would stop" not in capsys.readouterr().out
  assert not (folder / "contact_sheet.png").exists()


def test_public_data_sets_by_name(folder, capsys):
  (folder / "train.json").write_text(json.dumps([
      {"images": ["VisualProbe_train/a.png"], "doc_id": 1, "problem": "?", "solution": "27B",
       "data_source": "VisualProbe_train"}]))
  (folder / "q.jsonl").unlink()
  assert inspect.main(["--source", "visualprobe", str(folder), "--sheet", ""]) == 0
  assert "\nsource: VisualProbe_train\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.jsonl"], "error: nowhere.jsonl is not a file"), ([], "no PATH is given"),
    (["x", "--column", "txt=a"], "--column names ['txt']; fields are ['acting'"),
    (["--config", "nowhere.py"], "--config nowhere.py is not a file"),
    (["--config", "configs/axpo_tiny.py"], "data.source='miniworld' needs no files")])
def test_what_cannot_be_read_says_why(arguments, message, capsys, monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  assert inspect.main(arguments) == 2
  assert message in capsys.readouterr().err


def test_the_sample_is_fair_and_repeats():
  questions = [Question(str(i), "?", (), ("1",)) for i in range(400)]
  first = inspect.summarise(questions, sample=50, seed=1)
  assert [q.id for q in first.sample] == [q.id for q in inspect.summarise(questions, 50, 1).sample]
  numbers = [int(question.id) for question in first.sample]
  assert len(set(numbers)) == 50 and 140 < sum(numbers) / 50 < 260  # the mean of all is 199.5


def test_a_sheet_shows_questions_without_images_and_with_broken_ones(tmp_path):
  questions = [Question("a", "long " * 100, (), ("x",)),
               Question("b", "?", (tmp_path / "gone.png",), ("y",)),
               Question("c", "?", (PIL.Image.new("RGB", (9, 9)),) * 3, ("z",))]
  assert contact_sheet(questions, columns=2).size == (670, 686)
  with pytest.raises(ValueError, match="0 questions"):
    contact_sheet([])


def test_it_runs_as_a_command_without_jax(folder):
  code = ("import sys; from axpo_jax.data import inspect; inspect.main(['--help'])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert "--source NAME" in done.stdout and "examples:" in done.stdout and "virl39k" in done.stdout
  code = "import sys, axpo_jax.data.inspect; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
