"""Rewards that the config names: sums, parts, limits, and functions that break every promise."""

import asyncio
import dataclasses
import math
import sys
import threading
import time
import types

import pytest
from aiohttp import web

from axpo_jax.agent import reward_functions, reward_terms
from axpo_jax.agent.judge import ChatJudge
from axpo_jax.agent.reward_functions import Finished, RewardError, parse
from axpo_jax.data.question import Question
from axpo_jax.rollouts import census


@pytest.fixture
def finished(world, scripted):
  """A rollout whose last turn gives the right answer, after a call."""
  call = '<tool_call>\n{"name": "image_zoom_in", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "x"}}\n'
  turns = [world.ids(f"look</think>\n\n{call}</tool_call><|im_end|>"),
           world.ids("so</think>\n\n<answer>\n\\boxed{K}\n</answer><|im_end|>")]
  rollout = asyncio.run(world.resume(world.start(), scripted(turns)))
  return Finished(world.question, rollout.transcript, rollout.answer, rollout.stop, rollout.calls, (),
                  world.chat, 100)


@pytest.fixture
def own(monkeypatch):
  """Makes functions importable as "own:name"."""
  def put(**functions):
    module = types.ModuleType("own")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "own", module)
  return put


def score(expression, rollout, limit=5.0, **options):
  return asyncio.run(parse(expression, time_limit=limit, **options)(rollout))


def returning(value):
  async def function(rollout):
    return value
  return function


def test_shipped_functions(finished):
  assert score("exact", finished) == reward_functions.Score(1.0)  # one plain number has no parts
  assert score("math_verify", finished).reward == 1.0
  assert score("format", finished).reward == 1.0
  sampled = finished.transcript.sampled.sum()
  assert score("length", finished).reward == sampled / 100
  wrong = dataclasses.replace(finished, answer="J")
  found = score("exact + 0.5*format - 0.1 * length", wrong)
  assert found.parts == {"exact": 0.0, "format": 1.0, "length": sampled / 100}
  assert found.reward == pytest.approx(0.5 - sampled / 1000)
  paid = dataclasses.replace(finished, turn_rewards=(0.25, 1.0))
  assert score("environment", paid).reward == 1.25


@pytest.mark.parametrize("said, form", [
  ("</think><answer>\\boxed{K}</answer><|im_end|>", 1.0),
  ("</think>So: <answer>\\boxed{K}</answer><|im_end|>", 1.0),
  ("</think><answer>K</answer><|im_end|>", 0.0),
  ("</think>\\boxed{K}<|im_end|>", 0.0),
  ("</think><answer>\\boxed{K}</answer> I think<|im_end|>", 0.0),
  ("</think><answer>\\boxed{J}\\boxed{K}</answer><|im_end|>", 0.0)])
def test_the_form_of_an_answer(finished, world, scripted, said, form):
  rollout = asyncio.run(world.resume(world.start(), scripted([world.ids(said)])))
  assert score("format", dataclasses.replace(finished, transcript=rollout.transcript)).reward == form


def test_a_function_sees_the_whole_rollout(finished, own):
  async def seen(rollout):
    assert rollout.question.id == "q1" and rollout.calls[0].name == "image_zoom_in"
    assert "look</think>" in rollout.turns[0] and len(rollout.turns) == 2
    assert len(rollout.observations) == 1 and "image" in rollout.observations[0].lower()
    assert rollout.turns[0] in rollout.response and rollout.observations[0] in rollout.response
    assert next(image.size for image in rollout.images) == (512, 400)
    return {"turns": len(rollout.turns), "images": len(rollout.images)}

  own(seen=seen)
  found = score("exact + 2*own:seen", finished)
  assert found.error is None and found.reward == 1 + 2 * (2 + 2)
  assert found.parts == {"exact": 1.0, "seen/turns": 2.0, "seen/images": 2.0}


@pytest.mark.parametrize("value, says", [
  (math.nan, "nan"), (math.inf, "inf"), ({"a": 1.0, "b": -math.inf}, "-inf"), (None, "not a number"),
  ("much", "not a number"), ("1.0", "not a number"), ({}, "0 parts"), ({f"p{i}": 1.0 for i in range(10_000)}, "10000 parts"),
  ({"a b": 1.0}, "is called"), ({"x" * 10**6: 1.0}, "is called"), ({3: 1.0}, "is called"),
  (10**400, "not a number"), ([1.0], "not a number"), ({"a": 1e308, "b": 1e308}, "")])
def test_values_that_are_no_reward(finished, own, value, says):
  own(bad=returning(value))
  found = score("exact + own:bad", finished)
  assert found.reward == 0 and found.error.startswith("reward bad: ") and says in found.error
  assert len(found.error) < 500 and not found.parts


def test_a_sum_beyond_the_floats(finished, own):
  own(huge=returning(1e308), vast=returning(1e308))
  assert "inf" in score("own:huge + own:vast", finished).error


def test_exceptions(finished, own):
  async def raises(rollout):
    raise KeyError("x" * 10_000)

  async def exits(rollout):
    raise TimeoutError("its own")

  own(raises=raises, exits=exits)
  assert len(score("own:raises", finished).error) < 500
  assert "its own" in score("own:exits", finished).error


def test_a_function_that_waits_for_ever(finished, own):
  async def sleeps(rollout):
    await asyncio.sleep(1000)

  own(sleeps=sleeps)
  begin = time.monotonic()
  assert "no value after 0.2 seconds" in score("own:sleeps", finished, 0.2).error
  assert time.monotonic() - begin < 3


def test_a_function_that_holds_up_its_loop(finished, own, monkeypatch):
  """It costs its own rollouts their rewards; the next ones are judged by a new loop."""
  monkeypatch.setattr(reward_functions, "_GRACE_SECONDS", 0.3)
  release = threading.Event()

  async def blocks(rollout):
    release.wait(60)

  async def ticks():
    for _ in range(10):
      await asyncio.sleep(0.02)
    return time.monotonic()

  async def both():
    begin = time.monotonic()
    found, ticked = await asyncio.gather(parse("own:blocks", time_limit=0.2)(finished), ticks())
    return found, ticked - begin

  own(blocks=blocks)
  found, ticked = asyncio.run(both())
  assert "holds up the event loop" in found.error and ticked < 0.5
  assert score("exact", finished).reward == 1.0
  release.set()


def reward_threads():
  return [thread for thread in threading.enumerate() if thread.name == "rewards"]


def test_an_endless_computation_is_ended_and_others_begin_again(finished, own, monkeypatch):
  monkeypatch.setattr(reward_functions, "_GRACE_SECONDS", 0.3)

  async def spins(rollout):
    while True:
      pass

  async def waits(rollout):
    await asyncio.sleep(0.01)
    return 1.0

  async def both():
    return await asyncio.gather(parse("own:spins", time_limit=0.2)(finished), parse("own:waits", time_limit=60)(finished))

  own(spins=spins, waits=waits)
  before = len(reward_threads())
  begin = time.monotonic()
  endless, other = asyncio.run(both())
  assert "holds up the event loop" in endless.error and other.reward == 1.0
  assert time.monotonic() - begin < 30
  assert len(reward_threads()) <= max(before, 1)


def test_what_has_no_time_limit_does_not_wait_for_a_thread_that_is_lost(finished, own, monkeypatch):
  """The shipped rules have none. A call into C that does not return cannot be interrupted."""
  monkeypatch.setattr(reward_functions, "_GRACE_SECONDS", 0.1)
  release = threading.Event()

  async def blocks(rollout):
    release.wait(60)

  async def all_of_a_step():
    return await asyncio.wait_for(asyncio.gather(*(
      parse(name, time_limit=0.2)(finished) for name in ["own:blocks", "exact", "own:blocks", "own:blocks", "exact"])), 30)

  own(blocks=blocks)
  begin = time.monotonic()
  *_, last = found = asyncio.run(all_of_a_step())
  release.set()
  assert time.monotonic() - begin < 10  # not one limit a rollout
  assert [score.error is None for score in found[:1]] == [False] and "event loop" in found[2].error
  assert last.reward == 1.0 or "twice" in last.error
  for thread in list(reward_functions._given_up):
    thread.join(10)


def test_threads_that_cannot_be_ended_are_few(finished, own, monkeypatch):
  monkeypatch.setattr(reward_functions, "_GRACE_SECONDS", 0.1)
  monkeypatch.setattr(reward_functions, "MAX_BLOCKED", 1)
  release = threading.Event()

  async def blocks(rollout):
    release.wait(60)

  own(blocks=blocks)
  assert "holds up" in score("own:blocks", finished, 0.1).error
  assert "await what waits, and give it a time limit" in score("exact", finished).error
  release.set()  # the call returns, and the thread ends
  for thread in list(reward_functions._given_up):
    thread.join(10)
  assert score("exact", finished).reward == 1.0


@pytest.mark.parametrize("expression, says", [
  ("", "cannot read"), ("exact +", "cannot read"), ("exact exact", "cannot read"), ("2 exact", "cannot read"),
  ("exact + exact", "twice"), ("correct", "there is no reward 'correct'"), ("judge", "no reward 'judge'"),
  ("no_such_module:f", "cannot be imported"), ("math:f", "cannot be imported"),
  ("math:sqrt", "no async function"), ("os.system('x')", "cannot read|no reward")])
def test_expressions_that_cannot_work(expression, says):
  with pytest.raises(RewardError, match=says):
    parse(expression, time_limit=1.0)


def test_a_reward_that_fails_leaves_its_rollout_out_or_at_zero(world, scripted, own):
  own(bad=returning(math.nan))
  turn = [world.ids("</think><answer>\\boxed{K}</answer><|im_end|>")]
  for leave_out in (True, False):
    reward = parse("exact + own:bad", time_limit=1.0, leave_out=leave_out)
    rollout = asyncio.run(world.resume(world.start(), scripted(turn), reward=reward))
    assert rollout.failed is leave_out and rollout.reward == 0 and "nan" in rollout.reward_error
    assert (rollout.error is not None) is leave_out


def stats(**fields):
  return census.RolloutStats(reward=0.0, used_tool=False, num_calls=0, turns=1, sampled_tokens=1,
                             stop="answer", **fields)


def test_parts_that_differ_between_rollouts_are_means_over_those_that_have_them():
  rollouts = [stats(reward_parts={"a": 1.0, "b": 3.0}), stats(reward_parts={"a": 0.0}),
              stats(reward_failed=True), stats(reward_parts={f"p{i}": 1.0 for i in range(1000)})]
  found = census.census([census.GroupStats(rollouts)])
  assert found["rollout/reward/a"] == 0.5 and found["rollout/reward/b"] == 3.0
  assert found["rollout/reward_failures"] == 1
  assert sum(name.startswith("rollout/reward/") for name in found) == 64


# ---- the judge ----

@pytest.fixture
def judge_server():
  """A real endpoint on loopback that finds "kay" right; yields its address and the prompts it saw."""
  seen, ready, loop = [], threading.Event(), asyncio.new_event_loop()

  async def reply(request):
    text = (await request.json())["messages"][1]["content"]
    seen.append(text)
    await asyncio.sleep(0.05)
    verdict = "CORRECT" if "kay" in text else "INCORRECT"
    return web.json_response({"choices": [{"message": {"content": f'{{"verdict": "{verdict}"}}'}}]})

  async def serve():
    app = web.Application()
    app.router.add_post("/v1/chat/completions", reply)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address.append(site._server.sockets[0].getsockname()[1])
    ready.set()

  address = []
  loop.create_task(serve())
  thread = threading.Thread(target=loop.run_forever, daemon=True)
  thread.start()
  assert ready.wait(10)
  yield f"http://127.0.0.1:{address[0]}/v1", seen
  loop.call_soon_threadsafe(loop.stop)
  thread.join(5)


def test_a_judge_is_asked_once_for_an_answer_and_within_its_budget(finished, judge_server):
  url, seen = judge_server
  by_judge = reward_terms.judged(lambda: ChatJudge(url, "m", attempts=1, max_requests=2))
  reward = parse("judge", time_limit=5.0, known={"judge": by_judge})

  async def main():
    answers = ["kay"] * 8 + ["jay"] * 4 + ["K"] * 4
    found = await asyncio.gather(*(reward(dataclasses.replace(finished, answer=a)) for a in answers))
    assert [one.reward for one in found] == [1.0] * 8 + [0.0] * 4 + [1.0] * 4
    assert len(seen) == 2  # the rules know "K"
    beyond = await reward(dataclasses.replace(finished, answer="ell"))
    assert "max_requests are used up" in beyond.error
    assert (await reward(dataclasses.replace(finished, answer="kay"))).reward == 1.0  # known

  asyncio.run(main())
  assert asyncio.run(reward(dataclasses.replace(finished, question=Question("q", "?", (), ("kay",)), answer=None))).reward == 0
