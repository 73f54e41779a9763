"""Values in JSON records, by dotted path."""

from collections.abc import Mapping
from typing import Any


def value_at(record: Any, path: str) -> Any:
  """The value at a dotted path; None if there is none. A key that is the whole path, dots included, goes first."""
  if isinstance(record, Mapping) and path in record:
    return record[path]
  for name in path.split("."):
    record = record.get(name) if isinstance(record, Mapping) else None
  return record
