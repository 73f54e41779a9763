"""A real MCP server, run as a process of its own by test_mcp.py: `mcp_example.py [PORT]`."""

import io
import os
import sys
import time

import PIL.Image
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("example")


@server.tool()
def add(first: int, second: int = 2) -> str:
  """Adds two numbers."""
  return str(first + second)


@server.tool()
def square(side: int):
  """Paints a red square and says so."""
  buffer = io.BytesIO()
  PIL.Image.new("RGB", (side, side), (255, 0, 0)).save(buffer, format="PNG")
  return ["here it is", Image(data=buffer.getvalue(), format="png")]


@server.tool()
def broken_image():
  """Returns what is no image."""
  return Image(data=b"not a PNG", format="png")


@server.tool()
def fail() -> str:
  """Fails."""
  raise ToolError("out of paint")


@server.tool()
def slow(seconds: float) -> str:
  """Takes its time."""
  time.sleep(seconds)
  return "done"


@server.tool()
def leave() -> str:
  """Ends the server."""
  os._exit(1)


@server.tool()
def variable(name: str) -> str:
  """One variable of the server's environment."""
  return os.environ.get(name, "(unset)")


_kept: dict[int, list[str]] = {}  # by session


@server.tool()
def keep(text: str, ctx: Context) -> str:
  """Keeps a text for this session, and lists those it has."""
  _kept.setdefault(id(ctx.session), []).append(text)
  return str(_kept[id(ctx.session)])


if __name__ == "__main__":
  if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
  else:
    server.run()
