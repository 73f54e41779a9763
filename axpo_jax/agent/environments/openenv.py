"""Environments that speak OpenEnv, on a server of their own: games, browsers, code.

In: the server's address. Out: an `Environment` with a session for each episode, over the server's WebSocket
(`/ws`), since OpenEnv's plain POST /reset and /step keep no state between requests:

    {"type": "reset", "data": {"seed": 7}}    {"type": "step", "data": {...action}}    {"type": "close"}
    answered by {"type": "observation", "data": {"observation": {...}, "reward": 0.5, "done": false}}

A reset by the question's seed must show the same first observation again: it is part of the prompt, which all
rollouts of a question share. What a server says is bounded in size, and one that breaks the rules or goes
away ends that rollout.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from typing import Any

import aiohttp

from axpo_jax.agent.environment import (
  NONE,
  REPLAY,
  Environment,
  EnvironmentFailed,
  PolicyTurn,
  Step,
  seed_of,
)
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.data.question import IMAGE_MARK, Question

_MOST_BYTES = 4 << 20  # of a message
_MOST_TEXT = 20_000  # characters of an observation in the prompt


class OpenEnv(Environment):
  """An OpenEnv server.

  Args:
    url: such as http://localhost:8000.
    action: the field of an action that gets the turn's text; "" = the text is the action, as JSON.
    reset: further arguments of every reset; a question's `meta["reset"]` adds its own.
    repeatable: the same actions after the same reset are answered alike, so that a frozen prefix can be
      replayed; False: such rollouts are resampled from the question.
    time_limit: seconds of one exchange.
  """

  waits = True

  def __init__(self, url: str, action: str = "", reset: dict[str, Any] | None = None, *,
               repeatable: bool = True, time_limit: float = 60.0):
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"url={url!r}: write http://host:port")
    self._url = "ws" + url.rstrip("/").removeprefix("http") + "/ws"
    self._action, self._reset, self.time_limit = action, reset or {}, time_limit
    self.resume = REPLAY if repeatable else NONE
    self._openings: dict[str, str] = {}

  def opening(self, question: Question) -> Question:
    """The question's text and the first observation. Blocks while the server resets.

    Raises:
      EnvironmentFailed: the server does not answer.
    """
    first = background.run(self._opened(question))
    text = first.replace(IMAGE_MARK, "(image)")
    return dataclasses.replace(question, text=f"{question.text}\n\n{text}".strip())

  async def start(self, question: Question, episode: EpisodeState) -> _Session:
    """A session that shows what the prompt shows."""
    session, first = await self._begin(question)
    if first != self._openings.setdefault(question.id, first):
      await session.close()
      raise EnvironmentFailed("the server's reset shows another first observation than in the prompt: it "
                              "does not follow its seed")
    return session

  async def step(self, state: _Session, turn: PolicyTurn) -> Step:
    """Sends the turn's text as an action. A turn with calls is the tools' alone."""
    if turn.calls:
      return Step()
    try:
      action = {self._action: turn.text.strip()} if self._action else _object(turn.text)
    except ValueError as error:
      return Step(f"This is no action: {error}. Write one JSON object.")
    answer = await state.ask({"type": "step", "data": action})
    if answer.get("type") == "error":  # an action that it does not know: the policy may try another
      return Step(f"Error: {str(answer['data'].get('message', answer['data']))[:2000]}")
    text, reward, done = _observation(answer)
    return Step(None if done else text, reward=reward, done=done)

  async def close(self, state: _Session) -> None:
    """Ends the session."""
    await state.close()

  async def _opened(self, question: Question) -> str:
    if question.id not in self._openings:
      session, first = await self._begin(question)
      await session.close()
      self._openings[question.id] = first
    return self._openings[question.id]

  async def _begin(self, question: Question) -> tuple[_Session, str]:
    """A session after its reset, and the first observation."""
    session = _Session(self.time_limit)
    await session.open(self._url)
    try:
      data = {"seed": seed_of(question)} | self._reset | dict(question.meta.get("reset", {}))
      answer = await session.ask({"type": "reset", "data": data})
      return session, _observation(answer)[0]
    except BaseException:
      await session.close()
      raise


class _Session:
  """One connection, and with it one environment of the server's."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._client: aiohttp.ClientSession | None = None
    self._socket: aiohttp.ClientWebSocketResponse | None = None

  async def open(self, url: str) -> None:
    # No total limit: a session lives as long as its episode. Each exchange has its own.
    self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
    try:
      async with asyncio.timeout(self._seconds):
        self._socket = await self._client.ws_connect(url, max_msg_size=_MOST_BYTES)
    except BaseException as error:  # a deadline cancels this too
      await self._client.close()
      if isinstance(error, (aiohttp.ClientError, OSError, TimeoutError)):
        raise EnvironmentFailed(f"the OpenEnv server does not answer ({type(error).__name__})") from error
      raise

  async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
    """The answer's JSON object. Raises EnvironmentFailed."""
    try:
      async with asyncio.timeout(self._seconds):
        await self._socket.send_json(message)
        answer = await self._socket.receive_json()
    except (aiohttp.ClientError, OSError, TimeoutError, TypeError, ValueError, RuntimeError) as error:
      raise EnvironmentFailed(f"the OpenEnv server gave no answer to a {message['type']} "
                              f"({type(error).__name__})") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), dict):
      raise EnvironmentFailed("the OpenEnv server's answer has no data")
    return answer

  async def close(self) -> None:
    """Again is harmless."""
    if self._socket is not None and not self._socket.closed:
      with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):  # it is gone already
        async with asyncio.timeout(self._seconds):
          await self._socket.send_json({"type": "close"})
          await self._socket.close()
    await self._client.close()


def _object(text: str) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except RecursionError as error:  # the policy's brackets, and no fault of the environment
    raise ValueError("it is nested too deeply") from error
  if not isinstance(value, dict):
    raise ValueError("it is no object")
  return value


def _observation(answer: dict[str, Any]) -> tuple[str, float, bool]:
  """Text, reward and end of an answer. Raises EnvironmentFailed."""
  data = answer["data"]
  if answer.get("type") != "observation" or "observation" not in data:
    raise EnvironmentFailed(f"the OpenEnv server answers {answer.get('type')!r}: {str(data)[:300]}")
  seen = data["observation"]
  only = list(seen.values()) if isinstance(seen, dict) else [seen]
  text = only[0] if len(only) == 1 and isinstance(only[0], str) else json.dumps(seen, ensure_ascii=False)
  try:
    return text[:_MOST_TEXT], float(data.get("reward") or 0.0), data.get("done") is True
  except (TypeError, ValueError, OverflowError) as error:
    raise EnvironmentFailed("the OpenEnv server's reward is no number") from error
