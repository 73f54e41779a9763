"""Every test sees eight CPU devices, so that sharded code runs on any machine.

The variables must be set before jax is first imported, which is why they are set here and why this
file imports nothing that imports jax.
"""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_NO_SIDECAR = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def sidecar_python(pytestconfig):
  """A Python that has SGLang for CPUs; without one the test is skipped, and the summary says so.

  Tests that ask for it start real servers: `with Sidecar(SidecarSpec(...), folder) as sidecar`.
  """
  from axpo_jax.rollout.sidecar import SidecarError
  from axpo_jax.rollout.sidecar.environment import find_python

  try:
    return find_python("cpu")
  except SidecarError as error:
    pytestconfig.stash[_NO_SIDECAR] = str(error)
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def python_isolation():
  """How the python tool can be kept apart here: namespaces, or limits alone where those are forbidden."""
  from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
  from axpo_jax.agent.tools.python import PythonTool

  for isolation in ("namespaces", "rlimits"):
    tool = PythonTool(KernelConfig(isolation=isolation, warm=1))
    try:
      tool.start()
    except SandboxError as error:
      reason = str(error)
      continue
    tool.close()
    return isolation
  pytest.skip(reason)


def pytest_terminal_summary(terminalreporter, config):
  if reason := config.stash.get(_NO_SIDECAR, ""):
    terminalreporter.section("NOTHING WAS TESTED AGAINST A REAL SGLANG SERVER", sep="!", red=True)
    terminalreporter.line(reason)
