"""Who waits for a server, and what is left when many give up at once. Nothing is contacted here; servers
that really fail are in test_sglang_faults.py."""

import asyncio

import pytest

from axpo_jax.engine.settings import FleetConfig
from axpo_jax.engine.sglang.api import Server, Unreachable
from axpo_jax.engine.sglang.fleet import Fleet, NoServer

URL = "http://127.0.0.1:9"


def out_of_service(deadline_s=60.0):
  """A fleet of one unhealthy server, whose gate is open. Call it in a running loop."""
  async def install(_member):
    raise AssertionError("nobody watches, so nobody installs")

  fleet = Fleet([Server(URL)], FleetConfig(deadline_s=deadline_s), install, lambda: "tag")
  fleet.open_gate()
  return fleet


async def turns(count):
  for _ in range(count):
    await asyncio.sleep(0)


async def served(fleet, session):
  async with fleet.lease(session) as member:
    return member.server.url


@pytest.mark.parametrize("between", range(8))
def test_a_server_comes_back_for_others_after_many_gave_up_at_once(between):
  """Whoever closes or drops a step cancels all that wait, and perhaps again before they have ended."""
  async def scenario():
    fleet = out_of_service()
    leaving = [asyncio.create_task(served(fleet, f"a{i}")) for i in range(4)]
    await turns(10)
    for _ in range(2):
      for task in leaving:
        task.cancel()
      await turns(between)
    ended = await asyncio.gather(*leaving, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended
    staying = [asyncio.create_task(served(fleet, f"b{i}")) for i in range(4)]
    await turns(10)
    fleet.members[0].tag = "tag"
    fleet.mark_healthy(fleet.members[0])
    async with asyncio.timeout(30):
      assert await asyncio.gather(*staying) == [URL] * 4
    assert asyncio.all_tasks() == {asyncio.current_task()}

  asyncio.run(scenario())


def test_all_that_wait_get_the_reason_at_the_deadline():
  async def scenario():
    fleet = out_of_service(deadline_s=0.05)
    return await asyncio.gather(*(served(fleet, str(i)) for i in range(4)), return_exceptions=True)

  for error in asyncio.run(scenario()):
    assert isinstance(error, NoServer) and f"0.05 s (deadline_s): {URL}: not checked yet" in str(error)


class Checked:
  """A server whose every `worst`-th check of its weights fails, or all checks."""

  url = URL

  def __init__(self, worst: int):
    self.worst, self.checks = worst, 0

  async def healthy(self, _):
    return True

  async def weight_tag(self, _):
    self.checks += 1
    if self.checks % self.worst == 0:
      raise Unreachable("no answer")
    return "tag"


@pytest.mark.parametrize("worst, lost", [(2, 0), (1, 1)])
def test_only_two_failed_health_checks_in_a_row_make_a_server_unhealthy(worst, lost):
  async def scenario():
    server = Checked(worst)

    async def install(_member):
      raise AssertionError("it has its weights")

    fleet = Fleet([server], FleetConfig(probe_s=0.01), install, lambda: "tag")
    (member,) = fleet.members
    member.tag, member.fault = "tag", None
    fleet.open_gate()
    fleet.watch()
    async with asyncio.timeout(30):
      await fleet.check(member)  # of a request that failed; it returns as soon as the outcome is known
      while server.checks < 6 and not fleet.failures:
        await asyncio.sleep(0.01)
    for watcher in fleet._watchers:
      watcher.cancel()
    return fleet.failures, fleet.is_ready(member)

  assert asyncio.run(scenario()) == (lost, not lost)
