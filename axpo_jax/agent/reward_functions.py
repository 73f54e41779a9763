"""The reward of a finished rollout: a weighted sum of functions that the config names.

In: an expression such as "exact + 0.2 * my_module:brevity", and finished rollouts. Out: a `Score` each.
A reward function is an async function of a `Finished` rollout that returns a number, or named parts:

    async def brevity(rollout):
      return 1.0 if len(rollout.response) < 500 else 0.0

Functions run on an event loop in a thread of their own, beside the sampling, and within a time limit. A
function that raises, takes too long, or returns anything but finite numbers fails that one rollout's reward. The
failure is counted, and never ends the run.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import importlib
import inspect
import math
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import PIL.Image
from absl import logging

from axpo_jax.agent import reward_terms
from axpo_jax.agent.rewards import Verdict
from axpo_jax.agent.rollout import CallRecord
from axpo_jax.agent.transcript import Kind, Originals, Transcript
from axpo_jax.data.question import Question
from axpo_jax.model.chat import Chat

MAX_PARTS = 32  # of one function's reward: each is a metric
MAX_BLOCKED = 8  # threads that functions hold up for ever, before all rewards fail
_GRACE_SECONDS = 5.0  # after a time limit, for a function that holds up the loop it runs on
_PART = re.compile(r"[\w.-]{1,64}")
_TERM = re.compile(r"\s*([+-])?\s*(?:(\d+\.?\d*(?:[eE]-?\d+)?)\s*\*)?\s*([A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*")


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished rollout, as a reward function sees it.

  Attributes:
    question: with its gold answers.
    transcript: all tokens and images; read it, never write it.
    answer: of the last turn; None without one.
    stop: how the episode ended, one of `rollout.STOPS`.
    calls: that the episode made, with the kinds of their errors.
    turn_rewards: of the environment, one for each turn that it has stepped.
    chat: decodes the transcript.
    max_response_tokens: the episode's limit.
  """

  question: Question
  transcript: Transcript
  answer: str | None
  stop: str
  calls: Sequence[CallRecord]
  turn_rewards: Sequence[float]
  chat: Chat
  max_response_tokens: int

  @property
  def response(self) -> str:
    """All text after the prompt, observations and special tokens included."""
    return self.chat.decode(self.transcript.ids[self.transcript.prompt_length:])

  @property
  def turns(self) -> list[str]:
    """What the policy said, turn by turn, thinking and special tokens included."""
    return [self.chat.decode(self.transcript.ids[start:stop]) for start, stop in self.transcript.turns]

  @property
  def observations(self) -> list[str]:
    """The tools' results and the environment's replies, turn by turn, without special tokens around them."""
    out: list[list[int]] = []
    before = None
    for token, kind in zip(self.transcript.ids, self.transcript.kinds):
      if kind == Kind.OBSERVATION:
        if before != kind:
          out.append([])
        out[-1].append(token)
      before = kind
    return [self.chat.decode(ids) for ids in out]

  @property
  def images(self) -> Sequence[PIL.Image.Image]:
    """The question's images and the tools', in full resolution; each is decoded when it is read."""
    return Originals(self.transcript.images)


@dataclasses.dataclass(frozen=True)
class Score:
  """The reward of a rollout.

  Attributes:
    reward: the sum, on which the policy is trained.
    parts: of which it is the weighted sum, before weights; empty where the reward is one plain number.
    timed_out: a comparison of answers ran out of time or memory, and counts as wrong.
    error: why a function failed; the reward is then 0.
  """

  reward: float = 0.0
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  timed_out: bool = False
  error: str | None = None


class RewardError(ValueError):
  """An expression that names no reward, or a function that returned none."""


Function = Callable[[Finished], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class Term:
  """One function of a sum. `time_limit`: seconds; None: the function has limits of its own."""

  name: str
  weight: float
  function: Function
  time_limit: float | None


class RewardSum:
  """The weighted sum of functions, awaited by any event loop.

  Args:
    terms: at least one.
    leave_out: a rollout whose reward fails is left out of training; False: its reward is 0.
  """

  def __init__(self, terms: Sequence[Term], *, leave_out: bool = True):
    self.terms, self.leave_out = tuple(terms), leave_out

  async def __call__(self, rollout: Finished) -> Score:
    """The rollout's score. Raises nothing but CancelledError."""
    found = await asyncio.gather(*(self._term(term, rollout) for term in self.terms))
    if error := next((score.error for score in found if score.error), None):
      return Score(error=error)
    reward = sum(term.weight * score.reward for term, score in zip(self.terms, found))
    if not math.isfinite(reward):
      return Score(error=f"the sum of the rewards is {reward}")
    parts = {name: value for score in found for name, value in score.parts.items()}
    plain = len(self.terms) == 1 and self.terms[0].weight == 1 and list(parts) == [self.terms[0].name]
    return Score(reward, {} if plain else parts, any(score.timed_out for score in found))

  async def _term(self, term: Term, rollout: Finished) -> Score:
    try:
      return _checked(term.name, await _run(term, rollout))
    except Exception as error:  # of the user's function: counted, and the run goes on
      logging.log_first_n(logging.WARNING, "the reward %s failed on question %s: %r", 5, term.name,
                          rollout.question.id, error)
      return Score(error=f"reward {term.name}: {_described(error)}")


def _described(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error)[:300]}"


def _checked(name: str, value: Any) -> Score:
  """A function's value as a score.

  Raises:
    RewardError: it is no finite number, or no small record of such.
  """
  if isinstance(value, Verdict):
    return Score(value.reward, {name: value.reward}, value.timed_out)
  parts = value if isinstance(value, Mapping) else {"": value}
  if not 1 <= len(parts) <= MAX_PARTS:
    raise RewardError(f"it returned {len(parts)} parts; give 1 to {MAX_PARTS}")
  out = {}
  for part, number in parts.items():
    if part and not (isinstance(part, str) and _PART.fullmatch(part)):
      raise RewardError(f"a part is called {str(part)[:80]!r}; use up to 64 of A-Z a-z 0-9 _ . -")
    try:
      number = float(None if isinstance(number, (str, bytes)) else number)
    except (TypeError, ValueError, OverflowError) as error:
      raise RewardError(f"it returned {type(parts[part])!s}, not a number") from error
    if not math.isfinite(number):
      raise RewardError(f"it returned {number}")
    out[f"{name}/{part}" if part else name] = number
  return Score(math.fsum(out.values()), out)


# ---- from a config's text to functions ----

def parse(expression: str, *, time_limit: float, known: Mapping[str, Function] | None = None,
          leave_out: bool = True) -> RewardSum:
  """The weighted terms of `agent.reward`, parsed.

  Args:
    expression: terms with "+" or "-" between them, each "name", "module:function" or "number * ..." of
      these.
    time_limit: seconds that a function may take, unless it has an attribute `time_limit`.
    known: functions by name, beside `reward_terms.TERMS`.
    leave_out: see `RewardSum`.

  Raises:
    RewardError: what cannot be read, imported, or is no async function.
  """
  names = {**reward_terms.TERMS, **(known or {})}
  terms, at = [], 0
  while at < len(expression) or not terms:
    found = _TERM.match(expression, at)
    if not found or (terms and not found[1]):
      raise RewardError(f"{expression!r}: cannot read {expression[at:][:40]!r}; write a sum such as "
                        "'exact + 0.2 * my_module:brevity'")
    at, name = found.end(), found[3]
    function = names[name] if name in names else _imported(name, names)
    weight = float(found[2] or 1.0) * (-1 if found[1] == "-" else 1)
    terms.append(Term(name.rpartition(":")[2], weight, function,
                      getattr(function, "time_limit", time_limit)))
  labels = [term.name for term in terms]
  if doubled := sorted({label for label in labels if labels.count(label) > 1}):
    raise RewardError(f"{expression!r} names {doubled} twice: each part needs a name of its own")
  return RewardSum(terms, leave_out=leave_out)


def _imported(name: str, names: Mapping[str, Function]) -> Function:
  module, colon, attribute = name.partition(":")
  if not colon:
    raise RewardError(f"there is no reward {name!r}; there are {sorted(names)}, and functions of yours "
                      "as 'module:function'")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except Exception as error:  # of the user's module
    raise RewardError(f"{name!r} cannot be imported: {_described(error)}") from error
  if not inspect.iscoroutinefunction(function):
    raise RewardError(f"{name!r} is no async function: write `async def {attribute}(rollout)`")
  return function


# ---- the loop they run on ----
#
# One loop in one thread serves all functions. A function that never gives it back (an endless computation, a
# request without a time limit) would hold up all others. So its loop is given up: the others begin again, once, on a
# new loop. Python cannot end a thread: the old one gets an exception at its next instruction, which ends a
# computation, but no call into C that does not return.

_lock = threading.Lock()
_loop: _Loop | None = None
_given_up: list[threading.Thread] = []


class _Loop:
  """An event loop and its thread. `pending`: what it was given and has not finished."""

  def __init__(self):
    self.loop = asyncio.new_event_loop()
    self.pending: set[concurrent.futures.Future] = set()
    self.thread = threading.Thread(target=self._serve, name="rewards", daemon=True)
    self.thread.start()

  def _serve(self) -> None:
    with contextlib.suppress(SystemExit):
      self.loop.run_forever()
    # Given up. What still waits here is cancelled; nobody asks for it any more.
    self.loop.set_exception_handler(lambda *_: None)  # it would report the interrupted function
    self.loop.call_soon(self.loop.stop)
    self.loop.run_forever()  # once round: what was handed over meanwhile becomes tasks, and none of them runs
    while tasks := asyncio.all_tasks(self.loop):
      for task in tasks:
        task.cancel()
      self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    self.loop.close()

  def interrupt(self) -> None:
    """Raises SystemExit in the thread, as soon as it runs Python; it ends the thread and nothing else."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident), ctypes.py_object(SystemExit))


def _submit(term: Term, rollout: Finished) -> tuple[_Loop, concurrent.futures.Future]:
  """Begins a function on the loop. Raises RewardError if too many threads that were given up do not end."""
  global _loop
  with _lock:
    if _loop is None:
      _given_up[:] = [thread for thread in _given_up if thread.is_alive()]
      if len(_given_up) >= MAX_BLOCKED:
        raise RewardError(f"{len(_given_up)} functions hold up their threads and do not return: "
                          "await what waits, and give it a time limit")
      _loop = _Loop()
    future = asyncio.run_coroutine_threadsafe(_limited(term, rollout), _loop.loop)
    _loop.pending.add(future)
    return _loop, future


def _give_up(held_up: _Loop) -> None:
  """Cancels all that waits for this loop, and lets the next function have a new one."""
  global _loop
  with _lock:
    if _loop is not held_up:
      return
    _loop = None
    _given_up.append(held_up.thread)
    waiting = tuple(held_up.pending)
  for future in waiting:
    future.cancel()
  held_up.interrupt()


async def _run(term: Term, rollout: Finished) -> Any:
  """The function's value. Raises what it raises, TimeoutError, or RewardError where none can run."""
  limit = None if term.time_limit is None else term.time_limit + _GRACE_SECONDS
  for _ in range(2):
    serving, future = _submit(term, rollout)
    try:
      done, _ = await _wait(future, limit)
    finally:
      with _lock:
        serving.pending.discard(future)
    if not done:
      future.cancel()
      _give_up(serving)
      raise TimeoutError(f"no value after {term.time_limit:g} seconds, and a reward holds up the event "
                         "loop: await what waits, or use asyncio.to_thread")
    if serving is _loop or not future.cancelled():
      return future.result()
  raise TimeoutError("other rewards held up the event loop twice: await what waits, or use asyncio.to_thread")


async def _wait(future: concurrent.futures.Future, seconds: float | None):
  wrapped = asyncio.wrap_future(future)
  try:
    return await asyncio.wait({wrapped}, timeout=seconds)
  finally:
    if wrapped.done() and not wrapped.cancelled():
      wrapped.exception()  # read from `future`
    else:
      wrapped.cancel()


async def _limited(term: Term, rollout: Finished) -> Any:
  try:
    async with asyncio.timeout(term.time_limit) as clock:
      return await term.function(rollout)
  except TimeoutError:
    if not clock.expired():
      raise
    raise TimeoutError(f"no value after {term.time_limit:g} seconds") from None
