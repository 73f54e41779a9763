"""Which servers are in, who serves whom, and when a server that failed comes back.

In: servers, the weights they must hold, and sessions that ask for one. Out: leases on a server that
is up and holds those weights. Everything runs on one event loop.

A server is *in* while it answers health checks and its weights were verified by us. Two failed checks
in a row take it out, and nothing else does: a request that fails or is slow only has the server checked
at once. When a server goes out, calls that it owes an answer are ended, so that a frozen process delays a
request by seconds and not by its whole time limit. Its watcher then checks every `probe_s` whether it is
back (whoever restarted it), gives it the current weights and lets it in.

Routing is sticky: a session stays where its first request went, since there its prefix is cached;
new sessions go to the server with the fewest sessions at work. The episode's session is its
question, so all rollouts of a question and all resamples of their prefixes meet one cache.
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
  """The server went out before it was asked."""


class NoServer(RuntimeError):
  """No server was in within the deadline; the message says why each of them is out."""


class Member:
  """One server as the fleet sees it.

  Attributes:
    tag: of the weights that we verified on it; None when we cannot be sure what it holds.
    why_out: what took it out; None while it is in.
    load: requests that run or wait here. homes: sessions that belong here.
  """

  def __init__(self, server: Server, slots: int):
    self.server = server
    self.tag: str | None = None
    self.why_out: str | None = "not seen yet"
    self.slots = asyncio.Semaphore(slots)
    self.calls: set[asyncio.Task] = set()
    self.load = self.homes = 0
    self.look = asyncio.Event()  # its watcher should look now
    self.doubted: asyncio.Future | None = None  # done when its watcher knows how it is
    self.prefills: dict[Any, Any] = {}  # prompts that several requests are about to share

  async def call(self, coroutine: Coroutine) -> Any:
    """Awaits a call to this server; ServerError when it goes out meanwhile, NotAsked when it is out."""
    if self.why_out is not None:
      coroutine.close()
      raise NotAsked(f"{self.server.url} is out: {self.why_out}")
    task = asyncio.ensure_future(coroutine)
    self.calls.add(task)
    try:
      return await asyncio.shield(task)
    except asyncio.CancelledError:
      # By `Fleet.take_out`, unless our caller gives up.
      if task.cancelled() and not asyncio.current_task().cancelling():
        raise ServerError(f"{self.server.url} went out: {self.why_out}") from None
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
    self.times_out = 0
    self._install, self._wanted = install, wanted
    self._homes: collections.OrderedDict[str, Member] = collections.OrderedDict()
    self._leases = 0
    self._idle = asyncio.Event()  # set while there is no lease
    self._idle.set()
    self._open = asyncio.Event()  # cleared while weights change
    self._changed = asyncio.Event()  # set, and replaced by another, when a server may be in
    self._watchers: list[asyncio.Task] = []  # the loop itself keeps weak references only

  def watch(self) -> None:
    """Starts the watchers; they end with the loop's tasks."""
    self._watchers = [asyncio.create_task(self._watch(member)) for member in self.members]

  def is_in(self, member: Member) -> bool:
    wanted = self._wanted()
    return member.why_out is None and wanted is not None and member.tag == wanted

  def take_out(self, member: Member, error: Exception) -> None:
    """The member gets no more requests until its watcher lets it in again."""
    if member.why_out is None:
      member.why_out = str(error)
      self.times_out += 1
      logging.warning("server %s is out: %s", member.server.url, error)
    if isinstance(error, Unreachable):  # else the answers to others may be sound
      for task in member.calls:
        task.cancel()

  def let_in(self, member: Member) -> None:
    member.why_out = None
    self._tell()

  def _tell(self) -> None:
    """Wakes who waits for a server. No condition: its lock can be lost for ever where waiters are
    cancelled at the same moment, and with it every server."""
    self._changed.set()
    self._changed = asyncio.Event()

  # ---- leases ----

  @contextlib.asynccontextmanager
  async def lease(self, session: str, avoid: Collection[Member] = ()) -> AsyncIterator[Member]:
    """A place at the server of `session`; at one of `avoid` only if no other is in.

    Raises:
      NoServer: none was in within deadline_s. (Waiting for the gate does not count.)
    """
    member = await self._take_place(session, avoid)
    self._leases += 1
    try:
      yield member
    finally:
      self._leases -= 1
      if not self._leases:
        self._idle.set()
      member.load -= 1
      member.slots.release()

  async def _take_place(self, session: str, avoid: Collection[Member]) -> Member:
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
      # While we waited for the place, the weights or the server may have gone.
      if self._open.is_set() and self.is_in(member):
        self._idle.clear()
        return member
      member.load -= 1
      member.slots.release()

  def _choose(self, session: str, avoid: Collection[Member]) -> Member | None:
    ready = [member for member in self.members if self.is_in(member)]
    ready = [member for member in ready if member not in avoid] or ready
    if not ready:
      return None
    home = self._homes.get(session)
    if home in ready:
      self._homes.move_to_end(session)
      return home
    chosen = min(ready, key=lambda member: (member.load, member.homes))
    if session:
      self._move(session, chosen)
    return chosen

  def _move(self, session: str, member: Member) -> None:
    if session in self._homes:
      self._homes.pop(session).homes -= 1
    self._homes[session] = member
    member.homes += 1
    if len(self._homes) > _SESSIONS_KEPT:
      self._homes.popitem(last=False)[1].homes -= 1

  async def _wait_for_any(self) -> None:
    try:
      async with asyncio.timeout(self.config.deadline_s):
        while not any(map(self.is_in, self.members)):
          await self._changed.wait()
    except TimeoutError:
      raise NoServer(self._all_out()) from None

  def _all_out(self) -> str:
    reasons = "; ".join(f"{m.server.url}: {m.why_out or 'weights not loaded'}" for m in self.members)
    return (f"none of {len(self.members)} servers was in for {self.config.deadline_s:g} s "
            f"(deadline_s): {reasons}")

  # ---- changing the weights ----

  def close_gate(self) -> None:
    """No lease begins until `open_gate`."""
    self._open.clear()

  def open_gate(self) -> None:
    self._open.set()
    self._tell()

  @property
  def gate_is_open(self) -> bool:
    return self._open.is_set()

  async def drain(self, seconds: float) -> None:
    """Waits until every lease has ended, at most so long."""
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(seconds):
        await self._idle.wait()

  async def install_all(self) -> None:
    """Gives every member that is in the current weights; those that fail go out.

    Raises:
      NoServer: no member took them within deadline_s.
    """
    for member in self.members:
      if member.why_out is not None:
        member.look.set()
    await asyncio.gather(*map(self._try_install, self.members))
    await self._wait_for_any()

  async def _try_install(self, member: Member) -> None:
    if member.why_out is not None:
      return  # its watcher's business
    try:
      await self._install(member)
    except ServerError as error:
      self.take_out(member, error)

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

  async def doubt(self, member: Member) -> None:
    """Has a server checked that failed a request; returns when it is known to be well, or is out."""
    if member.why_out is not None:
      return
    if member.doubted is None:
      member.doubted = asyncio.get_running_loop().create_future()
      member.look.set()
    await asyncio.shield(member.doubted)

  async def _watch(self, member: Member) -> None:
    misses, doubts = 0, []
    while True:
      if member.doubted is not None:
        doubts.append(member.doubted)
        member.doubted = None  # who doubts from now on wants a later check
      try:
        if member.why_out is not None:
          await self._try_revive(member)
          misses = 0
        elif self.is_in(member):
          misses = 0 if await self._looks_well(member) else misses + 1
        elif self.gate_is_open and self._wanted() is not None:
          await self._try_revive(member)  # an update was cancelled before it came to this one
      except Exception as error:  # a watcher must outlive whatever its server does
        logging.exception("watcher of %s", member.server.url)
        self.take_out(member, error)
      if misses >= self.config.misses:
        self.take_out(member, Unreachable(f"{misses} health checks failed"))
      if not misses or member.why_out is not None:
        for doubted in doubts:
          doubted.set_result(None)
        doubts = []
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(self.config.probe_s, _RECHECK_S) if doubts
                                   else self.config.probe_s):
          await member.look.wait()
      member.look.clear()

  async def _looks_well(self, member: Member) -> bool:
    """Whether it answers and holds what we gave it. A restarted server that lost it goes out."""
    server, limit, wanted = member.server, self.config.probe_timeout_s, self._wanted()
    try:
      tag = await server.weight_tag(limit) if await server.healthy(limit) else None
    except ServerError:
      tag = None
    if not self.is_in(member):
      return True  # weights began to load meanwhile: a paused server does not answer
    if tag is not None and tag != wanted == member.tag:
      self.take_out(member, ServerError("it was restarted and lost its weights"))
    return tag is not None

  async def _try_revive(self, member: Member) -> None:
    try:
      tag = await member.server.weight_tag(self.config.probe_timeout_s)
      wanted = self._wanted()
      if wanted is not None and not tag == wanted == member.tag:
        member.tag = None  # it was restarted, or failed while it loaded
        await self._install(member)
      elif not await member.server.healthy(self.config.probe_timeout_s):
        return
    except ServerError as error:
      member.why_out = str(error)
      return
    if wanted == self._wanted():
      if wanted is not None:
        logging.info("server %s is in with weights %s", member.server.url, wanted)
      self.let_in(member)
