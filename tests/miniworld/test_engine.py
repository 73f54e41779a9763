"""The scripted teacher behind the engine protocol, in the loop that will roll out the policy."""

import asyncio
import dataclasses
import pathlib

import pytest

import axpo_jax
from axpo_jax.agent.episode import continue_episode, start_transcript
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.corpus import Document, LocalSearch
from axpo_jax.agent.tools.search import SearchTool
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.engine.protocol import (
  Engine,
  EngineClosed,
  RequestError,
  SampleRequest,
  SamplingParams,
)
from axpo_jax.miniworld import perception, search, world
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.images import ImageLimits, ImageProcessor

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
WORLD = perception.PerceptionConfig()
SHOWN = ImageLimits(WORLD.shown_min_pixels, WORLD.shown_max_pixels)


@pytest.fixture(scope="module")
def play(chat, python_tool):
  """Plays the questions to their ends, or goes on from `transcripts`."""
  processor = ImageProcessor.from_checkpoint(TINY)
  zoom = ImageZoomIn(ImageLimits(WORLD.crop_min_pixels, WORLD.crop_max_pixels),
                     factor=processor.factor)
  land = SearchTool(LocalSearch(Document(**document) for document in search.documents(0)))
  tools = ToolBox([zoom, python_tool, land], ["read_image", "execute", "network"])
  limits = EpisodeLimits(max_turns=3, max_new_tokens_per_turn=128, max_response_tokens=512,
                         max_total_tokens=2048, max_images=4)

  def run(questions, config, transcripts=None, **changes):
    engine = TeacherEngine(chat, {question.id: question for question in questions}, config)
    if transcripts is None:
      transcripts = [start_transcript(question, chat, tools, "Be brief.", processor, SHOWN)
                     for question in questions]

    async def all_of_them():
      return await asyncio.gather(*(
        continue_episode(transcript, question, engine, tools,
                         dataclasses.replace(limits, **changes), SamplingParams(128), chat,
                         processor, seed)
        for seed, (question, transcript) in enumerate(zip(questions, transcripts))))

    return asyncio.run(all_of_them())

  return run


def questions(n, **fields):
  config = perception.PerceptionConfig(**fields)
  return [perception.make_question(0, index, config) for index in range(n)]


def habits(**probabilities):
  zero = {field.name: 0.0 for field in dataclasses.fields(TeacherConfig)
          if field.name.startswith("p_")}
  return TeacherConfig(**{**zero, **probabilities})


def test_a_flawless_teacher_is_right_with_the_tool_and_wrong_only_when_it_guesses(play):
  rollouts = play(questions(40), habits(p_tool_small=1.0))
  assert all(rollout.reward == 1 for rollout in rollouts)
  assert {rollout.stop for rollout in rollouts} == {"answer"}
  for rollout, question in zip(rollouts, questions(40)):
    assert rollout.used_tool == (question.meta["size"] == "small")
    assert all(call.error is None for call in rollout.calls)


def test_a_malformed_call_gets_an_error_and_is_mended(play):
  rollouts = play(questions(12, large_share=0.0), habits(p_tool_small=1, p_malformed=0.5, p_retry=1))
  errors = [[call.error is not None for call in rollout.calls] for rollout in rollouts]
  assert [True, False] in errors and [False] in errors
  for rollout, failed in zip(rollouts, errors):
    assert rollout.reward == 1 or failed == [True, True]


def test_all_tasks_play_to_an_answer(play):
  rollouts = play(questions(30, mix=perception.WARM_START_MIX), habits())
  assert all(rollout.reward == 1 and not rollout.used_tool for rollout in rollouts)


def test_rollouts_are_reproducible_and_differ_by_seed(play):
  (question,) = questions(1, large_share=0.0)
  repeats = [dataclasses.replace(question, id=str(i)) for i in range(8)]
  first, again = (play(repeats, TeacherConfig()) for _ in range(2))
  assert [r.transcript.ids for r in first] == [r.transcript.ids for r in again]
  assert len({tuple(r.transcript.ids) for r in first}) > 1


def test_a_prefix_cut_inside_its_call_is_continued_with_a_call(play):
  asked = questions(8, large_share=0.0)
  sources = play(asked, habits(p_tool_small=1, p_off_cell=1))
  assert not any(rollout.calls[0].arguments["bbox_2d"] == list(question.meta["bbox_2d"])
                 for rollout, question in zip(sources, asked))
  cut = [rollout.transcript.cut(rollout.transcript.prefix_end()) for rollout in sources]
  resampled = play(asked, habits(p_tool_small=1), cut)
  for prefix, rollout in zip(cut, resampled):
    assert rollout.transcript.ids[:len(prefix)] == prefix.ids
    assert len(rollout.calls) == 1 and rollout.reward == 1


def mixed(n, **families):
  config = world.WorldConfig(families=tuple(families.items()))
  return [world.make_question(0, index, config) for index in range(n)]


def test_a_flawless_teacher_solves_every_family_with_its_tool(play):
  asked = mixed(24, perception=1, search=1, reasoning=1)
  for tool, category, calls in (("image_zoom_in", "perception", 1), ("tavily-search", "search", 2),
                                ("python", "reasoning", 1)):
    family = [question for question in asked if question.category == category]
    assert len(family) > 3
    rollouts = play(family, habits(p_tool_small=1, p_tool_large=1, p_search=1, p_python_hard=1,
                                   p_python_easy=1))
    for rollout in rollouts:
      assert rollout.reward == 1
      assert [(call.name, call.error) for call in rollout.calls] == [(tool, None)] * calls


def test_a_search_that_was_cut_is_continued_with_the_same_hop(play):
  asked = mixed(6, search=1)
  sources = play(asked, habits(p_search=1, p_wrong_query=1))
  cut = [rollout.transcript.cut(rollout.transcript.prefix_end()) for rollout in sources]
  for question, rollout in zip(asked, play(asked, habits(p_search=1), cut)):
    office, town = question.meta["office"], question.meta["town"]
    assert rollout.calls[0].arguments == {"query": f"{office} of {town}", "max_results": 1}
    assert rollout.reward == 1


def test_tokens_beyond_the_limit_are_cut(play):
  (rollout,) = play(questions(1), habits(), max_new_tokens_per_turn=5)
  assert rollout.stop == "length" and rollout.reward == 0


def request(chat, **fields):
  ids = tuple(chat.encode("<|im_start|>assistant\n<think>\n"))
  return SampleRequest(**{"ids": ids, "images": (), "params": SamplingParams(128), "seeds": (1, 2),
                          "session": "a", **fields})


def test_the_protocol(chat):
  (question,) = questions(1)
  engine = TeacherEngine(chat, {"a": question})
  assert isinstance(engine, Engine)

  async def scenario():
    await engine.update_weights(None, 7)
    samples = await engine.generate(request(chat))
    assert [sample.weight_version for sample in samples] == [7, 7]
    assert all(sample.ids[-1] == chat.im_end_id and sample.finish_reason == "stop"
               and sample.logprobs == (0.0,) * len(sample.ids) for sample in samples)
    stats = engine.stats(reset=True)
    assert (stats.requests, stats.samples, stats.prompt_tokens) == (
      1, 2, 2 * len(request(chat).ids))
    assert stats.decode_tokens == sum(len(sample.ids) for sample in samples)
    assert engine.stats().requests == 0
    with pytest.raises(RequestError, match="session 'b' names no question"):
      await engine.generate(request(chat, session="b"))
    with pytest.raises(RequestError, match="no assistant turn"):
      await engine.generate(request(chat, ids=tuple(chat.encode("hello"))))
    await engine.close()
    with pytest.raises(EngineClosed):
      await engine.generate(request(chat))

  asyncio.run(scenario())
