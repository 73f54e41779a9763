"""Diagnosis of foreign logs: read as written, counted as a second count has it, without JAX."""

import collections
import json
import pathlib
import subprocess
import sys

import pytest
from scipy.stats import binomtest

from axpo_jax.diagnose.__main__ import main
from axpo_jax.diagnose.figures import diagnose
from axpo_jax.diagnose.intervals import wilson
from axpo_jax.diagnose.reading import read
from axpo_jax.diagnose.traces import Call, Fields, Trace, TraceError
from axpo_jax.diagnose.warnings import collapse
from axpo_jax.rollouts import census
from axpo_jax.rollouts.acting import acting_census
from tests.diagnose.logs import (
  as_openai,
  as_qwen,
  counted,
  episodes,
  unreadable_calls_are_nameless,
  write,
)

REPO = pathlib.Path(__file__).parents[2]


def test_a_plain_text_file_of_conversations(tmp_path):
  items = [item for item in episodes(seed=2) if item["step"] == 1]
  text = ""
  for item in items:
    record = as_qwen(item)
    text += f"reward={int(item['right'])} step={item['step']} question_id={item['question']}\n"
    text += record["input"] + record["output"] + "\n"
  (tmp_path / "log.txt").write_text(text)
  figures = diagnose(read([tmp_path]).traces)["figures"]
  expected = counted(unreadable_calls_are_nameless(items))
  for name in ("success_rate", "tool_attempt_rate", "tool_all_wrong_rate", "tool_error_rate"):
    assert (figures[name]["count"], figures[name]["of"]) == expected[name]


def test_names_agree_with_the_training_metrics():
  """On our own rollouts the figures are those that the loop logs."""
  items = episodes(seed=9)
  traces, groups = [], collections.defaultdict(list)
  for i, item in enumerate(items):
    calls = [Call(name, None if kind == "ok" else kind) for name, kind in item["calls"]]
    traces.append(Trace(str(i), item["question"], item["step"], float(item["right"]), calls,
                        "a tool" if item["mentions"] else "", acting=item["acting"]))
    groups[item["step"], item["question"], item["acting"]].append(census.RolloutStats(
      float(item["right"]), bool(calls), len(calls), 1, 1, "answer",
      collections.Counter(call.error for call in calls if call.error),
      item["mentions"] and not calls))
  stats = [census.GroupStats(members, acting=key[2]) for key, members in groups.items()]
  logged = census.census(stats, prefix="x") | acting_census(stats, prefix="x")
  figures = diagnose(traces)["figures"]
  shared = [name for name in figures if f"x/{name}" in logged]
  assert len(shared) == 16
  for name in shared:
    assert figures[name]["value"] == pytest.approx(logged[f"x/{name}"]), name


@pytest.mark.parametrize("count, of", [(0, 7), (7, 7), (3, 10), (50, 400)])
def test_wilson_is_scipys(count, of):
  interval = binomtest(count, of).proportion_ci(method="wilson")
  assert wilson(count, of) == pytest.approx((interval.low, interval.high))


def test_alike_rollouts_widen_the_interval():
  """100 questions whose 8 rollouts all agree tell as much as 100 rollouts, not as 800."""
  def rate(rollouts):
    return diagnose([Trace("", f"q{q}", None, float(q % 2), [Call("t")])
                     for q in range(100) for _ in range(rollouts)])["figures"]["success_rate"]
  one, many = rate(1), rate(8)
  assert (one["interval"], many["interval"]) == ("wilson", "bootstrap")
  assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=0.2)


def test_bad_lines_are_named_and_counted(tmp_path, capsys):
  good = as_openai(episodes(1)[0])
  path = tmp_path / "log.jsonl"
  path.write_text("\n".join([json.dumps(good), "{broken", json.dumps({"messages": []}),
                             json.dumps(good | {"reward": "maybe"}), "[1]", "",
                             json.dumps(good)]) + "\n")
  assert main([str(path), "--out", str(tmp_path / "out")]) == 0
  result = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
  assert result["rollouts"] == 2
  assert [problem["line"] for problem in result["problems"]] == [2, 3, 4, 5]
  for problem, reason in zip(result["problems"], ("not JSON", "messages", "'maybe'", "object")):
    assert problem["file"] == str(path)
    assert reason in problem["reason"]
  printed = capsys.readouterr().out
  assert f"{path}:2: not JSON" in printed
  assert printed == (tmp_path / "out" / "diagnosis.md").read_text() + "\n"


def test_a_collapse_is_told_with_its_step(tmp_path):
  def at(step, tries):
    return [Trace("", f"q{i}", step, 1.0, [Call("zoom")] * (i < tries)) for i in range(40)]
  steady = [trace for step in range(1, 11) for trace in at(step, 20)]
  falling = [trace for step in range(1, 11) for trace in at(step, 20 if step < 6 else 2)]
  assert "collapse" not in [w["kind"] for w in diagnose(steady)["warnings"]]
  (warning,) = [w for w in diagnose(falling)["warnings"] if w["kind"] == "collapse"]
  assert "from 6 on" in warning["text"]
  assert "50.0 %" in warning["text"]
  assert "5.0 %" in warning["text"]
  assert collapse([]) is None
  assert [w["kind"] for w in diagnose(at(1, 0))["warnings"]] == ["no_tools"]


def test_strict_tells_by_its_exit_status(tmp_path):
  path = write(tmp_path / "log.jsonl",
               [as_openai(item | {"calls": []}) for item in episodes(1)])
  arguments = [str(path), "--out", str(tmp_path)]
  assert main(arguments) == 0
  assert main([*arguments, "--strict"]) == 1
  assert main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2


def test_fields_can_be_named():
  record = {"score": 0, "result": {"ok": True}, "when": 1_767_225_600}
  fields = Fields({"reward": "result.ok", "when": "when"})
  assert fields.common(record) == {"reward": 1.0, "when": "2026-01-01"}
  assert Fields().common(record) == {"reward": 0.0, "when": None}
  with pytest.raises(TraceError, match="no field"):
    Fields({"rewrd": "x"})


def test_needs_numpy_alone():
  """A team that never trains installs no JAX, transformers or torch."""
  code = ("import sys\n"
          "for name in ('jax', 'flax', 'transformers', 'torch', 'PIL', 'ml_collections'):\n"
          "  sys.modules[name] = None\n"
          "from axpo_jax.diagnose.__main__ import main\n"
          "try: main(['--help'])\n"
          "except SystemExit as end: assert not end.code\n"
          "del sys.modules['jax']\n"
          "import axpo_jax.diagnose.dumps\n"
          "assert 'jax' not in sys.modules\n")
  done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
