"""The teacher's script for totals: its code runs in the real python tool, its mistakes, its shares."""

import asyncio
import collections
import dataclasses
import json
import math
import random
import re

import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.miniworld import perception, reasoning, teacher
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step
from tests.miniworld.habits import always

CONFIG = reasoning.ReasoningConfig(canvas=perception.PerceptionConfig(cell_px=40))
ANSWER = re.compile(r"<answer>\n\\boxed\{(.+)\}\n</answer>$")
CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>$", re.DOTALL)


@pytest.fixture(scope="module")
def run_code(python_tool):
  """Runs a cell in a fresh kernel; returns the observation."""
  box = ToolBox([python_tool], ["execute"])

  def run(arguments):
    state = EpisodeState("q", [])
    observation = asyncio.run(box.call("python", arguments, state))
    box.end_episode(state)
    return observation

  return run


def questions(n, **fields):
  config = dataclasses.replace(CONFIG, **fields)
  return [reasoning.make_question(0, index, config) for index in range(n)]


def answer(text):
  return ANSWER.search(text)[1]


def arguments(text):
  written = json.loads(CALL.search(text)[1])
  assert written["name"] == "python"
  return written["arguments"]


def test_its_code_gives_the_answer_in_the_real_tool(run_code):
  for question in questions(8):
    text = teacher.turn(question, (), random.Random(0), always(p_python_hard=1, p_python_easy=1))
    for _, colour, price in question.meta["items"]:
      assert f"{colour} {price}" in text.partition("</think>")[0]
    observation = run_code(arguments(text))
    assert observation.error is None and observation.text == question.answers[0]
    steps = [Step(arguments(text), observation.text)]
    assert answer(teacher.turn(question, steps, random.Random(0), always())) == question.answers[0]


def test_wrong_code_misleads_it_and_broken_code_is_mended(run_code):
  for question in questions(4, easy_share=0.0):
    text = teacher.turn(question, (), random.Random(0), always(p_python_hard=1, p_wrong_code=1))
    observation = run_code(arguments(text))
    assert observation.error is None
    steps = [Step(arguments(text), observation.text)]
    assert answer(teacher.turn(question, steps, random.Random(0), always())) == observation.text
    assert observation.text != question.answers[0]

    text = teacher.turn(question, (), random.Random(0), always(p_python_hard=1, p_broken_code=1))
    observation = run_code(arguments(text))
    assert "SyntaxError" in observation.text
    steps = [Step(arguments(text), observation.text)]
    again = teacher.turn(question, steps, random.Random(0), always(p_retry=1))
    assert run_code(arguments(again)).text == question.answers[0]
    assert answer(teacher.turn(question, steps, random.Random(0), always())) == question.answers[0]


def test_malformed_calls_are_not_json():
  for seed, question in enumerate(questions(20)):
    text = teacher.call(question, (), random.Random(seed), always(p_malformed=1))
    with pytest.raises(json.JSONDecodeError):
      json.loads(text.removesuffix("\n</tool_call>"))


def test_it_slips_in_its_head():
  for question in questions(20):
    assert answer(teacher.turn(question, (), random.Random(0), always())) == question.answers[0]
    slipped = teacher.turn(question, (), random.Random(0), always(p_slip_hard=1, p_slip_easy=1))
    assert answer(slipped) != question.answers[0]


def compute(code):
  """The python tool's text for the teacher's code; its equality with the real one is tested above."""
  try:
    left, right = re.fullmatch(r"print\((\d+ \* \d+) \+ (\d+ \* \d+)\)", code).groups()
  except AttributeError:
    return "SyntaxError"
  return str(sum(int(a) * int(b) for a, b in (part.split(" * ") for part in (left, right))))


def trajectory(question, config, seed):
  """Whether it called, and whether it was right."""
  rng, steps = random.Random(seed), []
  while True:
    text = teacher.turn(question, steps, rng, config)
    if found := ANSWER.search(text):
      return bool(steps), found[1] == question.answers[0]
    try:
      steps.append(Step(given := arguments(text), compute(given["code"])))
    except json.JSONDecodeError:
      steps.append(Step(None, "Error: not valid JSON"))


def test_shares_are_what_the_habits_predict():
  n, config = 1200, TeacherConfig(p_python_hard=0.5, p_python_easy=0.3, p_broken_code=0.15)
  seen = collections.Counter(
      trajectory(question, config, seed) for seed, question in enumerate(questions(n)))
  tool, right, both = (sum(count for key, count in seen.items() if wanted(*key)) for wanted in (
      lambda t, r: t, lambda t, r: r, lambda t, r: t and r))
  rates = config.reasoning_rates(CONFIG.easy_share)
  for share, trials, expected in (
      (tool, n, rates.tool), (right, n, rates.right), (both, tool, rates.tool_right),
      (right - both, n - tool, rates.direct_right), (both, right, rates.tool_of_right)):
    # 4 standard deviations of a binomial: a false alarm in about 15,000 seeds.
    assert abs(share / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)
