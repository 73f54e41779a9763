"""The miniature's config: all families, their tools, and what is reported of each."""

import asyncio
import dataclasses

import pytest

from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.stages import evaluate, sft
from axpo_jax.stages.context import run_context
from axpo_jax.stages.questions import eval_questions
from configs import axpo_tiny

TOOLS = {"perception": "image_zoom_in", "search": "tavily-search", "reasoning": "python"}


@pytest.fixture(scope="module")
def config(python_isolation):
  config = axpo_tiny.get_config()
  config.eval.update(questions=24, rollouts=2)
  config.agent.python.isolation = python_isolation
  return config


@pytest.fixture(scope="module")
def context(config):
  return run_context(config)


def teacher(config, context, **habits):
  zero = {field.name: 0.0 for field in dataclasses.fields(TeacherConfig)
          if field.name.startswith("p_")}
  questions = {question.id: question for question in eval_questions(config)}
  return TeacherEngine(context.chat, questions, TeacherConfig(**{**zero, **habits}))


def test_evaluation_reports_every_family(config, context):
  """A teacher that always uses its tool where that is needed, except that it does not search."""
  engine = teacher(config, context, p_tool_small=1, p_python_hard=1)
  metrics = asyncio.run(evaluate.run(config, context, engine, progress=False))
  asked = eval_questions(config)
  for family in TOOLS:
    of_family = [question for question in asked if question.category == family]
    assert metrics[f"eval/{family}/questions"] == len(of_family) > 3
    hard = [question.meta.get("difficulty", "easy") == "hard" for question in of_family]
    assert metrics[f"eval/{family}/tool_attempt_rate"] == pytest.approx(sum(hard) / len(hard))
  assert metrics["eval/perception/pass_at_1"] == metrics["eval/reasoning/pass_at_1"] == 1
  assert metrics["eval/search/pass_at_1"] < 0.6
  assert metrics["eval/pass_at_1"] == pytest.approx(
    sum(metrics[f"eval/{family}/pass_at_1"] * metrics[f"eval/{family}/questions"]
        for family in TOOLS) / 24)


def test_the_teachers_episodes_fit_the_limits(config, context):
  """Two searches, an image and its crop, a line of python: nothing is cut short."""
  engine = teacher(config, context, p_tool_small=1, p_tool_large=1, p_search=1, p_python_hard=1,
                   p_python_easy=1)
  metrics = asyncio.run(evaluate.run(config, context, engine, progress=False))
  assert metrics["eval/pass_at_1"] == 1 and metrics["eval/stop/answer"] == 1
  assert metrics["eval/search/calls_per_tool_rollout"] == 2
  # A mistake costs a call more, which has to fit too.
  assert metrics["eval/total_length_max"] < config.agent.max_total_tokens - 60


def test_supervised_examples_come_from_every_family_and_tool(config, context):
  config = config.copy_and_resolve_references()
  config.sft.update(examples=60)
  config.sft.teacher.update(p_tool_small=1.0, p_search=1.0, p_python_hard=1.0)
  examples, counts = next(sft.sft_batches(config, context))
  texts = [context.chat.decode(example.ids_T) for example in examples]
  for tool in TOOLS.values():
    assert sum(f'<tool_call>\n{{"name": "{tool}"' in text for text in texts) > 3
  assert 0.5 < counts["data/kept_share"] < 1
