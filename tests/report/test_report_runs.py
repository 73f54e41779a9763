"""What the report reads of a run that evaluated: shards as `rollouts.shards` writes them."""

import pytest

from axpo_jax.eval.scoring import RULE, Score
from axpo_jax.report import page, tables
from axpo_jax.report.runs import load_runs
from axpo_jax.rollouts import shards
from axpo_jax.stages import evaluate
from tests.rollouts.test_shards import run, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """An evaluation of two benchmarks. Of the first, variants share a group, one question failed whole,
  and the rollouts were repeated with calls forced; answers to the second are worth a half."""
  folder = tmp_path_factory.mktemp("evaluated")
  questions, actor = world(broken=[world()[0][2].id])
  run(folder / "eval" / "vstar", questions[:6], actor, n=4, size=2,
      group=lambda question: f"pair {questions.index(question) // 2}")
  run(folder / "eval" / "vstar" / shards.FORCED, questions[:2], actor, n=4)

  async def half(question, answer, response):
    return Score(0.5, RULE)

  run(folder / "eval" / "mmsearch", questions[3:6], actor, n=4, score=half)
  return folder


@pytest.fixture(scope="module")
def loaded(folder):
  (loaded,) = load_runs([folder])
  return loaded


def records(folder, name):
  return list(shards.records(folder / "eval" / name))


def test_benchmarks_are_what_the_records_say(folder, loaded):
  assert list(loaded.benchmarks) == ["mmsearch", "vstar"]
  assert not loaded.metrics and not loaded.training_dumps
  found, (*_, failed, three, four, five) = loaded.benchmarks["vstar"], records(folder, "vstar")
  assert failed.failed == 4
  assert found == [*records(folder, "vstar")[:2], three, four, five]
  assert [record.group for record in found] == ["pair 0", "pair 0", "pair 1", "pair 2", "pair 2"]
  assert {record.counts.rewards for record in loaded.benchmarks["mmsearch"]} == {(0.5,) * 4}


def test_the_table_is_that_of_the_evaluation(folder, loaded):
  """Two ways to the same numbers: the page's table, and that which a run prints."""
  table = tables.benchmark_table([loaded])
  assert table["benchmarks"] == ["mmsearch", "vstar", tables.AVERAGE]
  scores, tools = table["rows"]
  for place, name in enumerate(("mmsearch", "vstar")):
    printed = evaluate.result(records(folder, name), 4)
    for shown, ending in (("text", ""), ("error", "_se")):
      assert scores["cells"][place][shown] == " / ".join(
        f"{100 * printed[f'pass_at_{k}{ending}']:.1f}" for k in (1, 4))
    assert tools["cells"][place] == f"{100 * printed['tool_attempt_rate']:.1f}"


def test_rollouts_of_every_folder_can_be_browsed(folder, loaded):
  assert "40 of 44 dumped trajectories" in page.render([loaded])  # four of 4 · (6 + 2 + 3) failed
  places = {path.parent.relative_to(folder).as_posix() for path in loaded.dumps}
  assert places == {"eval/mmsearch", "eval/vstar", "eval/vstar/forced"}
