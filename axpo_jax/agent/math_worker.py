"""The process in which math-verify runs; `agent.mathematics` starts it and talks to it.

It runs as `python -P math_worker.py CPU_SECONDS MEMORY_BYTES`. In: one JSON line a request, ["same", answer,
gold] or ["value", text]. Out: one JSON line each, {"result": ...} (null: it cannot be read) or {"died": why};
and {"ready": true} before the first.

What a policy wrote may make sympy run for years or fill the memory, inside of C code too. So a fork of the
loaded process does the work, the kernel of the operating system kills it when its CPU time or its memory is
used up, and the next fork takes milliseconds. CPU time and not wall time: a reward must not depend on how busy
the machine is.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_REQUESTS = 1000  # of one fork: sympy keeps what it has computed
_RENEW, _NO_MEMORY = 3, 4  # exit codes of a fork: it has served them; the memory is used up
# Of every kind: math-verify's parser is slow at each form that it has not met before.
_FORMS = (("12", "13"), ("\\frac{1}{2} + \\sqrt{3}", "0.5"), ("3x^2 - 2\\pi", "x + 1"), ("60^\\circ", "50\\%"),
          ("\\{1, 2\\}", "(1, 2)"), ("x = 5", "5 \\text{ cm}"), ("\\sin x", "1:2"))


def main(cpu_seconds: float, memory: int) -> None:
  """Serves standard input until its end."""
  import math_verify  # noqa: F401  sympy takes a while; every fork has it then

  # It warns that its own time limits are off. They use signals and do not reach into C code.
  for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  for pair in _FORMS:  # half a second, once; a fork would need it again after each answer that ended one
    _same(*pair)
  gc.freeze()  # collections in a fork pass over what it shares
  _say({"ready": True})
  while True:
    child = os.fork()
    if child == 0:
      _serve(cpu_seconds, memory)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
      return
    if code != _RENEW:
      _say({"died": {-signal.SIGPROF: "time", _NO_MEMORY: "memory"}.get(code, f"exit code {code}")})


def _serve(cpu_seconds: float, memory: int) -> None:
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  # A process inherits what its parent ignores and blocks: a profiler in the trainer may do both.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
  for _ in range(_REQUESTS):
    line = _read_line()
    if not line:
      os._exit(0)
    operation, *texts = json.loads(line)
    # Nobody handles the signal of this timer, so it ends the process wherever that is.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
      result = {"same": _same, "value": _value}[operation](*texts)
    except MemoryError:
      os._exit(_NO_MEMORY)
    except Exception:  # sympy raises nearly anything on odd input; what cannot be read is not right
      result = None
    signal.setitimer(signal.ITIMER_PROF, 0)
    _say({"result": result})
  os._exit(_RENEW)


def _same(answer: str, gold: str) -> bool:
  import math_verify
  golds, answers = _parsed_gold(gold), _parsed(answer)
  # What differs at one point needs no proof: math-verify would simplify the difference, which takes 30 ms.
  if "%" not in answer + gold and _differ(golds, answers):
    return False
  return bool(math_verify.verify(golds, answers, timeout_seconds=None))


def _differ(golds: list[Any], answers: list[Any]) -> bool:
  """Whether both are one expression, and their values at one point are a thousandth or more apart, as
  numbers are everywhere. math-verify rounds to six decimals."""
  import sympy
  if len(golds) != 2 or len(answers) != 2:  # an expression and its text
    return False
  right, given = golds[0], answers[0]
  if any(isinstance(x, sympy.Symbol) or not isinstance(x, sympy.Expr) for x in (right, given)):
    return False  # of a name math-verify compares the letters; sets and equations have no value
  names = sorted(right.free_symbols | given.free_symbols, key=str)
  point = {name: sympy.Rational(733 + 211 * i, 1009) for i, name in enumerate(names)}
  right, given = (sympy.N(x.subs(point) if point else x) for x in (right, given))
  return bool(right.is_Number and given.is_Number and right.is_finite and given.is_finite
              and abs(right - given) > 1e-3 * max(1, abs(right)))


def _value(text: str) -> str | None:
  """The value of an expression, as text that gives the same float."""
  return repr(float(_parsed(text)[0]))


def _parsed(text: str) -> list[Any]:
  import math_verify
  return math_verify.parse(f"\\boxed{{{text.strip(' $')}}}", parsing_timeout=None)


_parsed_gold = functools.lru_cache(256)(_parsed)  # the rollouts of a question share it


def _read_line() -> bytes:
  """From the descriptor, byte by byte of nothing that belongs to a later fork."""
  line = b""
  while not line.endswith(b"\n"):
    data = os.read(0, 1 << 16)  # one request is under way at a time: this reads no other
    if not data:
      return b""
    line += data
  return line


def _say(message: dict[str, Any]) -> None:
  data = json.dumps(message).encode() + b"\n"
  while data:
    data = data[os.write(1, data):]


if __name__ == "__main__":
  main(float(sys.argv[1]), int(sys.argv[2]))
