"""Logs of other makers: every format's figures against a plain count of what was written down, and
nothing that is not read passes for a rollout without a call."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from axpo_jax.diagnose.__main__ import main
from axpo_jax.diagnose.figures import diagnose
from axpo_jax.diagnose.reading import read
from axpo_jax.diagnose.traces import Fields
from tests.diagnose import logs
from tests.diagnose.logs import WRITERS, counted, episodes

REPO = pathlib.Path(__file__).parents[2]


def figures_of(result: dict) -> dict:
  return ({name: (share["count"], share["of"]) for name, share in result["figures"].items()}
          | {f"error_rate of {tool}": (share["errors"], share["calls"])
             for tool, share in result["tools"].items()})


@pytest.mark.parametrize("name", WRITERS)
def test_figures_are_those_of_a_plain_count(name, tmp_path):
  writer, form, seen = WRITERS[name]
  items = episodes(seed=5)
  fields = Fields({"reward": "result.ok", "question": "result.id", "when": "result.step"}
                  if name == "swe-agent" else {})
  reading = read([logs.write(tmp_path / "log.jsonl", [writer(item) for item in items])], fields=fields)
  assert (reading.formats, reading.problems, reading.unread) == ({form: len(items)}, [], [])
  result = diagnose(reading.traces)
  assert figures_of(result) == counted(seen(items))
  for share in result["figures"].values():
    assert share["value"] == pytest.approx(share["count"] / share["of"])
    assert share["low"] <= share["value"] <= share["high"]
  by_step = [counted([item for item in items if item["step"] == step])["tool_attempt_rate"]
             for step in (1, 2, 3)]
  assert [(row["figures"]["tool_attempt_rate"]["count"], row["rollouts"])
          for row in result["over_time"]] == by_step
  dated = [f"2026-03-0{step}" for step in (1, 2, 3)]
  assert [row["when"] for row in result["over_time"]] == (
    dated if name in ("hermes", "atif") else [1, 2, 3])


def test_results_json_of_tau2(tmp_path):
  """The whole file is one object; its name used to make it vanish."""
  items = episodes(seed=7)
  (tmp_path / "results.json").write_text(json.dumps(logs.as_tau2(items)))
  reading = read([tmp_path])
  assert (reading.formats, reading.problems) == ({"tau2": len(items)}, [])
  result = diagnose(reading.traces)
  assert figures_of(result) == counted(logs.objects_only(items))
  assert [row["when"] for row in result["over_time"]] == ["2026-03-01", "2026-03-02", "2026-03-03"]


def test_trials_of_harbor_and_trajectories_of_swe_agent(tmp_path):
  """A file a rollout; Harbor's reward stands in another file of the trial's folder."""
  items = [item for item in episodes(seed=3) if item["step"] == 1]
  for number, item in enumerate(items):
    trial = tmp_path / "harbor" / f"trial-{number}"
    (trial / "agent").mkdir(parents=True)
    record = logs.as_atif(item)
    del record["extra"]
    (trial / "agent" / "trajectory.json").write_text(json.dumps(record))
    (trial / "result.json").write_text(json.dumps(
      {"task_name": item["question"], "verifier_result": {"rewards": {"reward": item["right"]}}}))
    run = tmp_path / "swe" / f"run-{number}"
    run.mkdir(parents=True)
    (run / f"{item['question']}.traj").write_text(json.dumps(logs.as_swe_agent(item)))
    (run / "info.log").write_text("2026-01-01 INFO step 1\n")
  expected = counted(logs.objects_only(items))
  reading = read([tmp_path / "harbor"])
  assert figures_of(diagnose(reading.traces)) == expected
  assert {pathlib.Path(skipped.file).name for skipped in reading.skipped} == {"result.json"}
  reading = read([tmp_path / "swe"])
  seen = figures_of(diagnose(reading.traces))
  unscored = counted(logs.answered(logs.objects_only(items)))
  for name in ("tool_attempt_rate", "stop_after_first_call_rate", "mention_without_call_rate"):
    assert seen[name] == unscored[name]
  assert len({trace.question for trace in reading.traces}) == 6
  assert [pathlib.Path(skipped.file).name for skipped in reading.skipped] == ["info.log"] * len(items)


def test_atif_records_are_atif():
  """Read against the models of the format's own package."""
  atif = pytest.importorskip("atif", reason="NOT TESTED HERE: our ATIF records are valid. pip install atif")
  for item in episodes(seed=5):
    atif.Trajectory.model_validate(logs.as_atif(item))


UNKNOWN = {
  "xml": "<invoke name=\"zoom\"><parameter name=\"at\">1</parameter></invoke>",
  "mistral": '[TOOL_CALLS] [{"name": "zoom", "arguments": {"at": 1}}]',
  "llama": "<|python_tag|>zoom.call(at=1)",
  "deepseek": "<｜tool▁calls▁begin｜>zoom",
  "react": "I look.\nAction: zoom\nAction Input: 1",
  "react of tau-bench": 'Thought:\nI look.\nAction:\n{"name": "zoom", "arguments": {}}',
  "json": '{"name": "zoom", "parameters": {"at": 1}}',
}


@pytest.mark.parametrize("said", [*UNKNOWN.values(), [{"toolUse": {"name": "zoom"}}],
                                  [{"type": "functionCall", "x": 1}]], ids=str)
def test_an_unknown_notation_counts_as_nothing(said, tmp_path, capsys):
  """Not as agents that do not act. The rollouts beside it that look plain may have acted as well."""
  acted = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]}
  plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3"}]}
  path = logs.write(tmp_path / "log.jsonl", [acted, plain, plain])
  assert main([str(path), "--out", str(tmp_path)]) == 2
  result = json.loads((tmp_path / "diagnosis.json").read_text())
  assert (result["rollouts"], len(result["unread"])) == (0, 1)
  assert result["warnings"][0]["kind"] == "unread_calls"
  assert f"{path}:1" in result["warnings"][0]["text"]
  assert "unread_calls" in capsys.readouterr().out
  assert main([str(path), "--out", str(tmp_path), "--count-unread"]) == 0  # who knows that it is prose
  assert json.loads((tmp_path / "diagnosis.json").read_text())["rollouts"] == 3


def test_a_result_without_a_call_is_an_unknown_notation_too(tmp_path):
  record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zoom!"},
                         {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]}
  reading = read([logs.write(tmp_path / "log.jsonl", [record])])
  assert (len(reading.traces), len(reading.unread)) == (0, 1)


def test_one_slip_does_not_hide_the_calls_of_the_others(tmp_path):
  """A file whose calls are read: a turn in another notation is left out alone."""
  items = episodes(seed=5)
  slip = {"messages": [{"role": "user", "content": "q0"},
                       {"role": "assistant", "content": UNKNOWN["xml"]}]}
  reading = read([logs.write(tmp_path / "log.jsonl", [slip, *map(logs.as_openai, items)])])
  assert (len(reading.traces), len(reading.unread), len(reading.uncounted)) == (len(items), 1, 1)


def test_nothing_is_skipped_in_silence(tmp_path):
  """Every file of a folder is read, or listed with a reason."""
  (tmp_path / "policy").mkdir()
  (tmp_path / "policy" / "config.json").write_text("{}")
  for name, text in {"results.json": '{"accuracy": 0.3}', "config.json": '{"model": {}}',
                     "records_0.jsonl": '{"id": "q", "stats": []}\n' * 3, "notes.txt": "hello",
                     "picture.png": "", "data.parquet": "", "empty.jsonl": "", "broken.json": "{"
                     }.items():
    (tmp_path / name).write_text(text)
  logs.write(tmp_path / "log.jsonl", [logs.as_openai(episodes(1)[0])])
  reading = read([tmp_path])
  assert len(reading.traces) == 1
  told = {pathlib.Path(one.file).name for one in [*reading.skipped, *reading.problems]}
  assert told >= {"results.json", "config.json", "records_0.jsonl", "notes.txt", "policy", "broken.json",
                  "empty.jsonl"}
  kinds = " ".join(one.reason for one in reading.skipped)
  assert ".png" in kinds
  assert ".parquet" in kinds


def test_any_key_holds_messages_if_it_is_named(tmp_path):
  items = episodes(seed=5)
  records = [{"run": {"log": record["messages"]}, **record["metadata"]}
             for record in map(logs.as_openai, items)]
  path = logs.write(tmp_path / "log.jsonl", records)
  assert read([path]).traces == []
  reading = read([path], fields=Fields({"messages": "run.log"}))
  assert figures_of(diagnose(reading.traces)) == counted(items)


def test_a_prompt_that_goes_on_is_no_example(tmp_path):
  """Rows of single turns: what stands behind the user's last word in the prompt was done here."""
  messages = logs.as_openai({**episodes(1)[0], "calls": [("zoom", "ok")]})["messages"]
  user = {"role": "user", "content": "and now?"}
  reading = read([logs.write(tmp_path / "log.jsonl", [
    {"prompt": messages[:-1], "completion": messages[-1:]},
    {"prompt": [*messages, user], "completion": messages[-1:]}])])
  assert [[call.error for call in trace.calls] for trace in reading.traces] == [[None], []]


def test_questions_are_told_apart_by_what_was_asked(tmp_path):
  """Neither by what a user quotes, nor all together where nothing is known of them."""
  def asked(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "3"}]}
  quoted = "<tool_response>{}</tool_response>"
  reading = read([logs.write(tmp_path / "log.jsonl", [
    asked(quoted.format("a")), asked(quoted.format("b")), asked(quoted.format("b")),
    {"output": "3"}, {"output": "4"},
    {"output": "3", "task_id": 0, "data_source": "x"}, {"output": "3", "task_id": 0, "data_source": "y"}
  ])])
  questions = [trace.question for trace in reading.traces]
  assert questions[1] == questions[2]
  assert len(set(questions)) == 6


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
  path = logs.write(tmp_path / "log.jsonl", [logs.as_openai(item) for item in episodes(1)])
  command = [sys.executable, "-m", "axpo_jax.diagnose", str(path), "--out", str(tmp_path)]
  reading, writing = os.pipe()
  os.close(reading)
  try:
    done = subprocess.run(command, cwd=REPO, stdout=writing, stderr=subprocess.PIPE, text=True)
  finally:
    os.close(writing)
  assert (done.returncode, done.stderr) == (0, "")
