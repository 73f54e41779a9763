"""Logs of strangers: nothing in a file ends the diagnosis, lies to it or draws on the terminal."""

import json
import os

import pytest

from axpo_jax.eval.diagnose import reading
from axpo_jax.eval.diagnose.__main__ import main
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
