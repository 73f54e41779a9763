"""The nine benchmarks: files in exactly their layouts, how they are scored, what they report."""

import asyncio
import base64
import csv
import io
import json

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axpo_jax.agent.judge import Grade, JudgeError
from axpo_jax.data import readers
from axpo_jax.data.adapters import LAYOUTS, parts
from axpo_jax.data.question import load_image
from axpo_jax.eval import benchmarks
from axpo_jax.eval.benchmarks import BENCHMARKS
from axpo_jax.eval.scoring import Score

LENIENT = readers.ReaderConfig(max_bad_share=1.0)


def png(colour=(200, 10, 20)):
  stream = io.BytesIO()
  PIL.Image.new("RGB", (6, 4), colour).save(stream, "png")
  return stream.getvalue()


def image(colour=(200, 10, 20)):
  return {"bytes": png(colour), "path": "a.png"}


def parquet(path, *rows):
  pq.write_table(pa.Table.from_pylist(list(rows)), path)
  return path


def read(name, path):
  report = readers.ReadReport()
  return list(BENCHMARKS[name].read(path, LENIENT, report)), report


def value(name, question, answer, judge=None):
  return asyncio.run(BENCHMARKS[name].score(question, answer, judge)).value


def test_there_are_nine_and_all_can_be_read():
  assert len(BENCHMARKS) == 9
  assert BENCHMARKS.keys() <= LAYOUTS.keys()
  assert [sum(b.category == category for b in BENCHMARKS.values())
          for category in ("reasoning", "perception", "search")] == [3, 4, 2]


# ---- reasoning ----


def mathvision(**fields):
  return {"id": "4", "question": "Which of these?\n<image1>", "options": ["A", "B", "C", "D", "E"],
          "image": "images/4.jpg", "decoded_image": image(), "answer": "B", "solution": None,
          "level": 2, "subject": "counting", **fields}


def test_mathvision(tmp_path):
  path = parquet(
      tmp_path / "testmini.parquet", mathvision(),
      mathvision(id="5", options=["$\\frac{1}{2}$", "0.25", "2"], answer="A"),
      mathvision(id="6", options=[], answer="12", question="How many?"),
      mathvision(id="10", options=["$1: 1$", "$7: 4$", "$8: 5$"], answer="C"),
      mathvision(id="7", question="<image1> <image2>?", options=["<image2>", "<image3>"], answer="B"),
      mathvision(id="8", options=["1", "2"], answer="C"),
      mathvision(id="9", decoded_image=None))
  (letters, values, free, ratios, pictures), report = read("mathvision", path)
  assert letters.text == "Which of these?\n<image>"  # bare letters stand in the picture
  assert values.text.endswith("A. $\\frac{1}{2}$\nB. 0.25\nC. 2")
  # Equals the letter or the option's value.
  assert [value("mathvision", values, answer) for answer in (
      "A", "(a)", "\\frac{1}{2}", "0.5", "1/2", "B", "0.25", "2", None)] == [1] * 5 + [0] * 4
  assert [value("mathvision", free, answer) for answer in ("12", "12.0", "13")] == [1, 1, 0]
  assert [value("mathvision", free, answer) for answer in (
      "12 m^3", "12 \\text{ cm}^2", "12\\text{ units}", "12.004", "12:1", "12.006", "12:5")] == [1, 1, 1, 1, 1, 0, 0]
  assert [value("mathvision", ratios, answer) for answer in (
      "8:5", "8 : 5", "\\frac{8}{5}", "7:4", "5:8")] == [1, 1, 1, 0, 0]
  assert pictures.text == "<image> (picture 2)?\nA. (picture 2)\nB. (picture 3)"
  assert [bad.row for bad in report.examples] == [6, 7]
  assert "'C' is none of 2 options" in report.examples[0].reason


def dynamath(seed, answer="1.732", kind="float", **fields):
  return {"id": str(seed), "question": "What is x?", "image": "images/1.png",
          "decoded_image": image(), "ground_truth": answer, "answer_type": kind,
          "subject": "algebra", "knowledge_level": "high school", **fields}


def test_dynamath(tmp_path):
  choice = "Is it even?\nA: yes\nB: no"
  for variant in (1, 2):
    parquet(tmp_path / f"sample{variant}-00000-of-00001.parquet", dynamath(1),
            dynamath(2, "B", "multiple choice", question=choice), dynamath(3, "yes", "text"),
            dynamath(4, kind="essay"))
  questions, report = read("dynamath", tmp_path)
  assert [question.id for question in questions] == ["1-1", "2-1", "3-1", "1-2", "2-2", "3-2"]
  assert [benchmarks.group(question) for question in questions] == [
      f"dynamath-{seed}" for seed in (1, 2, 3)] * 2
  number, letter, text = questions[:3]
  assert [value("dynamath", number, answer) for answer in (
      "1.732", "1.733", "1.731", "\\sqrt{3}", "1.7331", "1.7309", "x")] == [1, 1, 1, 1, 0, 0, 0]
  assert [value("dynamath", letter, answer) for answer in ("B", "no", "A", "yes")] == [1, 1, 0, 0]
  assert [value("dynamath", text, answer) for answer in ("Yes.", "no")] == [1, 0]
  assert report.bad == 2 and "answer_type 'essay'" in report.examples[0].reason
  # Text is right where the gold words stand in the answer, as in the official script.
  assert [value("dynamath", text, answer) for answer in ("It is: yes", "yesterday")] == [1, 0]


# How the 501 published questions write what used to be lost: answer types, and options.
@pytest.mark.parametrize("kind, gold, right, wrong", [
    ("single answer", "49", "49.0", "50"), ("int", "-15.700000000000001", "-15.7", "-15.6"),
    ("int", "5.000000000000001", "5", "6")])
def test_numbers_of_dynamath_by_other_names(kind, gold, right, wrong, tmp_path):
  (question,), _ = read("dynamath", parquet(tmp_path / "sample1.parquet", dynamath(1, gold, kind)))
  assert [value("dynamath", question, answer) for answer in (right, wrong)] == [1, 0]


@pytest.mark.parametrize("asked, options", [
    ("Which one do we see? choice: (A) (B) (C) (D)", "ABCD"),
    ("The quotient (y-coordinate):(x-coordinate)? choice: (A) A (B) B (C) C (D)", "ABCD"),
    ("Which box?  choice:(A) A (B) B (C) Both are the same ", ("A", "B", "Both are the same")),
    ("Pets of City A. Suppose City A has 10, which? Choices: (A) Dogs (B) Cats", ("Dogs", "Cats")),
    ("Which? A. red B. blue", ("red", "blue")), ("Is f(A) equal to f(B)?", ())])
def test_options_in_a_text(asked, options):
  assert parts.options_in(asked) == tuple(options)


def test_dynamath_reports_the_worst_case(tmp_path):
  for variant in (1, 2):
    parquet(tmp_path / f"sample{variant}-0.parquet", dynamath(1), dynamath(2))
  questions, _ = read("dynamath", tmp_path)
  right, wrong = Score(1.0, "rule"), Score(0.0, "rule")
  # Seed 1: right in both variants. Seed 2: half of the rollouts in one, all in the other.
  rollouts = [[right, right], [right, wrong], [right, right], [right, right]]
  details = BENCHMARKS["dynamath"].details(list(zip(questions, rollouts)), prefix="eval/dynamath")
  assert details == {"eval/dynamath/worst_case": 0.75, "eval/dynamath/algebra/pass_at_1": 0.875}


def test_mathvr(tmp_path):
  empty = {f"image{number}": None for number in range(1, 9)}
  row = {"id": 11, "question": "See <image2>, then <image1>. Find $x$.", "answer": "$2\\sqrt{2}$",
         "analysis": "...", "category": "multimodal", **empty}
  path = parquet(
      tmp_path / "test.parquet",
      {**row, "image1": image(), "image2": image((0, 255, 0))},
      {**row, "id": 12, "question": "Find $x$.", "category": "text"}, {**row, "id": 13})
  (both, text), report = read("mathvr", path)
  assert both.text == "See <image>, then <image>. Find $x$."
  assert load_image(both.images[0]).getpixel((0, 0)) == (0, 255, 0)  # in the order of the text
  assert text.images == ()
  assert [value("mathvr", both, answer) for answer in (
      "2\\sqrt{2}", "\\sqrt{8}", "2\\sqrt{3}")] == [1, 1, 0]
  assert value("mathvr", both, "two times the root of two", ScriptedJudge(True)) == 1
  assert "column image2 is empty" in report.examples[0].reason


def test_mathvr_keeps_its_gold_answers_in_a_list(tmp_path):
  """The column that the official scripts read; sub-questions have one answer each."""
  row = {"id": 1, "question": "Find $x$ and $y$.", "category": "text"}
  (one, two), _ = read("mathvr", parquet(
      tmp_path / "test.parquet", {**row, "answers": ["4"]}, {**row, "id": 2, "answers": ["4", "-1"]}))
  assert (one.answers, two.answers) == (("4",), ("4; -1",))
  assert value("mathvr", one, "4.0") == 1


def test_mathvr_grades_a_response_by_its_rubric(tmp_path):
  """The process score: 1 for a right answer, else 0.7 of the share of points, as the official summary counts."""
  row = {"id": 1, "question": "Find $x$.", "category": "text", "answers": ["4"], "total_score": 5,
         "scoring_points": ["p1: squares", "p2: sums"], "scores": ["p1: 2", "p2: 3"]}
  (graded, plain), _ = read("mathvr", parquet(
      tmp_path / "test.parquet", row, {**row, "id": 2, "scoring_points": None}))
  benchmark = BENCHMARKS["mathvr"]

  def score(question, answer, judge):
    return asyncio.run(benchmark.score(question, answer, judge, "I square, and sum."))

  partly, fully = Grade(False, 0.5), Grade(True, 1.0)
  judge = ScriptedJudge(partly)
  scores = [score(graded, "4", judge), score(graded, "5", judge), score(graded, "four", ScriptedJudge(fully)),
            score(graded, None, judge), score(graded, None, ScriptedJudge(fully)), score(graded, "5", None),
            score(graded, "5", ScriptedJudge(None))]
  assert scores == [Score(1, "rule", None, 1), Score(0, "judge", None, 0.35), Score(1, "judge", None, 1),
                    Score(0, "no_answer", None, 0.35), Score(0, "no_answer", None, 0.7), Score(0, "rule"),
                    Score(0, "judge_failed")]
  assert judge.asked[0] == ("Find $x$.", ("4",), "I square, and sum.", {
      "max_score": 5.0, "scoring_points": row["scoring_points"], "point_values": row["scores"]})
  assert benchmark.details([(graded, scores[:4])], prefix="p")["p/process_score"] == pytest.approx(2.7 / 4)
  assert "p/process_score" not in benchmark.details([(graded, scores[5:])], prefix="p")
  assert score(plain, "5", ScriptedJudge(True)) == Score(1, "judge")


# ---- perception ----


def test_vstar_as_a_list(tmp_path):
  (tmp_path / "direct_attributes").mkdir()
  (tmp_path / "direct_attributes" / "sa_1.jpg").write_bytes(png())
  row = {"image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "label": "C",
         "question_id": 0, "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n"
         "(C) kevlar\n(D) leather\nAnswer with the option's letter from the given choices directly."}
  path = tmp_path / "test_questions.jsonl"
  path.write_text("\n".join(json.dumps(entry) for entry in (
      row, {**row, "question_id": 1, "label": "E"}, {**row, "question_id": 2, "image": "no.jpg"})))
  (question,), report = read("vstar", tmp_path)
  assert question.options == ("rubber", "cotton", "kevlar", "leather")
  assert question.text.endswith("(D) leather")
  assert [value("vstar", question, answer) for answer in (
      "C", "C. kevlar", "kevlar", "Kevlar.", "B", "leather")] == [1, 1, 1, 1, 0, 0]
  assert [bad.row for bad in report.examples] == [2, 3]


def test_vstar_as_files_beside_the_images_is_shuffled_and_always_alike(tmp_path):
  folder = tmp_path / "relative_position"
  folder.mkdir()
  for number in range(12):
    (folder / f"sa_{number}.jpg").write_bytes(png())
    (folder / f"sa_{number}.json").write_text(json.dumps({
        "target_object": ["ladder", "wagon"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "question": "Left or right?", "options": ["left side", "right side", "above", "below"]}))
  (folder / "sa_99.json").write_text(json.dumps({"question": "?", "options": ["a", "b"]}))
  questions, report = read("vstar", tmp_path)
  assert len(questions) == 12 and "no image sa_99" in report.examples[0].reason
  # The files name the right option first; wherever it went, it stays the right one.
  for question in questions:
    assert question.options[ord(question.answers[0]) - ord("A")] == "left side"
    assert value("vstar", question, "left side") == 1
    assert f"{question.answers[0]}. left side" in question.text
  assert len({question.answers for question in questions}) > 1
  assert [question.answers for question in read("vstar", tmp_path)[0]] == [
      question.answers for question in questions]


def test_visualprobe(tmp_path):
  folder = tmp_path / "VisualProbe_Hard"
  (folder / "data").mkdir(parents=True)
  (folder / "data" / "1.jpg").write_bytes(png())
  row = {"images": ["VisualProbe_Hard/data/1.jpg"], "doc_id": 1, "problem": "What is written?",
         "solution": "27B", "data_source": "VisualProbe_Hard"}
  (folder / "val.json").write_text(json.dumps([row, {**row, "solution": None}]))
  (question,), report = read("visualprobe_bench", folder)
  assert (question.id, question.category) == ("hard-1", "hard")
  assert [value("visualprobe_bench", question, answer) for answer in ("27b", "27D")] == [1, 0]
  assert report.examples[0].row == 2


def hrbench(index, answer, *options, colour=(200, 10, 20)):
  return {"index": index, "question": "What is the number?", "answer": answer, "category": "single",
          **dict(zip("ABCD", options)), "cycle_category": f"cycle_{index % 4}",
          "image": base64.b64encode(png(colour)).decode()}


CYCLES = (hrbench(0, "A", "27B", "37B", "27D", "27E"), hrbench(1, "B", "27E", "27B", "37B", "27D"),
          hrbench(2, "C", "27D", "27E", "27B", "37B"), hrbench(3, "D", "37B", "27D", "27E", "27B"))


@pytest.mark.parametrize("name", ["hrbench_4k", "hrbench_8k"])
def test_hrbench_cycles_are_one_group(tmp_path, name):
  other = hrbench(4, "A", "27B", "37B", "27D", "27E", colour=(0, 0, 9))  # asks the same elsewhere
  path = parquet(tmp_path / f"{name}.parquet", *CYCLES, other, {**other, "index": 5, "answer": "F"},
                 {**other, "index": 6, "image": "AAAA"})
  questions, report = read(name, path)
  groups = [benchmarks.group(question) for question in questions]
  assert len(set(groups[:4])) == 1 and groups[4] not in groups[:4]
  assert questions[1].text.splitlines() == [
      "What is the number?", "A. 27E", "B. 27B", "C. 37B", "D. 27D"]
  # One answer by its letter is right in one cycle, by its text in all.
  assert [value(name, question, "A") for question in questions[:4]] == [1, 0, 0, 0]
  assert [value(name, question, "27B") for question in questions[:4]] == [1, 1, 1, 1]
  assert [bad.row for bad in report.examples] == [6, 7]


def test_hrbench_as_tab_separated_values(tmp_path):
  path = tmp_path / "hr_bench_4k.tsv"
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, CYCLES[0], delimiter="\t")
    writer.writeheader()
    writer.writerows(CYCLES)
    file.write("9\ta line of too few cells\n")
  questions, report = read("hrbench_4k", path)
  assert load_image(questions[3].images[0]).size == (6, 4)
  assert [question.id for question in questions] == ["0", "1", "2", "3"]
  assert report.examples[0].row == 5 and "cells of the header" in report.examples[0].reason


def test_hrbench_reports_the_share_that_is_right_in_all_cycles(tmp_path):
  questions, _ = read("hrbench_4k", parquet(tmp_path / "a.parquet", *CYCLES))
  right, wrong = Score(1.0, "rule"), Score(0.0, "rule")
  results = [(question, [right, right]) for question in questions[:3]]
  results.append((questions[3], [right, wrong]))
  assert BENCHMARKS["hrbench_4k"].details(results, prefix="p") == {
      "p/single/pass_at_1": 0.875, "p/all_cycles_right": 0.5}


# ---- search ----


def test_hr_mmsearch(tmp_path):
  row = {"sample_id": "1", "query": "Who made it?", "query_image": image(), "ground_truth": "Ada",
         "difficulty": "hard", "category": "art"}
  path = parquet(tmp_path / "train.parquet", row,
                 {**row, "sample_id": "2", "ground_truth": '["Ada", "Lovelace"]'},
                 {**row, "sample_id": "3", "ground_truth": ""},
                 {**row, "sample_id": "4", "query_image": {"bytes": b"x", "path": None}})
  (one, many), report = read("hr_mmsearch", path)
  assert (one.answers, many.answers) == (("Ada",), ("Ada", "Lovelace"))
  assert [value("hr_mmsearch", many, answer) for answer in ("lovelace", "ada.", "Bob")] == [1, 1, 0]
  assert [bad.row for bad in report.examples] == [3, 4]
  judge = ScriptedJudge(True)  # which gets the picture, as the official one does
  assert value("hr_mmsearch", one, "Lady Byron's daughter", judge) == 1
  assert judge.asked == [("Who made it?", ("Ada",), "Lady Byron's daughter", *one.images)] and one.images


def mmsearch(**fields):
  return {"sample_id": "1", "query": "When does it open?", "query_image": image(),
          "image_search_result": None, "area": "news", "subfield": "sports", "timestamp": "2024",
          "gt_requery": "opening", "gt_answer": "21 July 2024",
          "alternative_gt_answers": ["July 21"], **fields}


def test_mmsearch(tmp_path):
  path = parquet(tmp_path / "end2end.parquet", mmsearch(),
                 mmsearch(sample_id="2", query_image=None, alternative_gt_answers=None),
                 mmsearch(sample_id="3", gt_answer=None), mmsearch(sample_id="4", query=" "))
  (seen, text), report = read("mmsearch", path)
  assert (len(seen.images), text.images) == (1, ())
  assert seen.answers == ("21 July 2024", "July 21") and text.answers == ("21 July 2024",)
  # "21" is not the 21st of July, whatever mathematics makes of the two.
  assert value("mmsearch", seen, "21") < 1
  # Without a judge the value is the token F1 against the best gold answer.
  assert value("mmsearch", seen, "July 21, 2024") == 1
  assert value("mmsearch", seen, "in July") == pytest.approx(0.5)
  assert value("mmsearch", text, "in July") == pytest.approx(0.4)
  assert value("mmsearch", seen, "never") == value("mmsearch", seen, None) == 0
  assert [bad.row for bad in report.examples] == [3, 4]


# ---- the judge ----


class ScriptedJudge:
  """Says what it is told to, and remembers what it was asked."""

  def __init__(self, verdict):
    self.verdict, self.asked = verdict, []

  async def __call__(self, question, golds, answer, images=()):
    self.asked.append((question, tuple(golds), answer, *images))
    if self.verdict is None:
      raise JudgeError("down")
    return self.verdict

  async def grade(self, question, golds, solution, rubric):
    self.asked.append((question, tuple(golds), solution, rubric))
    if self.verdict is None:
      raise JudgeError("down")
    return self.verdict


@pytest.fixture
def question(tmp_path):
  return read("mmsearch", parquet(tmp_path / "end2end.parquet", mmsearch()))[0][0]


def test_the_judge_is_asked_only_where_no_gold_answer_matches(question):
  judge = ScriptedJudge(True)
  assert value("mmsearch", question, "july 21", judge) == 1
  assert value("mmsearch", question, None, judge) == 0
  assert value("mmsearch", question, "July 21 " * 200, judge) == 0  # 1,600 characters
  assert judge.asked == []
  assert value("mmsearch", question, "the 21st of July", judge) == 1
  assert judge.asked == [("When does it open?", ("21 July 2024", "July 21"), "the 21st of July")]
  assert value("mmsearch", question, "the 21st of July", ScriptedJudge(False)) == 0


def test_benchmarks_that_need_no_judge_never_ask_one(tmp_path):
  judge = ScriptedJudge(True)
  (question, *_), _ = read("hrbench_4k", parquet(tmp_path / "a.parquet", *CYCLES))
  assert value("hrbench_4k", question, "37B", judge) == 0 and judge.asked == []


def test_a_judge_that_fails_is_counted_and_not_fatal(question):
  benchmark = BENCHMARKS["mmsearch"]
  answers = [("july 21", ScriptedJudge(True)), ("July", ScriptedJudge(True)),
             ("in May", ScriptedJudge(None)), (None, ScriptedJudge(True))]
  scores = [asyncio.run(benchmark.score(question, *pair)) for pair in answers]
  assert [(score.value, score.how) for score in scores] == [
      (1, "rule"), (1, "judge"), (0, "judge_failed"), (0, "no_answer")]
  assert benchmark.details([(question, scores), (question, [])], prefix="p") == {
      "p/news/pass_at_1": 0.5, "p/f1": pytest.approx((1 + 2 / 3) / 4), "p/judged_share": 0.5,
      "p/judge_failed": 1}
