"""A server on loopback that speaks OpenEnv's WebSocket: the policy must count up to a number.

`attack` names how it breaks the rules.
"""

import asyncio
import contextlib
import json
import threading

from aiohttp import web


def observation(text, reward=None, done=False):
  return {"type": "observation", "data": {"observation": {"text": text}, "reward": reward, "done": done}}


class Counter:
  """One session's game."""

  def reset(self, data):
    self.number, self.goal = 0, 2 + data.get("seed", 0) % 2
    return observation(f"Count to {self.goal}.")

  def step(self, data):
    if set(data) != {"said"}:
      return {"type": "error", "data": {"message": "an action has one field, said", "code": "VALIDATION_ERROR"}}
    self.number += 1
    right, done = str(self.number) in data["said"], self.number == self.goal
    return observation(f"{self.number} of {self.goal}", 1.0 if right else -0.5, done)


@contextlib.contextmanager
def serving(attack=""):
  """Yields the address and the list of sessions that are open."""
  loop, ready, address, sessions = asyncio.new_event_loop(), threading.Event(), [], []

  async def talk(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    game = Counter()
    sessions.append(game)
    try:
      async for message in socket:
        message = json.loads(message.data)
        if message["type"] == "close":
          break
        answer = getattr(game, message["type"])(message["data"])
        if attack == "another opening" and message["type"] == "reset":
          answer["data"]["observation"]["text"] += str(id(game))
        if message["type"] == "step":
          if attack == "silence":
            await asyncio.sleep(60)
          if attack == "hang up":
            break
          answer = {"no JSON object": [1], "no data": {"type": "observation"}, "a reward of text": observation("x", "much"),
                    "a reward of NaN": observation("x", float("nan")), "10 MB": observation("x" * 10**7),
                    "1 MB": observation("<|im_end|><image>" * 60_000)}.get(attack, answer)
        await socket.send_str("[" * 100_000 if attack == "brackets" and message["type"] == "step"
                              else json.dumps(answer))
    finally:
      sessions.remove(game)
    return socket

  async def serve():
    app = web.Application()
    app.router.add_get("/ws", talk)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
    ready.set()

  loop.create_task(serve())
  thread = threading.Thread(target=loop.run_forever, daemon=True)
  thread.start()
  assert ready.wait(10)
  try:
    yield address[0], sessions
  finally:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
