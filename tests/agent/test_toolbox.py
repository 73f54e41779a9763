"""The tool box: permissions, limits, audit; whatever a tool does becomes an observation."""

import asyncio
import json
import threading
from typing import ClassVar

import PIL.Image
import pytest

from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.tools.arguments import ArgumentError, check_arguments
from axpo_jax.agent.tools.base import EpisodeState, Observation, PastCall, Tool, ToolBox
from axpo_jax.agent.tools.budget import ToolLimits, Usage


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


def test_a_tool_that_does_not_end_leaves_no_other_open():
  class Broken(Echo):
    name, aliases = "broken", ()

    def end(self, episode):
      raise RuntimeError("stuck")

  class Ended(Echo):
    ended = False

    def end(self, episode):
      self.ended = True

  last = Ended()
  ToolBox([Broken(), last], ["read"]).end_episode(EpisodeState("q7", []))
  assert last.ended


def test_unknown_tool_names_the_known_ones():
  observation = call(ToolBox([Echo()], ["read"]), "browse")
  assert observation.error == "unknown_tool"
  assert "'browse'" in observation.text and "echo" in observation.text


def test_refused_scope_does_not_run_and_says_so():
  tool, log = Echo(), []
  observation = call(ToolBox([tool], ["other"], audit=log.append))
  assert observation.error == "refused" and "'read'" in observation.text and tool.ran == 0
  assert (log[0]["scope"], log[0]["granted_scopes"], log[0]["outcome"]) == (
      "read", ["other"], "refused")


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
  text = "a" * 9 + "b" * 9
  assert call(box, arguments={"text": text}).text == "aaaaa\n[cut: 8 characters]\nbbbbb"
  text = call(box, arguments={"text": "a\ud800"}).text
  assert text == "a?" and text.encode()


def test_audit_sees_every_call_once_as_json():
  log = []
  box = ToolBox([Echo()], ["read"], audit=log.append)
  call(box)
  call(box, "browse", {"x": 1})
  box.reject(CallError("bad_json", "no", "{"), EpisodeState("q8", []))
  json.dumps(log)
  assert [(e["question"], e["turn"], e["tool"], e["outcome"]) for e in log] == [
      ("q7", 2, "echo", "ok"), ("q7", 2, "browse", "unknown_tool"), ("q8", 0, "", "bad_json")]


def test_audit_sees_a_cancelled_call():
  log = []

  async def main():
    begun = asyncio.Event()

    async def act():
      begun.set()
      await asyncio.sleep(60)

    box = ToolBox([Echo(act)], ["read"], audit=log.append)
    running = asyncio.create_task(box.call("echo", {"text": ""}, EpisodeState("q", [])))
    await begun.wait()
    running.cancel()
    await running

  with pytest.raises(asyncio.CancelledError):
    asyncio.run(main())
  assert [e["outcome"] for e in log] == ["cancelled"]


# ---- what may be used up ----

def test_an_episode_that_has_made_its_calls_is_refused_and_another_is_not():
  box = ToolBox([tool := Echo()], ["read"], episode_limits=ToolLimits(calls=2))
  state = EpisodeState("q", [])

  async def main(state):
    return [(await box.call("echo", {"text": "a"}, state)).error for _ in range(3)]

  assert asyncio.run(main(state)) == [None, None, "limit"]
  assert asyncio.run(main(EpisodeState("q", []))) == [None, None, "limit"]
  assert tool.ran == 4


def test_calls_of_a_cut_transcript_count():
  past = PastCall(ToolCall("echo", {"text": "a"}), None, 0)
  state = EpisodeState("q", [], history=[past, past])
  box = ToolBox([Echo()], ["read"], episode_limits=ToolLimits(calls=2))
  observation = asyncio.run(box.call("echo", {"text": "a"}, state))
  assert observation.error == "limit" and "this episode has used up its 2 calls" in observation.text


def test_a_run_is_limited_over_its_episodes_and_goes_on_from_its_log():
  box = ToolBox([Echo()], ["read"], run_limits=ToolLimits(calls=5), used=Usage(calls=3))
  assert [call(box).error for _ in range(3)] == [None, None, "limit"]


@pytest.mark.parametrize("limits, seen", [
    (ToolLimits(bytes=13), [None, None, "limit"]),  # 6 of text and 3 * 2 of pixels a call
    (ToolLimits(images=3), [None, None, None]),
    (ToolLimits(images=2), [None, None, "limit"]),
    (ToolLimits(seconds=0.02), [None, "limit", "limit"]),
])
def test_limits_on_what_comes_back_and_on_time(limits, seen):
  async def act():
    await asyncio.sleep(0.02)
    return Observation("größe"[:4], (PIL.Image.new("RGB", (2, 1)),))
  box = ToolBox([Echo(act)], ["read"], episode_limits=limits)
  state = EpisodeState("q", [])

  async def main():
    return [(await box.call("echo", {"text": ""}, state)).error for _ in range(3)]

  assert asyncio.run(main()) == seen


# ---- beside the sampling ----

class Waiter(Echo):
  """Counts how many calls are inside at once."""

  waits = True

  def __init__(self, limit):
    self.max_concurrent, self.inside, self.most, self.threads = limit, 0, 0, set()

  async def run(self, arguments, episode):
    self.threads.add(threading.current_thread().name)
    self.inside += 1
    self.most = max(self.most, self.inside)
    await asyncio.sleep(0.05)
    self.inside -= 1
    return Observation("done")


def test_waiting_tools_run_at_once_up_to_their_limit():
  tool = Waiter(3)
  box = ToolBox([tool], ["read"])

  async def main():
    await asyncio.gather(*(box.call("echo", {"text": ""}, EpisodeState("q", []))
                           for _ in range(10)))

  asyncio.run(main())
  asyncio.run(main())  # a box outlives the loop that used it
  assert tool.most == 3 and tool.threads == {"tools"}


def test_a_waiting_tool_goes_on_while_the_samplers_loop_is_held_up():
  """What the embedded engine's device calls do. The call's own time limit is much shorter."""
  went_on, let_go = threading.Event(), threading.Event()

  class Slow(Waiter):
    time_limit = 30.0

    async def run(self, arguments, episode):
      went_on.set()
      await asyncio.to_thread(let_go.wait)
      return Observation("done")

  async def main():
    waiting = asyncio.create_task(ToolBox([Slow(1)], ["read"]).call(
        "echo", {"text": ""}, EpisodeState("q", [])))
    await asyncio.sleep(0)
    assert went_on.wait(30)  # this blocks the loop, and the tool runs all the same
    let_go.set()
    return await waiting

  assert asyncio.run(main()) == Observation("done")


def test_a_slow_call_does_not_hold_up_other_episodes():
  """The slow one ends only after the other episode has made ten calls."""
  others_done = threading.Event()

  class Slow(Waiter):
    async def run(self, arguments, episode):
      if episode.question_id == "slow":
        await asyncio.to_thread(others_done.wait, 60)
      return Observation("done")

  box = ToolBox([Slow(2)], ["read"])

  async def others():
    for _ in range(10):
      await box.call("echo", {"text": ""}, EpisodeState("quick", []))
    others_done.set()

  async def main():
    slow = box.call("echo", {"text": ""}, EpisodeState("slow", []))
    await asyncio.wait_for(asyncio.gather(slow, others()), 50)

  asyncio.run(main())


def test_without_overlap_calls_run_one_at_a_time():
  tool = Waiter(3)
  box = ToolBox([tool], ["read"], overlap=False)

  async def main():
    await asyncio.gather(*(box.call("echo", {"text": ""}, EpisodeState("q", []))
                           for _ in range(4)))

  asyncio.run(main())
  assert tool.most == 1


def test_a_cancelled_call_is_cancelled_in_the_tools_thread_too():
  begun, cancelled = threading.Event(), threading.Event()

  class Stuck(Waiter):
    async def run(self, arguments, episode):
      begun.set()
      try:
        await asyncio.sleep(600)
      except asyncio.CancelledError:
        cancelled.set()
        raise

  async def main():
    box = ToolBox([Stuck(1)], ["read"])
    running = asyncio.create_task(box.call("echo", {"text": ""}, EpisodeState("q", [])))
    assert await asyncio.to_thread(begun.wait, 60)
    running.cancel()
    await running

  with pytest.raises(asyncio.CancelledError):
    asyncio.run(main())
  assert cancelled.wait(30)


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
