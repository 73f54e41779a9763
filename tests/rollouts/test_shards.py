"""Sampled shards: restartable in the middle, nothing sampled twice, every rollout kept."""

import asyncio
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import axpo_jax
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.data.filters import Counts
from axpo_jax.engine.protocol import SamplingParams
from axpo_jax.eval.scoring import JUDGE, JUDGE_FAILED, RULE, Score
from axpo_jax.miniworld import perception
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor
from axpo_jax.rollouts import shards
from axpo_jax.rollouts.collect import Actor
from axpo_jax.rollouts.dump import load_rollouts

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
WORLD = perception.PerceptionConfig()
HABITS = TeacherConfig(p_tool_small=0.6, p_wrong_mark=0.3, p_malformed=0.3)


class Watched(TeacherEngine):
  """Counts who was asked; `broken` questions fail, and the process dies at question `deadly`."""

  def __init__(self, chat, questions, *, broken=(), deadly=None):
    super().__init__(chat, {question.id: question for question in questions}, HABITS)
    self.asked, self.broken, self.deadly = [], set(broken), deadly

  async def generate(self, request):
    self.asked.append((request.session, *request.seeds))
    if request.session == self.deadly:
      os.kill(os.getpid(), signal.SIGKILL)
    if request.session in self.broken:
      raise RuntimeError("out of order")
    return await super().generate(request)


def world(**engine) -> tuple[list, Actor]:
  questions = [perception.make_question(0, index, WORLD) for index in range(11)]
  chat, processor = Chat.from_pretrained(TINY), ImageProcessor.from_checkpoint(TINY)
  zoom = ImageZoomIn(ImageLimits(WORLD.crop_min_pixels, WORLD.crop_max_pixels),
                     factor=processor.factor)
  return questions, Actor(
    Watched(chat, questions, **engine), chat, processor, ToolBox([zoom], ["read_image"]),
    EpisodeLimits(max_new_tokens_per_turn=128, max_response_tokens=512, max_total_tokens=2048),
    SamplingParams(128), ImageLimits(WORLD.shown_min_pixels, WORLD.shown_max_pixels), "Be brief.")


def run(folder, questions, actor, n=2, **options):
  return asyncio.run(shards.sample(pathlib.Path(folder), questions, lambda _: actor, n, seed=3,
                                   **{"size": 3, **options}))


def content(folder) -> dict[str, object]:
  """All files but what holds times; of rollouts everything but the calls' seconds."""
  out = {}
  for path in sorted(pathlib.Path(folder).rglob("*")):
    if path.suffix == ".jsonl":
      lines = [json.loads(line) for line in path.read_text().splitlines()]
      for call in (call for line in lines for call in line.get("calls", ())):
        call["seconds"] = None
      out[path.name] = lines
    elif path.is_file():
      out[path.name] = path.read_bytes()
  return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  questions, actor = world()
  return folder, questions, actor, run(folder, questions, actor)


def test_every_rollout_is_kept_beside_its_counts(whole):
  folder, questions, actor, records = whole
  assert [record.id for record in records] == [question.id for question in questions]
  assert [record.place for record in records] == list(range(11))
  assert list(shards.records(folder)) == records
  rollouts = [rollout for path in sorted(folder.glob("rollouts_*.jsonl"))
              for rollout in load_rollouts(path, actor.processor)]
  assert len(rollouts) == 22
  for record, pair in zip(records, zip(rollouts[::2], rollouts[1::2])):
    assert {rollout.question_id for rollout in pair} == {record.id}
    assert record.counts == Counts(tuple(rollout.reward for rollout in pair))
    assert record.answers == tuple(rollout.answer for rollout in pair)
    assert [s.used_tool for s in record.stats] == [rollout.used_tool for rollout in pair]
    assert [s.total_tokens for s in record.stats] == [r.transcript.expanded_length for r in pair]
  totals = json.loads((folder / shards.DONE).read_text())
  assert totals["rollouts"] == totals["judged"] == 22
  assert totals["right"] == sum(rollout.reward for rollout in rollouts)
  assert 0 < totals["right"] < 22 and 0 < totals["used_tool"] < 22  # the teacher errs, and acts
  assert any(stats.tool_errors for record in records for stats in record.stats)


def test_finished_stream_is_not_sampled_again(whole):
  folder, questions, _, records = whole
  _, actor = world()
  assert run(folder, questions, actor) == records
  assert not actor.engine.asked


# The child dies (-9) while question 7, of the third shard, is being sampled.
CHILD = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_shards
questions, actor = test_shards.world(deadly=test_shards.world()[0][7].id)
test_shards.run(sys.argv[1], questions, actor)
"""


def test_killed_in_the_middle_and_resumed_it_is_the_unbroken_one(whole, tmp_path):
  folder, questions, unbroken, _ = whole
  died = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True,
                        check=False)
  assert died.returncode == -signal.SIGKILL, died.stderr
  finished = [record.id for record in shards.records(tmp_path)]
  # Two shards are under way at once; the third begins when one of the first two is finished.
  assert finished and set(finished) <= {question.id for question in questions[:6]}
  assert len(finished) % 3 == 0
  assert not shards.done(tmp_path)
  for half in (".rollouts_00002.jsonl.1.tmp", "images/.0a.png.1.tmp"):
    (tmp_path / half).write_text("half a li")
  _, actor = world()
  run(tmp_path, questions, actor)
  assert content(tmp_path) == content(folder)
  # What is finished is not sampled again, and the rest is, with the seeds of the unbroken run.
  assert sorted(actor.engine.asked) == sorted(
    asked for asked in unbroken.engine.asked if asked[0] not in finished)


def test_size_of_shards_changes_no_rollout(whole, tmp_path):
  _, questions, actor, records = whole
  assert run(tmp_path, questions, actor, size=5) == records


def test_failed_questions_are_counted_and_the_others_go_on(whole, tmp_path):
  _, _, _, records = whole
  questions, actor = world(broken=[f"{world()[0][4].id}"])
  questions[2] = dataclasses.replace(questions[2], images=(b"no picture",))
  found = run(tmp_path, questions, actor)
  assert [record.failed for record in found] == [0, 0, 2, 0, 2, *[0] * 6]
  assert "asked" in found[2].error and "out of order" in found[4].error
  assert found[4].counts == Counts(()) and len(found[4].stats) == 2  # kept, but not judged
  for i in (0, 1, 3, 5):
    assert found[i] == records[i]
  assert json.loads((tmp_path / shards.DONE).read_text())["failed"] == 4
  assert len(shards.Trajectories(tmp_path, actor.processor)) == 20


def test_shard_that_failed_altogether_ends_the_run_and_is_sampled_later(whole, tmp_path):
  folder, questions, _, _ = whole
  _, actor = world(broken=[question.id for question in questions[3:]])
  with pytest.raises(shards.SamplingError, match="out of order"):
    run(tmp_path, questions, actor)
  assert [record.id for record in shards.records(tmp_path)] == [q.id for q in questions[:3]]
  _, actor = world()
  run(tmp_path, questions, actor)
  assert content(tmp_path) == content(folder)


def test_trajectories_are_read_one_by_one(whole):
  folder, _, actor, records = whole
  right = shards.Trajectories(folder, actor.processor, lambda record: [
    i for i in record.judged if record.stats[i].reward > 0.5])
  assert len(right) == sum(record.counts.passed for record in records)
  wanted = [(record.id, answer) for record in records
            for answer, stats in zip(record.answers, record.stats) if stats.reward > 0.5]
  assert [(right[i].question_id, right[i].answer) for i in range(len(right))] == wanted
  one = shards.Trajectories(folder / "rollouts_00001.jsonl", actor.processor)
  assert [one[i].question_id for i in (5, 0)] == [records[5].id, records[3].id]


def test_a_benchmark_judges(whole, tmp_path):
  _, questions, actor, _ = whole

  async def score(question, answer, response):
    assert answer is None or answer in response
    return Score(0.25, RULE, f1=0.5)

  found = run(tmp_path, questions[:2], actor, score=score, group=lambda question: "one")
  assert found[0].counts == Counts((0.25, 0.25))
  assert found[1].scores == (Score(0.25, RULE, 0.5),) * 2 and found[1].group == "one"
  assert shards.Trajectories(tmp_path, actor.processor)[0].reward == 0.25
  assert list(shards.records(tmp_path)) == found


def test_what_a_judge_failed_to_judge_is_judged_again(whole, tmp_path):
  """And nothing else is: neither what was judged, nor any rollout."""
  _, questions, actor, _ = whole
  asked = []

  def judge(down: bool):
    async def score(question, answer, response):
      asked.append((question.id, answer, response, len(question.images)))
      if down and question.id in (questions[1].id, questions[4].id):
        return Score(0.0, JUDGE_FAILED)
      return Score(1.0, JUDGE)
    return score

  def again(folder, down=False):
    asked.clear()
    return asyncio.run(shards.judge_again(folder, lambda: questions, judge(down), actor.chat,
                                          actor.processor))

  run(tmp_path / "whole", questions[:7], actor, score=judge(down=False))
  asked.clear()
  run(tmp_path / "late", questions[:7], actor, score=judge(down=True))
  failed = sorted(seen for seen in asked if seen[0] in (questions[1].id, questions[4].id))
  assert json.loads((tmp_path / "late" / shards.DONE).read_text())["right"] == 10
  assert again(tmp_path / "late", down=True) == 4
  before = content(tmp_path / "late")
  assert [record.counts.passed for record in shards.records(tmp_path / "late")] == [2, 0, 2, 2, 0, 2, 2]
  assert again(tmp_path / "late") == 0
  assert sorted(asked) == failed and len(failed) == 4  # with what it saw the first time
  assert all(answer in response and images == 1 for _, answer, response, images in asked)
  after = content(tmp_path / "late")
  assert after == content(tmp_path / "whole")
  assert after["records_00002.jsonl"] == before["records_00002.jsonl"]
  assert again(tmp_path / "late") == 0 and not asked
  assert again(tmp_path / "nothing here yet") == 0


def test_shards_of_something_else_are_refused(whole, tmp_path):
  folder, questions, actor, _ = whole
  before = content(folder)
  with pytest.raises(shards.ShardError, match="other questions"):
    run(folder, questions[1:], actor)
  with pytest.raises(shards.ShardError, match="2 rollouts a question, not 3"):
    run(folder, questions, actor, n=3)
  assert content(folder) == before
  with pytest.raises(shards.ShardError, match="no sampled shards"):
    shards.records(tmp_path)
  (tmp_path / "records_00000.jsonl").write_text('{"id": 1}\n')
  with pytest.raises(shards.ShardError, match=r"records_00000.jsonl is damaged"):
    list(shards.records(tmp_path))
