"""The programs that this process has compiled: which function, for what shapes, in how many seconds.

A jitted function is compiled anew for every shape of its arguments. Compiling a large model takes minutes, so a
run has few shapes, and they are counted here.

  compiled = Compiled()
  out = compiled("accumulate", "8x24576 tokens", function, *args)
  metrics |= programs.metrics()
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import logging

T = TypeVar("T")

# A program that takes this many seconds is worth a line on the terminal.
_WORTH_A_LINE = 5.0


@dataclasses.dataclass(frozen=True)
class Program:
  """seconds: of the first call: tracing, compiling (or reading from the compilation cache)."""

  function: str
  shapes: str
  seconds: float


_met: list[Program] = []
_reported = 0
_lock = threading.Lock()


class Compiled:
  """Calls the jitted functions of one owner; the first call for each shape is timed and noted."""

  def __init__(self):
    self._known: set[tuple[str, Any]] = set()

  def __len__(self) -> int:
    return len(self._known)

  def __call__(self, name: str, shapes: str, function: Callable[..., T], *args: Any, **kwargs: Any
               ) -> T:
    """function(*args, **kwargs). `shapes` names all that decides which program runs."""
    if (name, shapes) in self._known:
      return function(*args, **kwargs)
    start = time.perf_counter()
    out = function(*args, **kwargs)  # returns when the program is compiled, before it has run
    self._known.add((name, shapes))
    _note(Program(name, shapes, time.perf_counter() - start))
    return out


def use_cache(path: str) -> None:
  """Keeps compiled programs in a folder or at an object store's URL, for later runs and resumed ones.

  Several processes may share it. The environment's JAX_COMPILATION_CACHE_DIR comes first; an empty
  path changes nothing.
  """
  if path and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", path if "://" in path else os.path.expanduser(path))


def compiler_options(mesh: jax.sharding.Mesh | None, *dtypes: Any) -> dict[str, str] | None:
  """Options of `jax.jit` for a program over the stack of layers; None: XLA's own.

  XLA's CPU backend computes bfloat16 in float32. Its loop-invariant code motion moves the conversion of
  the weights out of the scan over layers, so that a float32 copy of the whole stack exists during every
  call: 7 GB for a 2B model, written anew each time. Left inside, one layer is converted at a time.

  Args:
    mesh: where the program runs; None is the default backend.
    dtypes: of its parameters and its activations; None: no further one.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if platform != "cpu" or "bfloat16" not in map(str, dtypes):
    return None
  return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def _note(program: Program) -> None:
  with _lock:
    _met.append(program)
  _return_heap()
  if program.seconds >= _WORTH_A_LINE and jax.process_index() == 0:
    # A warning, since the terminal shows no lower level, and the run waits while it compiles.
    logging.warning("program %d: %s for %s, compiled in %.0f s", len(_met), program.function,
                    program.shapes, program.seconds)


def _return_heap() -> None:
  """Gives the system back what compiling took. glibc keeps it: about 100 MB a program of the miniature."""
  with contextlib.suppress(AttributeError, OSError):  # glibc alone has the function
    ctypes.CDLL(None).malloc_trim(0)


def met() -> list[Program]:
  """All so far, in the order in which they were met."""
  with _lock:
    return list(_met)


def metrics() -> dict[str, float]:
  """How many this process has met, and the seconds that new ones took since the last call."""
  global _reported
  with _lock:
    new, _reported = _met[_reported:], len(_met)
    return {"time/programs": float(len(_met)),
            "time/compile_s": sum(program.seconds for program in new)}
