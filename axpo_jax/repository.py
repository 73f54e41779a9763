"""What lies beside the package in a checkout and inside it in a wheel: programs, configs, examples, requirements.

The console scripts of a wheel (`axpo-train` and others) run the programs of launch/ as they are.
"""

import pathlib
import runpy
import sys

_IN_WHEEL = pathlib.Path(__file__).with_name("_repository")  # setup.py fills it
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else pathlib.Path(__file__).parents[1]


def train() -> None:
  """`axpo-train`: trains or evaluates a policy as a config file says."""
  _run("main")


def sweep() -> None:
  """`axpo-sweep`: runs a config at many points."""
  _run("sweep")


def sidecar() -> None:
  """`axpo-sidecar`: starts SGLang servers."""
  _run("sidecar")


def compile_ahead() -> None:
  """`axpo-compile`: compiles a run for TPUs or GPUs without one."""
  _run("compile")


def _run(program: str) -> None:
  path = str(FOLDER / "launch" / f"{program}.py")
  sys.argv[0] = path  # absl finds a program's own flags, for --help, by its name
  runpy.run_path(path, run_name="__main__")
