"""The scripted teacher: its turns' format, its script for perception, and what it says elsewhere."""

import json
import math
import random
import re

import pytest

from axpo_jax.data.question import Question
from axpo_jax.miniworld import perception, reasoning, script, teach_perception, teacher, world
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step
from tests.miniworld.habits import always

CONFIG = perception.PerceptionConfig(cell_px=40)  # faster to draw; the teacher sees no pixels
ANSWER = re.compile(r"<answer>\n\\boxed\{(.+)\}\n</answer>")


def make(index, **fields):
  return perception.make_question(0, index, perception.PerceptionConfig(cell_px=40, **fields))


def find(size):
  return next(q for q in map(make, range(100)) if q.meta["size"] == size)


def looked(box):
  return Step({"bbox_2d": list(box)}, "Image 1: zoomed from image 0.")


def trajectory(question, config, seed):
  """Every turn of one trajectory, driven through the conversation's text like the engine's."""
  rng = random.Random(seed)
  text, turns = "<|im_start|>user\n<tool_call>...</tool_call>", []
  while True:
    text += "<|im_start|>assistant\n<think>\n"
    steps, _ = script.read_history(text)
    turns.append(teacher.turn(question, steps, rng, config))
    if "<tool_call>" not in turns[-1]:
      return turns
    text += turns[-1] + "<|im_end|>\n<|im_start|>user\n<tool_response>\n.\n</tool_response>"


def answer(turn):
  return ANSWER.search(turn.rpartition("</think>")[2])[1]


def call(turn):
  return json.loads(re.search(r"<tool_call>\n(.*)\n</tool_call>$", turn, re.DOTALL)[1])


def test_a_direct_answer_has_the_thinking_format():
  question = find("large")
  text = teacher.turn(question, (), random.Random(0), always())
  thought, rest = text.split("\n</think>\n\n")
  assert 5 <= len(thought.split()) <= 16
  assert rest == f"<answer>\n\\boxed{{{question.answers[0]}}}\n</answer>"


def test_a_tool_call_points_at_the_target():
  question = find("small")
  text = teacher.turn(question, (), random.Random(0), always(p_tool_small=1.0))
  assert "<answer>" not in text
  assert call(text) == {"name": "image_zoom_in", "arguments": {
      "bbox_2d": list(question.meta["bbox_2d"]), "img_idx": 0,
      "label": f"{question.meta['colour']} {question.meta['shape']}"}}


def test_it_reads_what_a_crop_shows():
  question = find("small")
  looks = [looked(question.meta["bbox_2d"])]
  assert answer(teacher.turn(question, looks, random.Random(0), always())) == question.answers[0]
  misread = teacher.turn(question, looks, random.Random(0), always(p_misread_crop=1.0))
  assert answer(misread) != question.answers[0]


@pytest.mark.parametrize("mistake", ["p_wrong_mark", "p_off_cell"])
def test_a_mistaken_call_misses_and_is_mended_or_given_up(mistake):
  for index in range(30):
    question = make(index)
    box = call(teacher.turn(question, (), random.Random(index),
                            always(p_tool_small=1, p_tool_large=1, **{mistake: 1})))
    box = box["arguments"]["bbox_2d"]
    assert not teach_perception.hit(question, box)
    others = [list(mark.bbox_2d) for mark in question.meta["marks"][1:]]
    if mistake == "p_wrong_mark":
      assert box in others
    else:
      width, height = (abs(a - b) for a, b in zip(box[:2], question.meta["bbox_2d"][:2]))
      assert (width == 0) != (height == 0) and max(width, height) <= 260
    again = teacher.turn(question, [looked(box)], random.Random(index), always(p_retry=1.0))
    assert call(again)["arguments"]["bbox_2d"] == list(question.meta["bbox_2d"])
    assert answer(teacher.turn(question, [looked(box)], random.Random(index), always()))


def test_malformed_calls_are_not_json_and_count_as_failed_looks():
  for index in range(30):
    text = teacher.turn(make(index), (), random.Random(index),
                        always(p_tool_small=1, p_tool_large=1, p_malformed=1))
    with pytest.raises(json.JSONDecodeError):
      call(text)
    history = f"<|im_start|>assistant\n<think>\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert script.read_history(history) == ([(None, "")], "")


def test_it_never_calls_more_often_than_it_may():
  config = always(p_tool_small=1, p_tool_large=1, p_off_cell=1, p_retry=1)
  assert all(len(trajectory(make(i), config, i)) == 3 for i in range(20))


def test_history_tells_the_open_turn_and_ignores_calls_that_are_only_thought():
  text = ("<|im_start|>system\n<tool_call>{}</tool_call><|im_end|>\n<|im_start|>assistant\n<think>\n"
          "I could <tool_call>{\"arguments\": {\"bbox_2d\": [0, 0, 1, 1]}}</tool_call>\n</think>\n\n"
          '<tool_call>\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 20, 40, 60], '
          '"label": "a"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nTwo\nlines.\n'
          "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\nI see")
  assert script.read_history(text) == (
      [({"bbox_2d": [0, 20, 40, 60], "label": "a"}, "Two\nlines.")], "I see")
  with pytest.raises(ValueError, match="no assistant turn"):
    script.read_history("<|im_start|>user\nhello")


@pytest.mark.parametrize("task", ["where", "what_at", "list", "read_crop", "read_large"])
def test_dense_tasks_are_answered_right_and_without_tools(task):
  for index in range(10):
    question = make(index, mix=((task, 1.0),))
    (text,) = trajectory(question, TeacherConfig(), index)
    assert answer(text) == question.answers[0]


@pytest.mark.parametrize("kind", ["repeat", "look_up", "prices", "formula"])
def test_so_are_those_of_the_other_families(kind):
  families = {"search" if kind in ("repeat", "look_up") else "reasoning": 1.0}
  mixes = world.kinds_by_family({kind: 1.0})
  config = world.WorldConfig(families=tuple(families.items()), search_mix=mixes["search"],
                             reasoning=reasoning.ReasoningConfig(mix=mixes["reasoning"]))
  for index in range(10):
    question = world.make_question(0, index, config)
    (text,) = trajectory(question, TeacherConfig(), index)
    assert answer(text) == question.answers[0]


def test_other_questions_are_an_error():
  with pytest.raises(ValueError, match="family '' of question 'x'"):
    teacher.turn(Question("x", "?", (), ("1",)), (), random.Random(0), TeacherConfig())
  with pytest.raises(ValueError, match="task None of question 'x'"):
    teacher.turn(Question("x", "?", (), ("1",), category="perception"), (), random.Random(0),
                 TeacherConfig())


def test_tool_share_and_filter_rate_are_what_the_config_predicts():
  n, config = 2000, TeacherConfig()
  tool = right = both = 0
  for index in range(n):
    question = perception.make_question(0, index, CONFIG)
    turns = trajectory(question, config, index)
    is_right = answer(turns[-1]) == question.answers[0]
    tool += len(turns) > 1
    right += is_right
    both += is_right and len(turns) > 1
  rates = config.rates(CONFIG.large_share)
  assert 0.25 <= rates.tool <= 0.30
  for seen, trials, expected in (
      (tool, n, rates.tool), (right, n, rates.right), (both, tool, rates.tool_right),
      (right - both, n - tool, rates.direct_right), (both, right, rates.tool_of_right)):
    # 4 standard deviations of a binomial: a false alarm in about 15,000 seeds.
    assert abs(seen / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


def test_a_turn_is_a_function_of_its_random_stream():
  question = find("small")
  first, same, *others = (teacher.turn(question, (), random.Random(seed), TeacherConfig())
                          for seed in (1, 1, 2, 3, 4, 5))
  assert first == same
  assert any(other != first for other in others)
