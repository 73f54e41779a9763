"""Kernels for the `python` tool on other machines, behind a small HTTP protocol.

In: the address of an executor. Out: the pool and the kernels of `kernels`, with the same methods. The
protocol, all bodies JSON, the key as `Authorization: Bearer`:

    GET    /                      200 {"protocol": 1}
    POST   /kernels               201 {"kernel": "an id"}, a fresh one; 503 while there is no room
    POST   /kernels/ID/cells      {"code", "timeout", "images": [PNG in base64 that are new, ...]}
                                  200 {"status": "ok" | "failed" | "timeout" | "died", "stdout",
                                       "stderr", "reason", "figures": [PNG in base64, ...]}
                                  404 if the kernel is gone; after "timeout" and "died" it is
    DELETE /kernels/ID            204, whether there was one or not

The executor holds the cell to its `timeout` and to limits of its own, and ends kernels that nobody has
used for a while: a trainer may die. examples/executor.py is one. What it answers is bounded here, since
a cell may have taken it over.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import time
from typing import Any

import aiohttp
import PIL.Image

from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.kernels import ANSWER_GRACE, BaseKernel, CellResult, SandboxError
from axpo_jax.agent.tools.sandbox.wire import MOST_FIGURES, MOST_PIXELS
from axpo_jax.model.pictures import ImageError, decode

KEY_VARIABLE = "AXPO_EXECUTOR_KEY"
PROTOCOL = 1
_MOST_BYTES = 64 << 20  # of an answer: eight figures of noise as PNG in base64
_CONNECT_SECONDS = 30.0
_ROOM_SECONDS = 300.0  # that a kernel is waited for where there is no room


class ExecutorLost(SandboxError):
  """Nobody answers."""


class RemotePool:
  """Kernels of an executor. Made anywhere, used on one event loop, like `kernels.KernelPool`.

  Args:
    url: of the executor, such as http://sandbox-1:8400.
    key: sent as bearer token; by default the environment variable AXPO_EXECUTOR_KEY, if set.
  """

  def __init__(self, url: str, key: str | None = None):
    self._url = url.rstrip("/")
    key = key or os.environ.get(KEY_VARIABLE)
    self._headers = {"Authorization": f"Bearer {key}"} if key else {}
    self._session: aiohttp.ClientSession | None = None

  async def start(self) -> None:
    """Raises SandboxError unless an executor answers that speaks this protocol."""
    try:
      status, answer = await self.ask("GET", "/", _CONNECT_SECONDS)
    except SandboxError as error:
      raise SandboxError(f"no executor at config.agent.python.url={self._url!r}: {error}") from error
    if status != 200 or answer.get("protocol") != PROTOCOL:
      raise SandboxError(f"config.agent.python.url={self._url!r} answers {status} and not as an executor "
                         f"of protocol {PROTOCOL}; a key goes into {KEY_VARIABLE}")

  async def take(self) -> RemoteKernel:
    """A fresh kernel, the caller's to kill; waits where the executor has no room or starts again.

    Raises:
      SandboxError: it gives none.
    """
    wait, end = 0.1, time.monotonic() + _ROOM_SECONDS
    while True:
      try:
        status, answer = await self.ask("POST", "/kernels", _CONNECT_SECONDS, {})
        if status == 201 and isinstance(answer.get("kernel"), str):
          return RemoteKernel(self, answer["kernel"])
        problem = SandboxError(f"the executor gives no kernel (status {status})")
        if status != 503:
          raise problem
      except ExecutorLost as error:
        problem = error
      if time.monotonic() > end:
        raise problem
      await asyncio.sleep(wait)
      wait = min(2 * wait, 5.0)

  async def close(self) -> None:
    """Ends the connections. Kernels that nobody has ended are the executor's to end."""
    if self._session is not None:
      await self._session.close()
      self._session = None

  async def ask(self, method: str, path: str, seconds: float, body: dict[str, Any] | None = None
                ) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of an answer ({} where it has none).

    Raises:
      SandboxError: there is no answer, or one that is too long. The message has no address: policies
        read it.
    """
    if self._session is None:
      # As many connections as cells; the tool bounds those.
      self._session = aiohttp.ClientSession(
          headers=self._headers, connector=aiohttp.TCPConnector(limit=0))
    # Encoded in a thread: photographs take a while.
    data = None if body is None else await asyncio.to_thread(lambda: json.dumps(body).encode())
    try:
      async with self._session.request(
          method, self._url + path, data=data, headers={"Content-Type": "application/json"},
          allow_redirects=False, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
        content = await _limited(response)
        answer = await asyncio.to_thread(json.loads, content) if content else {}
        return response.status, answer if isinstance(answer, dict) else {}
    except (aiohttp.ClientError, TimeoutError) as error:
      raise ExecutorLost(f"the executor does not answer ({type(error).__name__})") from error
    except (ValueError, RecursionError) as error:
      raise SandboxError("the executor's answer is not JSON") from error


async def _limited(response: aiohttp.ClientResponse) -> bytes:
  content = bytearray()
  async for chunk in response.content.iter_chunked(1 << 16):
    content += chunk
    if len(content) > _MOST_BYTES:
      raise SandboxError(f"the executor's answer is longer than {_MOST_BYTES} bytes")
  return bytes(content)


class RemoteKernel(BaseKernel):
  """One kernel of an executor."""

  def __init__(self, pool: RemotePool, name: str):
    super().__init__()
    self._pool, self._path = pool, f"/kernels/{name}"

  async def _run(self, code, timeout, images) -> CellResult:
    encoded = await asyncio.to_thread(lambda: [encode_png(image) for image in images])
    patience = timeout + ANSWER_GRACE + 5 * len(images)  # the images have to travel too
    status, answer = await self._pool.ask(
      "POST", f"{self._path}/cells", patience, {"code": code, "timeout": timeout, "images": encoded})
    return await asyncio.to_thread(_result, status, answer)

  def _end(self) -> None:
    background.keep(self._delete())

  async def _delete(self) -> None:
    with contextlib.suppress(SandboxError):  # the executor ends what nobody uses
      await self._pool.ask("DELETE", self._path, _CONNECT_SECONDS)


def _result(status: int, answer: dict[str, Any]) -> CellResult:
  """Raises SandboxError unless the answer is what an executor says of a cell."""
  if status != 200:
    raise SandboxError("the executor does not know it any more" if status == 404
                       else f"the executor answers with status {status}")
  figures, texts = answer.get("figures"), [answer.get(key, "") for key in ("stdout", "stderr", "reason")]
  if (answer.get("status") not in ("ok", "failed", "timeout", "died") or not isinstance(figures, list)
      or len(figures) > MOST_FIGURES or not all(isinstance(text, str) for text in (*figures, *texts))):
    raise SandboxError("the executor's answer is not that of a cell")
  stdout, stderr, reason = texts
  return CellResult(answer["status"], stdout, stderr, tuple(map(decode_png, figures)), reason[:200])


def encode_png(image: PIL.Image.Image) -> str:
  """A picture as the protocol has it."""
  data = io.BytesIO()
  image.convert("RGB").save(data, format="PNG", compress_level=1)
  return base64.b64encode(data.getvalue()).decode()


def decode_png(text: str, most_pixels: int = MOST_PIXELS) -> PIL.Image.Image:
  """The inverse of `encode_png`.

  Raises:
    SandboxError: no picture, or one of more pixels.
  """
  try:
    return decode(base64.b64decode(text, validate=True), name="a figure", max_pixels=most_pixels)
  except (ValueError, ImageError) as error:
    raise SandboxError("a figure cannot be read") from error
