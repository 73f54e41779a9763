"""A filter of system calls for the processes of a cell: what numerical Python never asks for is refused.

Namespaces and limits decide what a call may do; this decides which calls there are. It closes what those
leave open: memory that no limit counts (memfd, System V), keyrings, namespaces within namespaces, sockets
of other families than the sandbox's own (vsock reaches the hypervisor), and the rarely used parts of the
operating system's kernel where most of its faults have been (io_uring, bpf, mounts, userfaultfd, ...).

The filter is a classic BPF program over `struct seccomp_data`: the number of the call, the architecture,
the arguments. It is made once and put on by every kernel; children inherit it, and nobody can take it off.
libseccomp would bring these 60 lines as a system package, which a trainer's image may not have.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import socket
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # the first number of x86-64's second table of calls

# Name -> (number on x86-64, on arm64); None where there is no such call. A number above 400 is the
# same on both.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Memory that belongs to no process, so that no limit of a process counts it.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Keyrings, which outlive an episode.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Namespaces and mounts.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "statmount": (457, 457),
    "listmount": (458, 458), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # Other processes' memory and descriptors.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "kcmp": (312, 272),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # Parts of the operating system's kernel that a cell has no use for.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_setup": (206, 0), "io_submit": (209, 2), "vmsplice": (278, 75), "remap_file_pages": (216, 234),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92),
    "syslog": (103, 116), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "vhangup": (153, 58), "uselib": (134, None),
}
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
# CLONE_NEW of time-less namespaces: the low byte of clone's flags is a signal.
_NEW_NAMESPACES = 0x7E020000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # bytes in struct seccomp_data
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000  # _FAIL | errno
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


@functools.cache
def program(machine: str, *, sockets: bool) -> bytes:
  """The filter.

  Args:
    machine: as `platform.machine` says.
    sockets: sockets of the family AF_UNIX may be opened; else only pairs of connected ones.
  """
  column = list(_AUDIT_ARCH).index(machine)
  lines = [_line(_LOAD, _ARCHITECTURE_AT), _line(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
           _line(_RETURN, _KILL),  # 32-bit calls have other numbers
           _line(_LOAD, _NUMBER_AT)]
  if machine == "x86_64":
    lines += [_line(_AT_LEAST, _X32, 0, 1), _fail(errno.ENOSYS)]
  for numbers in _REFUSED.values():
    if numbers[column] is not None:
      lines += [_line(_EQUAL, numbers[column], 0, 1), _fail(errno.EPERM)]
  # Its flags lie in memory, where a filter cannot look. glibc then uses clone.
  lines += [_line(_EQUAL, _CLONE3[column], 0, 1), _fail(errno.ENOSYS)]
  lines += [_line(_EQUAL, _CLONE[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT_AT),
            _line(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _fail(errno.EPERM), _line(_RETURN, _ALLOW)]
  if not sockets:
    lines += [_line(_EQUAL, _SOCKET[column], 0, 1), _fail(errno.EACCES)]
  for numbers in (_SOCKET, _SOCKETPAIR):
    lines += [_line(_EQUAL, numbers[column], 0, 4), _line(_LOAD, _FIRST_ARGUMENT_AT),
              _line(_EQUAL, socket.AF_UNIX, 1, 0), _fail(errno.EAFNOSUPPORT),
              _line(_RETURN, _ALLOW)]
  return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
  """One instruction; `if_true` and `if_false` say how many to skip."""
  return struct.pack("HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
  return _line(_RETURN, _FAIL | number)


class _Program(ctypes.Structure):
  _fields_ = (("lines", ctypes.c_ushort), ("start", ctypes.c_char_p))


def put_on(*, sockets: bool) -> None:
  """Puts the filter on this process, for good. It must have given up new privileges before.

  Raises:
    OSError: the operating system's kernel refuses, has no such filters, or is of another machine than
      x86-64 and arm64.
  """
  if platform.machine() not in _AUDIT_ARCH:
    raise OSError(errno.ENOSYS, f"no filter of system calls for {platform.machine()}")
  data = program(platform.machine(), sockets=sockets)
  libc = ctypes.CDLL(None, use_errno=True)
  words = (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Program(len(data) // 8, data)), 0, 0)
  if libc.prctl(*(ctypes.c_ulong(word) if isinstance(word, int) else word for word in words)):
    number = ctypes.get_errno()
    raise OSError(number, f"no filter of system calls: {errno.errorcode.get(number, number)}")
