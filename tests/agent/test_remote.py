"""The python tool on another machine: a real executor on loopback, and executors that mean harm."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from aiohttp import web

from axpo_jax.agent.parse import ToolCall
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.base import EpisodeState, PastCall, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig, KernelPool, SandboxError
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.agent.tools.remote import KEY_VARIABLE, RemotePool, encode_png
from examples.executor import Executor
from tests.hostile import corpus

PICTURE = PIL.Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))


@contextlib.contextmanager
def served(app):
  """Serves an application on the tools' event loop; yields its address."""
  runner = web.AppRunner(app)

  async def begin():
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"

  yield background.run(begin())
  background.run(runner.cleanup())


@pytest.fixture(scope="module")
def address(python_isolation):
  pool = KernelPool(KernelConfig(isolation=python_isolation, memory_mb=1024, warm=1))
  with served(Executor(pool, key="k", most=2, cells=2, idle=600).app()) as url:
    yield url


@pytest.fixture
def tool(address, monkeypatch):
  monkeypatch.setenv(KEY_VARIABLE, "k")
  made = PythonTool(url=address)
  made.start()
  yield made
  made.close()


@pytest.fixture
def cell(tool):
  """Runs cells of one episode."""
  box, state = ToolBox([tool], ["execute"]), EpisodeState("q", [PICTURE])
  yield lambda code, timeout=20: asyncio.run(box.call("python", {"code": code, "timeout": timeout}, state))
  box.end_episode(state)


def test_cells_figures_and_the_episodes_images(cell):
  assert cell("x = 40; print('out')").text == "out"
  assert cell("x + 2").text == "42"
  seen = cell("_pil_images[0].resize((12, 8), 0)")
  assert seen.text == "Image 1: figure."
  np.testing.assert_array_equal(seen.images[0], PICTURE.resize((12, 8), 0))
  assert cell("1 / 0").error == "cell_error" and cell("x").text == "40"


def test_a_kernel_that_is_lost_is_told_and_the_next_cell_meets_an_empty_one(cell):
  cell("x = 1")
  assert cell("import time; time.sleep(60)", timeout=1).error == "timeout"
  assert "NameError" in cell("x").text
  seen = cell("import os; os._exit(3)")
  assert seen.error == "kernel_died" and "exited with code 3" in seen.text


def test_a_continued_episode_finds_its_variables(tool):
  past = PastCall(ToolCall("python", {"code": "x = 7"}), None, 0)
  state = EpisodeState("q", [], history=[past])
  box = ToolBox([tool], ["execute"])
  assert asyncio.run(box.call("python", {"code": "x"}, state)).text == "7"
  box.end_episode(state)


def test_a_full_executor_is_waited_for_and_kernels_end(address):
  async def main():
    pool = RemotePool(address, "k")
    one, two = await pool.take(), await pool.take()
    third = asyncio.create_task(pool.take())
    await asyncio.sleep(0.5)
    assert not third.done()
    one.kill()
    kernel = await asyncio.wait_for(third, 60)
    lost = await one.run("1", 5)
    two.kill()
    kernel.kill()
    await asyncio.sleep(0.2)
    await pool.close()
    return lost

  lost = background.run(main())
  assert lost.status == "died" and "does not know it any more" in lost.reason


def test_a_kernel_that_nobody_uses_is_ended(python_isolation):
  async def main(url):
    pool = RemotePool(url)
    kernel = await pool.take()
    assert (await kernel.run("1", 5)).status == "ok"
    await asyncio.sleep(1)
    lost = await kernel.run("1", 5)
    await pool.close()
    return lost

  pool = KernelPool(KernelConfig(isolation=python_isolation, warm=1))
  with served(Executor(pool, key="", most=1, cells=1, idle=0.2).app()) as url:
    assert background.run(main(url)).status == "died"


def test_no_executor_and_a_wrong_key_are_named(address, monkeypatch):
  monkeypatch.setenv(KEY_VARIABLE, "wrong")
  with pytest.raises(SandboxError, match=f"answers 401.*{KEY_VARIABLE}"):
    PythonTool(url=address).start()
  with pytest.raises(SandboxError, match=r"no executor at config\.agent\.python\.url='http://127.0.0.1:9'"):
    PythonTool(url="http://127.0.0.1:9").start()


def test_an_open_executor_needs_a_key():
  environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
  done = subprocess.run([sys.executable, "examples/executor.py", "--host=0.0.0.0"], env=environment,
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 1 and f"set {KEY_VARIABLE}" in done.stderr


WHITE = encode_png(PIL.Image.new("RGB", (5000, 5000), "white"))  # 75 MB in 100 kB
GOOD = {"status": "ok", "stdout": "", "stderr": "", "reason": "", "figures": []}


@pytest.mark.parametrize("answer", [
    b"", b"no JSON", b"[" * 200_000, b'{"status": "ok"}', b'"ok"', json.dumps(GOOD | {"status": "fine"}),
    json.dumps(GOOD | {"stdout": 3}), json.dumps(GOOD | {"figures": [WHITE]}),
    json.dumps(GOOD | {"figures": ["AAAA"]}), json.dumps(GOOD | {"figures": ["%"]}),
    json.dumps(GOOD | {"figures": [""] * 9}), None],
    ids=["empty", "text", "brackets", "no figures", "a string", "status", "stdout", "a large figure",
         "no picture", "no base64", "nine figures", "endless"])
def test_an_executor_that_means_harm(answer):
  """Its answer is a dead kernel, within bounds, and nothing of it or of its address is told."""
  async def hostile(request):
    if answer is not None:
      return web.Response(body=answer)
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
      while True:
        await response.write(bytes(1 << 20))

  async def kernel(request):
    return web.json_response({"kernel": "k", "protocol": 1}, status=201)

  app = web.Application()
  app.add_routes([web.post("/kernels", kernel), web.post("/kernels/k/cells", hostile)])
  with served(app) as url:
    tool = PythonTool(url=url)
    box, state = ToolBox([tool], ["execute"]), EpisodeState("q", [])
    with corpus.bounds(seconds=20, megabytes=400):
      seen = asyncio.run(box.call("python", {"code": "1"}, state))
    assert seen.error == "kernel_died" and "127.0.0.1" not in seen.text and len(seen.text) < 300
    box.end_episode(state)
    tool.close()
