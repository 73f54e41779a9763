"""Tools of an MCP server (Model Context Protocol), local over stdio or remote over HTTP.

In: where the server is. Out: one Tool for each that it lists, with its schema. Its texts and images
become observations. A connection that breaks is made anew by the next call.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.arguments import ArgumentError
from axpo_jax.agent.tools.base import TOOL_ERROR, EpisodeState, Observation, Tool, failure
from axpo_jax.data.question import ImageError, load_image


class McpError(RuntimeError):
  """A server that cannot be reached, or that offers no such tool."""


@dataclasses.dataclass(frozen=True)
class McpConfig:
  """Where a server is and what its tools may do.

  Attributes:
    command: program and arguments of a local server, or
    url: address of a remote one.
    env: variables of a local server; of the trainer's it gets the harmless ones alone (PATH, HOME).
    scope: what all its tools need to be granted.
    prefix: put in front of their names.
    only: names of the tools to offer; empty = all.
    time_limit: seconds a call may take.
    max_concurrent: calls of one tool at once.
    connect_seconds: seconds that starting and listing may take.
  """

  command: tuple[str, ...] = ()
  url: str = ""
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  scope: str = "network"
  prefix: str = ""
  only: tuple[str, ...] = ()
  time_limit: float = 60.0
  max_concurrent: int = 8
  connect_seconds: float = 60.0

  def __post_init__(self):
    if bool(self.command) == bool(self.url):
      raise ValueError("an MCP server needs either a command or a url; got "
                       f"command={self.command!r}, url={self.url!r}")


class McpServer:
  """One connection. It lives in a task of its own on the tools' loop, as its protocol asks."""

  def __init__(self, config: McpConfig):
    try:
      import mcp
    except ImportError as error:
      raise ImportError("MCP servers need the mcp package: pip install 'axpo_jax[tools]'"
                        ) from error
    self.config, self._mcp = config, mcp
    self._client: Any = None
    self._holder: asyncio.Task | None = None
    self._opening = asyncio.Lock()
    self._stop = asyncio.Event()

  def tools(self) -> list[McpTool]:
    """Connects and lists the server's tools.

    Raises:
      McpError: it cannot be reached, or lacks a tool that the config names.
    """
    listed = background.run(self._list())
    if missing := sorted(set(self.config.only) - {tool.name for tool in listed}):
      raise McpError(f"{self._where} has no tools {missing}; it has "
                     f"{sorted(tool.name for tool in listed)}")
    return [McpTool(self, tool) for tool in listed
            if not self.config.only or tool.name in self.config.only]

  def close(self) -> None:
    """Ends the connection, and a local server with it. It ends with this process too."""
    background.run(self._close())

  async def call(self, name: str, arguments: dict[str, Any]) -> Any:
    """The server's CallToolResult. Raises what the connection raises."""
    client = await self._connected()
    try:
      return await client.call_tool(name, arguments,
                                    read_timeout_seconds=self.config.time_limit)
    except self._mcp.MCPError as error:
      if error.code == self._mcp.types.CONNECTION_CLOSED:
        await self._close()
      raise

  @property
  def _where(self) -> str:
    return self.config.url or " ".join(self.config.command)

  async def _list(self) -> list[Any]:
    client = await self._connected()
    found, cursor = [], None
    while True:
      page = await client.list_tools(cursor=cursor)
      found += page.tools
      if not (cursor := page.next_cursor):
        return found

  async def _connected(self) -> Any:
    async with self._opening:
      if self._holder is None or self._holder.done():
        ready = asyncio.get_running_loop().create_future()
        self._stop.clear()
        self._holder = asyncio.create_task(self._hold(ready))
        try:
          async with asyncio.timeout(self.config.connect_seconds):
            self._client = await asyncio.shield(ready)
        except Exception as error:  # of the program, the network, the protocol
          self._holder.cancel()
          raise McpError(f"the MCP server {self._where} cannot be reached: "
                         f"{type(error).__name__}: {_root(error)}") from error
      return self._client

  async def _hold(self, ready: asyncio.Future) -> None:
    try:
      async with self._mcp.Client(self._target()) as client:
        ready.set_result(client)
        await self._stop.wait()
    except Exception as error:
      if not ready.done():
        ready.set_exception(error)

  def _target(self) -> Any:
    if self.config.url:
      return self.config.url
    program, *arguments = self.config.command
    return self._mcp.StdioServerParameters(command=program, args=arguments,
                                           env=dict(self.config.env))

  async def _close(self) -> None:
    self._stop.set()
    if self._holder is not None:
      await asyncio.wait([self._holder], timeout=10)
      self._holder.cancel()
      self._holder = None


class McpTool(Tool):
  """One tool of a server."""

  waits = True

  def __init__(self, server: McpServer, listed: Any):
    self._server, self._remote_name = server, listed.name
    self.name = server.config.prefix + listed.name
    self.scope = server.config.scope
    self.time_limit, self.max_concurrent = server.config.time_limit, server.config.max_concurrent
    self.schema = {"type": "function", "function": {
        "name": self.name, "description": listed.description or "",
        "parameters": dict(listed.input_schema)}}
    self._validator = _validator(listed.input_schema)

  def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """By the whole of JSON schema: a server's schemas may use all of it."""
    import jsonschema
    try:
      problem = jsonschema.exceptions.best_match(self._validator.iter_errors(dict(arguments)))
    except Exception:  # the schema itself is at fault: let the server judge
      problem = None
    if problem is not None:
      where = f"{problem.json_path}: " if problem.path else ""
      raise ArgumentError(f"{where}{problem.message[:300]}")
    return dict(arguments)

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Calls the server; its error results are error observations."""
    result = await self._server.call(self._remote_name, arguments)
    texts, images = [], []
    for block in result.content:
      if block.type == "image":
        try:
          images.append(load_image(base64.b64decode(block.data, validate=True)))
        except (ImageError, binascii.Error) as error:
          texts.append(f"(an image that cannot be read: {error})")
      else:
        texts.append(_text(block))
    text = "\n".join(texts)
    return failure(TOOL_ERROR, text) if result.is_error else Observation(text, tuple(images))


def _validator(schema: Mapping[str, Any]) -> Any:
  import jsonschema
  import referencing
  # An empty registry: a schema that refers elsewhere must not make us fetch anything.
  kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
  return kind(schema, registry=referencing.Registry())


def _text(block: Any) -> str:
  """Text of a block, or what it is where it has none."""
  if block.type == "text":
    return block.text
  if block.type == "resource":
    return getattr(block.resource, "text", None) or f"({block.resource.uri})"
  return f"({getattr(block, 'uri', None) or block.type})"


def _root(error: BaseException) -> BaseException:
  """The first of a group of errors: the group's own text says nothing."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  return error


def servers(configs: Sequence[Mapping[str, Any]]) -> list[McpServer]:
  """Servers of a list of records with the fields of McpConfig; `$NAME` in `env` is the trainer's
  variable of that name."""
  made = []
  for record in configs:
    fields = dict(record)
    fields["env"] = {name: os.path.expandvars(value)
                     for name, value in dict(fields.get("env", {})).items()}
    for name in ("command", "only"):
      fields[name] = tuple(fields.get(name, ()))
    made.append(McpServer(McpConfig(**fields)))
  return made
