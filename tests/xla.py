"""How the programs of tests are compiled: in a hurry.

Most of a small run's time is compilation, and half of that is LLVM's optimisation, which changes no
program's meaning. With XLA_FLAGS=--xla_backend_optimization_level=3 in the environment the tests meet the
code that users run.
"""

import os

_COUNT = "--xla_force_host_platform_device_count"
_HURRY = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")


def flags(devices: int) -> str:
  """XLA_FLAGS of a process that sees so many CPU devices; what the environment says else stays."""
  given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _COUNT not in flag]
  names = {flag.partition("=")[0] for flag in given}
  hurry = () if any(flag.partition("=")[0] in names for flag in _HURRY) else _HURRY
  return " ".join([f"{_COUNT}={devices}", *given, *hurry])
