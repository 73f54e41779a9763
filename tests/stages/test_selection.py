"""What is left to train on, from records as sampling writes them."""

import json

import pytest

from axpo_jax.config import base_config
from axpo_jax.data import filters, pipeline
from axpo_jax.data.question import Question
from axpo_jax.errors import ConfigError
from axpo_jax.rollouts import shards
from axpo_jax.rollouts.census import RolloutStats
from axpo_jax.stages import selection


def record(place, right, asked=4, *, failed=0, tokens=100):
  stats = [RolloutStats(float(i < right), False, 0, 1, 10, "answer", total_tokens=tokens + i)
           for i in range(asked)]
  stats += [RolloutStats(0.0, False, 0, 1, 10, "engine_error")] * failed
  return shards.Record(f"q{place}", place, len(stats), tuple(stats), ("x",) * len(stats))


@pytest.fixture
def run(tmp_path):
  """run("screen", records): a folder with what a stage leaves."""
  def write(stage, records):
    folder = tmp_path / stage / "shards"
    folder.mkdir(parents=True)
    for number in range(0, len(records), 2):
      (folder / f"records_{number // 2:05d}.jsonl").write_text("".join(
        json.dumps(record.to_json()) + "\n" for record in records[number:number + 2]))
      (folder / f"rollouts_{number // 2:05d}.jsonl").write_text("".join(
        f"rollout {record.id} {i}\n" for record in records[number:number + 2]
        for i in range(len(record.stats))))
    return folder

  write.folder = tmp_path
  return write


def config(*stages):
  c = base_config()
  c.stages = stages
  return c


def test_questions_for_rl(run):
  run("screen", [record(0, 4), record(1, 3), record(2, 0), record(3, 1), record(4, 0, 0, failed=4)])
  run("teach", [record(0, 4), record(2, 0), record(3, 1)])  # the teacher was not asked about q1
  kept, tally = selection.questions(config("teach", "sft", "screen", "rl"), run.folder)
  assert [found.id for found in kept] == ["q1", "q3"]
  assert tally.reasons == {filters.KEPT: 2, filters.SOLVED: 1, filters.HOPELESS: 1, filters.UNKNOWN: 1}
  kept, _ = selection.questions(config("screen", "rl"), run.folder)
  assert [found.id for found in kept] == ["q1", "q2", "q3"]
  assert selection.questions(config("rl"), run.folder) == (None, None)


def test_other_runs_and_other_thresholds(run):
  c = config("rl")
  c.rl.filter.teacher = str(run("elsewhere", [record(0, 4), record(1, 1), record(2, 0)]))
  kept, _ = selection.questions(c, None)
  assert [found.place for found in kept] == [0, 1]
  c.rl.filter.hopeless = 0.25
  assert [found.place for found in selection.questions(c, None)[0]] == [0]
  c.rl.filter.teacher = str(run.folder)
  with pytest.raises(ConfigError, match=r"config.rl.filter.teacher"):
    selection.questions(c, None)


def test_trajectories_for_sft(run, capsys):
  run("teach", [record(0, 2), record(1, 0, failed=1), record(2, 4, tokens=9000)])
  c = config("teach", "sft")
  c.sft.update(source="shards", max_length=9001)
  found, tally = selection.trajectories(c.sft, None, run.folder)
  assert (len(found), tally.total) == (4, 13)
  assert tally.reasons == {filters.KEPT: 4, filters.WRONG: 6, filters.TOO_LONG: 2, filters.FAILED: 1}
  lines = []
  for path, start in found._places:  # the very lines of the right rollouts
    lines.append(path.read_text()[start:].splitlines()[0])
  assert lines == ["rollout q0 0", "rollout q0 1", "rollout q2 0", "rollout q2 1"]
  selection.report_tally(tally, run.folder / "sft")
  assert "4 of 13 trajectories kept (30.8%)" in capsys.readouterr().out
  assert json.loads((run.folder / "sft" / "filter.json").read_text())["reasons"]["too long"] == 2
  c.sft.max_length = 10
  with pytest.raises(ConfigError, match="no trajectory"):
    selection.trajectories(c.sft, None, run.folder)


def test_records_of_other_data_are_noticed():
  data = [Question(f"q{i}", "?", (), ("1",)) for i in range(4)]
  chosen = pipeline.Chosen(data, [1, 3], ["q1", "q3"])
  assert [chosen[i].id for i in range(len(chosen))] == ["q1", "q3"]
  for places, ids in (([1], ["q2"]), ([9], ["q9"])):
    with pytest.raises(pipeline.PipelineError, match="other data"):
      pipeline.Chosen(data, places, ids)[0]
