"""Tools of an MCP server (Model Context Protocol), local over stdio or remote over HTTP.

In: where the server is (`mcp_config`). Out: one Tool for each that it lists, with its schema. Its texts
and images become observations. A server without state serves all episodes by one session, which is made
anew when it broke; one with state has a session for every episode that calls it, in which the calls of
a transcript that is continued are made again.

What a server says is not ours: names, descriptions and schemas are bounded when they are listed,
arguments are checked within a number of steps, and results within sizes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from axpo_jax.agent import parse
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.arguments import ArgumentError
from axpo_jax.agent.tools.base import (
  TIMEOUT,
  TOOL_ERROR,
  EpisodeState,
  Observation,
  PastCall,
  Tool,
  failure,
)
from axpo_jax.agent.tools.mcp_config import McpConfig
from axpo_jax.agent.tools.mcp_connection import Connection, ConnectionLost, McpError
from axpo_jax.data.question import ImageError, load_image

SESSION_LOST = "session_lost"  # an episode's session, and the server's state with it
MAX_IMAGES, MAX_IMAGE_PIXELS = 8, 1 << 24  # of one result; of one image
_MAX_PAGES, _MAX_TOOLS = 50, 256
_MAX_TIMEOUTS = 3  # in a row, after which a shared session is made anew
_MAX_DESCRIPTION, _MAX_SCHEMA, _MAX_SCHEMAS = 8192, 65_536, 262_144  # characters
_MAX_DEPTH = 32
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")


class McpServer:
  """The sessions with one server. Made anywhere; everything runs on the tools' loop."""

  def __init__(self, config: McpConfig):
    try:
      import mcp  # noqa: F401
    except ImportError as error:
      raise ImportError("MCP servers need the mcp package: pip install 'axpo_jax[tools]'"
                        ) from error
    self.config = config
    self.names: frozenset[str] = frozenset()  # of its tools, as the policy calls them
    self._opening = asyncio.Lock()
    self._shared: Connection | None = None
    self._failed: tuple[float, McpError] | None = None  # when the last opening did, and how
    self._free = asyncio.Semaphore(config.sessions)
    self._unused: Connection | None = None  # was opened to list the tools
    self._own: set[Connection] = set()  # of episodes

  def tools(self) -> list[McpTool]:
    """Connects and lists the server's tools.

    Raises:
      McpError: it cannot be reached, takes too long, or lacks a tool that the config names.
    """
    listed = background.run(self._list())
    only = self.config.only
    if missing := sorted(set(only) - {tool.name for tool in listed}):
      raise McpError(f"the MCP server {self.config.label} has no tools {missing}; it has "
                     f"{sorted(tool.name for tool in listed)}")
    tools = [McpTool(self, tool) for tool in listed if not only or tool.name in only]
    self.names = frozenset(tool.name for tool in tools)
    size = sum(len(json.dumps(tool.schema)) for tool in tools)
    if size > _MAX_SCHEMAS:
      raise McpError(f"the {len(tools)} tools of the MCP server {self.config.label} have schemas of "
                     f"{size} characters, more than {_MAX_SCHEMAS}: name those you want in `only`")
    return tools

  def close(self) -> None:
    """Ends all sessions, and a local server with them. They end with this process too."""
    background.run(self._close())

  async def call(self, name: str, arguments: dict[str, Any], episode: EpisodeState) -> Any:
    """The server's CallToolResult.

    Raises:
      TimeoutError: the call took too long.
      McpError: anything else that went wrong.
    """
    if self.config.sessions:
      connection = await self._of_episode(episode)
      try:
        return await self._timed(connection, name, arguments)
      except ConnectionLost:
        self._forget(episode, connection)
        raise
    connection = await self._connected()
    try:
      return await self._timed(connection, name, arguments)
    except ConnectionLost as lost:
      if not lost.unseen:  # it may have been done; the policy decides
        raise
      return await self._timed(await self._connected(), name, arguments)

  def release(self, episode: EpisodeState) -> None:
    """Lets go of the episode's session, if it has one."""
    connection = episode.memory.pop(self._key, None)
    if connection is not None:
      asyncio.run_coroutine_threadsafe(self._end(connection), background.loop())

  @property
  def _key(self) -> str:
    return f"mcp session {id(self)}"

  async def _timed(self, connection: Connection, name: str, arguments: dict[str, Any]) -> Any:
    try:
      async with asyncio.timeout(self.config.time_limit):
        result = await connection.call(name, arguments)
    except TimeoutError:
      connection.timeouts += 1
      if connection.timeouts >= _MAX_TIMEOUTS and not self.config.sessions:
        connection.abandon()  # it answers nobody any more
      raise
    connection.timeouts = 0
    return result

  async def _list(self) -> list[Any]:
    """The tools that may be offered. Raises McpError."""
    connection = await (self._open() if self.config.sessions else self._connected())
    try:
      async with asyncio.timeout(self.config.connect_seconds):
        listed = await self._pages(connection)
    except McpError:
      await connection.close()
      raise
    except TimeoutError as error:
      await connection.close()
      raise McpError(f"the MCP server {self.config.label} did not list its tools within "
                     f"{self.config.connect_seconds:g} seconds") from error
    if self.config.sessions:
      self._unused = connection
    return [tool for tool in listed if self._usable(tool)]

  async def _pages(self, connection: Connection) -> list[Any]:
    found, cursor = [], None
    for _ in range(_MAX_PAGES):
      page = await connection.list_tools(cursor)
      found += page.tools
      if not (cursor := page.next_cursor) or len(found) > _MAX_TOOLS:
        break
    if cursor or len(found) > _MAX_TOOLS:
      raise McpError(f"the MCP server {self.config.label} lists more than {_MAX_TOOLS} tools or "
                     f"{_MAX_PAGES} pages of them")
    return found

  def _usable(self, tool: Any) -> bool:
    """Whether a prompt can hold it; what cannot is left out and logged."""
    reason = ""
    if not _NAME.fullmatch(tool.name):
      reason = "its name has other characters than A-Z a-z 0-9 _ . / - or more than 128"
    elif parse.deeper_than(_MAX_DEPTH, tool.input_schema):
      reason = f"its schema is more than {_MAX_DEPTH} levels deep"
    elif (size := len(json.dumps(tool.input_schema))) > _MAX_SCHEMA:
      reason = f"its schema has {size} characters, more than {_MAX_SCHEMA}"
    if reason:
      logging.warning("the MCP server %s: the tool %.40r is left out: %s", self.config.label,
                      tool.name, reason)
    return not reason

  async def _open(self) -> Connection:
    connection = Connection(self.config)
    await connection.connect()
    return connection

  async def _connected(self) -> Connection:
    """The session that all episodes share."""
    asked = asyncio.get_running_loop().time()
    async with self._opening:
      if self._shared is not None and self._shared.alive:
        return self._shared
      if self._failed and self._failed[0] >= asked:  # while this call waited for its turn
        raise self._failed[1]
      if self._shared is not None:
        background.keep(self._shared.close())
      try:
        self._shared = await self._open()
      except McpError as error:
        self._failed = asyncio.get_running_loop().time(), error
        raise
      return self._shared

  async def _of_episode(self, episode: EpisodeState) -> Connection:
    """The episode's own session, with the calls of its transcript's past made again."""
    known = self._key in episode.memory
    connection = episode.memory.get(self._key)
    if connection is not None and connection.alive:
      return connection
    if connection is not None:
      self._forget(episode, connection)
      raise ConnectionLost(f"the session with the MCP server {self.config.label} was lost, and all "
                           "that it held; the next call begins anew")
    connection = await self._take()
    try:
      for past in [] if known else calls_to_repeat(episode.history, self):
        await self._timed(connection, past.call.name.removeprefix(self.config.prefix),
                          past.call.arguments)
    except BaseException as error:
      background.keep(self._end(connection))
      if isinstance(error, (McpError, TimeoutError)):
        episode.memory[self._key] = None
        raise ConnectionLost("the calls of the past could not be made again in a session of the MCP "
                             f"server {self.config.label}; the next call begins anew") from error
      raise
    episode.memory[self._key] = connection
    return connection

  def _forget(self, episode: EpisodeState, connection: Connection) -> None:
    """Drops a lost session; the call that found it lost reports that to the policy."""
    episode.memory[self._key] = None
    background.keep(self._end(connection))

  async def _take(self) -> Connection:
    """A session that nobody has used, once one is free."""
    try:
      async with asyncio.timeout(self.config.connect_seconds):
        await self._free.acquire()
    except TimeoutError as error:
      raise McpError(f"all {self.config.sessions} sessions of the MCP server {self.config.label} "
                     "are in use by other episodes") from error
    try:
      connection, self._unused = self._unused, None
      if connection is None or not connection.alive:
        connection = await self._open()
    except BaseException:
      self._free.release()
      raise
    self._own.add(connection)
    return connection

  async def _end(self, connection: Connection) -> None:
    """Closes an episode's session and lets another one open; again is harmless."""
    if connection in self._own:
      self._own.discard(connection)
      try:
        await connection.close()
      finally:
        self._free.release()

  async def _close(self) -> None:
    ends = [self._end(connection) for connection in list(self._own)]
    ends += [one.close() for one in (self._shared, self._unused) if one is not None]
    await asyncio.gather(*ends, return_exceptions=True)


class McpTool(Tool):
  """One tool of a server."""

  waits = True

  def __init__(self, server: McpServer, listed: Any):
    self.server, self._remote_name = server, listed.name
    self.name = server.config.prefix + listed.name
    self.scope = server.config.scope
    self.parallel = not server.config.sessions
    self.max_concurrent = server.config.max_concurrent  # calls and connecting have limits of their own
    description = _clean(listed.description or "")
    if len(description) > _MAX_DESCRIPTION:
      description = f"{description[:_MAX_DESCRIPTION]} [...]"
    self.schema = {"type": "function", "function": {
        "name": self.name, "description": description, "parameters": _clean(listed.input_schema)}}

  def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As the schema says, and no more: servers have no aliases, and fill in their own defaults."""
    if problem := self._checker.problem(dict(arguments)):
      raise ArgumentError(problem)
    return dict(arguments)

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Calls the server; its error results are error observations."""
    try:
      result = await self.server.call(self._remote_name, arguments, episode)
    except TimeoutError:
      return failure(TIMEOUT, f"{self.name} took longer than {self.server.config.time_limit:g} seconds")
    except ConnectionLost as error:
      return failure(SESSION_LOST if self.server.config.sessions else TOOL_ERROR, str(error))
    except McpError as error:
      return failure(TOOL_ERROR, str(error))
    except asyncio.CancelledError:  # the episode is over, perhaps since before it had its session
      self.server.release(episode)
      raise
    # Decoding takes a while, and other tools' clocks run on this loop.
    text, images = await asyncio.to_thread(_content, result.content)
    if result.is_error:
      return failure(TOOL_ERROR, self.server.config.redact(text))
    return Observation(text, images)

  def end(self, episode: EpisodeState) -> None:
    self.server.release(episode)


def calls_to_repeat(history: list[PastCall], server: McpServer) -> list[PastCall]:
  """The calls whose effects a session must hold: those that reached the server since the last loss."""
  calls: list[PastCall] = []
  for past in history:
    if past.call.name in server.names and past.error == SESSION_LOST:
      calls = []
    elif past.call.name in server.names and past.error in (None, TOOL_ERROR):
      calls.append(past)
  return calls


def _content(blocks: list[Any]) -> tuple[str, tuple[Any, ...]]:
  """Text and images of a result."""
  texts, images = [], []
  for block in blocks:
    if block.type != "image":
      texts.append(_text(block))
    elif len(images) == MAX_IMAGES:
      texts.append(f"(an image is left out: at most {MAX_IMAGES} are shown)")
    else:
      try:
        images.append(load_image(base64.b64decode(block.data, validate=True),
                                 max_pixels=MAX_IMAGE_PIXELS))
      except (ImageError, binascii.Error, ValueError) as error:
        texts.append(f"(an image that cannot be read: {error})")
  return "\n".join(texts), tuple(images)


def _text(block: Any) -> str:
  """Text of a block, or what it is where it has none."""
  if block.type == "text":
    return block.text
  if block.type == "resource":
    return getattr(block.resource, "text", None) or f"({block.resource.uri})"
  return f"({getattr(block, 'uri', None) or block.type})"


def _clean(value: Any) -> Any:
  """A JSON value whose texts can be encoded: halves of characters become "?"."""
  return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
