"""Servers that die or freeze at the worst moment: real processes, real signals.

Two servers: the one that all tests share, which stays well, and a victim behind a proxy that pulls the
trigger when a certain request arrives. The supervisor restarts the victim with the weights of its
checkpoint, which are not those that were pushed.
"""

import asyncio
import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from axpo_jax.engine.sglang.fleet import NoServer
from tests.children import until

LOADS, DELTAS = "/update_weights_from_disk", "/update_weights_from_tensor"


@pytest.fixture(scope="module")
def victim(start_servers):
  with start_servers(backoff=0.1) as sidecar:
    yield sidecar


@pytest.fixture
def pair(connect, server, victim, proxy, other_params):
  """An engine on the well server and the victim, with weights that no checkpoint has, and the proxy
  before the victim."""
  between = proxy(victim.urls[0])
  engine = connect([server.urls[0], between.url], fleet={"probe_timeout_s": 4.0})
  asyncio.run(engine.update_weights(other_params, 1))
  until(lambda: engine.gauges()["servers_healthy"] == 2)
  yield engine, between
  asyncio.run(engine.close())


def send(sidecar, number):
  os.killpg(sidecar.status()[0].pid, number)


def once(action):
  """A function of a request that runs `action` at its first call and passes every request on."""
  left = [action]
  return lambda _: left.pop()() if left else None


def rollouts(engine, ask, text, count=12, tag="a"):
  """As many requests, each of an episode of its own; the requests and their samples."""
  requests = [ask(text(i, 8 + i), max_new=12, session=f"{tag}{i}") for i in range(count)]

  async def together():
    return await asyncio.gather(*map(engine.generate, requests))

  return requests, [sample for (sample,) in asyncio.run(together())]


def assert_all_from(reference, version, requests, samples):
  for request, sample in zip(requests, samples, strict=True):
    assert sample.weight_version == version and len(sample.ids) == 12
    np.testing.assert_allclose(
      sample.logprobs, reference.logprobs(request.ids, (), sample.ids), atol=1e-4)


def test_killed_in_mid_rollout(pair, victim, reference, other_params, ask, text):
  engine, between = pair
  between.before["/generate"] = once(lambda: send(victim, signal.SIGKILL))
  trained, lives = reference.with_params(other_params), victim.status()[0].restarts
  assert_all_from(trained, 1, *rollouts(engine, ask, text))
  metrics = engine.gauges()
  assert metrics["servers_lost"] == 1 and metrics["retries"] >= 1
  until(lambda: engine.gauges()["servers_healthy"] == 2)
  assert victim.status()[0].restarts == lives + 1
  served = len(between.seen["/generate"])
  assert_all_from(trained, 1, *rollouts(engine, ask, text, tag="b"))
  assert len(between.seen["/generate"]) > served  # the restarted one too, with the pushed weights


def test_killed_in_mid_push(pair, victim, reference, other_params, ask, text):
  engine, between = pair

  def bump(path, leaf):
    return leaf.at[1].add(0.05) if "down" in str(path) else leaf

  params = jax.tree_util.tree_map_with_path(bump, other_params)
  between.before[DELTAS] = once(lambda: send(victim, signal.SIGKILL))
  del between.seen[LOADS][:]
  asyncio.run(engine.update_weights(params, 2))
  trained, push = reference.with_params(params), engine.last_push
  assert engine.gauges()["servers_healthy"] == 1
  assert_all_from(trained, 2, *rollouts(engine, ask, text))
  until(lambda: engine.gauges()["servers_healthy"] == 2)
  # The server that has started again lost what it held: it loads the whole push, then what changed since.
  assert [request["model_path"] for request in between.seen[LOADS]] == [str(push.previous.folder)]
  assert len(between.seen[DELTAS]) == 2
  assert_all_from(trained, 2, *rollouts(engine, ask, text, tag="b"))


def test_frozen_in_mid_rollout(pair, victim, reference, other_params, ask, text):
  engine, between = pair
  between.before["/generate"] = once(lambda: send(victim, signal.SIGSTOP))
  loads, lives = len(between.seen[LOADS]), victim.status()[0].restarts
  try:
    trained = reference.with_params(other_params)
    assert_all_from(trained, 1, *rollouts(engine, ask, text))
    assert engine.gauges()["servers_healthy"] == 1
  finally:
    send(victim, signal.SIGCONT)
  until(lambda: engine.gauges()["servers_healthy"] == 2)
  # It kept its weights: it was let in again as it was.
  assert len(between.seen[LOADS]) == loads and victim.status()[0].restarts == lives
  assert_all_from(trained, 1, *rollouts(engine, ask, text, tag="b"))


def test_frozen_in_mid_push(pair, victim, reference, other_params, ask, text):
  engine, between = pair
  between.before[DELTAS] = once(lambda: send(victim, signal.SIGSTOP))
  try:
    asyncio.run(engine.update_weights(reference.params, 2))
    assert engine.gauges()["servers_healthy"] == 1
    assert_all_from(reference, 2, *rollouts(engine, ask, text))
  finally:
    send(victim, signal.SIGCONT)
  until(lambda: engine.gauges()["servers_healthy"] == 2)
  assert_all_from(reference, 2, *rollouts(engine, ask, text, tag="b"))


def test_when_all_are_frozen_the_deadline_holds(connect, victim, reference, ask, text):
  engine = connect(victim.urls, fleet={"probe_timeout_s": 4.0})
  asyncio.run(engine.update_weights(reference.params, 1))
  engine._fleet.config = dataclasses.replace(engine._fleet.config, deadline_s=3.0)
  send(victim, signal.SIGSTOP)
  try:
    with pytest.raises(NoServer, match="none of 1 servers was healthy for 3 s"):
      rollouts(engine, ask, text)
    assert engine.gauges()["servers_healthy"] == 0
  finally:
    send(victim, signal.SIGCONT)
  asyncio.run(engine.close())
