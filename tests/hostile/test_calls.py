"""Calls that a policy writes to end the run: read, refused, run, dumped and logged by the real objects."""

import asyncio
import json

import pytest

from axpo_jax.agent.parse import CallError, SpecialIds, parse_call
from axpo_jax.agent.rollout import CallRecord, Rollout
from axpo_jax.agent.tools import audit
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.transcript import Transcript
from axpo_jax.rollouts.dump import dump_rollouts
from tests.hostile import corpus


def text_of(case):
  if "deep" in case:
    inside = "[" * (case["deep"] - 2) + "]" * (case["deep"] - 2)
    return f'{{"name": "python", "arguments": {{"code": {inside}}}}}'
  if "long" in case:
    return json.dumps({"name": "python", "arguments": {"code": "x" * case["long"]}})
  if "wide" in case:
    return json.dumps({"name": "python", "arguments": {"code": [[]] * case["wide"]}})
  return case["text"]


@pytest.mark.parametrize("case", corpus.cases("calls"))
def test_calls(case):
  with corpus.bounds(seconds=2):
    error = parse_call(text_of(case))
  assert isinstance(error, CallError) and error.kind in case["bound"].split(" or ")
  assert len(error.message) < 200
  seen = ToolBox([], []).reject(error, EpisodeState("q", []))
  assert seen.error == error.kind and seen.text.isascii()


def nested(depth):
  value = 1
  for _ in range(depth):
    value = [value]
  return value


BEYOND_JSON = {
    "half a character": "\ud800", "as a key": {"\ud800": 1}, "500 deep": nested(500),
    "20,000 deep": nested(20_000), "inf": float("inf"), "nan": float("nan"), "400 digits": 10**400,
    "5,000 digits": 10**5000, "a set": {1, 2}, "bytes": b"\xff"}


@pytest.mark.parametrize("name", BEYOND_JSON)
def test_dumps_and_the_log_write_whatever_they_are_given(name, tmp_path, chat):
  arguments = {"x": BEYOND_JSON[name]}
  transcript = Transcript(SpecialIds.from_chat(chat))
  transcript.append_prompt(chat.encode("hello"), [])
  rollout = Rollout("q\ud800", transcript, 0.0, "\udfff", "no_answer",
                    [CallRecord(0, "\ud800", arguments, None, 0.1)], 1, 0, 0)
  dump_rollouts(tmp_path / "step_1.jsonl", [rollout], chat=chat)
  record = json.loads((tmp_path / "step_1.jsonl").read_text())
  assert record["calls"][0]["name"] == "\ud800" and (tmp_path / "step_1.txt").read_text()
  log = audit.AuditLog(tmp_path / "audit.jsonl", "run")
  box = ToolBox([], [], audit=log)
  asyncio.run(box.call("\ud800", arguments, EpisodeState("q", [])))
  log.close()
  (line,) = audit.read(tmp_path / "audit.jsonl")
  assert line["tool"] == "\ud800"
