"""Cells that a policy writes to leave the sandbox or to pass its limits, on both kinds of it.

tests/agent/test_hostile.py has the attempts that are more than a cell: bombs, servers, killed processes.
"""

import asyncio
import ctypes
import os
import platform
import tempfile

import pytest

from axpo_jax.agent.tools import kernels
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.agent.tools.sandbox import wire
from tests.hostile import corpus

_SESSION, _ADD_KEY = -3, {"x86_64": 248, "aarch64": 217}


@pytest.fixture(scope="module", params=["namespaces", "rlimits"])
def tool(request):
  """With a secret in the trainer's session keyring, where the host has keyrings."""
  libc = ctypes.CDLL(None)
  libc.syscall(_ADD_KEY[platform.machine()], b"user", b"axpo_test_key", b"gold", 4, _SESSION)
  # With rlimits all kernels of a user share the room for processes, those of other tests too.
  made = PythonTool(KernelConfig(isolation=request.param, memory_mb=1024, processes=64, warm=1))
  try:
    made.start()
  except SandboxError as error:
    pytest.skip(str(error))
  yield made
  made.close()


def run(tool, code, timeout=20):
  box, state = ToolBox([tool], ["execute"]), EpisodeState("q", [])
  try:
    return asyncio.run(box.call("python", {"code": code, "timeout": timeout}, state))
  finally:
    box.end_episode(state)


@pytest.mark.parametrize("case", corpus.cases("cells"))
def test_cells(case, tool):
  if case.get("only", tool.isolation) != tool.isolation:
    pytest.skip("only namespaces hold this back")
  with corpus.bounds(seconds=case.get("seconds", 30)):
    seen = run(tool, case["code"], case.get("timeout", 20))
  assert seen.error == case.get("error"), seen.text
  if seen.error is None:
    assert seen.text == case.get(f"expect_{tool.isolation}", case["expect"])


ORDINARY = """
import asyncio, concurrent.futures, ctypes, os, subprocess, tempfile, threading
import numpy as np, scipy.linalg, sympy
async def later():
  process = await asyncio.create_subprocess_exec('echo', 'child', stdout=subprocess.PIPE)
  return (await process.communicate())[0]
def in_loop(): return asyncio.run(later())
with concurrent.futures.ThreadPoolExecutor(2) as pool: child = pool.submit(in_loop).result()
numbers = (ctypes.c_int * 3)(3, 1, 2)
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
ctypes.CDLL(None).qsort(numbers, 3, 4, compare(lambda a, b: a[0] - b[0]))
with tempfile.NamedTemporaryFile() as file: file.write(b'x')
if os.fork() == 0: os._exit(0)
os.wait()
print(child, list(numbers), round(float(scipy.linalg.det(np.eye(200) * 1.01)), 3), sympy.factor('x**2-1'))
"""


def test_ordinary_code_meets_no_filter(tool):
  assert run(tool, ORDINARY).text == "b'child\\n' [1, 2, 3] 7.316 (x - 1)*(x + 1)"


@pytest.mark.parametrize("message", [
    {"figures": [[20_000, 20_000]], "sizes": [1_200_000_000]}, {"figures": [[2**40, 1]], "sizes": [0]},
    {"figures": [[1, 1]] * 9, "sizes": [3] * 9}, {"figures": [[1, 1]], "sizes": []},
    {"figures": [[2, 2]], "sizes": [3]}, {"figures": [[True, 1]], "sizes": [3]},
    {"figures": [[1.0, 1]], "sizes": [3]}, {"figures": None, "sizes": []}, {"sizes": []}],
    ids=lambda message: ascii(message)[:60])
def test_the_trainer_does_not_trust_a_supervisor(message):
  with pytest.raises(wire.WireError):
    wire.check_figures(message)


@pytest.mark.parametrize("made", ["a link", "open to all", "another user's"])
def test_a_cache_folder_that_somebody_else_has_made(made, tmp_path, monkeypatch):
  (tmp_path / "home").write_text("no folder")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  folder = tmp_path / f"axpo_jax_kernels_{os.getuid()}"
  assert kernels._cache_folder() == str(folder)
  if made == "a link":
    folder.rmdir()
    folder.symlink_to(tmp_path)
  elif made == "open to all":
    folder.chmod(0o777)
  elif os.getuid() == 0:
    os.chown(folder, 12345, 12345)
  else:
    pytest.skip("needs root")
  with pytest.raises(SandboxError, match="remove the latter if another user has made it"):
    kernels._cache_folder()
