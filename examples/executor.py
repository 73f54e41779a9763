"""An executor: runs the cells of the `python` tool on this machine, for trainers elsewhere.

    AXPO_EXECUTOR_KEY=secret python examples/executor.py --host=0.0.0.0 --port=8400 --kernels=200

and in the run: AXPO_EXECUTOR_KEY=secret, --config.agent.python.url=http://THIS-MACHINE:8400. The
protocol is that of axpo_jax/agent/tools/remote.py; the sandbox is the trainer's own, with the limits
given here (docs/tools.md says what it holds). Put it on a machine that holds nothing else, behind TLS if
the network between is not yours. Another executor needs these four routes and nothing of this package.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hmac
import os
import sys
import time
import uuid

from aiohttp import web

from axpo_jax.agent.tools import remote
from axpo_jax.agent.tools.kernels import Kernel, KernelConfig, KernelPool, SandboxError

_MOST_BODY = 1 << 30  # bytes of a cell with its images
_MOST_PIXELS = 1 << 26  # of one of them
_MOST_SECONDS = 600.0  # that a cell may ask for


@dataclasses.dataclass
class _Entry:
  kernel: Kernel
  used: float  # when, on the monotonic clock
  lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Executor:
  """The routes.

  Args:
    pool: starts kernels.
    key: that requests must bear; "" lets everybody in.
    most: kernels at once.
    cells: that run at once; others wait, and their time limit begins when they start.
    idle: seconds after which a kernel that nobody uses is ended.
  """

  def __init__(self, pool: KernelPool, *, key: str, most: int, cells: int, idle: float):
    self._pool, self._key, self._most, self._idle = pool, key, most, idle
    self._kernels: dict[str, _Entry] = {}
    self._starting = 0
    self._free = asyncio.Semaphore(cells)

  def app(self) -> web.Application:
    app = web.Application(client_max_size=_MOST_BODY, middlewares=[self._checked])
    app.add_routes([
      web.get("/", self._hello), web.post("/kernels", self._start),
      web.post("/kernels/{name}/cells", self._cell), web.delete("/kernels/{name}", self._end)])
    app.cleanup_ctx.append(self._serving)
    return app

  @web.middleware
  async def _checked(self, request: web.Request, handler) -> web.StreamResponse:
    given = request.headers.get("Authorization", "")
    if self._key and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
      return web.Response(status=401)
    return await handler(request)

  async def _serving(self, app: web.Application):
    await self._pool.start()
    reaper = asyncio.create_task(self._reap())
    yield
    reaper.cancel()
    for name in list(self._kernels):
      self._kill(name)
    await self._pool.close()

  async def _reap(self) -> None:
    while True:
      await asyncio.sleep(min(self._idle / 4, 10))
      for name, entry in list(self._kernels.items()):
        if not entry.lock.locked() and time.monotonic() - entry.used > self._idle:
          self._kill(name)

  async def _hello(self, request: web.Request) -> web.Response:
    return web.json_response({"protocol": remote.PROTOCOL})

  async def _start(self, request: web.Request) -> web.Response:
    if len(self._kernels) + self._starting >= self._most:
      return web.Response(status=503)
    self._starting += 1
    try:
      kernel = await self._pool.take()
    except SandboxError:
      return web.Response(status=503)
    finally:
      self._starting -= 1
    name = uuid.uuid4().hex
    self._kernels[name] = _Entry(kernel, time.monotonic())
    return web.json_response({"kernel": name}, status=201)

  async def _cell(self, request: web.Request) -> web.Response:
    name = request.match_info["name"]
    entry = self._kernels.get(name)
    if entry is None:
      return web.Response(status=404)
    try:
      body = await request.json()
      code, timeout = str(body["code"]), min(float(body["timeout"]), _MOST_SECONDS)
      images = [await asyncio.to_thread(remote.decode_png, text, _MOST_PIXELS)
                for text in body["images"]]
    except (ValueError, TypeError, KeyError, SandboxError):
      return web.Response(status=400)
    async with entry.lock, self._free:
      result = await entry.kernel.run(code, timeout, images)
      entry.used = time.monotonic()
    if result.kernel_is_gone:
      self._kill(name)
    answer = {"status": result.status, "stdout": result.stdout, "stderr": result.stderr,
              "reason": result.reason, "figures": [remote.encode_png(figure) for figure in result.figures]}
    return web.json_response(answer)

  async def _end(self, request: web.Request) -> web.Response:
    self._kill(request.match_info["name"])
    return web.Response(status=204)

  def _kill(self, name: str) -> None:
    if entry := self._kernels.pop(name, None):
      entry.kernel.kill()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--host", default="127.0.0.1")
  parser.add_argument("--port", type=int, default=8400)
  parser.add_argument("--kernels", type=int, default=200, help="at once")
  parser.add_argument("--cells", type=int, default=os.cpu_count(), help="that run at once")
  parser.add_argument("--idle", type=float, default=900, help="seconds until an unused kernel ends")
  for field in dataclasses.fields(KernelConfig):
    parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
  args = parser.parse_args()
  key = os.environ.get(remote.KEY_VARIABLE, "")
  if not key and args.host not in ("127.0.0.1", "localhost", "::1"):
    sys.exit(f"set {remote.KEY_VARIABLE}: without a key anybody who reaches {args.host} runs code here")
  config = KernelConfig(**{field.name: getattr(args, field.name)
                           for field in dataclasses.fields(KernelConfig)})
  executor = Executor(KernelPool(config), key=key, most=args.kernels, cells=args.cells, idle=args.idle)
  with contextlib.suppress(KeyboardInterrupt):
    web.run_app(executor.app(), host=args.host, port=args.port, access_log=None)


if __name__ == "__main__":
  main()
