"""Runs that tests start: with as many devices as asked for, and no torch.

Users need no torch, and transformers takes seconds to import it where there is one.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

from tests import xla

REPO = pathlib.Path(__file__).parents[1]
MICRO = "tests/stages/micro_config.py"
_WITHOUT_TORCH = str(pathlib.Path(__file__).parent / "without_torch")
# A thread that waits for others is not taken for dead on a busy machine.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# Seconds after which a run is taken for stuck. Alone on two cores it takes a twentieth of that.
_PATIENCE = 600


def environment(devices: int, *flags: str) -> dict[str, str]:
  """For `subprocess`; `flags` are further XLA_FLAGS."""
  path = os.pathsep.join(filter(None, (_WITHOUT_TORCH, os.environ.get("PYTHONPATH"))))
  return {**os.environ, "XLA_FLAGS": " ".join((xla.flags(devices), *flags)), "PYTHONPATH": path}


def launch(workdir, flags=(), *, config=MICRO, program=("launch/main.py",)) -> subprocess.CompletedProcess:
  """What a user does, on one device: a run to its end. `program` is another one that runs main.py."""
  return subprocess.run(
    [sys.executable, *program, f"--config={config}", f"--workdir={workdir}", *flags], cwd=REPO,
    env=environment(1), capture_output=True, text=True, timeout=3600)


def until(condition, seconds: float = 120.0):
  """Waits for `condition()`; its value."""
  deadline = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < deadline, "it did not happen"
    time.sleep(0.02)
  return value


class Job:
  """The processes of one run of launch/main.py.

  Attributes:
    processes: `subprocess.Popen` of each, the main one first.
  """

  def __init__(self, processes: list[subprocess.Popen], logs: list[tuple[pathlib.Path, pathlib.Path]]):
    self.processes, self._logs = processes, logs

  def wait(self) -> list[int | None]:
    """Exit codes once all have ended, or patience has (None: it still runs)."""
    self.until(lambda: False, quiet=True)
    return self.codes()

  def until(self, condition, quiet: bool = False) -> None:
    """Returns when it holds; fails when all processes have ended, or patience has."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
      if None not in self.codes() or time.monotonic() > deadline:
        assert quiet, f"it did not happen: {self}"
        return
      time.sleep(0.1)

  def codes(self) -> list[int | None]:
    return [process.poll() for process in self.processes]

  def outputs(self) -> list[str]:
    return [out.read_text() for out, _ in self._logs]

  def errors(self) -> list[str]:
    """The ends of what they wrote to their standard errors."""
    return [err.read_text()[-4000:] for _, err in self._logs]

  def __str__(self) -> str:
    return "\n".join([f"exit codes {self.codes()}", *self.errors()])


@contextlib.contextmanager
def job(config: str, workdir: pathlib.Path, changes: dict, count: int, port: int, devices: int = 4):
  """A run of `count` processes that have `devices` in all; none of them is left behind."""
  flags = [f"--config.{name}={value}" for name, value in changes.items()]
  flags += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
  logs = [(workdir.with_suffix(f".{i}.out"), workdir.with_suffix(f".{i}.err")) for i in range(count)]
  processes = []
  try:
    for i, (out, err) in enumerate(logs):
      with out.open("w") as stdout, err.open("w") as stderr:
        processes.append(subprocess.Popen(
          [sys.executable, "launch/main.py", f"--config={config}", f"--workdir={workdir}", *flags,
           f"--process_id={i}"],
          cwd=REPO, env=environment(devices // count, PATIENT), stdout=stdout, stderr=stderr))
    yield Job(processes, logs)
  finally:
    for process in processes:
      process.kill()  # nothing less: jax takes the signal to end for a notice of preemption
      process.wait()


# Runs launch/main.py with sys.argv[2:]; kills itself as soon as step sys.argv[1] is on the disk.
_DYING = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(REPO)!r})
from axpo_jax.stages.metrics import MetricsWriter
last, write = int(sys.argv.pop(1)), MetricsWriter.write

def write_and_die(self, step, values):
  write(self, step, values)
  if step == last:
    os.kill(os.getpid(), signal.SIGKILL)

MetricsWriter.write = write_and_die
sys.argv[0] = {str(REPO / "launch" / "main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def dying(step: int) -> list[str]:
  """Python's arguments for a run (`launch/main.py`) that is killed (-9) after that step."""
  return ["-c", _DYING, str(step)]
