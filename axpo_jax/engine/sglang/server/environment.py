"""The sidecar's own Python environment: finds it, or makes it.

In: the device, and a requirements file of this repository. Out: the path of a Python that has SGLang.
The trainer's environment has neither SGLang nor torch.

AXPO_SIDECAR_PYTHON names an existing one. Else it is made once, by `install`, in
`$AXPO_CACHE/sidecar-<device>-<hash>` (default of AXPO_CACHE: `~/.cache/axpo_jax`), where the hash is
that of the requirements and the Python version: changed requirements make another environment.
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

from axpo_jax import repository
from axpo_jax.engine.sglang.server.spec import SERVE, SidecarError

PYTHON_VARIABLE = "AXPO_SIDECAR_PYTHON"
_DONE = "complete"  # this file is written last


def requirements(device: str) -> pathlib.Path:
  """The requirements file of the servers' environment for "cuda" or "cpu"."""
  name = {"cuda": "requirements-sidecar.txt", "cpu": "requirements-sidecar-cpu.txt"}[device]
  return repository.FOLDER / name


def environment_folder(device: str) -> pathlib.Path:
  """Where the environment for this device belongs, whether it is there or not."""
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  root = pathlib.Path(os.environ.get("AXPO_CACHE") or pathlib.Path(cache) / "axpo_jax")
  text = requirements(device).read_bytes() + str(sys.version_info[:2]).encode()
  return root.absolute() / f"sidecar-{device}-{hashlib.sha256(text).hexdigest()[:12]}"


def find_python(device: str) -> str:
  """The sidecar's interpreter. Raises: SidecarError that says how to get one."""
  if named := os.environ.get(PYTHON_VARIABLE):
    if not os.access(named, os.X_OK):
      raise SidecarError(f"{PYTHON_VARIABLE}={named} is no program that can be run")
    return named
  folder = environment_folder(device)
  if not (folder / _DONE).exists():
    raise SidecarError(
      f"no environment with SGLang in {folder}: run `python launch/sidecar.py --install "
      f"--device={device}`, or name the python of an existing one in {PYTHON_VARIABLE}"
    )
  return str(folder / "bin" / "python")


def install(device: str, report=print) -> str:
  """Makes the environment unless it is there. Returns its Python.

  Two processes may call this at once; one waits. A broken attempt is removed and made anew.
  Raises: SidecarError if pip or the check of the result fails.
  """
  folder = environment_folder(device)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{folder}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / _DONE).exists():
      report(f"making {folder} (minutes, and gigabytes)")
      shutil.rmtree(folder, ignore_errors=True)
      _make(folder, device, report)
      (folder / _DONE).touch()
  return str(folder / "bin" / "python")


def _make(folder: pathlib.Path, device: str, report) -> None:
  python = str(folder / "bin" / "python")
  wanted = str(requirements(device))
  pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
  steps = [[sys.executable, "-m", "venv", str(folder)]]
  if device == "cpu":
    steps += [[*pip, "torch", "--constraint", wanted], [*pip, "--no-deps", "--requirement", wanted]]
  else:
    steps += [[*pip, "--requirement", wanted]]
  steps += [[python, str(SERVE), "check"]]
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
  env |= {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}
  for step in steps:
    report(" ".join(step))
    done = subprocess.run(step, env=env, capture_output=True, text=True)
    if done.returncode:
      raise SidecarError(f"`{' '.join(step)}` failed:\n{(done.stdout + done.stderr)[-4000:]}")
