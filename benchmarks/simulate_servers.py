"""Simulated servers: an event loop, and samplers with continuous batching. See `simulate.py`.

In: requests (a context, tokens to draw) and a `Plant` that says how fast the machines are. Out: when each request
ends, and what each server did with its seconds. Processes are coroutines, as in the real engine; time passes in
`Simulation.sleep` and in the servers only.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Coroutine
from typing import Any

DRAIN_S = 120.0  # longest wait for running samples under on_push="drain"


class Event:
  """Something that processes wait for; it happens once."""

  def __init__(self):
    self.is_set, self.value, self.waiting = False, None, []

  def __await__(self):
    if not self.is_set:
      yield self
    return self.value


class Simulation:
  """The clock: runs coroutines that wait for events."""

  def __init__(self):
    self.now = 0.0
    self._queue, self._numbers = [], itertools.count()  # the number keeps equal times in order

  def at(self, time: float, call: Callable, *args: Any) -> None:
    heapq.heappush(self._queue, (time, next(self._numbers), call, args))

  def sleep(self, seconds: float) -> Event:
    event = Event()
    self.at(self.now + seconds, self.set, event)
    return event

  def set(self, event: Event, value: Any = None) -> None:
    if not event.is_set:
      event.is_set, event.value = True, value
      for coroutine, done in event.waiting:
        self._resume(coroutine, done)

  def spawn(self, coroutine: Coroutine) -> Event:
    """Starts a process; the event is its end, with what it returns."""
    done = Event()
    self._resume(coroutine, done)
    return done

  def _resume(self, coroutine: Coroutine, done: Event) -> None:
    try:
      event = coroutine.send(None)
    except StopIteration as end:
      self.set(done, end.value)
    else:
      event.waiting.append((coroutine, done))

  def run(self, until: Event) -> Any:
    while not until.is_set:
      self.now, _, call, args = heapq.heappop(self._queue)
      call(*args)
    return until.value


@dataclasses.dataclass(frozen=True)
class Plant:
  """How fast the machines are, in seconds, tokens and bytes.

  Attributes:
    servers: samplers. hosts: machines that they are on.
    iteration_s, sequence_s, context_s: seconds of one decode iteration: constant, for each running sequence, for
      each token of their contexts.
    prefill_s, request_s: of a token to prefill; of a request.
    slots: sequences of a server that run at once. pool: tokens that its KV cache holds.
    block: tokens between two checks for finished sequences.
    chips: that train. row_tokens: of a row of a micro-batch; a chip takes one row at a time.
    row_s: seconds of such a row, the reference's score included. update_s: constant part of an update.
    push_bytes: of a whole push. delta_share: part of them that a delta has.
    prepare_s: seconds to fetch and compare the parameters. write_rate, load_rate: bytes/s into the trainer's
      folder, and into a server. shared_rate: bytes/s out of that folder, over all hosts together.
    control_s: pause, flush, check and resume.
  """

  servers: int
  iteration_s: float
  row_s: float
  hosts: int = 1
  sequence_s: float = 0.0
  context_s: float = 0.0
  prefill_s: float = 0.0
  request_s: float = 0.0
  slots: int = 1 << 30
  pool: float = math.inf
  block: int = 1
  chips: int = 1
  row_tokens: float = 1.0
  update_s: float = 0.0
  push_bytes: float = 0.0
  delta_share: float = 0.003
  prepare_s: float = 0.0
  write_rate: float = math.inf
  load_rate: float = math.inf
  shared_rate: float = math.inf
  control_s: float = 0.0

  def update_seconds(self, tokens: float) -> float:
    return self.update_s + math.ceil(math.ceil(tokens / self.row_tokens) / self.chips) * self.row_s

  def bytes(self, delta: bool) -> float:
    return self.push_bytes * (self.delta_share if delta else 1.0)

  def write_seconds(self, delta: bool) -> float:
    return self.prepare_s + self.bytes(delta) / self.write_rate

  def load_seconds(self, delta: bool) -> float:
    return self.control_s + self.bytes(delta) * max(1 / self.load_rate, self.hosts / self.shared_rate)


class Request:
  """One turn of a rollout at a server.

  Args:
    prefix: key of the context in the server's cache. context: its tokens. new: tokens behind it to prefill.
    tokens: to draw. shared: part of the context that other requests have too. rank: of those that wait, the
      lowest is served first, and of equal ones the first to come.
  """

  def __init__(self, prefix: Any, context: int, new: int, tokens: int, shared: int = 0, rank: int = 0):
    self.prefix, self.context, self.new, self.tokens, self.rank = prefix, context, new, tokens, rank
    self.private = context - shared + new + tokens  # tokens of the KV pool that are its own at its end
    self.kept = 0  # drawn before it was interrupted
    self.joined = self.end = 0.0  # clock of its server when it began to decode, and when it will be done
    self.done, self.aborted = Event(), False


class Server:
  """One sampler with continuous batching. Prefill comes first; decoding waits for it.

  `_clock` counts decode iterations. Every running sequence advances by one token an iteration, so one that joins at
  clock c with n tokens to draw ends at clock c + n, however long iterations become.

  Attributes:
    seconds: by what it did: prefill, decode, load, tools (idle, while a rollout of its own is in a tool), idle.
    drawn, thrown, prefilled: tokens.
    load: requests that run or wait.
    history: (time, running sequences), whenever that changes.
  """

  def __init__(self, simulation: Simulation, plant: Plant):
    self.plant, self.seconds = plant, collections.Counter()
    self.drawn = self.thrown = self.prefilled = self.load = self.tools = 0
    self.history: list[tuple[float, int]] = []
    self._simulation, self._numbers = simulation, itertools.count()
    self._running: list[tuple[float, int, Request]] = []  # a heap by their ends
    self._waiting: list[tuple[int, int, Request]] = []  # a heap by rank and number
    self._prefilling: list[Request] = []
    self._cache: dict[Any, tuple[int, float]] = {}  # prefix -> (flushes, tokens written) when it was last used
    self._clock = self._context = self._last = self._prefill_until = 0.0
    self._used = self._written = self._flushes = self._stamp = 0
    self._open, self._empty = True, Event()

  def generate(self, request: Request) -> Event:
    """Set when the request's tokens are drawn, or when it was aborted."""
    self.load += 1
    heapq.heappush(self._waiting, (request.rank, next(self._numbers), request))
    self._admit()
    return request.done

  def abort(self, request: Request) -> None:
    """Ends a request; its tokens are thrown away."""
    if request.done.is_set:
      return
    self.advance()
    request.aborted = True
    if _remove(self._waiting, request):
      self.thrown += request.kept
    elif _remove(self._running, request):  # if it is prefilled at the moment, `_join` drops it
      self.thrown += self._drawn(request)
      self._leave(request)
    self._end(request)
    self._admit()

  def keep(self, key: Any) -> None:
    """What was just computed stays in the cache under this key."""
    self._cache[key] = self._flushes, self._written

  def tool(self, change: int) -> None:
    """A rollout enters (+1) or leaves (-1) a tool."""
    self.advance()
    self.tools += change

  async def install(self, seconds: float, on_push: str) -> None:
    """Loads weights: interrupts running samples (`Policy.on_push`) and flushes the cache."""
    self.advance()
    self._open = False
    if on_push == "drain" and (self._running or self._prefilling):
      self._empty = Event()
      self._simulation.at(self._simulation.now + DRAIN_S, self._simulation.set, self._empty)
      await self._empty
      self.advance()
    interrupted = [request for *_, request in sorted(self._running, key=lambda entry: entry[1])]
    for request in interrupted:
      request.kept = self._drawn(request)
      if on_push == "drop":
        self.thrown += request.kept
        request.kept = 0
    interrupted += [request for request in self._prefilling if not request.aborted]
    for request in interrupted:  # before those of its rank that wait already
      heapq.heappush(self._waiting, (request.rank, next(self._numbers) - (1 << 60), request))
    self._running, self._prefilling, self._context, self._used = [], [], 0.0, 0
    self._flushes += 1
    self._prefill_until = self._simulation.now
    self._stamp += 1
    await self._simulation.sleep(seconds)
    self.advance()
    self._open = True
    self._admit()

  def advance(self) -> None:
    """Accounts for the time since the last call."""
    now, last = self._simulation.now, self._last
    prefill = max(min(now, self._prefill_until) - last, 0.0)
    rest, self._last = now - last - prefill, now
    self.seconds["prefill"] += prefill
    if self._running:
      self.seconds["decode"] += rest
      first, growth = self._iteration()
      # Solves first x + growth x^2 / 2 = rest, since contexts grow by a token a sequence and iteration.
      steps = 2 * rest / (first + math.sqrt(first**2 + 2 * growth * rest)) if rest else 0.0
      self._clock += steps
      self._context += steps * len(self._running)
    else:
      self.seconds["load" if not self._open else "tools" if self.tools else "idle"] += rest

  # ---- inside

  def _admit(self) -> None:
    """Starts the prefill of what waits, in order, as slots and the pool allow."""
    self.advance()
    while (self._open and self._waiting and len(self._running) + len(self._prefilling) < self.plant.slots
           and (self._used + self._waiting[0][2].private <= self.plant.pool or not self._used)):
      request = heapq.heappop(self._waiting)[2]
      compute = request.new if self._cached(request) else request.context + request.new + request.kept
      self._cache[request.prefix] = self._flushes, self._written
      self._prefill_until = max(self._simulation.now, self._prefill_until) + (
        self.plant.request_s + compute * self.plant.prefill_s)
      self.prefilled += compute
      self._written += compute
      self._used += request.private
      self._prefilling.append(request)
      self._simulation.at(self._prefill_until, self._join, request, self._flushes)
    self._schedule()

  def _cached(self, request: Request) -> bool:
    """The cache drops what was used longest ago: a prefix stays until newer tokens have filled the pool."""
    flushes, written = self._cache.get(request.prefix, (-1, 0))
    return (flushes == self._flushes and not request.kept
            and self._written - written + request.context <= self.plant.pool)

  def _join(self, request: Request, flushes: int) -> None:
    """Its prefill is done: it decodes from here on."""
    if flushes != self._flushes:
      return  # it was interrupted, and waits again
    self.advance()
    self._prefilling.remove(request)
    if request.aborted:
      self._used -= request.private
      return self._admit()
    request.joined = self._clock
    request.end = self._clock + math.ceil((request.tokens - request.kept) / self.plant.block) * self.plant.block
    heapq.heappush(self._running, (request.end, next(self._numbers), request))
    self._context += request.context + request.new + request.kept
    self._schedule()

  def _drawn(self, request: Request) -> float:
    return min(request.kept + self._clock - request.joined, request.tokens)

  def _iteration(self) -> tuple[float, float]:
    """Seconds of an iteration now, and by how much each one is longer than the one before."""
    plant, n = self.plant, len(self._running)
    return plant.iteration_s + n * plant.sequence_s + self._context * plant.context_s, n * plant.context_s

  def _schedule(self) -> None:
    """The next end of a sequence, as things are now; an earlier appointment lapses."""
    self._stamp += 1
    if self._running:
      steps = max(self._running[0][0] - self._clock, 0.0)
      first, growth = self._iteration()
      begin = max(self._simulation.now, self._prefill_until)
      self._simulation.at(begin + first * steps + growth * steps**2 / 2, self._finish, self._stamp)
    if not self.history or self.history[-1][1] != len(self._running):
      self.history.append((self._simulation.now, len(self._running)))

  def _finish(self, stamp: int) -> None:
    if stamp != self._stamp:
      return
    self.advance()
    ended = []
    while self._running and self._running[0][0] <= self._clock + 1e-6:
      ended.append(heapq.heappop(self._running)[2])
    for request in ended:
      self._leave(request)
      self._written += request.tokens
      self.drawn += request.tokens
    for request in ended:
      self._end(request)
    self._admit()

  def _leave(self, request: Request) -> None:
    """It decodes no more."""
    self._used -= request.private
    self._context -= request.context + request.new + request.kept + self._clock - request.joined
    if not self._open and not self._running and not self._prefilling:
      self._simulation.set(self._empty)

  def _end(self, request: Request) -> None:
    self.load -= 1
    self._simulation.set(request.done)


def _remove(entries: list[tuple[float, int, Request]], request: Request) -> bool:
  """Takes a request out of a heap; whether it was there."""
  kept = [entry for entry in entries if entry[2] is not request]
  found = len(kept) < len(entries)
  entries[:] = kept
  heapq.heapify(entries)
  return found
