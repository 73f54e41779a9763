"""OpenEnv environments on a real server on loopback, and servers that break the rules."""

import asyncio
import socket
import time

import pytest

from axpo_jax.agent.environment import NONE, EnvironmentFailed, PolicyTurn, seed_of
from axpo_jax.agent.environments.openenv import OpenEnv
from axpo_jax.agent.reward_functions import parse
from axpo_jax.agent.tools import background
from tests.agent import openenv_server

REWARD = parse("environment", time_limit=5.0)


def play(world, scripted, environment, texts, transcript=None):
  engine = scripted([world.ids(f"hm</think>\n\n{text}<|im_end|>") for text in texts])
  world.question = environment.opening(world.question) if transcript is None else world.question
  return asyncio.run(world.resume(transcript or world.start(), engine, environment=environment, reward=REWARD))


def wait_until(condition):
  end = time.monotonic() + 5
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


def test_an_episode(world, scripted):
  with openenv_server.serving() as (url, sessions):
    environment = OpenEnv(url, action="said")
    goal = 2 + seed_of(world.question) % 2
    rollout = play(world, scripted, environment, ["1", "2", "3"][:goal])
    assert f"Count to {goal}." in world.chat.decode(rollout.transcript.ids[:rollout.transcript.prompt_length])
    assert rollout.stop == "done" and rollout.reward == goal and rollout.transcript.rewards == [1.0] * goal
    assert f"<|im_start|>user\n1 of {goal}<|im_end|>" in world.chat.decode(rollout.transcript.ids)
    cut = rollout.transcript.cut(rollout.transcript.turns[1].start + 1)
    again = play(world, scripted, environment, ["</think>no<|im_end|>"][:1] + ["3"] * (goal - 2), cut)
    assert again.transcript.rewards[:2] == [1.0, -0.5]
    assert wait_until(lambda: not sessions)  # every session was closed


def test_actions_as_json_and_those_that_are_none(world, scripted):
  with openenv_server.serving() as (url, _):
    rollout = play(world, scripted, OpenEnv(url), ['{"said": "1"}', "two", '{"what": 2}'])
  said = world.chat.decode(rollout.transcript.ids)
  assert "This is no action" in said and rollout.transcript.rewards == [1.0, 0.0, 0.0]
  assert rollout.stop == "turn_limit"


@pytest.mark.parametrize("attack, says", [
  ("silence", "took longer than 2 seconds|no answer"), ("hang up", "no answer"), ("no JSON object", "no data"),
  ("no data", "no data"), ("a reward of text", "no number"), ("a reward of NaN", "finite number"),
  ("10 MB", "no answer"), ("brackets", "no answer"), ("another opening", "another first observation")])
def test_servers_that_break_the_rules(world, scripted, attack, says):
  with openenv_server.serving(attack) as (url, sessions):
    with pytest.raises(EnvironmentFailed, match=says):
      limit = 2.0 if attack == "silence" else 20.0
      play(world, scripted, OpenEnv(url, action="said", time_limit=limit), ["1", "2", "3"])
    assert wait_until(lambda: not sessions or attack == "silence")


def test_what_it_says_is_cut_and_is_text(world, scripted):
  with openenv_server.serving("1 MB") as (url, _):
    rollout = play(world, scripted, OpenEnv(url, action="said"), ["1"] * 3)
  assert rollout.stop == "token_limit" and rollout.transcript.ids.count(rollout.transcript.special.im_end) <= 3


def test_a_server_that_is_not_there(world):
  with pytest.raises(EnvironmentFailed, match="does not answer"):
    OpenEnv("http://127.0.0.1:1").opening(world.question)
  with pytest.raises(ValueError, match="write http"):
    OpenEnv("127.0.0.1:1")
  assert OpenEnv("http://x", repeatable=False).resume == NONE


def test_a_server_that_takes_connections_and_says_nothing(world):
  """The prompt is made outside of any episode's deadline."""
  with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(EnvironmentFailed, match="does not answer"):
    OpenEnv(f"http://127.0.0.1:{listening.getsockname()[1]}", time_limit=0.5).opening(world.question)


def test_an_action_of_brackets_is_the_policys_mistake(world, scripted):
  with openenv_server.serving() as (url, _):
    environment = OpenEnv(url)
    session = background.run(environment.start(world.question, None))
    try:
      step = background.run(environment.step(session, PolicyTurn(0, "[" * 100_000, "")))
    finally:
      background.run(environment.close(session))
  assert "This is no action: it is nested too deeply" in step.reply


def test_the_package_itself(world, scripted):
  """A server of openenv-core's own, where it is installed."""
  openenv = pytest.importorskip("openenv.core.env_server")
  import threading

  import uvicorn

  class Action(openenv.Action):
    said: str

  class Observation(openenv.Observation):
    text: str

  class Game(openenv.Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **_):
      self.left = 2
      return Observation(text=f"seed {seed}")

    def step(self, action, timeout_s=None, **_):
      self.left -= 1
      return Observation(text=action.said, reward=0.5, done=not self.left)

    @property
    def state(self):
      return openenv.State()

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  app = openenv.create_fastapi_app(Game, Action, Observation, max_concurrent_envs=4)
  server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  assert wait_until(lambda: server.started)
  try:
    rollout = play(world, scripted, OpenEnv(f"http://127.0.0.1:{port}", action="said"), ["a", "b"])
  finally:
    server.should_exit = True
    thread.join(10)
  assert rollout.stop == "done" and rollout.reward == 1.0
  assert f"seed {seed_of(world.question)}" in world.chat.decode(rollout.transcript.ids)
