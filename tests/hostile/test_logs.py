"""Logs of strangers: nothing in a file ends the diagnosis, lies to it or draws on the terminal."""

import json
import os
import random

import pytest

from axpo_jax.diagnose import figures, output, reading
from axpo_jax.diagnose.__main__ import main
from axpo_jax.report import foreign
from axpo_jax.report.pictures import Pictures
from tests.diagnose import logs
from tests.hostile import corpus


def diagnosed(path, out, capsys):
  """(exit status, what was printed, diagnosis.json)."""
  with corpus.bounds(seconds=10):
    status = main([str(path), "--out", str(out)])
  return status, capsys.readouterr().out, json.loads((out / "diagnosis.json").read_text())


@pytest.mark.parametrize("case", corpus.cases("logs"))
def test_lines(case, tmp_path, capsys):
  line = case["line"].replace("9DIGITS", "9" * 5000).replace("TAGS", "<tool_call>" * 1000)
  good = '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "t", "arguments": "{}"}}]}]}'
  path = tmp_path / "log.jsonl"
  path.write_text(f"{line}\n{good}\n", encoding="utf-8")
  status, printed, result = diagnosed(path, tmp_path, capsys)
  assert status == 0
  assert result["rollouts"] == 1 + case.get("traces", 0)
  assert len(result["problems"]) == case.get("problems", 0)
  assert result["calls"] == 1 + case.get("calls", 0)
  assert all(character.isprintable() or character == "\n" for character in printed)
  traces = reading.read([path]).traces
  for name in ("when", "reward"):
    if name in case:
      assert getattr(traces[0], name) == case[name]


NESTED = {"brackets": "[" * 100_000, "objects": '{"a":' * 100_000,
          "in a record": '{"messages": ' + "[" * 100_000,
          "as deep as JSON reads": '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900
                                   + '}, {"role": "assistant", "content": "3"}]}',
          "in arguments": json.dumps({"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "t", "arguments": "[" * 100_000}}]}]}),
          "in a result": json.dumps({"messages": [
            {"role": "assistant", "tool_calls": [{"function": {"name": "t", "arguments": "{}"}}]},
            {"role": "tool", "content": "[" * 100_000}]})}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".traj"])
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
def test_depth(nested, suffix, tmp_path, capsys):
  path = tmp_path / f"log{suffix}"
  path.write_text(nested)
  _, _, result = diagnosed(path, tmp_path / "out", capsys)
  assert result["rollouts"] + len(result["problems"]) == 1


def test_what_is_no_file_is_listed_and_not_waited_for(tmp_path, capsys):
  os.mkfifo(tmp_path / "pipe.jsonl")
  (tmp_path / "away.json").symlink_to(tmp_path / "nowhere")
  (tmp_path / "circle").symlink_to(tmp_path)
  (tmp_path / "bytes.jsonl").write_bytes(b'\xff\xfe{"text": "3"}\n{"text": "3", "task_id": "\xff"}\n')
  _, _, result = diagnosed(tmp_path, tmp_path / "out", capsys)
  assert result["rollouts"] == 1
  assert {problem["file"].rpartition("/")[2] for problem in result["problems"]} == {
    "pipe.jsonl", "away.json", "bytes.jsonl"}


JUNK = (None, True, -1, 2**70, float("nan"), float("inf"), "", "\ud800", "\x1b[2J", "<tool_call>", "{", [], {},
        [None], [[]], {"": {}}, [{"type": "tool_use"}], {"role": "assistant"}, "assistant", "tool",
        [{"role": "assistant", "tool_calls": [{"function": {"name": [], "arguments": 3}}]}])


def mutated(value, draw, chance=0.06):
  """A copy in which some values, keys included, are junk."""
  if draw.random() < chance:
    return draw.choice(JUNK)
  if isinstance(value, dict):
    return {draw.choice(("type", "role", "content", key)) if draw.random() < chance / 2 else key:
            mutated(inner, draw, chance) for key, inner in value.items()}
  if isinstance(value, list):
    return [mutated(inner, draw, chance) for inner in value for _ in range(draw.choice((1, 1, 1, 0, 2)))]
  return value


@pytest.mark.parametrize("name", logs.WRITERS)
def test_mutated_records_never_end_the_reading_or_the_page(name, tmp_path):
  draw = random.Random(name)
  records = [mutated(logs.WRITERS[name][0](item), draw) for item in logs.episodes(3) for _ in range(3)]
  records.append(mutated(logs.as_tau2(logs.episodes(4)[:20]), draw, 0.01))
  path = tmp_path / "log.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  found = reading.read([path], keep=True)
  assert len(found.traces) + len(found.uncounted) + len(found.problems) >= len(records)
  output.markdown(figures.diagnose(found.traces), found)
  for _, build in foreign.groups(0, [*found.traces, *found.uncounted], Pictures(64)):
    json.dumps(build(), allow_nan=False)


LONG = 200_000
REPEATED = {"calls": "<tool_call>", "results": "<tool_response>", "closed calls": "<tool_call>{}</tool_call>",
            "thoughts": "<think></think>", "turns": "<|im_start|>", "functions": "<function=a>", "lines": "\n",
            "actions": "Action:\n", "equals": "=", "names": '"name": "', "brackets": "[", "blanks": " "}


@pytest.mark.parametrize("piece", REPEATED.values(), ids=REPEATED)
def test_repetition_costs_time_in_proportion(piece, tmp_path):
  text = piece * (LONG // len(piece))
  (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
    {"text": text}, {"messages": [{"role": "assistant", "content": text}]},
    {"messages": [{"role": "assistant", "content": "<tool_call>{}</tool_call>"},
                  {"role": "user", "content": text}, {"role": "assistant", "content": "3"}]})))
  (tmp_path / "log.txt").write_text(text + "<|im_start|>system")
  (tmp_path / "other.txt").write_text(text + "\n<|im_start|>system")
  with corpus.bounds(seconds=5, megabytes=256):
    reading.read([tmp_path], keep=True)


def test_results_of_other_calls_cost_time_in_proportion(tmp_path):
  calls = [{"id": f"c{i}", "function": {"name": "t", "arguments": "{}"}} for i in range(20_000)]
  results = [{"role": "tool", "tool_call_id": f"x{i}", "content": "3"} for i in range(20_000)]
  (tmp_path / "log.jsonl").write_text(json.dumps(
    {"messages": [{"role": "assistant", "tool_calls": calls}, *results]}))
  with corpus.bounds(seconds=10, megabytes=256):
    (trace,) = reading.read([tmp_path]).traces
  assert {call.error for call in trace.calls} == {"no_result"}
