"""Health of the servers, and which server a request goes to.

In: servers, the weights they must hold, and sessions that ask for one. Out: leases on a healthy server
that holds those weights. Everything runs on one event loop.

Health. One watcher a server checks it every `probe_s` seconds:

                 `misses` failed checks in a row, or it holds other weights
      healthy ───────────────────────────────────────────────────────────▶ unhealthy
         ▲                                                                      │
         └──────── it answers, is given the current weights, which are verified ┘

A request that fails or is slow does not make its server unhealthy; it only has the server checked at
once. When a server becomes unhealthy, its open calls end, so a frozen process delays a request by
seconds and not by the whole time limit.

Affinity. A session stays at the server of its first request, whose cache holds its prefix. A new session
goes to the server with the fewest requests. The session of an episode is its question, so all
rollouts of a question and all resamples of their prefixes use one cache.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

from absl import logging

from axpo_jax.engine.settings import FleetConfig
from axpo_jax.engine.sglang.api import Server, ServerError, Unreachable

_SESSIONS_KEPT = 65_536
_RECHECK_S = 0.5  # between two checks of a server while requests wait for what they say


class NotAsked(ServerError):
  """The server became unhealthy before the request was sent."""


class NoServer(RuntimeError):
  """No server was healthy within the deadline; the message says what is wrong with each."""


class Member:
  """One server as the fleet sees it.

  Attributes:
    tag: of the weights that were verified on it; None if unknown.
    fault: why it is unhealthy; None while it is healthy.
    load: requests that run or wait here. sessions: how many have their affinity here.
  """

  def __init__(self, server: Server, slots: int):
    self.server = server
    self.tag: str | None = None
    self.fault: str | None = "not checked yet"
    self.slots = asyncio.Semaphore(slots)
    self.calls: set[asyncio.Task] = set()
    self.load = self.sessions = 0
    self.check_now = asyncio.Event()  # ends its watcher's wait
    self.checked: asyncio.Future | None = None  # done when a check that was asked for has an outcome
    self.prefills: dict[Any, Any] = {}  # prompts that several requests are about to share

  async def call(self, coroutine: Coroutine) -> Any:
    """Awaits a call to this server.

    Raises:
      NotAsked: it is unhealthy, and was not asked.
      ServerError: it became unhealthy meanwhile, or the call failed.
    """
    if self.fault is not None:
      coroutine.close()
      raise NotAsked(f"{self.server.url} is unhealthy: {self.fault}")
    task = asyncio.ensure_future(coroutine)
    self.calls.add(task)
    try:
      return await asyncio.shield(task)
    except asyncio.CancelledError:
      # Cancelled by `Fleet.mark_unhealthy`, unless our caller gave up.
      if task.cancelled() and not asyncio.current_task().cancelling():
        raise ServerError(f"{self.server.url} became unhealthy: {self.fault}") from None
      task.cancel()
      raise
    finally:
      self.calls.discard(task)


class Fleet:
  """See the module docstring.

  Args:
    servers: at least one.
    config: see FleetConfig.
    install: gives a member the current weights and verifies them, or raises ServerError.
    wanted: the tag of the current weights; None before there are any.
  """

  def __init__(self, servers: Sequence[Server], config: FleetConfig,
               install: Callable[[Member], Awaitable[None]], wanted: Callable[[], str | None]):
    if not servers:
      raise ValueError("no servers: give at least one base URL")
    self.config = config
    self.members = [Member(server, config.max_concurrent) for server in servers]
    self.failures = 0
    self._install, self._wanted = install, wanted
    self._affinity: collections.OrderedDict[str, Member] = collections.OrderedDict()
    self._leases = 0
    self._idle = asyncio.Event()  # set while there is no lease
    self._idle.set()
    self._open = asyncio.Event()  # cleared while weights change
    self._changed = asyncio.Event()  # set, and replaced by another, when a server may be ready
    self._watchers: list[asyncio.Task] = []  # the loop itself keeps weak references only

  def watch(self) -> None:
    """Starts the watchers; they end with the loop's tasks."""
    self._watchers = [asyncio.create_task(self._watch(member)) for member in self.members]

  def is_ready(self, member: Member) -> bool:
    """Whether it is healthy and holds the current weights."""
    wanted = self._wanted()
    return member.fault is None and wanted is not None and member.tag == wanted

  def mark_unhealthy(self, member: Member, error: Exception) -> None:
    """The member gets no more requests until its watcher finds it healthy again."""
    if member.fault is None:
      member.fault = str(error)
      self.failures += 1
      logging.warning("server %s is unhealthy: %s", member.server.url, error)
    if isinstance(error, Unreachable):  # else its answers to other requests may be valid
      for task in member.calls:
        task.cancel()

  def mark_healthy(self, member: Member) -> None:
    member.fault = None
    self._notify()

  def _notify(self) -> None:
    """Wakes the requests that wait for a server. Not an asyncio.Condition: if waiters are cancelled at
    that moment its lock can stay taken for ever, and no request would be served again."""
    self._changed.set()
    self._changed = asyncio.Event()

  # ---- leases ----

  @contextlib.asynccontextmanager
  async def lease(self, session: str, avoid: Collection[Member] = ()) -> AsyncIterator[Member]:
    """A slot at the server of `session`; at one of `avoid` only if no other is ready.

    Raises:
      NoServer: none was ready within deadline_s. (Waiting for the gate does not count.)
    """
    member = await self._acquire(session, avoid)
    self._leases += 1
    try:
      yield member
    finally:
      self._leases -= 1
      if not self._leases:
        self._idle.set()
      member.load -= 1
      member.slots.release()

  async def _acquire(self, session: str, avoid: Collection[Member]) -> Member:
    while True:
      await self._open.wait()
      member = self._choose(session, avoid)
      if member is None:
        await self._wait_for_any()
        continue
      member.load += 1
      try:
        await member.slots.acquire()
      except BaseException:
        member.load -= 1
        raise
      # While this request waited for the slot, the server may have failed or the gate closed.
      if self._open.is_set() and self.is_ready(member):
        self._idle.clear()
        return member
      member.load -= 1
      member.slots.release()

  def _choose(self, session: str, avoid: Collection[Member]) -> Member | None:
    ready = [member for member in self.members if self.is_ready(member)]
    ready = [member for member in ready if member not in avoid] or ready
    if not ready:
      return None
    usual = self._affinity.get(session)
    if usual in ready:
      self._affinity.move_to_end(session)
      return usual
    chosen = min(ready, key=lambda member: (member.load, member.sessions))
    if session:
      self._move(session, chosen)
    return chosen

  def _move(self, session: str, member: Member) -> None:
    if session in self._affinity:
      self._affinity.pop(session).sessions -= 1
    self._affinity[session] = member
    member.sessions += 1
    if len(self._affinity) > _SESSIONS_KEPT:
      self._affinity.popitem(last=False)[1].sessions -= 1

  async def _wait_for_any(self) -> None:
    try:
      async with asyncio.timeout(self.config.deadline_s):
        while not any(map(self.is_ready, self.members)):
          await self._changed.wait()
    except TimeoutError:
      raise NoServer(self._faults()) from None

  def _faults(self) -> str:
    reasons = "; ".join(f"{m.server.url}: {m.fault or 'weights not loaded'}" for m in self.members)
    return (f"none of {len(self.members)} servers was healthy for {self.config.deadline_s:g} s "
            f"(deadline_s): {reasons}")

  # ---- changing the weights ----

  def close_gate(self) -> None:
    """No lease begins until `open_gate`."""
    self._open.clear()

  def open_gate(self) -> None:
    self._open.set()
    self._notify()

  @property
  def gate_is_open(self) -> bool:
    return self._open.is_set()

  async def drain(self, seconds: float) -> None:
    """Waits until every lease has ended, at most so long."""
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(seconds):
        await self._idle.wait()

  async def install_all(self) -> None:
    """Gives every healthy member the current weights; those that fail become unhealthy.

    Raises:
      NoServer: no member took them within deadline_s.
    """
    for member in self.members:
      if member.fault is not None:
        member.check_now.set()
    await asyncio.gather(*map(self._try_install, self.members))
    await self._wait_for_any()

  async def _try_install(self, member: Member) -> None:
    if member.fault is not None:
      return  # its watcher gives them to it
    try:
      await self._install(member)
    except ServerError as error:
      self.mark_unhealthy(member, error)

  # ---- watching ----

  async def while_alive(self, member: Member, coroutine: Coroutine) -> Any:
    """Awaits a long call, and ends it with Unreachable if the server freezes meanwhile."""
    task, misses = asyncio.ensure_future(coroutine), 0
    try:
      while not (await asyncio.wait([task], timeout=self.config.probe_s))[0]:
        try:
          await member.server.weight_tag(self.config.probe_timeout_s)
          misses = 0
        except ServerError as error:
          misses += 1
          if misses >= self.config.misses:
            raise Unreachable(f"{member.server.url} froze: {error}") from error
      return task.result()
    finally:
      task.cancel()

  async def check(self, member: Member) -> None:
    """Has a server checked that failed a request; returns when the check has an outcome."""
    if member.fault is not None:
      return
    if member.checked is None:
      member.checked = asyncio.get_running_loop().create_future()
      member.check_now.set()
    await asyncio.shield(member.checked)

  async def _watch(self, member: Member) -> None:
    misses, waiting = 0, []
    while True:
      if member.checked is not None:
        waiting.append(member.checked)
        member.checked = None  # a request that fails from now on needs a later check
      try:
        if member.fault is not None:
          await self._revive(member)
          misses = 0
        elif self.is_ready(member):
          misses = 0 if await self._passes(member) else misses + 1
        elif self.gate_is_open and self._wanted() is not None:
          await self._revive(member)  # an update was cancelled before this server had the new weights
      except Exception as error:  # the watcher goes on whatever its server does
        logging.exception("watcher of %s", member.server.url)
        self.mark_unhealthy(member, error)
      if misses >= self.config.misses:
        self.mark_unhealthy(member, Unreachable(f"{misses} health checks failed"))
      if not misses or member.fault is not None:
        for checked in waiting:
          checked.set_result(None)
        waiting = []
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(self.config.probe_s, _RECHECK_S) if waiting
                                   else self.config.probe_s):
          await member.check_now.wait()
      member.check_now.clear()

  async def _passes(self, member: Member) -> bool:
    """Whether it answers. A server that holds other weights than ours was restarted: it is unhealthy."""
    server, limit, wanted = member.server, self.config.probe_timeout_s, self._wanted()
    try:
      tag = await server.weight_tag(limit) if await server.healthy(limit) else None
    except ServerError:
      tag = None
    if not self.is_ready(member):
      return True  # its weights are being changed: a paused server does not answer
    if tag is not None and tag != wanted == member.tag:
      self.mark_unhealthy(member, ServerError("it was restarted and lost its weights"))
    return tag is not None

  async def _revive(self, member: Member) -> None:
    try:
      tag = await member.server.weight_tag(self.config.probe_timeout_s)
      wanted = self._wanted()
      if wanted is not None and not tag == wanted == member.tag:
        member.tag = None  # it was restarted, or failed while it loaded
        await self._install(member)
      elif not await member.server.healthy(self.config.probe_timeout_s):
        return
    except ServerError as error:
      member.fault = str(error)
      return
    if wanted == self._wanted():
      if wanted is not None:
        logging.info("server %s is healthy with weights %s", member.server.url, wanted)
      self.mark_healthy(member)
