"""Memory cgroups: a bound on all memory of a kernel, where the host lets us make them.

In: the files of cgroup v2. Out: a group a kernel, with `memory.max`, made before the kernel and removed
after it. Address space and the watch of `server` hold a kernel everywhere; a group also counts what no
process maps: buffers of pipes and sockets, and files in memory.

A group can be made where a folder is ours to write and hands the memory controller to its children: the
host's root group, or the folder of this process's own group. That is so for root on most hosts, for users
under systemd (`systemd-run --user --scope`), and in containers that got a writable cgroup of their own:

    user@1000.service/app.slice       cgroup.subtree_control: memory   (ours)
      ├─ run-17.scope                 the trainer and the fork server
      ├─ axpo_17_1                    memory.max   the first kernel and its supervisor
      └─ axpo_17_2                    memory.max   the second
"""

from __future__ import annotations

import contextlib
import os
import pathlib

_PREFIX = "axpo"  # then the number of the fork server, and of the kernel


def open_parent(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
  """A descriptor of the folder in which groups can be made; None where there is none.

  Args:
    root: where cgroup v2 is mounted.
    own: the file that says which group this process is in.
  """
  with contextlib.suppress(OSError):
    for line in pathlib.Path(own).read_text().splitlines():
      if not line.startswith("0::/") or ".." in line:  # another version's, or of another namespace
        continue
      group = pathlib.Path(root, line.removeprefix("0::/"))
      for folder in (group, group.parent) if group != pathlib.Path(root) else (group,):
        if _hands_memory_on(folder):
          return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  return None


def _hands_memory_on(folder: pathlib.Path) -> bool:
  try:
    controllers = (folder / "cgroup.subtree_control").read_text().split()
  except OSError:
    return False
  # Moving a process needs the right to write the procs file of the folder above both groups.
  return "memory" in controllers and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)


class Groups:
  """The groups of one fork server, by the child that entered each.

  Args:
    parent: from `open_parent`; None: no group is made, and all calls do nothing.
    memory: bytes of a group.
  """

  def __init__(self, parent: int | None, memory: int):
    self._parent, self._memory = parent, memory
    self._count = 0
    self._entered: dict[int, str] = {}
    self._left: set[str] = set()
    if parent is not None:
      self._remove_others()

  def make(self) -> str | None:
    """A new group's name; None where none can be made."""
    if self._parent is None:
      return None
    self._count += 1
    name = f"{_PREFIX}_{os.getpid()}_{self._count}"
    try:
      os.mkdir(name, 0o755, dir_fd=self._parent)
      self._write(f"{name}/memory.max", self._memory)
    except OSError:  # the host has a limit on groups
      self._left.add(name)
      return None
    with contextlib.suppress(OSError):  # a host without swap has no such file
      self._write(f"{name}/memory.swap.max", 0)
    return name

  def enter(self, name: str | None) -> None:
    """Moves this process into a group, and with it whatever it forks. As the user who made it."""
    if name is not None:
      self._write(f"{name}/cgroup.procs", 0)
    if self._parent is not None:
      os.close(self._parent)  # no kernel may reach it

  def keep(self, name: str | None, child: int) -> None:
    """`child` has entered the group."""
    if name is not None:
      self._entered[child] = name

  def ended(self, child: int) -> None:
    """`child` was reaped. Its own children may live on."""
    if name := self._entered.pop(child, None):
      self._left.add(name)

  def remove(self) -> None:
    """Removes the groups that nobody is in any more."""
    for name in list(self._left):
      with contextlib.suppress(OSError):  # somebody is
        os.rmdir(name, dir_fd=self._parent)
        self._left.discard(name)

  def _remove_others(self) -> None:
    """Those of fork servers that were killed."""
    for name in os.listdir(self._parent):
      prefix, _, server = name.rpartition("_")[0].partition("_")
      if prefix == _PREFIX and server.isdigit() and not os.path.exists(f"/proc/{server}"):
        with contextlib.suppress(OSError):
          os.rmdir(name, dir_fd=self._parent)

  def _write(self, path: str, value: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=self._parent), "w") as file:
      file.write(str(value))
