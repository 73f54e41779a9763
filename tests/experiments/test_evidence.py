"""The comparison's numbers by hand, its files, and the page made of them."""

import gzip
import json
import math
import pathlib
import random
import shutil

import pytest
from scipy import stats as scipy_stats

from axpo_jax.eval import statistics
from axpo_jax.rollouts import shards
from axpo_jax.rollouts.census import RolloutStats
from axpo_jax.rollouts.shards import Record
from experiments.evidence import __main__ as command
from experiments.evidence import counts, figures, measures, store, tables
from experiments.evidence.counts import Counts, Shares

REPO = pathlib.Path(command.__file__).parents[2]
# id, family, tool, tool_right, direct, direct_right, forced, forced_right
QUESTIONS = [Counts("a", "search", 3, 1, 1, 1, 4, 2), Counts("b", "search", 1, 0, 3, 3, 4, 0),
             Counts("c", "reasoning", 0, 0, 4, 1, 4, 1), Counts("d", "reasoning", 2, 0, 2, 0, 4, 0)]


def test_measures_by_hand():
  found = counts.measures(QUESTIONS)
  assert found["pass_at_1"] == pytest.approx((2 + 3 + 1 + 0) / 16)
  assert found["pass_at_4"] == pytest.approx(3 / 4)
  assert found["tool_rate"] == pytest.approx(6 / 16)
  assert found["tool_success"] == pytest.approx(1 / 6)
  assert found["direct_success"] == pytest.approx(5 / 10)
  assert found["forced_success"] == pytest.approx(3 / 16)
  assert found["all_wrong"] == pytest.approx(2 / 3)  # b and d, of a, b and d
  # Pairs of tool rollouts: a has 3 of which 2 wrong, C(2,2)/C(3,2) = 1/3; d has 2 wrong ones, 1.
  assert found["all_wrong_at_2"] == pytest.approx((1 / 3 + 1) / 2)
  assert found["forced_all_wrong_at_4"] == pytest.approx(2 / 4)


def test_fixed_count_does_not_fall_by_trying_more():
  """A tenth of the calls is right, however often it is called: the plain rate falls, this one stays."""
  rng = random.Random(0)

  def questions(tries):
    return [(tries, sum(rng.random() < 0.1 for _ in range(tries))) for _ in range(20_000)]

  few, many = questions(3), questions(12)
  plain = [counts.mean(float(right == 0) for _, right in asked) for asked in (few, many)]
  assert plain[0] > 0.7 > 0.3 > plain[1]
  for asked in (few, many):
    assert counts.all_wrong_at(asked, 2) == pytest.approx(0.9**2, abs=0.005)


def test_parts_of_a_change_by_hand():
  """Calls are opened 0.3 -> 0.5, forced calls succeed 0.2 -> 0.4."""
  before, after = Shares(0.3, 0.09, 0.40, 0.2), Shares(0.5, 0.26, 0.30, 0.4)
  found = counts.parts(before, after)
  assert found["part_more_often"] == pytest.approx(0.2 * 0.3)
  assert found["part_better"] == pytest.approx(0.2 * 0.4)
  assert found["part_chosen"] == pytest.approx((0.26 - 0.20) - (0.09 - 0.06))
  assert found["part_direct"] == pytest.approx(-0.1)
  assert sum(found.values()) == pytest.approx((0.26 + 0.30) - (0.09 + 0.40))


def test_a_mere_habit_has_no_part_that_got_better():
  """The same calls, on twice as many rollouts of every question: nothing improved, nothing was chosen."""
  start = [Counts("a", "", 2, 1, 6, 3, 8, 4), Counts("b", "", 2, 0, 6, 3, 8, 0)]
  habit = [Counts("a", "", 4, 2, 4, 2, 8, 4), Counts("b", "", 4, 0, 4, 2, 8, 0)]
  found = counts.parts(counts.shares(start), counts.shares(habit))
  assert found["part_better"] == found["part_chosen"] == 0
  assert found["part_more_often"] == pytest.approx(0.25 * 0.25)


def test_counts_of_shards_leave_failed_rollouts_out():
  def record(*stats):
    return Record("q", 0, len(stats), stats, ("",) * len(stats), family="search")

  def one(reward, tool, stop="answer"):
    return RolloutStats(reward, tool, int(tool), 1, 10, stop)

  natural = record(one(1, True), one(0, True), one(1, False), one(1, True, "engine_error"))
  # A forced rollout whose thinking never ended has no call.
  forced = record(one(1, True), one(0, True), one(0, False), one(0, True, "engine_error"))
  assert counts.from_records([natural], [forced]) == [Counts("q", "search", 2, 1, 1, 1, 2, 1)]
  assert counts.from_records([natural]) == [Counts("q", "search", 2, 1, 1, 1, 0, 0)]


def test_intervals_and_tests_against_scipy():
  values = [0.31, 0.35, 0.29, 0.40, 0.33]
  found = statistics.over_seeds(values)
  wanted = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
  assert math.isnan(statistics.over_seeds([0.3]).low) and statistics.over_seeds([]) is None
  # Five pairs of one sign: only the two flips of all signs are as extreme, of 32.
  paired = statistics.paired(dict(enumerate([0.0] * 5)), dict(enumerate(values)))
  assert paired.p == pytest.approx(2 / 32) and paired.n == 5
  assert statistics.sign_flip([0.1, -0.1]) == 1
  assert statistics.paired({0: 1.0, 7: 1.0}, {0: 1.5, 3: 9.0}).mean == pytest.approx(0.5)


def test_interval_over_questions_covers_the_mean_of_most_samples():
  rng = random.Random(0)
  inside = 0
  for trial in range(40):
    found = statistics.bootstrapped([rng.gauss(0.1, 0.5) for _ in range(100)], seed=trial)
    inside += found.low < 0.1 < found.high
  assert inside >= 34


def line(step, tools, *, continuations=0, **more):
  return {"step": step, "rollout/rollouts": 32, "rollout/reward_mean": 0.4,
          "rollout/tool_attempt_rate": tools, "rollout/tool_all_wrong_rate": 0.5,
          "rollout/tool_all_wrong_rate_after": 0.4, "axpo/continuations": continuations,
          "engine/decode_tokens": 1000 + 20 * continuations, "engine/prefill_tokens_computed": 500,
          "pack/tokens": 2000 + 20 * continuations, "train/kl": 0.001, "train/entropy": 0.5,
          "train/logp_gap_abs_mean": 1e-5, "train/grad_norm": 0.3, "time/step_s": 2.0} | more


def write_run(folder: pathlib.Path, lines, right: int, tool: int) -> None:
  """A run's folder with four rollouts of two questions; `right` of the first's, `tool` of which call."""
  held_out = folder / "eval" / shards.HELD_OUT
  policy = folder / "rl" / "policy"
  for place in (held_out / shards.FORCED, policy):
    place.mkdir(parents=True)
  (policy / "model.safetensors").write_bytes(folder.name.encode())
  start = "sft-1" if "-sft1" in folder.name else "sft-0"
  (folder / "config.json").write_text(json.dumps(
    {"seed": 0, "model": {"checkpoint": str(folder.parent / start / "sft" / "policy")}}))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  for place, calls in ((held_out, tool), (held_out / shards.FORCED, 4)):
    stats = [RolloutStats(float(i < right), i < calls, int(i < calls), 1, 10, "answer")
             for i in range(4)]
    records = [Record(name, 0, 4, tuple(stats), ("",) * 4, family=family)
               for name, family in (("q0", "search"), ("q1", "reasoning"))]
    (place / "records_00000.jsonl").write_text(
      "".join(json.dumps(record.to_json()) + "\n" for record in records))
    (place / shards.DONE).write_text("{}")


@pytest.fixture
def sweep(tmp_path) -> pathlib.Path:
  folder = tmp_path / "sweep"
  for name in ("sft-0", "sft-1"):
    write_run(folder / name, [], 1, 1)
    (folder / name / "sft" / "policy").mkdir(parents=True)
    (folder / name / "sft" / "policy" / "model.safetensors").write_bytes(name.encode())
  for seed in range(2):
    write_run(folder / f"grpo-sft0-seed{seed}", [line(1, 0.3), line(2, 0.2)], 2, 1)
    write_run(folder / f"axpo-sft0-seed{seed}",
              [line(1, 0.3, continuations=8), line(2, 0.4, continuations=8, **{"train/grad_norm": None})],
              3, 2 + seed)
  write_run(folder / "grpo-sft1-seed0", [line(1, 0.3)], 2, 1)
  write_run(folder / "axpo-sft1-seed0", [line(1, 0.3, continuations=8)], 2, 2)
  (folder / "cispo-sft0-seed0").mkdir()  # not evaluated yet
  (folder / "cispo-sft0-seed0" / "config.json").write_text("{}")
  return folder


def test_a_sweep_becomes_a_page(sweep, tmp_path, capsys):
  page = tmp_path / "results.md"
  marks = "".join(f"\nabout {name}\n<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables.TABLES)
  drawn = "".join(f"<!-- figure: {name} -->\n<!-- end -->\n" for name in figures.FIGURES)
  page.write_text(f"# Title\n{marks}\n{drawn}the end\n")
  assert command.main(["pack", str(sweep), "--into", str(tmp_path / "results" / "raw")]) == 0
  assert "not evaluated, so left out: cispo-sft0-seed0" in capsys.readouterr().out
  assert command.main(["page", str(page)]) == 0
  text = page.read_text()
  assert "old" not in text and text.endswith("the end\n") and text.count("about ") == len(tables.TABLES)
  # Pass@1: 2 of 4 and 3 of 4, at both seeds.
  assert "| AXPO − GRPO | 2 | +25.0 (+25.0 … +25.0) |" in text
  assert "| GRPO | 2 | 50.0 ± 0.0 |" in text
  assert "| SFT, where all begin | 1 | 25.0 |" in text
  # A quarter more rollouts: 40 instead of 32.
  assert "| AXPO | first | 2 | 1.25 ± 0.00 |" in text
  assert "| 0 | `" in text and "| 1 | `" in text
  # From the second policy nothing was gained: +25, +25 and 0 points together.
  assert "| AXPO − GRPO | 1 | 1 | +0.0 |" in text
  assert "| AXPO − GRPO | all | 3 | +16.7 (" in text
  for name in ("curves", "cost", "health"):
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 5000
  assert "(results/cost.png)" in text
  assert command.filled(text, command.packed(tmp_path / "results"), "results") == text


def test_a_repeat_is_laid_beside_the_first_time(sweep, tmp_path):
  page, first, again = tmp_path / "results.md", tmp_path / "results" / "raw", tmp_path / "results" / "repeat"
  page.write_text("<!-- table: repeat -->\n<!-- end -->\n")
  command.main(["pack", str(sweep), "--into", str(first)])
  # Somebody else's AXPO, seed 0: 1 of 4 instead of 3 of 4.
  shutil.rmtree(sweep / "axpo-sft0-seed0")
  write_run(sweep / "axpo-sft0-seed0", [line(1, 0.3, continuations=8)], 1, 2)
  command.main(["pack", str(sweep), "--into", str(again)])
  command.main(["page", str(page)])
  text = page.read_text()
  assert "| GRPO | 2 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
  assert "| AXPO | 2 | 75.0 ± 0.0 | 50.0 ± 317.7 |" in text
  assert "| AXPO − GRPO | 2 | +25.0 (+25.0 … +25.0) | +0.0 (−317.7 … +317.7) |" in text
  rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
  assert rows["GRPO"].endswith("| – |") and "Pass@1" in rows["AXPO"].split("|")[-2]


def test_packed_runs_keep_what_matters_and_no_paths(sweep, tmp_path):
  (sweep / "axpo-sft0-seed1" / "made_by.json").write_text('{"commit": "abc", "machine": "2 x pdp11"}')
  run = store.pack(sweep / "axpo-sft0-seed1")
  assert (run.recipe, run.sft, run.seed, run.commit) == ("axpo", 0, 1, "abc")
  assert run.machine == "2 x pdp11" and store.pack(sweep / "axpo-sft0-seed0").machine == ""
  assert run.questions[0] == Counts("q0", "search", 3, 3, 1, 0, 4, 3)
  start = store.pack(sweep / "sft-0")
  assert run.began_with == start.made != run.made
  path = store.write(run, tmp_path)
  assert store.load(tmp_path) == [run]
  content = path.read_bytes()
  assert path.stat().st_mtime_ns == store.write(run, tmp_path).stat().st_mtime_ns  # not written again
  assert content == path.read_bytes()
  assert str(sweep.parent) not in gzip.decompress(content).decode()


def test_a_run_that_went_wrong_shows_in_the_health_table(sweep):
  runs = [store.pack(sweep / name) for name in ("axpo-sft0-seed0", "grpo-sft0-seed0")]
  assert [measures.health(run)["not_finite"] for run in runs] == [1, 0]
  text = tables.TABLES["health"](tables.Comparison(runs))
  assert [row.split(" | ")[-1] for row in text.splitlines()[2:]] == ["0 |", "1 |"]


def test_what_cannot_be_read_is_named(sweep, tmp_path, capsys):
  with pytest.raises(store.StoreError, match="not named"):
    store.pack(tmp_path / "my_run")
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / "x.json.gz").write_bytes(b"torn")
  with pytest.raises(store.StoreError, match=r"x.json.gz is damaged"):
    store.load(tmp_path / "raw")
  page = tmp_path / "page.md"
  page.write_text("<!-- table: best -->\n<!-- end -->")
  with pytest.raises(store.StoreError, match="best"):
    command.filled(page.read_text(), tables.Comparison([store.pack(sweep / "sft-0")]), "page")
  (tmp_path / "other.md").touch()
  for arguments, said in ((["page", "other.md"], "no packed runs"), (["page", "no.md"], "no.md is not a file"),
                          (["pack", "none", "--into=packed"], "none holds no runs")):
    arguments[1] = str(tmp_path / arguments[1])
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err
