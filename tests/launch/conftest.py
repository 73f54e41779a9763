"""A wheel of the checkout in an environment of its own."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

REPO = pathlib.Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests",
                                 ".*_cache")


@pytest.fixture(scope="session")
def installed(once) -> pathlib.Path:
  """The bin folder of a fresh environment with the wheel; its other packages are those of this Python."""
  return once("wheel", _install) / "env" / "bin"


def _install(folder: pathlib.Path) -> None:
  source = folder / "source"
  shutil.copytree(REPO, source, ignore=IGNORED)  # a build leaves files beside setup.py
  # Without isolation and dependencies nothing is fetched.
  done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                         f"--wheel-dir={folder}", str(source)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (wheel,) = folder.glob("axpo_jax-*.whl")
  shutil.rmtree(source)
  venv.create(folder / "env", with_pip=False)
  python = folder / "env" / "bin" / "python"
  (site,) = (folder / "env").glob("lib/python*/site-packages")
  others = [path for path in sys.path if path.endswith("site-packages")]
  done = subprocess.run([sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", str(wheel)],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (site / "others.pth").write_text("\n".join(others) + "\n")


def environment_of(installed: pathlib.Path) -> dict[str, str]:
  """For `subprocess`: its programs come first, and nothing of the checkout is on Python's path."""
  kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
  return kept | {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}


def run_installed(installed, folder, name, *flags) -> subprocess.CompletedProcess:
  """One of its programs, in a folder."""
  return subprocess.run([str(installed / name), *flags], cwd=folder, env=environment_of(installed),
                        capture_output=True, text=True, timeout=1200)
