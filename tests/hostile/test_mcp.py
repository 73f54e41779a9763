"""Servers of the Model Context Protocol that break its rules. All are real processes."""

import asyncio
import contextlib
import functools
import gc
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
import zlib

import pytest

from axpo_jax.agent.parse import ToolCall
from axpo_jax.agent.tools import background, mcp_connection
from axpo_jax.agent.tools.base import EpisodeState, PastCall, ToolBox
from axpo_jax.agent.tools.mcp_config import McpConfig
from axpo_jax.agent.tools.mcp_connection import McpError
from axpo_jax.agent.tools.mcp_server import McpServer
from tests.children import until
from tests.hostile import corpus

SERVER = str(pathlib.Path(__file__).with_name("mcp_servers.py"))


@contextlib.contextmanager
def serving(attack="", **fields):
  settings = {"name": "hostile", "scope": "any", "time_limit": 3.0, "connect_seconds": 30.0}
  if "url" not in fields:
    settings["command"] = (sys.executable, "-S", SERVER, attack)
  server = McpServer(McpConfig(**(settings | fields)))
  try:
    yield server
  finally:
    server.close()


def boxed(server):
  return ToolBox(server.tools(), ["any"])


def call(box, text="hello", name="echo", episode=None):
  episode = episode or EpisodeState("q", [])
  return asyncio.run(box.call(name, {"text": text}, episode))


# ---- what it lists ----

@pytest.mark.parametrize("attack, message", [
  ("a handshake that hangs", "cannot be reached: TimeoutError"),
  ("a listing that hangs", "did not list its tools within 3 seconds"),
  ("a listing of pages without end", "more than 256 tools or 50 pages"),
  ("a schema of 5,000 levels", "its answer cannot be read"),
  ("300 tools", "more than 256 tools"),
  ("many large schemas", "name those you want in `only`"),
])
def test_a_start_that_is_refused(attack, message):
  # Those that hang take the whole of it; the others must not meet it on a busy machine.
  limit = 3.0 if "hangs" in attack else 30.0
  with (corpus.bounds(seconds=limit + 10), serving(attack, connect_seconds=limit) as server,
        pytest.raises(McpError, match=message)):
    server.tools()


@pytest.mark.parametrize("attack", [
  "a name with a special token", "a name of a million letters", "a schema of 60 levels",
  "a schema of a megabyte"])
def test_a_tool_that_no_prompt_can_hold_is_left_out(attack, caplog):
  with serving(attack) as server:
    assert [tool.name for tool in server.tools()] == ["echo", "remember", "recall"]
  assert "is left out" in caplog.text and len(caplog.text) < 2000


def test_a_long_description_is_cut():
  with serving("a description of a megabyte") as server:
    assert len(server.tools()[0].schema["function"]["description"]) < 9000


def test_special_tokens_of_a_server_are_text_in_the_prompt(chat):
  with serving("special tokens in description and schema") as server:
    schemas = boxed(server).schemas()
  added = set(chat.tokenizer.get_added_vocab().values())
  ids, plain = chat.prompt_ids("", schemas, "Hi", 0), chat.prompt_ids("", [], "Hi", 0)
  ours = chat.encode("<tools></tools><tool_call></tool_call>")  # what the template itself writes
  assert [i for i in ids if i == chat.image_pad_id] == []
  assert sum(i == chat.im_start_id for i in ids) == 1 + sum(i == chat.im_start_id for i in plain)
  assert sum(i in added for i in ids) <= sum(i in added for i in plain) + len(ours) + 2
  assert "Obey." in chat.decode(ids)


@pytest.mark.parametrize("attack", [
  "a pattern that is never matched", "definitions that double", "a schema that refers to itself"])
def test_a_schema_whose_check_never_ends(attack):
  with serving(attack, time_limit=20.0) as server, corpus.bounds(seconds=20):
    assert call(boxed(server), "a" * 40 + "!").error is None  # the server may judge


# ---- what it answers ----

@pytest.mark.parametrize("attack, error, shown", [
  ("", None, "hello"),
  ("bytes that are no UTF-8", None, "hello"),
  ("ten thousand lines of noise", None, "hello"),
  ("an answer to a call that nobody made", None, "hello"),
  ("notifications and requests without end", None, "hello"),
  ("a result's schema with a pattern", None, "hello"),
  ("an answer of 100,000 brackets", "tool_error", "cannot be read"),
  ("an answer of another form", "tool_error", "ValidationError"),
  ("a picture of 13,000 x 13,000", None, "cannot be read"),
  ("PostScript as a picture", None, "cannot be read"),
  ("no base64", None, "cannot be read"),
  ("a lone surrogate", "tool_error", "cannot be read"),
])
def test_an_answer(attack, error, shown):
  with serving(attack, time_limit=20.0) as server:
    box = boxed(server)
    with corpus.bounds(seconds=20, megabytes=100):
      seen = call(box)
  assert seen.error == error and shown in seen.text and not seen.images
  seen.text.encode("utf-8")


def test_lines_without_end(monkeypatch):
  """Each ends its session; what was read of it does not wait for Python's garbage collector."""
  monkeypatch.setattr(mcp_connection, "MAX_MESSAGE", 8 << 20)
  gc.disable()
  tracemalloc.start()  # the process's resident memory also grows by what malloc keeps
  try:
    with serving("a line without end", time_limit=60.0) as server:
      box = boxed(server)
      with corpus.bounds(seconds=60, megabytes=256):
        assert "was lost" in call(box).text
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(4):
          assert "was lost" in call(box).text
    until(lambda: tracemalloc.get_traced_memory()[0] - before < 4 << 20)  # lost sessions close beside us
  finally:
    tracemalloc.stop()
    gc.enable()


def test_many_pictures():
  with serving("a hundred pictures") as server:
    seen = call(boxed(server))
  assert len(seen.images) == 8 and seen.text.count("left out") == 92


def test_a_server_that_ends_under_many_calls_and_the_next():
  with serving("it ends") as server:
    box = boxed(server)

    async def together():
      return await asyncio.gather(*(box.call("echo", {"text": "x"}, EpisodeState("q", []))
                                    for _ in range(8)))
    for _ in range(2):  # it is started again each time
      seen = asyncio.run(together())
      assert {one.error for one in seen} == {"tool_error"}
      assert all("the connection to the MCP server hostile was lost" in one.text for one in seen)


def test_a_server_that_answers_nobody_is_started_again():
  with serving("never an answer", time_limit=0.3) as server:
    box = boxed(server)
    first = server._shared
    assert [call(box).error for _ in range(4)] == ["timeout"] * 4
    assert server._shared is not first


def test_a_server_killed_while_nobody_calls_is_started_again_unnoticed():
  with serving() as server:
    box = boxed(server)
    assert call(box).text == "hello"
    for child in children():
      os.kill(child, 9)
    until(lambda: not server._shared.alive)
    assert call(box).text == "hello"


def test_a_process_that_will_not_end_is_killed_with_its_children():
  tag = uuid.uuid4().hex
  with serving("a process that will not end", env={"AXPO_TAG": tag}) as server:
    assert call(boxed(server)).text == "hello"
    assert len(tagged(tag)) == 2  # it has started another
  assert not tagged(tag)


def test_a_process_that_will_not_end_does_not_outlive_the_trainer():
  tag = uuid.uuid4().hex
  code = f"""
import sys
from axpo_jax.agent.tools.mcp_config import McpConfig
from axpo_jax.agent.tools.mcp_server import McpServer
command = (sys.executable, "-S", {SERVER!r}, "a process that will not end")
McpServer(McpConfig(command=command, env={{"AXPO_TAG": {tag!r}}})).tools()
raise SystemExit("something else went wrong")
"""
  done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, text=True,
                        cwd=pathlib.Path(__file__).parents[2])
  assert done.stderr.strip() == "something else went wrong"
  until(lambda: not tagged(tag))


def tagged(tag):
  """Processes that have the tag in their environment, which children inherit."""
  return {path.parent.name for path in pathlib.Path("/proc").glob("[0-9]*/environ") if tag in _read(path)}


def nothing_left(server):
  """Waits for sessions that end in the background."""
  until(lambda: not server._own and not children())
  return True


def children():
  """The servers' processes below this one."""
  tasks = pathlib.Path("/proc/self/task").iterdir()
  found = " ".join(_read(task / "children") for task in tasks).split()
  return [int(pid) for pid in found if SERVER in _read(pathlib.Path("/proc", pid, "cmdline"))]


def _read(path):
  try:
    return path.read_text(errors="replace")
  except OSError:  # it has ended, or is another user's
    return ""


# ---- secrets ----

def test_errors_quote_no_secrets(monkeypatch):
  command = (sys.executable, "-S", SERVER, "an error that quotes secrets", "--api-key", "sk-in-argv",
             "--auth-token=tok-in-argv")
  with serving(command=command, env={"API_KEY": "sk-of-environment"}) as server:
    seen = call(boxed(server))
  assert seen.error == "tool_error" and "api.example" in seen.text
  for secret in ("sk-in-argv", "tok-in-argv", "sk-of-environment", "user:pw", "abcdef"):
    assert secret not in seen.text


@pytest.mark.parametrize("fields", [
  {"command": (sys.executable, "-c", "import sys; sys.exit('no key sk-secret-1')", "--key", "sk-secret-1")},
  {"command": (), "url": "http://127.0.0.1:9/mcp/sk-secret-1?token=sk-secret-1",
   "headers": {"Authorization": "Bearer sk-secret-1"}},
  {"command": ("/nowhere/server", "--token", "sk-secret-1")},
])
def test_a_start_that_fails_quotes_no_secrets(fields):
  with serving(**fields) as server, pytest.raises(McpError, match="hostile cannot be reached") as error:
    server.tools()
  assert "sk-secret-1" not in str(error.value)


# ---- state ----

def episodes(server, *histories):
  box = boxed(server)
  return box, [EpisodeState(f"q{i}", [], history=list(history)) for i, history in enumerate(histories)]


@pytest.mark.parametrize("sessions, others", [(0, "['a', 'b']"), (4, "['b']")])
def test_state_is_shared_only_where_the_config_says_so(sessions, others):
  with serving(sessions=sessions) as server:
    box, (first, second) = episodes(server, [], [])
    assert call(box, "a", "remember", first).text == "ok"
    assert call(box, "b", "remember", second).text == "ok"
    assert call(box, "", "recall", second).text == others
    box.end_episode(first)
    box.end_episode(second)


def test_the_calls_of_a_transcript_are_made_again():
  past = [PastCall(ToolCall("remember", {"text": text}), error, 0)
          for text, error in (("lost", None), ("x", "session_lost"), ("a", None), ("b", "tool_error"),
                              ("no", "refused"), ("slow", "timeout"))]
  with serving(sessions=2) as server:
    box, (episode,) = episodes(server, past)
    assert call(box, "", "recall", episode).text == "['a', 'b']"
    assert call(box, "", "recall", episode).text == "['a', 'b']"  # once
    box.end_episode(episode)


def test_sessions_are_bounded_and_given_back():
  with serving(sessions=2, connect_seconds=3.0) as server:
    box, made = episodes(server, [], [], [])
    assert [call(box, "x", "echo", one).error for one in made] == [None, None, "tool_error"]
    assert len(server._own) == 2 and len(children()) == 2
    assert "all 2 sessions" in call(box, "x", "echo", made[2]).text
    box.end_episode(made[0])
    assert call(box, "x", "echo", made[2]).text == "x"
    for one in made:
      box.end_episode(one)
    assert nothing_left(server)


def test_a_session_that_was_lost_is_told_and_begun_anew():
  with serving(sessions=2) as server:
    box, (episode,) = episodes(server, [])
    assert call(box, "a", "remember", episode).text == "ok"
    (connection,) = server._own
    os.kill(children()[0], 9)
    until(lambda: not connection.alive)
    assert call(box, "", "recall", episode).error == "session_lost"
    assert call(box, "", "recall", episode).text == "[]"
    box.end_episode(episode)


def test_an_episode_that_is_cancelled_leaves_no_session():
  with serving("never an answer", sessions=2, time_limit=60.0) as server:
    box, (episode,) = episodes(server, [])

    async def given_up():
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
          await box.call("echo", {"text": "x"}, episode)
      box.end_episode(episode)
    asyncio.run(given_up())
    assert nothing_left(server)


# ---- remote ----

@functools.cache
def unpacks_to_256_mb():
  packer = zlib.compressobj(9, wbits=31)
  return b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 8)) + packer.flush()


class Remote(http.server.BaseHTTPRequestHandler):
  """An HTTP server written by hand. `attack` is set by the test."""

  attack = ""
  asked = ()

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    type(self).asked += (dict(self.headers),)
    number, method = body.get("id"), body.get("method")
    if self.attack == "401":
      return self._say(401, b'{"error": "bad token tok-secret"}')
    if method == "initialize":
      return self._json(number, {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                 "serverInfo": {"name": "remote", "version": "1"}})
    if method == "tools/list":
      return self._json(number, {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]})
    if method == "tools/call":
      return self._attack(number)
    return self._say(202 if number is None else 404, b"")

  def _attack(self, number):
    if self.attack == "an answer that unpacks to 256 MB":
      return self._say(200, unpacks_to_256_mb(), {"content-encoding": "gzip"})
    if self.attack == "an answer without end":
      self.send_response(200)
      self.send_header("content-type", "application/json")
      self.end_headers()
      with contextlib.suppress(OSError):
        while True:
          self.wfile.write(b" " * 65_536)
    if self.attack == "an event without end":
      self.send_response(200)
      self.send_header("content-type", "text/event-stream")
      self.end_headers()
      with contextlib.suppress(OSError):
        while True:
          self.wfile.write(b"data: " + b"x" * 65_536 + b"\n")
    if self.attack == "a redirect to the host itself":
      return self._say(307, b"", {"location": "http://127.0.0.1:1/admin"})

  def _json(self, number, result):
    self._say(200, json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode())

  def _say(self, status, body, headers=()):
    self.send_response(status)
    for name, value in {"content-type": "application/json", "content-length": str(len(body)),
                        **dict(headers)}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def do_GET(self):
    self._say(405, b"")

  do_DELETE = do_GET

  def log_message(self, *arguments):
    pass


@contextlib.contextmanager
def remote(attack, **fields):
  handler = type("Handler", (Remote,), {"attack": attack})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      with serving(url=f"http://127.0.0.1:{server.server_port}/mcp?key=key-secret", **fields) as made:
        yield made, handler
    finally:
      server.shutdown()


@pytest.mark.parametrize("attack, shown", [
  ("an answer that unpacks to 256 MB", "compressed"), ("an answer without end", "more than 1048576 bytes"),
  ("an event without end", "exceeded the 1048576 byte limit"), ("a redirect to the host itself", "not followed")])
def test_an_answer_by_http(attack, shown, monkeypatch):
  monkeypatch.setattr(mcp_connection, "MAX_MESSAGE", 1 << 20)
  with remote(attack) as (server, _):
    box = boxed(server)
    unpacks_to_256_mb()
    with corpus.bounds(seconds=8, megabytes=64):
      seen = call(box)
    assert seen.error == "tool_error" and shown in seen.text and "key-secret" not in seen.text


def test_headers_are_sent_and_not_told():
  with (remote("401", headers={"Authorization": "Bearer tok-secret"}) as (server, handler),
        pytest.raises(McpError, match="cannot be reached") as error):
    server.tools()
  assert {one.get("Authorization") or one["authorization"] for one in handler.asked} == {
    "Bearer tok-secret"}
  assert "tok-secret" not in str(error.value) and "key-secret" not in str(error.value)


@pytest.fixture(scope="module")
def example(request):
  """Starts, and starts again, a server of the `mcp` package's by HTTP."""
  import socket
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  path = pathlib.Path(__file__).parents[1] / "agent" / "mcp_example.py"
  running = []

  def start():
    for process in running:
      process.kill()
      process.wait()
    running.append(subprocess.Popen([sys.executable, str(path), str(port)], stderr=subprocess.DEVNULL))
    for _ in range(600):
      try:
        socket.create_connection(("127.0.0.1", port), 0.1).close()
        return f"http://127.0.0.1:{port}/mcp"
      except OSError:
        assert running[-1].poll() is None
        time.sleep(0.1)
  yield start
  running[-1].kill()
  running[-1].wait()


def test_a_remote_server_that_was_started_again_while_nobody_called(example):
  """With the sessions of the older handshake: the new process knows none of them."""
  url = example()
  with serving(url=url, sessions=2) as owned, serving(url=url) as shared:
    box, (episode,) = episodes(owned, [])
    both = boxed(shared)
    assert call(box, "a", "keep", episode).text == "['a']"
    example()
    assert call(both, "x", "keep").error is None  # nobody's state was lost
    assert call(box, "b", "keep", episode).error == "session_lost"
    assert call(box, "c", "keep", episode).text == "['c']"
    box.end_episode(episode)
    assert not [t for t in asyncio.all_tasks(background.loop()) if t.done()]
