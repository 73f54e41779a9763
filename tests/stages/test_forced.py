"""Forced calls: the rollouts of an evaluation again, with a call opened behind their thinking."""

import asyncio
import pathlib

import pytest

import axpo_jax
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.engine.protocol import SamplingParams
from axpo_jax.miniworld import perception
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.rollouts import dump, shards
from axpo_jax.rollouts.census import GroupStats, RolloutStats
from axpo_jax.rollouts.collect import Actor
from axpo_jax.stages import forced

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
WORLD = perception.PerceptionConfig()
# It zooms in half of its rollouts, and points at the right mark whenever it does.
HABITS = TeacherConfig(p_tool_small=0.5, p_tool_large=0.5, p_wrong_mark=0, p_off_cell=0,
                       p_malformed=0, p_misread_crop=0)


class Teacher(TeacherEngine):
  """Fails at one question as long as it is told to."""

  failing = True

  async def generate(self, request):
    if self.failing and request.session == self.broken:
      raise RuntimeError("out of order")
    return await super().generate(request)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
  """(folder, natural records, forced records, questions); the third question fails at first."""
  chat, processor = Chat.from_pretrained(TINY), ImageProcessor.from_checkpoint(TINY)
  questions = [perception.make_question(0, index, WORLD) for index in range(8)]
  engine = Teacher(chat, {question.id: question for question in questions}, HABITS)
  engine.broken = questions[2].id
  zoom = ImageZoomIn(ImageLimits(WORLD.crop_min_pixels, WORLD.crop_max_pixels),
                     factor=processor.factor)
  actor = Actor(
    engine, chat, processor, ToolBox([zoom], ["read_image"]),
    EpisodeLimits(max_new_tokens_per_turn=128, max_response_tokens=512, max_total_tokens=2048),
    SamplingParams(128), ImageLimits(WORLD.shown_min_pixels, WORLD.shown_max_pixels), "Be brief.")
  folder = tmp_path_factory.mktemp("held_out")

  def sample(into, who):
    return asyncio.run(shards.sample(into, questions, lambda _: who, 4, seed=3, size=3))

  natural = sample(folder, actor)
  engine.failing = False
  opened = sample(folder / shards.FORCED, forced.opener(actor, forced.read_thoughts(folder)))
  return folder, natural, opened, questions


def rollouts(folder):
  processor = ImageProcessor.from_checkpoint(TINY)
  return [rollout for path in sorted(folder.glob("rollouts_*.jsonl"))
          for rollout in dump.load_rollouts(path, processor)]


def test_every_rollout_calls_and_is_right_as_often_as_its_calls_are(sampled):
  _, natural, opened, questions = sampled
  tried = [stats.used_tool for record in natural for stats in record.stats]
  assert 0.2 < sum(tried) / len(tried) < 0.8
  for record in opened:
    if record.id != questions[2].id:
      assert [stats.used_tool for stats in record.stats] == [True] * 4
      assert [stats.reward for stats in record.stats] == [1.0] * 4  # this teacher's calls never fail


def test_the_thinking_is_that_of_the_rollout_and_what_follows_is_sampled(sampled):
  folder, _, _, _ = sampled
  chat = Chat.from_pretrained(TINY)
  before = {(r.question_id, i % 4): r for i, r in enumerate(rollouts(folder))}
  for i, after in enumerate(rollouts(folder / shards.FORCED)):
    if after.failed:
      continue
    source = before[after.question_id, i % 4].transcript
    thinking = source.ids.index(chat.think_end_id, source.prompt_length) + 1
    assert after.transcript.ids[:thinking] == source.ids[:thinking]
    given = [*chat.encode("\n\n"), chat.tool_call_id]
    assert after.transcript.ids[thinking:thinking + len(given)] == given
    assert after.start == thinking + len(given) == after.transcript.prefix_end()


def test_what_had_failed_stays_failed(sampled):
  _, natural, opened, questions = sampled
  for records in (natural, opened):
    (broken,) = (record for record in records if record.id == questions[2].id)
    assert (broken.asked, broken.failed) == (4, 4)
  assert sum(record.failed for record in opened) == 4


def test_thinking_that_never_ends_opens_no_call(sampled):
  _, _, _, questions = sampled
  chat, processor = Chat.from_pretrained(TINY), ImageProcessor.from_checkpoint(TINY)
  zoom = ImageZoomIn(ImageLimits(WORLD.crop_min_pixels, WORLD.crop_max_pixels),
                     factor=processor.factor)
  actor = Actor(
    TeacherEngine(chat, {questions[0].id: questions[0]}, HABITS), chat, processor,
    ToolBox([zoom], ["read_image"]), EpisodeLimits(max_new_tokens_per_turn=4), SamplingParams(4),
    ImageLimits(WORLD.shown_min_pixels, WORLD.shown_max_pixels), "Be brief.")
  ids = chat.encode("I look at")[:4]
  thoughts = {(questions[0].id, 5): forced.Thought(ids, [0.0] * len(ids))}
  who = forced.opener(actor, thoughts)
  rollout = asyncio.run(who.roll(who.start(questions[0]), questions[0], 5))
  assert not rollout.used_tool and rollout.reward == 0 and not rollout.failed


def test_rates_by_hand():
  def group(family, *rewards):
    return GroupStats([RolloutStats(reward, True, 1, 2, 20, "answer", {"bad_box": 1 - int(reward)})
                       for reward in rewards], family=family)

  found = forced.metrics([group("search", 1, 0, 0, 0), group("search", 0, 0, 0, 0),
                          group("perception", 1, 1, 0, 0)])
  assert found["eval/forced_success_rate"] == pytest.approx(3 / 12)
  # Two of four: C(3,2)/6, 1, C(2,2)/6. All four: 0, 1, 0.
  assert found["eval/forced_all_wrong_rate_at_2"] == pytest.approx((3 / 6 + 1 + 1 / 6) / 3)
  assert found["eval/forced_all_wrong_rate_at_4"] == pytest.approx(1 / 3)
  assert found["eval/search/forced_success_rate"] == pytest.approx(1 / 8)
  assert found["eval/search/forced_all_wrong_rate_at_4"] == pytest.approx(1 / 2)
  assert found["eval/perception/forced_tool_error_rate"] == pytest.approx(1 / 2)
  assert found["eval/forced_opened_rate"] == 1
  assert not any(name.endswith("pass_at_1") for name in found)  # families are told by that name
