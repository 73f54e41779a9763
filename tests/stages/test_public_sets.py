"""From a config that names a public data set to the questions that a run trains and evaluates on."""

import io
import json

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from axpo_jax.config import base_config
from axpo_jax.stages.questions import eval_questions, question_batches


def test_a_run_reads_the_sets_its_config_names(tmp_path):
  picture = io.BytesIO()
  PIL.Image.new("RGB", (6, 4)).save(picture, "png")
  pq.write_table(pa.Table.from_pylist([
      {"id": str(i), "problem": f"What is {i}?", "answer": str(i), "source": "geo",
       "image": {"bytes": picture.getvalue(), "path": None}} for i in range(6)]),
      tmp_path / "train.parquet")
  (tmp_path / "bench").mkdir()
  (tmp_path / "bench" / "a.png").write_bytes(picture.getvalue())
  (tmp_path / "bench" / "test_questions.jsonl").write_text(json.dumps(
      {"image": "a.png", "text": "Left?\n(A) yes\n(B) no", "label": "B", "question_id": 3,
       "category": "relative_position"}))
  config = base_config()
  config.data.update(dict(source="mmfinereason", path=str(tmp_path / "train.parquet"),
                          eval_source="vstar", eval_path=str(tmp_path / "bench"),
                          image_cache=str(tmp_path / "cache")))
  config.data.columns.text = "problem"
  config.rl.questions = 3
  batch = next(question_batches(config))
  assert {question.text for question in batch} <= {f"What is {i}?" for i in range(6)}
  assert {image.parent.parent for question in batch for image in question.images} == {
      tmp_path / "cache"}
  (held_out,) = eval_questions(config)
  assert (held_out.id, held_out.answers, held_out.options) == ("3", ("B",), ("yes", "no"))
