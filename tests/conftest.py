"""Every test sees eight CPU devices, so that sharded code runs on any machine; and what one compiled,
no other compiles again.

The variables must be set before jax is first imported, which is why they are set here and why this
file imports nothing that imports jax.
"""

import collections
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import pytest

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla.flags(8)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One store of compiled programs for all workers and the runs that tests start, unless the user has one.
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_OWN_STORE = "" if _COMPILED in os.environ else tempfile.mkdtemp(prefix="axpo_compiled_")
if _OWN_STORE:
  os.environ[_COMPILED] = _OWN_STORE
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Files whose tests are whole runs of a minute each: they go first.
_LONGEST = {"test_runs.py", "test_sweep.py", "test_sidecar.py", "test_compile.py", "test_lora.py",
            "test_preemption.py", "test_processes.py", "test_processes_sglang.py", "test_sglang_steps.py",
            "test_sglang_faults.py", "test_attention_kernels.py"}
TINY = pathlib.Path(__file__).parents[1] / "axpo_jax" / "assets" / "tiny_tokenizer"
# How the reason of a skip begins that the summary repeats, in large letters.
_NOT_HERE = "NOT TESTED HERE: "


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[pathlib.Path], None]], pathlib.Path]:
  """once(name, make): a folder that is made once for all workers. Tests read it and change nothing."""
  root = tmp_path_factory.getbasetemp()
  root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

  def get(name, make):
    folder, made = root / name, root / f"{name}.made"
    with open(root / f"{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not made.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
        folder.mkdir()
        make(folder)
        made.touch()
    return folder

  return get


@pytest.fixture(scope="session")
def inputs(once) -> pathlib.Path:
  """A folder with the rigged policy and its questions: `rigged.flags(inputs)` gives them to a run."""
  from tests.stages import rigged

  return once("inputs", rigged.write)


@pytest.fixture(scope="session")
def micro_run(once, inputs) -> pathlib.Path:
  """The workdir of an unbroken run of the micro config, with what it printed in printed.txt."""
  from tests import children
  from tests.stages import rigged

  def make(folder):
    done = children.launch(folder, rigged.flags(inputs))
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "printed.txt").write_text(done.stdout)

  return once("micro_run", make)


@pytest.fixture(scope="session")
def sidecar_python():
  """A Python that has SGLang for CPUs; without one the test is skipped, and the summary says so.
  Every test that asks for it, itself or through another fixture, is marked `slow`.

  Tests that ask for it start real servers: `with Sidecar(SidecarSpec(...), folder) as sidecar`.
  """
  from axpo_jax.engine.sglang.server import SidecarError
  from axpo_jax.engine.sglang.server.environment import find_python

  try:
    return find_python("cpu")
  except SidecarError as error:
    pytest.skip(f"{_NOT_HERE}a real SGLang server. {error}")


@pytest.fixture(scope="session")
def python_tool():
  """One sandbox for all tests: namespaces, or limits alone on a host that forbids those."""
  from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
  from axpo_jax.agent.tools.python import PythonTool

  for isolation in ("namespaces", "rlimits"):
    tool = PythonTool(KernelConfig(isolation=isolation, memory_mb=1024, warm=1), max_concurrent=4)
    try:
      tool.start()
    except SandboxError as error:
      reason = str(error)
      continue
    yield tool
    tool.close()
    return
  pytest.skip(f"{_NOT_HERE}the python tool. {reason}")


@pytest.fixture(scope="session")
def python_isolation(python_tool) -> str:
  """How the python tool can be kept apart here."""
  return python_tool.isolation


@pytest.fixture(scope="session")
def chat():
  """The tiny tokenizer with its chat template."""
  from axpo_jax.model.chat import Chat

  return Chat.from_pretrained(TINY)


@pytest.fixture(scope="session")
def processor():
  """The tiny tokenizer's image processor."""
  from axpo_jax.model.images import ImageProcessor

  return ImageProcessor.from_checkpoint(TINY)


@pytest.hookimpl(tryfirst=True)  # pytest drops what `-m` deselects in the same hook
def pytest_collection_modifyitems(items):
  for item in items:
    if "sidecar_python" in item.fixturenames:
      item.add_marker("slow")  # a real SGLang server takes 30 s to start
  # With few long tests at the end one of two workers would be idle. `--no-loadscope-reorder` keeps this order.
  items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_unconfigure():
  if _OWN_STORE:  # empty in workers, which have their parent's
    shutil.rmtree(_OWN_STORE, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
  # Read from the reports: under xdist the tests ran in other processes.
  skipped = [report.longrepr[2].removeprefix("Skipped: ")
             for report in terminalreporter.stats.get("skipped", ())]
  for reason, count in collections.Counter(skipped).items():
    if reason.startswith(_NOT_HERE):
      title, _, rest = reason.partition(". ")
      terminalreporter.section(f"{title} ({count} tests)", sep="!", red=True)
      terminalreporter.line(rest)
