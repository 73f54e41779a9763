"""Linux namespaces, mounts, capabilities and limits, as the sandbox needs them.

Two steps. `enter_empty_world` is taken once, by the fork server: it leaves a root folder that holds
the system's libraries and this Python, read only, and no network. `enter_cell` is taken by every
kernel's first process: its own user, process, mount, network and IPC namespaces, a small private
folder, no capability. `seccomp` adds a filter of system calls. Straight system calls, since Python 3.11 wraps none of them; the order of the
mounts is bubblewrap's (a tmpfs over a folder, pivot, bind from the old root, drop the old root).

No /proc is mounted: nobody inside sees a process, an environment or a command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import platform
import re
import resource
import site
import socket
import sys
import sysconfig

from axpo_jax.agent.tools.sandbox import seccomp

FOLDER = "/sandbox"  # the one writable place
USER = 1000  # user and group inside; outside it is the trainer's user, or NOBODY where that is root
NOBODY = 65534

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEWPID, _NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442  # the same number on all architectures
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE = 0x8000
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SUBREAPER, _PR_NO_NEW_PRIVS = 4, 24, 36, 38
_LAST_CAPABILITY = 40
_OLD_ROOT = "/.old"
_NO_FILTER = 200  # exit code
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1

_LIBC = ctypes.CDLL(None, use_errno=True)


class IsolationError(RuntimeError):
  """The host does not let us build the sandbox; the message says which step failed."""


def enter_empty_world() -> None:
  """Moves this process into a root folder without the trainer's files, and out of the network.

  Raises:
    IsolationError: the host forbids a step, or its kernel is too old.
  """
  check_host()
  spaces = _NEWNS | _NEWNET | _NEWIPC | _NEWUTS
  if os.geteuid() == 0:  # root needs no user namespace here, and could not read others' files in one
    _call("unshare", spaces)
  else:
    user, group = os.geteuid(), os.getegid()
    _call("unshare", spaces | _NEWUSER)
    _map_user(None, (USER, user), (USER, group))
  _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
  _build_root(_needed_paths())


def check_host() -> None:
  """Raises IsolationError where the sandbox cannot be built for a reason known beforehand."""
  if sys.platform != "linux" or platform.machine() not in _SYS_PIVOT_ROOT:
    raise IsolationError(f"namespaces need Linux on x86_64 or aarch64, not {platform.platform()}")
  # Before 5.14 the process limit counts all processes of a user and not those of one namespace.
  if tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2]) < (5, 14):
    raise IsolationError(f"namespaces with a process limit of their own need Linux 5.14; this is "
                         f"{platform.release()}")


def drop_root() -> None:
  """Where the trainer is root, its kernels are nobody: root ignores the process limit."""
  if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # else its own user map is not its to write


def check_kernel() -> None:
  """Raises IsolationError where a kernel could not start: it would have no filter of system calls, or,
  of a root trainer, could not read this Python's packages.

  In an empty world it can walk through the folders above, but not into one that is root's alone.
  """
  folders = [os.path.dirname(os.__file__), *filter(os.path.isdir, _package_folders())]
  child = os.fork()
  if child == 0:
    drop_root()
    readable = [os.access(folder, os.R_OK | os.X_OK) for folder in folders]
    try:
      _call("prctl", _PR_NO_NEW_PRIVS, 1, 0, 0, 0)
      seccomp.put_on(sockets=False)
    except (IsolationError, OSError):
      os._exit(_NO_FILTER)
    os._exit(0 if all(readable) else 1 + readable.index(False))
  failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if failed == _NO_FILTER:
    raise IsolationError("no filter of system calls can be put on: the host forbids seccomp, or its "
                         f"processor ({platform.machine()}) is neither x86_64 nor aarch64")
  if failed:
    raise IsolationError(f"the trainer is root, so its kernels run as user {NOBODY}, who cannot "
                         f"read {folders[failed - 1]}: give others the right to read it, or use a "
                         "Python outside of root's home")


def unshare_cell(proc: int) -> None:
  """New namespaces; the next child is process 1 of them.

  Args:
    proc: descriptor of the host's /proc folder, where the user map is written.
  """
  user, group = os.geteuid(), os.getegid()
  _call("unshare", _NEWUSER | _NEWPID | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS)
  _map_user(proc, (USER, user), (USER, group))
  with contextlib.suppress(OSError):  # where /proc/sys is read-only the filter alone forbids them
    number = os.open("sys/user/max_user_namespaces", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
    os.write(number, b"0")
    os.close(number)


def enter_cell(file_bytes: int) -> None:
  """For process 1 of a cell: its private folder, then no capability any more."""
  options = f"size={file_bytes},nr_inodes=4096,mode=700".encode()
  _call("mount", b"none", FOLDER.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
  os.chdir(FOLDER)
  socket.sethostname("sandbox")
  for capability in range(_LAST_CAPABILITY + 1):
    _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # numbers beyond the kernel's last fail
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  _call("capset", header, (ctypes.c_uint32 * 6)())


def hide_memory() -> None:
  """Nobody of the same user can trace this process or read its memory or descriptors."""
  _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def leave_keyring() -> None:
  """A session keyring of its own, before the filter forbids to have any: else it is the trainer's."""
  number = _SYS_KEYCTL[platform.machine()]
  _LIBC.syscall(number, ctypes.c_ulong(_JOIN_SESSION_KEYRING), None)  # where it is forbidden, to all


def adopt_orphans() -> None:
  """Descendants whose parent dies become children of this process."""
  _call("prctl", _PR_SET_SUBREAPER, 1, 0, 0, 0)


def limit_resources(*, memory: int, cpu_seconds: int, file_bytes: int, processes: int) -> None:
  """Limits of each process of a cell; `processes` counts the threads of all of them.

  Args:
    memory: address space, bytes.
    cpu_seconds: CPU time of one process.
    file_bytes: size of one file.
    processes: processes and threads of the user.
  """
  _call("prctl", _PR_NO_NEW_PRIVS, 1, 0, 0, 0)  # neither sudo nor any other way to raise them
  limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: cpu_seconds,
            # Few descriptors: what lies in a socket's buffer is nobody's memory.
            resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 128,
            resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_NPROC: processes}
  for limit, value in limits.items():
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _needed_paths() -> list[pathlib.Path]:
  """Folders of the system's programs and libraries and of this Python with its packages."""
  python = {sys.prefix, sys.base_prefix, *_package_folders(), *sysconfig.get_paths().values()}
  python |= {os.path.realpath(path) for path in python}
  for prefix in python & {"/usr", "/usr/local"}:  # not whole: people keep data and sources there
    python |= {f"{prefix}/{name}" for name in ("bin", "lib", "lib64")}
  python -= {"/usr", "/usr/local"}
  system = ("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec",
            "/usr/share/fonts", "/usr/share/zoneinfo", "/usr/share/fontconfig", "/bin", "/lib",
            "/lib64", "/sbin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts",
            *(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")))
  found = sorted({pathlib.Path(path) for path in (*system, *python)
                  if os.path.lexists(path) and path != "/"})
  kept: list[pathlib.Path] = []
  for path in found:  # sorted: a folder comes before what lies in it
    if not any(path.is_relative_to(other) for other in kept if not other.is_symlink()):
      kept.append(path)
  return kept


def _package_folders() -> list[str]:
  """Where packages lie: this Python's own folders, and other Pythons' that a .pth file adds."""
  # Not all of sys.path: an editable install adds its checkout, where a user may keep secrets.
  added = (path for path in sys.path
           if os.path.basename(path) in ("site-packages", "dist-packages"))
  return list(dict.fromkeys([*site.getsitepackages(), *added]))


def _build_root(paths: list[pathlib.Path]) -> None:
  os.umask(0o022)
  _call("mount", b"none", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=1m,mode=755")
  os.mkdir(f"/tmp{_OLD_ROOT}")
  pivot = _SYS_PIVOT_ROOT[platform.machine()]
  _check("pivot_root", _LIBC.syscall(pivot, b"/tmp", f"/tmp{_OLD_ROOT}".encode()))
  os.chdir("/")
  for path in paths:
    _show(path)
  for folder in (FOLDER, "/etc"):
    os.makedirs(folder, exist_ok=True)
  if not os.path.lexists("/tmp"):  # it is there if this Python lies in it
    os.symlink(FOLDER.lstrip("/"), "/tmp")
  user = f"sandbox:x:{USER}:{USER}::{FOLDER}:/bin/sh\n"
  pathlib.Path("/etc/passwd").write_text(user)
  _call("umount2", _OLD_ROOT.encode(), _MNT_DETACH)
  os.rmdir(_OLD_ROOT)
  _read_only("/")


def _show(path: pathlib.Path) -> None:
  """Binds a file or folder of the old root at its old place, or copies a link."""
  old = pathlib.Path(f"{_OLD_ROOT}{path}")
  path.parent.mkdir(parents=True, exist_ok=True)
  if old.is_symlink():
    os.symlink(os.readlink(old), path)
    return
  if old.is_dir():
    path.mkdir(exist_ok=True)
  else:
    path.touch()
  _call("mount", bytes(old), bytes(path), None, _MS_BIND | _MS_REC, None)


class _MountAttr(ctypes.Structure):
  _fields_ = (("set", ctypes.c_uint64), ("clear", ctypes.c_uint64),
              ("propagation", ctypes.c_uint64), ("userns_fd", ctypes.c_uint64))


def _read_only(path: str) -> None:
  """Every mount at and below `path`."""
  attr = _MountAttr(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
  _check("mount_setattr", _LIBC.syscall(
    _SYS_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, ctypes.byref(attr),
    ctypes.c_size_t(ctypes.sizeof(attr))))


def _map_user(proc: int | None, user: tuple[int, int], group: tuple[int, int]) -> None:
  """Writes this process's user and group map: (inside, outside)."""
  prefix = "/proc/self/" if proc is None else "self/"
  for name, text in (("setgroups", "deny"), ("uid_map", "{} {} 1".format(*user)),
                     ("gid_map", "{} {} 1".format(*group))):
    try:
      descriptor = os.open(prefix + name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
      with open(descriptor, "w") as file:
        file.write(text)
    except OSError as error:
      raise IsolationError(f"writing {name} failed ({error.strerror}): the host restricts user "
                           "namespaces (AppArmor or a container's profile)") from error


def _call(name: str, *arguments) -> None:
  _check(name, getattr(_LIBC, name)(*(
    ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments)))


def _check(name: str, result: int) -> None:
  if result != 0:
    reason = os.strerror(ctypes.get_errno())
    raise IsolationError(f"{name} failed ({reason}): the host does not allow this namespace")
