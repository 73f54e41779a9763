"""The filter of system calls, for both processors, run by an interpreter of its own."""

import pathlib
import re
import struct

import pytest

from axpo_jax.agent.tools.sandbox import seccomp

X86, ARM = {"x86_64": 0xC000003E}, {"aarch64": 0xC00000B7}
ALLOW, KILL = "allow", "kill"


def outcome(machine, number, *arguments, architecture=None, sockets=False):
  """What the program says of one call: ALLOW, KILL or an errno."""
  architecture = architecture or (X86 | ARM)[machine]
  data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
  lines = list(struct.iter_unpack("HBBI", seccomp.program(machine, sockets=sockets)))
  at = value = 0
  while True:
    code, if_true, if_false, k = lines[at]
    at += 1
    if code == 0x20:
      (value,) = struct.unpack_from("<I", data, k)
    elif code == 0x06:
      return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(k, k & 0xFFFF)
    else:
      holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
      at += if_true if holds else if_false


@pytest.mark.parametrize("machine, numbers", [
    ("x86_64", {"read": 0, "clone": 56, "clone3": 435, "socket": 41, "socketpair": 53, "keyctl": 250}),
    ("aarch64", {"read": 63, "clone": 220, "clone3": 435, "socket": 198, "socketpair": 199, "keyctl": 219})])
def test_what_it_says(machine, numbers):
  def says(name, *arguments, **changes):
    return outcome(machine, numbers[name], *arguments, **changes)

  fork, thread = 0x1200011, 0x3D0F00
  assert says("read") == ALLOW and says("keyctl") == 1 and says("clone3") == 38
  assert says("clone", fork) == says("clone", thread) == ALLOW
  for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    assert says("clone", flag | 17) == 1
  for family in range(64):
    assert says("socket", family) == 13
    assert says("socket", family, sockets=True) == says("socketpair", family) == (
        ALLOW if family == 1 else 97)
  # A family is an int: the upper half of the register does not count.
  assert says("socket", 2 | 1 << 32, sockets=True) == 97
  assert says("read", architecture=0x40000003) == KILL
  refused = list(seccomp._REFUSED.values())
  assert all(outcome(machine, number) == 1 for pair in refused
             if (number := pair[machine == "aarch64"]) is not None)
  others = set(range(470)) - {pair[machine == "aarch64"] for pair in refused} - set(numbers.values())
  assert {outcome(machine, number) for number in others} == {ALLOW}


def test_x86s_second_table_is_not_there():
  assert outcome("x86_64", 0x40000000 + 41, 2) == 38


def test_the_filters_numbers_are_those_of_the_headers():
  headers = [pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
             pathlib.Path("/usr/include/asm-generic/unistd.h")]  # arm64 has the generic ones
  if not all(header.exists() for header in headers):
    pytest.skip("no headers of the Linux kernel here")
  theirs = [dict(re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
            for header in headers]
  others = {"clone": seccomp._CLONE, "clone3": seccomp._CLONE3, "socket": seccomp._SOCKET,
            "socketpair": seccomp._SOCKETPAIR}
  compared = [(name, number, int(there[name]))
              for name, numbers in {**seccomp._REFUSED, **others}.items()
              for number, there in zip(numbers, theirs) if name in there]
  assert len(compared) > 120 and [row for row in compared if row[1] != row[2]] == []
