"""One session with an MCP server: its transport, with bounds on what the server may send, and calls.

In: where the server is. Out: results of the protocol's requests, or a `ConnectionLost`. The protocol is
the `mcp` package's. Ours are the bounds around it: a message has at most `MAX_MESSAGE` bytes, a remote
server's answer is not decompressed, lines that are no messages are dropped, notifications (which we have
no use for) too, and a server that asks us things is answered ten times a second.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.mcp_config import McpConfig

MAX_MESSAGE = 32 << 20  # bytes; pictures travel in messages, as base64
_STDERR_BYTES = 2000  # of a local server's, kept for the error of a start that fails
_BETWEEN_REQUESTS = 0.1  # seconds
_ANSWER_ID = re.compile(rb'"id"\s*:\s*(\d{1,18})')
_EXIT_SECONDS = 2.0  # that a local server has to end by itself, and again after SIGTERM


class McpError(RuntimeError):
  """A server that cannot be reached, that offers no such tool, or that failed; holds no secrets."""


class ConnectionLost(McpError):
  """The session is gone, and with it what the server kept of it.

  Attributes:
    unseen: the server has refused the call unseen, so that it may be made again.
  """

  def __init__(self, message: str, *, unseen: bool = False):
    super().__init__(message)
    self.unseen = unseen


class Connection:
  """A session. It lives in a task of its own, as the protocol's scopes ask; made by `connect`.

  Attributes:
    timeouts: calls in a row that took too long; whoever times them counts.
  """

  def __init__(self, config: McpConfig):
    self.config, self.timeouts = config, 0
    self._client: Any = None
    self._scope: Any = None
    self._holder: asyncio.Task | None = None
    self._ended = asyncio.Event()  # set by the server's end, or by ours
    self._refused = False  # an HTTP request of this session was answered with 400 or 404
    self._stderr: collections.deque[bytes] = collections.deque(maxlen=8)

  @property
  def alive(self) -> bool:
    return not (self._ended.is_set() or self._holder.done())

  async def connect(self) -> None:
    """Starts or reaches the server. Raises McpError."""
    import anyio
    ready = asyncio.get_running_loop().create_future()
    self._scope = anyio.CancelScope()
    self._holder = background.keep(self._hold(ready))
    try:
      async with asyncio.timeout(self.config.connect_seconds):
        self._client = await asyncio.shield(ready)
    except Exception as error:  # of the program, the network, the protocol
      await self.close()
      said = b"".join(self._stderr).decode("utf-8", "replace").strip()[-_STDERR_BYTES:]
      raise McpError(f"the MCP server {self.config.label} cannot be reached: {self._described(error)}"
                     + self.config.redact(f"; it said: {said}" if said else "")) from error
    except asyncio.CancelledError:
      self._scope.cancel()
      raise

  async def call(self, name: str, arguments: dict[str, Any]) -> Any:
    """The server's CallToolResult.

    Raises:
      ConnectionLost: the session is gone.
      McpError: the server answered with an error of the protocol.
    """
    return await self.request(self._client.call_tool(name, arguments))

  async def list_tools(self, cursor: str | None) -> Any:
    """One page of the listing. Raises as `call`."""
    return await self.request(self._client.list_tools(cursor=cursor))

  async def request(self, work: Awaitable[Any]) -> Any:
    """Awaits one request of the client's, or the end of the session."""
    import mcp
    task = asyncio.ensure_future(work)
    try:
      await asyncio.wait({task, self._holder}, return_when=asyncio.FIRST_COMPLETED)
      if not task.done():
        raise ConnectionLost(f"the connection to the MCP server {self.config.label} was lost")
      return task.result()
    except mcp.MCPError as error:
      said = self.config.redact(str(error))[:2000]
      if self._ended.is_set():  # the error's code does not say so: servers use it for other errors too
        raise ConnectionLost(f"the connection to the MCP server {self.config.label} was lost"
                             ) from error
      if self._refused and "session" in said.lower():
        self._ended.set()
        raise ConnectionLost(f"the MCP server {self.config.label} no longer knows the session",
                             unseen=True) from error
      raise McpError(f"the MCP server {self.config.label}: {said}") from error
    except McpError:
      raise
    except Exception as error:  # of the network, of the protocol
      raise McpError(f"the MCP server {self.config.label}: {self._described(error)}") from error
    finally:
      task.cancel()

  def abandon(self) -> None:
    """The session is over, though the server has not said so."""
    self._ended.set()

  async def close(self) -> None:
    """Ends the session, and a local server with it; again is harmless."""
    self._ended.set()
    if self._client is None:
      self._scope.cancel()
    if not self._holder.done():
      await asyncio.wait([self._holder], timeout=4 * _EXIT_SECONDS)
      self._scope.cancel()  # a remote server that does not answer to the end of its session

  def _described(self, error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # the group's own text says nothing
      error = error.exceptions[0]
    return f"{type(error).__name__}: {self.config.redact(str(error))[:2000]}"

  async def _hold(self, ready: asyncio.Future) -> None:
    import mcp
    try:
      # A 2026 HTTP session is none: only the older handshake gives a server a place to keep state.
      mode = "legacy" if self.config.sessions and self.config.url else "auto"
      with self._scope:
        transport = _filtered(self._transport(), self._ended)
        async with mcp.Client(transport, mode=mode, cache=None) as client:
          # It would check results by the server's own output schema, regular expressions and all.
          client.session.validate_tool_result = _no_check
          ready.set_result(client)
          await self._ended.wait()
    except Exception as error:
      if not ready.done():
        ready.set_exception(error)
      else:
        logging.debug("the MCP server %s: %s", self.config.label, self._described(error))
    finally:
      self._ended.set()
      if not ready.done():
        ready.cancel()

  def _transport(self) -> Any:
    if self.config.command:
      return _stdio(self.config, self._stderr)
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamable_http_client
    if self.config.transport == "sse":
      return sse_client(self.config.url, dict(self.config.headers),
                        httpx_client_factory=lambda headers, timeout, auth: self._http(headers))
    return _closing(self._http(self.config.headers), lambda http: streamable_http_client(
        self.config.url, http_client=http, max_sse_event_size=MAX_MESSAGE))

  def _http(self, headers: Any) -> Any:
    import httpx2

    async def bound(response: Any) -> None:
      if response.status_code in (400, 404) and "mcp-session-id" in response.request.headers:
        self._refused = True
      if response.headers.get("content-encoding", "identity").lower() != "identity":
        response.stream = _bounded(response.stream, 0, "is compressed, which was not asked for")
      elif not response.headers.get("content-type", "").startswith("text/event-stream"):
        response.stream = _bounded(response.stream, MAX_MESSAGE, f"has more than {MAX_MESSAGE} bytes")

    return httpx2.AsyncClient(headers={**dict(headers or {}), "accept-encoding": "identity"},
                              timeout=httpx2.Timeout(30.0, read=300.0),
                              event_hooks={"response": [bound]})


async def _no_check(name: str, result: Any) -> None:
  """For `ClientSession.validate_tool_result`: a result is shown, whatever was promised of it."""


def _bounded(stream: Any, most: int, fault: str) -> Any:
  """The stream of a response's body, which fails after `most` bytes."""
  import httpx2

  class Bounded(httpx2.AsyncByteStream):
    async def __aiter__(self):
      size = 0
      async for chunk in stream:
        if (size := size + len(chunk)) > most:
          raise httpx2.StreamError(f"the answer {fault}")  # ends the call and not the session
        yield chunk

    async def aclose(self):
      await stream.aclose()

  return Bounded()


@contextlib.asynccontextmanager
async def _closing(http: Any, transport: Callable[[Any], Any]) -> AsyncIterator[Any]:
  async with http, transport(http) as streams:
    yield streams


@contextlib.asynccontextmanager
async def _filtered(transport: Any, ended: asyncio.Event) -> AsyncIterator[Any]:
  """A transport that hands on answers, and few of the server's own requests."""
  import anyio
  from mcp import types

  last = -_BETWEEN_REQUESTS

  def wanted(item: Any) -> bool:
    nonlocal last
    if isinstance(item, Exception):
      return False
    if not isinstance(item.message, types.JSONRPCRequest):
      return isinstance(item.message, (types.JSONRPCResponse, types.JSONRPCError))
    if time.monotonic() - last < _BETWEEN_REQUESTS:
      return False
    last = time.monotonic()
    return True

  async with transport as (read, write), anyio.create_task_group() as tasks:
    send, receive = anyio.create_memory_object_stream(0)

    async def pump() -> None:
      async with send:
        try:
          async for item in read:
            if wanted(item):
              await send.send(item)
            else:
              await asyncio.sleep(0)  # a flood must not hold up the loop
        finally:
          ended.set()  # before those who wait learn that no answer will come

    tasks.start_soon(pump)
    yield receive, write
    tasks.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _stdio(config: McpConfig, stderr: collections.deque[bytes]) -> AsyncIterator[Any]:
  """A local server's transport. The package's own keeps a line of any length in memory, ends at a byte
  that is no UTF-8 and writes a traceback for every line that is no message."""
  import anyio
  from mcp.client.stdio import get_default_environment

  process = await asyncio.create_subprocess_exec(
    *config.command, env=get_default_environment() | dict(config.env), cwd=config.cwd,
    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    start_new_session=True, limit=MAX_MESSAGE)
  _groups.add(process.pid)
  try:
    send, receive = anyio.create_memory_object_stream(0)
    outgoing, written = anyio.create_memory_object_stream(0)
    async with anyio.create_task_group() as tasks:
      tasks.start_soon(_read_messages, process.stdout, send)
      tasks.start_soon(_write_messages, written, process.stdin, send)
      tasks.start_soon(_keep_end, process.stderr, stderr)
      yield receive, outgoing
      tasks.cancel_scope.cancel()
  finally:
    with anyio.CancelScope(shield=True):
      await _end(process)
      _groups.discard(process.pid)


_groups: set[int] = set()  # process groups of local servers that run


@atexit.register
def _kill_groups() -> None:
  """Most servers end with their input; those that do not must not outlive the trainer."""
  for group in _groups:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(group, signal.SIGKILL)


async def _read_messages(stdout: asyncio.StreamReader, send: Any) -> None:
  from mcp.shared.message import SessionMessage
  from mcp.types import jsonrpc_message_adapter
  async with send:
    while True:
      try:
        line = await stdout.readuntil(b"\n")
      except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return  # it ended, or its line has no end
      try:
        message = jsonrpc_message_adapter.validate_json(line.decode("utf-8", "replace"), by_name=False)
      except ValueError:
        message = _refusal(line)
      if message is None:  # what programs print
        await asyncio.sleep(0)
      else:
        await send.send(SessionMessage(message))


def _refusal(line: bytes) -> Any:
  """For an answer that cannot be read (JSON that is too deep, half a character): an error in its place,
  so that nobody waits for it. None for what is no answer."""
  from mcp import types
  head = line[:1000]
  number = _ANSWER_ID.search(head) if b'"jsonrpc"' in head else None
  if number is None:
    return None
  error = types.ErrorData(code=types.PARSE_ERROR, message="its answer cannot be read")
  return types.JSONRPCError(jsonrpc="2.0", id=int(number[1]), error=error)


async def _write_messages(written: Any, stdin: asyncio.StreamWriter, send: Any) -> None:
  try:
    async with written:
      async for item in written:
        line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
        stdin.write(line.encode("utf-8", "replace") + b"\n")
        await stdin.drain()
  except OSError:  # the server has ended; whoever waits for an answer must learn it
    await send.aclose()


async def _keep_end(stream: asyncio.StreamReader, kept: collections.deque[bytes]) -> None:
  while data := await stream.read(_STDERR_BYTES):
    kept.append(data)


async def _end(process: asyncio.subprocess.Process) -> None:
  """Closes the server's input, then terminates it, then kills it and what it has started."""
  process.stdin.close()
  for number in (None, signal.SIGTERM, signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError, PermissionError):
      if number:
        os.killpg(process.pid, number)
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(_EXIT_SECONDS):
        while process.returncode is None:  # wait() would wait for its pipes too
          await asyncio.sleep(0.02)
        break
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)  # its children
  # What was not read: it may be large, and the reader is part of a cycle that is not collected soon.
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(0.5):
      while await process.stdout.read(1 << 20):
        pass
  process._transport.close()  # the pipes, which a child may still hold
