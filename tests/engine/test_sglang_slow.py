"""Requests that take too long, on servers that are well. Three simulated servers, which draw nothing and
answer when they are told to; that a real one ends a request by its id is in test_sglang_engine.py."""

import asyncio

import pytest
from aiohttp import web

from axpo_jax.engine.loop_thread import LoopThread
from axpo_jax.engine.sglang.api import TooSlow
from axpo_jax.engine.sglang.server.spec import free_port


class SimulatedServer:
  """Says what a well server says.

  Attributes:
    held: requests whose prompt begins with one of these ids are never answered.
    asked: first prompt id of every request. rids: what each was called. aborted: the ids of those aborted.
  """

  def __init__(self):
    self.held, self.aborted, self.asked, self.rids = set(), [], [], {}
    self._answering, self._tag = asyncio.Event(), "none"

  async def start(self) -> str:
    app = web.Application(client_max_size=1 << 30)
    for route in ("/health", "/pause_generation", "/continue_generation", "/flush_cache"):
      app.router.add_route("*", route, self._fine)
    app.router.add_get("/model_info", self._info)
    app.router.add_get("/server_info", self._fine)
    app.router.add_post("/update_weights_from_disk", self._load)
    app.router.add_post("/abort_request", self._abort)
    app.router.add_post("/generate", self._generate)
    self.runner, port = web.AppRunner(app, access_log=None, shutdown_timeout=0.1), free_port("127.0.0.1")
    await self.runner.setup()
    await web.TCPSite(self.runner, "127.0.0.1", port).start()
    return f"http://127.0.0.1:{port}"

  async def answer(self):
    self._answering.set()

  async def _fine(self, _):
    return web.json_response({"dtype": "float32"})

  async def _info(self, _):
    return web.json_response({"weight_version": self._tag})

  async def _load(self, request):
    self._tag = (await request.json())["weight_version"]
    return web.json_response({"success": True})

  async def _abort(self, request):
    self.aborted.append((await request.json())["rid"])
    return web.json_response({"dtype": "float32"})

  async def _generate(self, request):
    sent = await request.json()
    first = sent["input_ids"][0]
    self.asked.append(first)
    self.rids[first] = sent["rid"]
    if first in self.held:
      await asyncio.Event().wait()
    await self._answering.wait()
    meta = {"prompt_tokens": len(sent["input_ids"]), "cached_tokens": 0, "weight_version": self._tag,
            "finish_reason": {"type": "length"}, "output_token_logprobs": [[-1.0, 7, None]]}
    return web.json_response({"output_ids": [7], "meta_info": meta})


@pytest.fixture
def servers(connect, reference):
  """Three servers, an engine on them, and a function that has them answer. The engine waits 1 s for an
  answer, and 2 s more after its abort."""
  loop = LoopThread("simulated")

  async def start():
    found = [SimulatedServer() for _ in range(3)]
    return found, [await server.start() for server in found]

  found, urls = loop.start(start()).result()
  engine = connect(urls, fleet={"probe_s": 0.1, "probe_timeout_s": 2.0}, request_s=1.0, verify=False,
                   push={"delta": False})
  asyncio.run(engine.update_weights(reference.params, 1))
  yield found, engine, lambda: [loop.start(server.answer()).result() for server in found]
  asyncio.run(engine.close())
  for server in found:
    loop.start(server.runner.cleanup()).result()
  loop.stop()


def word(i: int) -> int:
  return 10 + i


def test_a_slow_request_takes_no_server_out_and_loses_nothing_of_others(servers, ask):
  """One of nine is never answered where it comes first; the others are once all have arrived."""
  (first, *_), engine, release = servers
  first.held = {word(0)}

  async def scenario():
    tasks = [asyncio.create_task(engine.generate(ask((word(i), 11), max_new=1, session=f"s{i}")))
             for i in range(9)]
    while sum(len(server.asked) for server in servers[0]) < 9:
      await asyncio.sleep(0.01)
    release()
    return await asyncio.gather(*tasks)

  samples = asyncio.run(scenario())
  assert [sample.ids for (sample,) in samples] == [(7,)] * 9
  # Nobody else was asked again.
  assert sorted(i for server in servers[0] for i in server.asked) == [word(0), *map(word, range(9))]
  assert first.aborted == [first.rids[word(0)]]
  assert engine.gauges().items() >= {
    "servers_healthy": 3, "servers_lost": 0, "too_slow": 1, "retries": 1}.items()


def test_what_is_slow_everywhere_fails_alone(servers, ask):
  found, engine, release = servers
  release()
  for server in found:
    server.held = {word(0)}

  async def scenario():
    slow = asyncio.create_task(engine.generate(ask((word(0), 11), max_new=1, session="a")))
    while not slow.done():
      await engine.generate(ask((word(1), 11), max_new=1, session="b"))
      await asyncio.sleep(0.05)
    return await slow

  with pytest.raises(TooSlow, match=r"no answer within 3 s"):
    asyncio.run(scenario())
  assert [len(server.aborted) for server in found] == [1, 1, 1]
  assert engine.gauges().items() >= {"servers_healthy": 3, "servers_lost": 0, "too_slow": 3}.items()
