"""Runs that are seeds of one method: how they are found, averaged and compared; and their page."""

import json

import pytest

from axpo_jax.report import charts, seeds
from axpo_jax.report.__main__ import main
from axpo_jax.report.runs import Run
from tests.report.report_run import open_page, write_run
from tests.report.test_report import with_browser


def run(name: str, seed=None, scores=(), **config) -> Run:
  """A run that logs one training step a score, and an evaluation after the last."""
  lines = [{"step": i + 1, "rollout/reward_mean": score, "rollout/tool_all_wrong_rate": score}
           for i, score in enumerate(scores)]
  lines += [{"step": len(scores), "eval/pass_at_1": scores[-1]}] if scores else []
  return Run(name, None, lines, {}, (), {"seed": seed, **config} if seed is not None else {})


@pytest.mark.parametrize("names, expected", [
  (("grpo-sft0-seed0", "grpo-sft0-seed10"), "grpo-sft0"),
  (("seed=0,rl.recipe=axpo", "seed=1,rl.recipe=axpo"), "rl.recipe=axpo"),
  (("axpo/seed_0", "axpo/seed_1"), "axpo"), (("monday", "tuesday"), "monday + tuesday"),
  (("seed0", "seed1"), "seed0 + seed1")])
def test_the_name_of_a_method_is_what_its_runs_share(names, expected):
  method, = seeds.methods([run(name, i, rl={"k": 4}) for i, name in enumerate(names)])
  assert method.name == expected and list(method.runs) == [0, 1]


def test_only_runs_that_differ_in_the_seed_alone_are_one_method():
  found = seeds.methods([run("a-seed0", 0, k=4), run("b-seed0", 0, k=8), run("a-seed1", 1, k=4),
                         run("again", 0, k=4), run("old"), run("older")])
  assert [(method.name, list(method.runs)) for method in found] == [
    ("a", [0, 1]), ("b-seed0", [0]), ("again", ["again"]), ("old", ["old"]), ("older", ["older"])]


def test_methods_whose_runs_have_the_same_name_are_told_apart():
  found = seeds.methods([run(f"x{i}/seed{i}", i, k=i // 2) for i in range(4)])
  assert [method.name for method in found] == ["x0/seed0 + x1/seed1", "x2/seed2 + x3/seed3"]


def test_means_end_where_the_shortest_run_does():
  method, = seeds.methods([run("seed0", 0, (0.2, 0.4, 0.9)), run("seed1", 1, (0.4, 0.8))])
  rewards = [line["rollout/reward_mean"] for line in method.metrics]
  assert rewards == pytest.approx([0.3, 0.6])


def test_differences_are_paired_by_seed():
  """By hand: +10 and +20 points over the two seeds of both; t of one degree of freedom is 12.706."""
  found = seeds.methods([run("grpo-seed0", 0, (0.50,), rl="grpo"), run("grpo-seed1", 1, (0.60,), rl="grpo"),
                         run("axpo-seed1", 1, (0.80,), rl="axpo"), run("axpo-seed0", 0, (0.60,), rl="axpo"),
                         run("axpo-seed2", 2, (0.00,), rl="axpo")])
  (label, cells, (delta,)), (_, _, (wrong,)) = seeds.glance(found)
  assert label == "Pass@1" and cells == [("–", "55.0 ± 63.5"), ("–", "46.7 ± 103.4")]
  assert delta == [{"text": "+15.0", "interval": "−48.5 … +78.5", "sure": ""}]
  table = seeds.benchmark_table(found)
  kinds = [(row["label"], row["kind"]) for row in table["rows"]]
  assert kinds == [("grpo", "result"), ("axpo", "result"), ("axpo − grpo", "difference"),
                   ("grpo", "tools"), ("axpo", "tools")]
  assert table["rows"][2]["cells"] == [[delta[0] | {"k": 1}]]
  assert wrong[0]["text"] == "+15.0"


def test_fewer_wrong_is_a_gain():
  def both(name, *ends):
    return [run(f"{name}-seed{i}", i, (end,), rl=name) for i, end in enumerate(ends)]
  (_, _, (right,)), (_, _, (wrong,)) = seeds.glance(seeds.methods(
    both("grpo", 0.50, 0.60, 0.70) + both("axpo", 0.40, 0.51, 0.60)))
  assert (right[0]["sure"], wrong[0]["sure"]) == ("loss", "gain")


def test_benchmarks_are_averaged_in_every_run_before_its_seeds_are():
  def evaluated(name, seed, perception, search):
    line = {"step": 1, "eval/pass_at_1": 0.0, "eval/perception/pass_at_1": perception,
            "eval/search/pass_at_1": search, "eval/perception/tool_attempt_rate": 0.25}
    return Run(name, None, [line], {}, (), {"seed": seed})
  table = seeds.benchmark_table(seeds.methods(
    [evaluated("x-seed0", 0, 0.2, 0.4), evaluated("x-seed1", 1, 0.4, 0.6)]))
  assert table["benchmarks"] == ["perception", "search", "average"]
  result, tools = table["rows"]
  # 12.706 · 0.1: both seeds lie 10 points from their mean.
  assert result["cells"] == [{"text": f"{mean} / –", "error": "127.1 / –"} for mean in (30.0, 50.0, 40.0)]
  assert tools["cells"] == ["25.0 ± 0.0", "–", "25.0 ± 0.0"]


def test_a_curve_is_the_mean_of_thin_ones():
  found = seeds.methods([run(f"{name}-seed{i}", i, [0.1 * (i + 1)] * 12, rl=name)
                         for name in ("grpo", "axpo") for i in (0, 1)])
  rewards = next(chart for chart in charts.charts(found) if chart.title == "Reward")
  lines = [(line["name"], line.get("showlegend", True), round(line["y"][-1], 6), line["meta"]["colour"])
           for line in rewards.figure["data"]]
  assert lines == [(name, thick, value, colour) for colour, name in enumerate(("grpo", "axpo"))
                   for thick, value in ((False, 0.1), (False, 0.2), (True, 0.15))]


def test_a_reward_of_ones_own_has_a_curve_a_part_on_an_axis_of_its_own():
  (method,) = seeds.methods([run("own-seed0", 0, [-0.5] * 12)])
  for line in method.metrics:
    line |= {"rollout/reward/exact": 0.1, "rollout/reward/care/length": -0.6}
  chart = next(chart for chart in charts.charts([method]) if chart.title == "Reward")
  assert {line["name"] for line in chart.figure["data"]} == {"mean", "exact", "care/length"}
  assert "range" not in chart.figure["layout"]["yaxis"]  # it may be below zero


@with_browser
def test_a_page_of_seeds(tmp_path):
  folders = [tmp_path / f"{name}-seed{seed}" for name in ("grpo", "axpo") for seed in (0, 1)]
  for folder in folders:
    write_run(folder, skill=0.7 if "axpo" in folder.name else 0.05, seed=int(folder.name[-1]))
    (folder / "config.json").write_text(json.dumps(
      {"seed": int(folder.name[-1]), "rl": {"algorithm": folder.name[:4]}}))
  out = tmp_path / "page.html"
  assert main([*map(str, folders), "--out", str(out)]) == 0
  with open_page(out) as page:
    page.wait_for_selector("#list[data-ready]")
    assert page.inner_text("h1") == "grpo · axpo"
    assert page.locator("#glance thead .run").all_inner_texts() == ["grpo", "axpo", "− grpo"]
    assert page.locator("select[name=run] option").count() == 5
    page.locator("details.warning summary").first.click()
    assert page.locator("details.warning p").first.is_visible()
    assert page.problems == []
