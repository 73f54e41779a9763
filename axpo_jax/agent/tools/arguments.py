"""Arguments of a call against the schema of its tool.

Knows the part of JSON schema that function schemas use: type, required, default, enum, and for
arrays items, minItems, maxItems. Unknown arguments are errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


class ArgumentError(ValueError):
  """Arguments that do not fit the tool's schema; the message is shown to the policy."""


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any],
                    aliases: Mapping[str, str]) -> dict[str, Any]:
  """Renames aliases, checks against the schema, fills in defaults.

  Raises:
    ArgumentError: names the first problem.
  """
  properties = parameters.get("properties", {})
  result: dict[str, Any] = {}
  for given, value in arguments.items():
    name = given if given in properties else aliases.get(given, given)
    if name not in properties:
      raise ArgumentError(f"unknown argument {given!r}; it takes: {', '.join(properties)}")
    if name in result:
      raise ArgumentError(f"argument {name!r} is given twice (as {given!r} too)")
    _check_value(name, value, properties[name])
    result[name] = int(value) if properties[name].get("type") == "integer" else value
  missing = [name for name in parameters.get("required", ()) if name not in result]
  if missing:
    raise ArgumentError(f"missing argument {missing[0]!r}")
  for name, schema in properties.items():
    if name not in result and "default" in schema:
      result[name] = schema["default"]
  return result


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: _is_finite_number(value),
    "integer": lambda value: _is_finite_number(value) and value == int(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _is_finite_number(value: Any) -> bool:
  try:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))
  except OverflowError:  # an integer beyond the floats
    return False


def _check_value(name: str, value: Any, schema: Mapping[str, Any]) -> None:
  kind = schema.get("type")
  if isinstance(kind, str) and kind in _TYPES and not _TYPES[kind](value):
    article = "an" if kind[0] in "aeiou" else "a"
    finite = "finite " if kind in ("number", "integer") else ""
    raise ArgumentError(f"{name} must be {'a' if finite else article} {finite}{kind}, "
                        f"got {_short(value)}")
  if "enum" in schema and value not in schema["enum"]:
    raise ArgumentError(f"{name} must be one of {schema['enum']}, got {_short(value)}")
  if kind == "array":
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not low <= len(value) <= high:
      wanted = f"{low}" if low == high else f"{low} to {high}"
      raise ArgumentError(f"{name} must have {wanted} items, got {len(value)}")
    for i, item in enumerate(value):
      _check_value(f"{name}[{i}]", item, schema.get("items", {}))


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
