"""One JSON line of a record that may hold anything: a file of a run is written whatever it is given."""

from __future__ import annotations

import json
import math
from typing import Any

_DEPTH = 100  # of what is written as it is
_BITS = 10_000  # of an integer; Python does not write more than 4,300 digits


def to_line(record: dict[str, Any]) -> str:
  """A record as ASCII JSON without a line break. Readers get back what they were given, except for what
  JSON has no form for: not finite numbers and unknown types become texts, what is nested more than
  100 deep becomes "..."."""
  try:
    return json.dumps(record, allow_nan=False)
  except (ValueError, TypeError, RecursionError):
    return json.dumps(_plain(record, _DEPTH), allow_nan=False)


def _plain(value: Any, depth: int) -> Any:
  if not depth:
    return "..."
  if isinstance(value, dict):
    return {str(key): _plain(part, depth - 1) for key, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(part, depth - 1) for part in value]
  if isinstance(value, int) and value.bit_length() > _BITS:
    return f"a number of {value.bit_length()} bits"
  if value is None or isinstance(value, (bool, int, str)) or (
      isinstance(value, float) and math.isfinite(value)):
    return value
  return repr(value)[:1000]
