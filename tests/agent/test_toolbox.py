"""The tool box: permissions, limits, audit; whatever a tool does becomes an observation."""

import asyncio
import json
from typing import ClassVar

import pytest

from axpo_jax.agent.parse import CallError
from axpo_jax.agent.tools.base import (
  ArgumentError,
  EpisodeState,
  Observation,
  Tool,
  ToolBox,
  check_arguments,
)


class Echo(Tool):
  name = "echo"
  scope = "read"
  aliases = ("say",)
  schema: ClassVar = {"type": "function", "function": {"name": "echo", "parameters": {
      "type": "object", "required": ["text"],
      "properties": {"text": {"type": "string"}, "times": {"type": "integer", "default": 1}}}}}

  def __init__(self, act=None, time_limit=None):
    self.act, self.time_limit, self.ran = act, time_limit, 0

  async def run(self, arguments, episode):
    self.ran += 1
    if self.act is not None:
      return await self.act()
    return Observation(arguments["text"] * arguments["times"])


def call(box, name="echo", arguments=None, turn=2):
  state = EpisodeState("q7", [], turn=turn)
  return asyncio.run(box.call(name, {"text": "ho"} if arguments is None else arguments, state))


def test_a_call_runs_with_defaults_filled_in():
  assert call(ToolBox([Echo()], ["read"])) == Observation("ho")
  assert call(ToolBox([Echo()], ["read"]), "say", {"text": "a", "times": 3.0}).text == "aaa"


def test_unknown_tool_names_the_known_ones():
  observation = call(ToolBox([Echo()], ["read"]), "browse")
  assert observation.error == "unknown_tool"
  assert "'browse'" in observation.text and "echo" in observation.text


def test_refused_scope_does_not_run_and_says_so():
  tool, log = Echo(), []
  observation = call(ToolBox([tool], ["other"], audit=log.append))
  assert observation.error == "refused" and "'read'" in observation.text and tool.ran == 0
  assert log[0]["granted"] is False and log[0]["error"] == "refused"


def test_dry_run_records_and_does_not_run():
  tool, log = Echo(), []
  observation = call(ToolBox([tool], ["read"], dry_run=True, audit=log.append))
  assert observation.error == "dry_run" and tool.ran == 0
  assert log[0]["dry_run"] is True and log[0]["arguments"] == {"text": "ho"}
  assert call(ToolBox([tool], ["read"], dry_run=True), arguments={}).error == "bad_arguments"


def test_a_tool_that_raises():
  async def act():
    raise KeyError("lost")
  observation = call(ToolBox([Echo(act)], ["read"]))
  assert observation.error == "tool_error" and "KeyError: 'lost'" in observation.text


def test_a_tool_that_takes_too_long():
  async def act():
    await asyncio.sleep(60)
  observation = call(ToolBox([Echo(act, time_limit=0.01)], ["read"]))
  assert observation.error == "timeout" and "0.01 seconds" in observation.text


def test_a_timeout_that_the_tool_raises_itself_is_its_error():
  async def act():
    raise TimeoutError("server")
  assert call(ToolBox([Echo(act, time_limit=60)], ["read"])).error == "tool_error"


def test_long_texts_are_cut_and_lone_surrogates_replaced():
  box = ToolBox([Echo()], ["read"], max_text=10)
  assert call(box, arguments={"text": "x" * 25}).text == "x" * 10 + "\n[cut: 15 more characters]"
  text = call(box, arguments={"text": "a\ud800"}).text
  assert text == "a?" and text.encode()


def test_audit_sees_every_call_once_as_json():
  log = []
  box = ToolBox([Echo()], ["read"], audit=log.append)
  call(box)
  call(box, "browse", {"x": 1})
  box.reject(CallError("bad_json", "no", "{"), EpisodeState("q8", []))
  json.dumps(log)
  assert [(e["question_id"], e["turn"], e["tool"], e["error"]) for e in log] == [
      ("q7", 2, "echo", None), ("q7", 2, "browse", "unknown_tool"), ("q8", 0, "", "bad_json")]


def test_audit_sees_a_cancelled_call():
  async def act():
    await asyncio.sleep(60)
  log = []

  async def main():
    box = ToolBox([Echo(act)], ["read"], audit=log.append)
    await asyncio.wait_for(box.call("echo", {"text": ""}, EpisodeState("q", [])), 0.01)

  with pytest.raises(TimeoutError):
    asyncio.run(main())
  assert [e["error"] for e in log] == ["cancelled"]


def test_two_tools_of_one_name():
  class Other(Echo):
    name = "say"
    aliases = ()
  with pytest.raises(ValueError, match="'say'"):
    ToolBox([Echo(), Other()], [])


def test_schemas_are_those_of_the_tools():
  assert ToolBox([Echo()], []).schemas() == [Echo.schema]


@pytest.mark.parametrize("schema, value, says", [
    ({"type": "integer"}, 1.5, "finite integer"),
    ({"type": "boolean"}, 1, "a boolean"),
    ({"type": "object"}, [], "an object"),
    ({"enum": ["a", "b"]}, "c", "one of"),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [], "1 to 2 items, got 0"),
])
def test_check_arguments(schema, value, says):
  with pytest.raises(ArgumentError, match=says):
    check_arguments({"properties": {"x": schema}}, {"x": value}, {})
