"""Memory cgroups, on a folder that has the files of cgroup v2: where the tests run, none may be written."""

import asyncio
import os
import pathlib
import subprocess
import sys

import pytest

from axpo_jax.agent.tools import kernels
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.agent.tools.sandbox import cgroup


@pytest.fixture
def host(tmp_path):
  """The slice of a user, which hands memory to its children, with this process's scope in it."""
  root = tmp_path / "cgroup"
  scope = root / "app.slice" / "run-17.scope"
  scope.mkdir(parents=True)
  for folder, controllers in ((root, "cpu memory pids\n"), (scope.parent, "memory pids\n"), (scope, "")):
    (folder / "cgroup.subtree_control").write_text(controllers)
    (folder / "cgroup.procs").write_text("")
  (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/app.slice/run-17.scope\n")
  return tmp_path


def parent(host):
  return cgroup.open_parent(str(host / "cgroup"), str(host / "own"))


def where(descriptor):
  return pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def test_a_group_is_made_beside_ones_own(host):
  slice_ = host / "cgroup" / "app.slice"
  assert where(parent(host)) == slice_
  groups = cgroup.Groups(parent(host), 512 << 20)
  first, second = groups.make(), groups.make()
  assert first == f"axpo_{os.getpid()}_1" != second
  assert (slice_ / first / "memory.max").read_text() == str(512 << 20)
  assert (slice_ / first / "memory.swap.max").read_text() == "0"


def test_a_child_enters_it_and_it_is_removed_when_all_have_left(host):
  groups = cgroup.Groups(parent(host), 1 << 30)
  name = groups.make()
  child = os.fork()
  if child == 0:
    groups.enter(name)
    os._exit(0 if groups.make() is None else 1)  # its descriptor is closed
  groups.keep(name, child)
  assert os.waitpid(child, 0)[1] == 0
  folder = host / "cgroup" / "app.slice" / name
  assert (folder / "cgroup.procs").read_text() == "0"  # whoever writes it
  groups.remove()
  assert folder.exists()  # the child is not known to have ended
  groups.ended(child)
  groups.remove()
  assert folder.exists()  # somebody is in it: a real group cannot be removed then, nor a folder with files
  for file in folder.iterdir():
    file.unlink()
  groups.remove()
  assert not folder.exists()


def test_groups_of_a_server_that_was_killed_are_removed(host):
  dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
  dead.wait()
  slice_ = host / "cgroup" / "app.slice"
  for name in (f"axpo_{dead.pid}_1", "axpo_1_3", "axpo_x_1", "other"):
    (slice_ / name).mkdir()
  cgroup.Groups(parent(host), 1)
  assert {path.name for path in slice_.iterdir() if path.is_dir()} == {
    "axpo_1_3", "axpo_x_1", "other", "run-17.scope"}


@pytest.mark.parametrize("spoil", [
  lambda host: (host / "own").write_text("4:memory:/elsewhere\n"),
  lambda host: (host / "own").write_text("0::/../other\n"),
  lambda host: (host / "own").unlink(),
  lambda host: (host / "cgroup" / "app.slice" / "cgroup.subtree_control").write_text("pids\n"),
  lambda host: (host / "cgroup" / "app.slice" / "cgroup.procs").unlink()])
def test_where_none_can_be_made_nothing_happens(host, spoil):
  spoil(host)
  assert parent(host) is None
  groups = cgroup.Groups(None, 1)
  assert groups.make() is None
  groups.keep(None, 1)
  groups.ended(1)
  groups.remove()
  groups.enter(None)


def test_the_root_group_hands_on_to_its_own(host):
  (host / "own").write_text("0::/\n")
  assert where(parent(host)) == host / "cgroup"


def test_a_group_that_cannot_be_made_leaves_the_kernel_without(host):
  groups = cgroup.Groups(parent(host), 1)
  (host / "cgroup" / "app.slice" / f"axpo_{os.getpid()}_1").mkdir()
  assert groups.make() is None and groups.make() is not None


@pytest.mark.parametrize("isolation", ["namespaces", "rlimits"])
def test_every_kernel_enters_a_group(host, isolation, monkeypatch):
  """The real fork server and kernels; the groups are folders."""
  fake = f"cgroup.open_parent.__defaults__ = {str(host / 'cgroup')!r}, {str(host / 'own')!r}; server.main("
  monkeypatch.setattr(kernels, "_START", kernels._START.replace(
    "server.main(", f"from axpo_jax.agent.tools.sandbox import cgroup; {fake}"))
  tool = PythonTool(KernelConfig(isolation=isolation, memory_mb=1024, file_mb=32, processes=64, warm=1))
  try:
    tool.start()
  except SandboxError as error:
    pytest.skip(str(error))
  try:
    state = EpisodeState("q", [])
    box = ToolBox([tool], ["execute"])
    assert asyncio.run(box.call("python", {"code": "print(6 * 7)"}, state)).text == "42"
    box.end_episode(state)
    made = sorted((host / "cgroup" / "app.slice").glob("axpo_*"))
    assert made and all(len(path.name.split("_")) == 3 for path in made)
    assert {(path / "memory.max").read_text() for path in made} == {str((1024 + 32) << 20)}
    assert (made[0] / "cgroup.procs").read_text() == "0"
  finally:
    tool.close()
