"""The six public training sets, read from small files in exactly their layouts, bad rows included."""

import asyncio
import io
import json
import os

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axpo_jax.agent import rewards
from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.agent.tools.image_search import ImageSearch
from axpo_jax.config import BENCHMARKS, PUBLIC_SETS, base_config
from axpo_jax.config_checks import validate
from axpo_jax.data import adapters, readers
from axpo_jax.data.question import load_image
from axpo_jax.errors import ConfigError
from tests import sizes

LENIENT = readers.ReaderConfig(max_bad_share=1.0)
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


def png(colour=(200, 10, 20), size=(6, 4)):
  stream = io.BytesIO()
  PIL.Image.new("RGB", size, colour).save(stream, "png")
  return stream.getvalue()


def read(name, path, config=LENIENT):
  report = readers.ReadReport()
  return list(adapters.read(name, path, config, report)), report


def reasons(report):
  return [(bad.row, bad.reason) for bad in report.examples]


def pixel(question, number=0):
  return load_image(question.images[number]).getpixel((0, 0))


# ---- ViRL39K ----


def virl(**fields):
  return {"question": "<image>What is the area?", "answer": "\\boxed{17^\\circ}",
          "PassRate_32BTrained": 0.75, "PassRate_7BBase": None, "category": "Geometry",
          "source": "Processed", "qid": "q-0", "image": ["images/a.png"], **fields}


def write_virl(folder, *rows):
  (folder / "images").mkdir()
  (folder / "images" / "a.png").write_bytes(png())
  (folder / "images" / "b.png").write_bytes(png((0, 255, 0)))
  path = folder / "39Krelease.parquet"
  pq.write_table(pa.Table.from_pylist(rows), path)
  return path


def test_virl39k(tmp_path):
  path = write_virl(
      tmp_path, virl(),
      virl(qid="q-1", question="<image><image>Which?\n(A) left\n(B) right", answer="\\boxed{B}",
           image=["images/a.png", "images/b.png"]),
      virl(qid="q-2", image=["images/gone.png"]), virl(qid="q-3", answer=" "),
      virl(qid="q-4", question=None), virl(qid="q-1"),
      virl(qid="q-5", question="<image><image>Which?"))
  (first, choice), report = read("virl39k", tmp_path)
  assert (first.id, first.answers, first.category) == ("q-0", ("17^\\circ",), "Geometry")
  assert first.meta == {"PassRate_32BTrained": 0.75, "PassRate_7BBase": None}
  assert first.images == (tmp_path / "images" / "a.png",)  # a path: nothing is decoded
  assert (choice.kind, choice.options, choice.answers) == ("choice", ("left", "right"), ("B",))
  assert pixel(choice, 1) == (0, 255, 0)
  assert rewards.judge(choice, "right") == rewards.judge(choice, "(B)") == 1
  assert (report.records, report.bad) == (7, 5)
  assert {bad.file for bad in report.examples} == {str(path)}
  (gone, blank, untexted, repeated, unseen) = reasons(report)
  assert gone[0] == 3 and "gone.png" in gone[1]
  assert blank == (4, "'answer' (the gold answer) is missing, empty or not a text")
  assert untexted == (5, "'question' is missing or empty")
  assert repeated[0] == 6 and "'q-1' was already used at" in repeated[1] and "row 2" in repeated[1]
  assert unseen[0] == 7 and "2 <image> marks but 1 images" in unseen[1]


def test_too_many_bad_rows_are_fatal(tmp_path):
  write_virl(tmp_path, virl(), virl(qid="q-1", answer=None))
  with pytest.raises(readers.TooManyBadRecords, match=r"(?s)1 of 2 records.*row 2: 'answer'"):
    read("virl39k", tmp_path, readers.ReaderConfig(max_bad_share=0.4))


# ---- FVQA ----


def fvqa(number, **fields):
  return {"prompt": [{"content": "Who built this?", "role": "user"}],
          "images": [{"bytes": png(), "path": None}],
          "reward_model": {"candidate_answers": '["Ada L.", "Lovelace"]', "ground_truth": "Ada L.",
                           "style": "rule"},
          "data_source": "mmsearch_r1/fvqa_train", "image_urls": None,
          "data_id": f"fvqa_train_{number}", "category": "search_required", **fields}


def write_fvqa(path, *rows):
  model = pa.struct([("candidate_answers", pa.string()), ("ground_truth", pa.string()),
                     ("style", pa.string())])
  schema = pa.schema([("prompt", MESSAGES), ("images", IMAGES), ("reward_model", model),
                      ("data_source", pa.string()), ("image_urls", pa.null()),
                      ("data_id", pa.string()), ("category", pa.string())])
  pq.write_table(pa.Table.from_pylist(list(rows), schema), path)
  return path


def test_fvqa(tmp_path):
  path = write_fvqa(
      tmp_path / "fvqa_train.parquet", fvqa(0),
      fvqa(1, category="search_free", reward_model={"candidate_answers": "[]", "ground_truth": "Malta"}),
      fvqa(2, reward_model=None), fvqa(3, prompt=[{"content": "hi", "role": "system"}]),
      fvqa(4, images=[{"bytes": png()[:20], "path": None}]), fvqa(5, data_id=None))
  (required, free), report = read("fvqa", path)
  assert (required.text, required.answers) == ("Who built this?", ("Ada L.", "Lovelace"))
  assert (required.id, required.category, required.acting) == ("fvqa_train_0", "search", "act")
  assert (free.answers, free.acting, free.meta) == (("Malta",), "decline", {"need": "search_free"})
  assert rewards.judge(required, "lovelace") == 1
  # As its authors compare: without case, articles and punctuation, wherever they stand.
  for answer, right in {"Ada, L": 1, "the A.d.a. L": 1, "Ada K.": 0, "...": 0}.items():
    assert rewards.judge(required, answer) == right
  assert [row for row, _ in reasons(report)] == [3, 4, 5, 6]
  assert "'reward_model' is not an object" in reasons(report)[0][1]
  assert "no message of role user" in reasons(report)[1][1]
  assert "image 0" in reasons(report)[2][1]
  assert "'data_id'" in reasons(report)[3][1]


def test_the_image_search_cache_of_fvqa_finds_its_questions(tmp_path):
  path = write_fvqa(tmp_path / "fvqa_train.parquet", fvqa(0))
  (tmp_path / "thumb.png").write_bytes(png())
  (tmp_path / "cache.json").write_text(json.dumps({"fvqa_train_0": {
      "tool_returned_web_title": ["A bridge", "Its builder"],
      "cached_images_path": ["thumb.png", None]}}))
  (question,), _ = read("fvqa", path)
  tool = ImageSearch(tmp_path / "cache.json")
  seen = asyncio.run(tool.run({}, EpisodeState(question.id, [load_image(question.images[0])])))
  assert seen.text == "[1] A bridge (image 1)\n[2] Its builder"


# ---- PyVision-RL ----


def pyvision(**fields):
  return {"id": "0", "question": "What is the material?\n(A) rubber\n(B) cotton\n(C) kevlar\n"
          "Answer with the option's letter from the given choices directly.", "answer": "A",
          "ability": "visual_search", "data_source": "vstar",
          "image_path": "/elsewhere/vstar_bench/direct_attributes/sa_1.jpg", **fields}


def test_pyvision(tmp_path):
  folder = tmp_path / "vstar_bench" / "direct_attributes"
  folder.mkdir(parents=True)
  (folder / "sa_1.jpg").write_bytes(png())
  path = tmp_path / "image_rl.json"
  path.write_text(json.dumps([
      pyvision(), pyvision(id="1", question="How many?", answer=3), pyvision(id="2", answer=None),
      pyvision(id="3", image_path="/elsewhere/vstar_bench/direct_attributes/sa_2.jpg"), "text"]))
  (choice, number), report = read("pyvision", path)
  assert choice.images == (folder / "sa_1.jpg",)  # the end of the foreign path that exists here
  assert choice.options[:2] == ("rubber", "cotton") and choice.kind == "choice"
  assert (choice.category, choice.source) == ("visual_search", "vstar")
  assert number.answers == ("3",)
  assert [row for row, _ in reasons(report)] == [3, 4, 5]
  assert "/elsewhere/vstar_bench/direct_attributes/sa_2.jpg" in reasons(report)[1][1]
  elsewhere = readers.ReaderConfig(max_bad_share=1, image_folder=str(tmp_path / "vstar_bench"))
  assert read("pyvision", path, elsewhere)[0][0].images == (folder / "sa_1.jpg",)


# ---- MMFineReason ----


def finereason(**fields):
  return {"source": "geo3k", "id": "7", "ori_question": "raw", "original_answer": "\\boxed{4}",
          "image": {"bytes": png(), "path": "x.png"}, "question": "<image>What is x?", "answer": "4",
          "qwen3vl_235b_thinking_response": "<think>long</think>4", "caption": "a triangle",
          "pass_rate": 0.0, "is_consistent": True, "consistency_analysis": "", **fields}


def test_mmfinereason(tmp_path):
  path = tmp_path / "train-00000-of-00018.parquet"
  pq.write_table(pa.Table.from_pylist([
      finereason(), finereason(id="8", answer=None), finereason(id="9", image=None),
      finereason(source="clevr"), finereason()]), path)
  (question, other), report = read("mmfinereason", path)
  assert (question.id, question.answers, question.source) == ("geo3k-7", ("4",), "geo3k")
  assert other.id == "clevr-7"  # ids are unique within their source alone
  assert question.meta == {"pass_rate": 0.0, "is_consistent": True}
  assert pixel(question) == (200, 10, 20)
  assert [row for row, _ in reasons(report)] == [2, 3, 5]


def test_columns_of_mmfinereason_can_be_mapped(tmp_path):
  path = tmp_path / "train.parquet"
  pq.write_table(pa.Table.from_pylist([finereason()]), path)
  columns = readers.Columns(text="ori_question", answers="original_answer")
  (question,), _ = read("mmfinereason", path, readers.ReaderConfig(columns=columns))
  assert (question.text, question.answers, question.id) == ("raw", ("4",), "geo3k-7")
  assert len(question.images) == 1  # columns that are not named keep the data set's own names


def test_columns_of_sets_with_a_layout_of_their_own_cannot(tmp_path):
  config = readers.ReaderConfig(columns=readers.Columns(text="q"))
  with pytest.raises(readers.ReaderError, match=r"columns=.*'text': 'q'.*leave them"):
    read("fvqa", write_fvqa(tmp_path / "a.parquet", fvqa(0)), config)


# ---- DeepEyes-47k ----


def deepeyes(index, **fields):
  question = "What colour is the dog?\nA. black\nB. white"
  return {"data_source": "vstar", "prompt": [
      {"content": "You are a helpful assistant.\n# Tools\n...", "role": "system"},
      {"content": f"<image>\n{question}\nThink first, call **image_zoom_in_tool** if needed, then "
       "answer. Format strictly as: <think>...</think>", "role": "user"}],
      "images": [{"bytes": png(), "path": None}], "ability": "vl_chat",
      "env_name": "visual_toolbox_v2", "reward_model": {"ground_truth": "black", "style": "model"},
      "extra_info": {"answer": "black", "index": index, "question": question, "split": "train"},
      **fields}


def test_deepeyes(tmp_path):
  path = tmp_path / "data_0.1.2_visual_toolbox_v2.parquet"
  rows = [deepeyes(0), deepeyes(1, extra_info={"answer": "black", "index": 1, "question": None,
                                               "split": "train"}),
          deepeyes(2, reward_model={"ground_truth": None, "style": "model"}),
          deepeyes(3, images=[]), deepeyes(4, reward_model=None)]
  pq.write_table(pa.Table.from_pylist(rows), path)
  (asked, cut, blind), report = read("deepeyes", path)
  assert asked.text == "What colour is the dog?\nA. black\nB. white"
  # Without the bare question the instructions that are baked into the prompt are cut off.
  assert cut.text == "<image>\nWhat colour is the dog?\nA. black\nB. white"
  assert (asked.answers, asked.meta) == (("black",), {"env_name": "visual_toolbox_v2"})
  assert asked.id != cut.id and blind.images == ()
  assert [row for row, _ in reasons(report)] == [3, 5]


# ---- VisualProbe ----


def probe(number, **fields):
  return {"images": [f"VisualProbe_train/data/visual_probe_train_{number}.jpg"], "doc_id": number,
          "problem": "What is the number on the door?", "solution": "27B",
          "data_source": "VisualProbe_train", **fields}


def test_visualprobe(tmp_path):
  folder = tmp_path / "VisualProbe_train"
  (folder / "data").mkdir(parents=True)
  (folder / "data" / "visual_probe_train_1.jpg").write_bytes(png())
  (folder / "train.json").write_text(json.dumps([probe(1), probe(2), probe(1, problem="")]))
  (question,), report = read("visualprobe", folder)
  # Its paths begin with the name of the folder that the file itself lies in.
  assert question.images == (folder / "data" / "visual_probe_train_1.jpg",)
  assert (question.id, question.answers, question.source) == ("1", ("27B",), "VisualProbe_train")
  assert [row for row, _ in reasons(report)] == [2, 3]


# ---- all ----


def test_a_file_of_another_data_set_says_what_is_missing(tmp_path):
  path = write_virl(tmp_path, virl())
  with pytest.raises(readers.ReaderError, match=r"no column 'prompt'; it has .*'question'"):
    read("fvqa", path)
  with pytest.raises(readers.ReaderError, match=r"unknown data set 'virl'; choose one of .*virl39k"):
    read("virl", path)


def test_memory_does_not_grow_with_the_file(tmp_path):
  """One row group of 48 MB in pages of about 2 MB; images are noise, so nothing compresses."""
  path = tmp_path / "big.parquet"
  rows = [finereason(id=str(i), image={"bytes": png() + os.urandom(1 << 18), "path": None})
          for i in range(192)]
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=192, write_batch_size=8,
                 use_dictionary=False)
  del rows
  pool = pa.default_memory_pool()
  before, most, count = pool.bytes_allocated(), 0, 0
  for question in adapters.read("mmfinereason", path):
    most, count = max(most, pool.bytes_allocated() - before), count + 1
    assert len(question.images) == 1
  assert count == 192
  assert most < 24e6  # half of the file; what is held is a batch of 16 rows and a page


def test_images_can_be_kept_on_disk(tmp_path):
  path = tmp_path / "q.parquet"
  pq.write_table(pa.Table.from_pylist([finereason(id=str(i)) for i in range(3)]), path)
  config = readers.ReaderConfig(image_cache=str(tmp_path / "cache"))
  questions = list(adapters.read("mmfinereason", path, config))
  stored = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
  assert len(stored) == 1  # by content: three records, one image
  assert {question.images for question in questions} == {(stored[0],)}
  assert stored[0].read_bytes() == png() and pixel(questions[0]) == (200, 10, 20)
  changed = stored[0].stat().st_mtime_ns
  list(adapters.read("mmfinereason", path, config))
  assert stored[0].stat().st_mtime_ns == changed  # not written twice


# ---- the config ----


def test_the_config_knows_every_layout():
  assert {*PUBLIC_SETS, *BENCHMARKS} == set(adapters.LAYOUTS)


@pytest.mark.parametrize("fields, message", [
    ({"source": "virl"}, r"data\.source='virl'; choose one of .*'virl39k'"),
    ({"source": "virl39k", "path": "/nowhere"}, r"data\.path='/nowhere' is not a file"),
    ({"source": "virl39k", "eval_source": "vstars"}, r"data\.eval_source='vstars'; choose one of"),
    ({"source": "miniworld", "eval_source": "vstar"}, r"eval_source='vstar': the miniature world"),
    ({"source": "virl39k", "image_folder": "/nowhere"}, r"image_folder='/nowhere' is not a folder")])
def test_bad_values_in_the_config(tmp_path, fields, message):
  config = base_config()
  config.model.checkpoint = str(sizes.write(tmp_path))
  config.data.path = config.data.eval_path = str(tmp_path)
  for name, content in fields.items():
    config.data[name] = content
  with pytest.raises(ConfigError, match=message):
    validate(config)


def test_a_folder_of_files_will_do(tmp_path):
  """As a snapshot of the hub is one. What is no data in it does not count."""
  config = base_config()
  config.model.checkpoint = str(sizes.write(tmp_path / "model"))
  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "README.md").write_text("no data")
  config.data.path = config.data.eval_path = str(folder)
  for source in ("virl39k", "jsonl"):
    config.data.source = source
    validate(config)
  with pytest.raises(readers.ReaderError, match=f"{folder} holds no file of type"):
    list(readers.read_questions(folder))
  (folder / "q.jsonl").write_text('{"id": "a", "question": "How many?", "answer": "3"}')
  assert [question.id for question in readers.read_questions(folder)] == ["a"]
