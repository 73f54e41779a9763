"""The report: its numbers, and the page itself in a real browser."""

import base64
import gzip
import json
import math
import re

import numpy as np
import pytest

from axpo_jax.report import tables
from axpo_jax.report.__main__ import main
from axpo_jax.report.runs import ReportError, Run, load_runs
from axpo_jax.rollouts.census import RolloutStats
from axpo_jax.rollouts.shards import Record
from tests.report.report_run import find_browser, open_page, write_run

NO_BROWSER = "NOT TESTED HERE: the report in a browser. Install chromium, or set $CHROMIUM to its path"
with_browser = pytest.mark.skipif(find_browser() is None, reason=NO_BROWSER)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "first"
  write_run(folder)
  return folder


@pytest.fixture(scope="module")
def report(run):
  assert main([str(run)]) == 0
  return run / "report.html"


def block(path, name):
  found = re.search(f'id="block-{name}">(.*?)</script>', path.read_text())
  return json.loads(gzip.decompress(base64.b64decode(found[1])))


def records(run, step):
  path = run / "rl" / "rollouts" / f"step_{step:06d}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_page_holds_what_the_dumps_hold(run, report):
  index, (group, *_) = block(report, "index"), block(report, "chunk-0")
  dumped = [record for step in (1, 2, 3) for record in records(run, step)]
  assert [row[2] for row in index["rows"]] == [record["reward"] for record in dumped]
  first = [record for record in dumped if record["question_id"] == group["id"]]
  assert group["question"].startswith("What is written in the ")
  assert group["gold"] == ["K"]
  for shown, record in zip(group["rollouts"], first, strict=True):
    text = "".join(token for segment in shown["segments"] for token in segment["tokens"])
    assert text.replace("\ufffc", "<|image_pad|>") == "".join(
      record["transcript"]["pieces"][shown["start"]:])
    assert shown["advantage"] == record["extra"]["advantage"]
    assert len(shown["calls"]) == len(record["calls"])


def test_probabilities_stand_with_their_tokens(run, report):
  record = records(run, 1)[0]
  shown = block(report, "chunk-0")[0]["rollouts"][0]
  for segment in shown["segments"]:
    logprobs = record["transcript"]["logprobs"][segment["at"]:][:len(segment["tokens"])]
    if segment["kind"] in (1, 2, 4):
      assert segment["p"] == [round(1000 * math.exp(value)) for value in logprobs]
    else:
      assert set(logprobs) == {None}


def test_dumped_advantages_are_the_papers(run):
  """Section 3 by hand, on the rewards in the dump: N = 6, ddof = 1."""
  seen = set()
  for step in (1, 2, 3):
    groups = {}
    for record in records(run, step):
      groups.setdefault(record["extra"]["group"], []).append(record)
    for members in groups.values():
      plain = [m for m in members if "branch" not in m["extra"]]
      rewards = [m["reward"] for m in plain]
      for position, member in enumerate(plain):
        extra = member["extra"]
        own = [m["reward"] for m in members
               if m["extra"].get("source") == position and "branch" in m["extra"]]
        compared = list(rewards)
        if own:
          compared[position] = float(any(own))
          assert extra["region"] == "prefix"
        std = np.std(compared, ddof=1)
        expected = (compared[position] - np.mean(compared)) / (std + 1e-6) if std else 0.0
        assert extra["advantage"] == pytest.approx(expected)
        seen.add(extra["region"])
  assert seen == {"all", "prefix"}


def test_a_limit_takes_whole_questions_of_every_step(run, tmp_path):
  assert main([str(run), "--trajectories", "24", "--out", str(tmp_path / "few.html")]) == 0
  index = block(tmp_path / "few.html", "index")
  assert {group["at"] for group in index["groups"]} == {"step 1", "step 2", "step 3"}
  for number, group in enumerate(index["groups"]):
    rows = [row for row in index["rows"] if row[0] == number]
    step = int(group["at"].split()[1])
    assert len(rows) == sum(r["question_id"] == group["id"] for r in records(run, step))


def test_paired_differences_use_the_common_questions():
  """By hand: questions a and b answered by both; their differences are +1 and 0."""
  def kept(rewards):
    return Run("r", None, (), {"bench": [
      Record(name, 0, len(of), tuple(RolloutStats(reward, True, 1, 1, 1, "answer") for reward in of), ())
      for name, of in rewards.items()]}, ())
  table = tables.benchmark_table([kept({"a": [0.0] * 4, "b": [1.0] * 4, "c": [0.0] * 4}),
                                  kept({"a": [1.0] * 4, "b": [1.0] * 4})])
  assert table["paired"]
  result, difference = table["rows"][0], table["rows"][2]
  assert result["cells"][0]["text"] == "33.3 / 33.3"
  assert difference["cells"][0][0] == {
    "k": 1, "text": "+50.0", "interval": "−48.0 … +148.0", "sure": ""}  # 50 ± 1.96 · 70.7 / √2


def test_unpaired_differences_add_the_errors():
  def logged(score, error):
    return Run("r", None, [{"step": 1, "eval/pass_at_1": score, "eval/pass_at_1_se": error}], {}, ())
  table = tables.benchmark_table([logged(0.5, 0.03), logged(0.6, 0.04)])
  assert not table["paired"]
  assert table["rows"][2]["cells"][0][0] == {
    "k": 1, "text": "+10.0", "interval": "+0.2 … +19.8", "sure": "gain"}  # 10 ± 1.96 · 5


def test_at_a_glance_one_evaluation_stands_where_it_was_made():
  trained = {"step": 1, "rollout/reward_mean": 0.2, "rollout/tool_all_wrong_rate": 0.5}
  run = Run("r", None, [trained, {"step": 1, "eval/pass_at_1": 0.25}], {}, ())
  assert tables.glance([run]) == [("Pass@1", [("–", "25.0")], []),
                                  ("all-wrong rate of the tool subgroup", [("50.0", "50.0")], [])]


def test_folders_without_a_run_are_named(tmp_path, run, capsys):
  assert main([str(tmp_path)]) == 2
  assert str(tmp_path) in capsys.readouterr().err
  with pytest.raises(ReportError, match="twice"):
    load_runs([run, run])


def test_nothing_is_loaded_from_elsewhere(report):
  text = report.read_text()
  assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", text)
  # What the agent wrote is data: it closes no tag of the page.
  assert "<b>K</b>" not in text


@with_browser
def test_in_a_browser(report):
  with open_page(report) as page:
    page.wait_for_selector("#detail[data-shown]")
    plots = page.locator(".plot")
    for i in range(plots.count()):
      plots.nth(i).scroll_into_view_if_needed()
      page.wait_for_function("plot => plot.dataset.drawn", arg=plots.nth(i).element_handle())
      assert plots.nth(i).locator("svg.main-svg").count() > 0
    assert plots.count() == 8
    index = block(report, "index")
    # Filters: as many as a count of the rows says.
    page.select_option("select[name=acting]", "continuation")
    page.select_option("select[name=outcome]", "right")
    expected = [row for row in index["rows"] if row[5] == 2 and row[2] > 0.5]
    assert page.inner_text("#count") == f"{len(expected)} of {len(index['rows'])}"
    # Keys: arrows move, the trajectory follows.
    page.focus("#list")
    for key, row in (("End", expected[-1]), ("Home", expected[0])):
      page.keyboard.press(key)
      page.wait_for_selector(f'#detail[data-shown="{index["groups"][row[0]]["id"]} {row[1]}"]')
    detail = page.locator("#detail")
    assert detail.locator(".prefix .thinking").count() == 1
    assert detail.locator(".continuations article").count() == 4
    assert detail.locator("article.chosen .verdict.right").count() == 1
    # The box is drawn where the call looked, on the original.
    page.wait_for_function(
      "[...document.querySelectorAll('#detail img')].every(image => image.complete)")
    box = detail.locator(".box .over").first
    frame = detail.locator(".frame:has(.box)").first.bounding_box()
    width = float(box.get_attribute("width")) / 1000 * frame["width"]
    assert box.bounding_box()["width"] == pytest.approx(width, abs=4)
    for mode, kind in (("advantage", ".gain"), ("confidence", ".doubt")):
      detail.locator(f"input[value={mode}]").check()
      assert detail.locator(f".block .t{kind}").count() > 0
    detail.locator("input[value=plain]").check()
    assert detail.locator(".block .t:is(.gain, .loss, .doubt, .masked)").count() == 0
    # Opened again, a trajectory stays as it was left.
    detail.locator(".frame").first.click()
    page.focus("#list")
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id == 'detail'")
    assert detail.locator(".frame.large").count() == 1
    assert page.problems == []


@with_browser
def test_on_a_phone_by_keyboard(report):
  with open_page(report, viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
    page.wait_for_selector("#list[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.focus("#list")
    page.keyboard.press("ArrowDown")
    assert not page.locator("#detail").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail[data-shown]")
    assert page.locator("#detail").is_visible()
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    assert page.evaluate("document.activeElement.id") == "list"
    assert page.problems == []


@with_browser
def test_several_runs_side_by_side(run, tmp_path):
  write_run(tmp_path / "second", skill=0.7, seed=1)
  assert main([str(run), str(tmp_path / "second"), "--out", str(tmp_path / "both.html")]) == 0
  with open_page(tmp_path / "both.html") as page:
    page.wait_for_selector("#list[data-ready]")
    rows = page.locator(".paper tbody tr")
    assert [rows.nth(i).get_attribute("class") for i in range(5)] == [
      None, None, "difference", "tools", "tools"]
    page.select_option("select[name=run]", "1")
    index = block(tmp_path / "both.html", "index")
    expected = sum(index["groups"][row[0]]["run"] == 1 for row in index["rows"])
    assert page.inner_text("#count") == f"{expected} of {len(index['rows'])}"
    assert page.problems == []
