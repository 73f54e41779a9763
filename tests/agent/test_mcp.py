"""Tools of real MCP servers, each a process of its own, over stdio and over HTTP."""

import asyncio
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.mcp_config import McpConfig, config_of, read
from axpo_jax.agent.tools.mcp_connection import McpError
from axpo_jax.agent.tools.mcp_server import McpServer

EXAMPLE = str(pathlib.Path(__file__).with_name("mcp_example.py"))
NAMES = {"add", "square", "broken_image", "fail", "slow", "leave", "variable", "keep"}


@pytest.fixture(scope="module")
def local():
  server = McpServer(McpConfig(command=(sys.executable, EXAMPLE), scope="paint",
                               env={"AXPO_GIVEN": "yes"}))
  yield server
  server.close()


@pytest.fixture(scope="module")
def remote():
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  process = subprocess.Popen([sys.executable, EXAMPLE, str(port)], stderr=subprocess.DEVNULL)
  for _ in range(600):
    try:
      socket.create_connection(("127.0.0.1", port), 0.1).close()
      break
    except OSError:
      assert process.poll() is None
      time.sleep(0.1)
  server = McpServer(McpConfig(url=f"http://127.0.0.1:{port}/mcp", scope="paint"))
  yield server
  server.close()
  process.terminate()
  process.wait()


@pytest.fixture(params=["local", "remote"])
def server(request):
  return request.getfixturevalue(request.param)


def call(server, name, arguments):
  box = ToolBox(server.tools(), ["paint"])
  return asyncio.run(box.call(name, arguments, EpisodeState("q", [])))


def test_its_tools_appear_with_their_schemas(server):
  tools = {tool.name: tool for tool in server.tools()}
  assert tools.keys() == NAMES
  function = tools["add"].schema["function"]
  assert function["name"] == "add" and function["description"] == "Adds two numbers."
  assert function["parameters"]["required"] == ["first"]
  assert function["parameters"]["properties"]["second"]["default"] == 2
  assert tools["add"].scope == "paint" and tools["add"].waits


def test_texts_and_images_become_observations(server):
  assert call(server, "add", {"first": 40}).text == "42"
  seen = call(server, "square", {"side": 5})
  assert seen.error is None and seen.text == "here it is"
  assert [(i.size, i.getpixel((0, 0))) for i in seen.images] == [((5, 5), (255, 0, 0))]


def test_what_goes_wrong_is_an_observation(server):
  assert "out of paint" in (seen := call(server, "fail", {})).text and seen.error == "tool_error"
  assert "cannot be read" in (seen := call(server, "broken_image", {})).text and not seen.images
  assert call(server, "add", {"first": "x"}).error == "bad_arguments"
  seen = call(server, "add", {})
  assert seen.error == "bad_arguments" and "missing argument 'first'" in seen.text


def test_scopes_hold_for_remote_tools(server):
  box = ToolBox(server.tools(), ["read_image"])
  seen = asyncio.run(box.call("add", {"first": 1}, EpisodeState("q", [])))
  assert seen.error == "refused" and "'paint'" in seen.text


def test_a_call_that_takes_too_long_and_the_next():
  server = McpServer(McpConfig(command=(sys.executable, EXAMPLE), time_limit=2.0, scope="paint"))
  try:
    assert call(server, "slow", {"seconds": 10}).error in ("timeout", "tool_error")
    assert any(call(server, "add", {"first": 1}).text == "3" for _ in range(10))
  finally:
    server.close()


def test_a_server_that_died_is_started_again(local):
  assert call(local, "leave", {}).error == "tool_error"
  seen = [call(local, "add", {"first": 1}) for _ in range(2)]
  assert seen[-1].text == "3"


def test_a_local_server_sees_what_it_is_given_alone(local, monkeypatch):
  monkeypatch.setenv("AXPO_SECRET", "gold")
  assert call(local, "variable", {"name": "AXPO_GIVEN"}).text == "yes"
  fresh = McpServer(config_of({
    "command": [sys.executable, EXAMPLE], "scope": "paint", "env": {"TOKEN": "$AXPO_SECRET"},
    "only": ["variable"], "prefix": "env_"}))
  try:
    assert [tool.name for tool in fresh.tools()] == ["env_variable"]
    assert call(fresh, "env_variable", {"name": "AXPO_SECRET"}).text == "(unset)"
    assert call(fresh, "env_variable", {"name": "TOKEN"}).text == "gold"
  finally:
    fresh.close()


def written(tmp_path, content):
  path = tmp_path / "servers.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def test_files_of_other_programs_are_read(tmp_path, monkeypatch):
  monkeypatch.setenv("LOOKUP_TOKEN", "tok-123456")
  monkeypatch.delenv("NOWHERE", raising=False)
  files, lookup, old = read(written(tmp_path, {"mcpServers": {
    "files": {"type": "stdio", "command": "npx", "args": ["-y", "server-files", "${HOME}/x"],
              "env": {"LEVEL": "${NOWHERE:-info}", "PRICE": "5$$"}, "autoApprove": ["read"]},
    "off": {"command": "x", "disabled": True},
    "lookup": {"type": "http", "url": "https://example.org/mcp", "scope": "web", "prefix": "l_",
               "headers": {"Authorization": "Bearer $LOOKUP_TOKEN"}},
    "old": {"type": "sse", "url": "https://example.org/sse"}}}))
  assert files.command == ("npx", "-y", "server-files", f"{os.environ['HOME']}/x")
  assert files.env == {"LEVEL": "info", "PRICE": "5$"} and files.label == "files"
  assert lookup.headers == {"Authorization": "Bearer tok-123456"} and lookup.scope == "web"
  assert old.transport == "sse" and lookup.transport == "http"
  assert lookup.redact("at https://u:p@example.org/mcp?k=v with tok-123456") == (
    "at https://example.org/... with ***")


@pytest.mark.parametrize("content, message", [
  ("{", "is not JSON"), ("[3]", "expected a list of servers"), ('{"servers": []}', "mcpServers"),
  ([{"url": "http://x", "headers": {"A": "$AXPO_UNSET"}}], r"names \$AXPO_UNSET, which is not set"),
  ([{"command": ["x", "${AXPO_UNSET}"]}], r"names \$AXPO_UNSET, which is not set"),
  ([{"command": ["x"], "comand": 1}], r"unknown fields \['comand'\]"),
  ([{"command": ["x"], "url": "http://x"}], "has both"),
  ([{"command": "x", "type": "http"}], "is reached by stdio"),
  ([{"url": "http://x", "type": "carrier pigeon"}], "is reached by http or sse"),
  ([{"command": ["x"], "sessions": -1}], "sessions=-1"),
  ([{"command": [7]}], "expected texts, got int"), ([{"command": ["x"], "sessions": "all"}], "wrong type"),
])
def test_files_that_cannot_work(tmp_path, monkeypatch, content, message):
  monkeypatch.delenv("AXPO_UNSET", raising=False)
  with pytest.raises(ValueError, match=message):
    read(written(tmp_path, content))


@pytest.mark.parametrize("config", [
    McpConfig(command=("/nowhere/at/all",)), McpConfig(url="http://127.0.0.1:9/mcp"),
    McpConfig(command=(sys.executable, "-c", "raise SystemExit(1)"), connect_seconds=30),
])
def test_servers_that_are_not_there(config):
  with pytest.raises(McpError, match="cannot be reached"):
    McpServer(config).tools()


def test_a_tool_that_the_server_lacks(local):
  server = McpServer(McpConfig(command=local.config.command, only=("add", "subtract")))
  with pytest.raises(McpError, match="subtract"):
    server.tools()
  server.close()
  with pytest.raises(ValueError, match="either a command or a url"):
    McpConfig()
