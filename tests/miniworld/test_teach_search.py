"""The teacher's script for two hops: its searches in the real tool, its mistakes, its shares."""

import asyncio
import collections
import dataclasses
import json
import math
import random
import re

import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.corpus import Document, LocalSearch
from axpo_jax.agent.tools.search import SearchTool
from axpo_jax.miniworld import search, teacher
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.script import Step
from tests.miniworld.habits import always

ANSWER = re.compile(r"<answer>\n\\boxed\{(.+)\}\n</answer>$")
CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>$", re.DOTALL)


@pytest.fixture(scope="module")
def look_up():
  """The real tool: arguments -> what the policy reads."""
  corpus = [Document(**document) for document in search.documents(0)]
  box = ToolBox([SearchTool(LocalSearch(corpus))], ["network"])

  def run(arguments):
    call = box.call("tavily-search", arguments, EpisodeState("q", []))
    return asyncio.run(call).text

  return run


def play(question, config, seed, look_up):
  """All turns of a trajectory, and the answer."""
  rng, steps, turns = random.Random(seed), [], []
  while True:
    turns.append(teacher.turn(question, steps, rng, config))
    if found := ANSWER.search(turns[-1]):
      return turns, found[1]
    try:
      written = json.loads(CALL.search(turns[-1])[1])
      assert written["name"] == "tavily-search"
      steps.append(Step(written["arguments"], look_up(written["arguments"])))
    except json.JSONDecodeError:
      steps.append(Step(None, "Error: not valid JSON"))


def questions(n):
  return [search.make_question(0, index) for index in range(n)]


def test_two_searches_are_right_and_one_is_a_guess(look_up):
  guessed = 0
  for seed, question in enumerate(questions(60)):
    turns, answer = play(question, always(p_search=1), seed, look_up)
    assert len(turns) == 3 and answer == question.answers[0]
    turns, answer = play(question, always(p_search=1, p_stop_short=1), seed, look_up)
    assert len(turns) == 2 and question.meta["person"] in turns[1]
    guessed += answer == question.answers[0]
    turns, _ = play(question, always(), seed, look_up)
    assert len(turns) == 1
  assert guessed < 25  # 10 are expected; 25 is five standard deviations off


def test_a_wrong_query_costs_a_search(look_up):
  for seed, question in enumerate(questions(20)):
    turns, _ = play(question, always(p_search=1, p_wrong_query=1, p_retry=1), seed, look_up)
    assert len(turns) == 3
    assert search.office_fact(question.meta["office"], question.meta["town"],
                              question.meta["person"]) not in "".join(turns)
    turns, _ = play(question, always(p_search=1, p_wrong_query=1), seed, look_up)
    assert len(turns) == 2  # it gives up


def test_a_malformed_call_is_mended(look_up):
  mended = 0
  for seed, question in enumerate(questions(40)):
    config = dataclasses.replace(always(p_search=1, p_malformed=0.5, p_retry=1), max_calls=4)
    turns, answer = play(question, config, seed, look_up)
    mended += len(turns) > 3 and answer == question.answers[0]
  assert mended > 5


def test_it_takes_another_colour_from_the_result(look_up):
  for seed, question in enumerate(questions(10)):
    _, answer = play(question, always(p_search=1, p_misread_result=1), seed, look_up)
    assert answer != question.answers[0] and answer in search.COLOURS


def test_shares_are_what_the_habits_predict(look_up):
  n, config = 1500, TeacherConfig(p_search=0.7, p_wrong_query=0.15, p_stop_short=0.3)
  seen = collections.Counter()
  for seed, question in enumerate(questions(n)):
    turns, answer = play(question, config, seed, look_up)
    seen[len(turns) > 1, answer == question.answers[0]] += 1
  tool, right, both = (sum(count for key, count in seen.items() if wanted(*key)) for wanted in (
      lambda t, r: t, lambda t, r: r, lambda t, r: t and r))
  rates = config.search_rates()
  for share, trials, expected in (
      (tool, n, rates.tool), (right, n, rates.right), (both, tool, rates.tool_right),
      (right - both, n - tool, rates.direct_right), (both, right, rates.tool_of_right)):
    # 4 standard deviations of a binomial: a false alarm in about 15,000 seeds.
    assert abs(share / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)
