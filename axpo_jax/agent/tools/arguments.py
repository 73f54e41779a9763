"""Arguments of a call against the JSON schema of its tool, by `jsonschema` within bounds.

In: a schema, which a server may have written, and arguments, which the policy did. Out: a sentence for
the policy about the first problem.

Checking a hostile schema can take for ever, so a schema with regular expressions checks nothing (one
search of them may never end), and checking gives up after `_MAX_STEPS` keywords (references to one
another can double at every level). A schema that cannot be checked lets all arguments pass: the tool, or
its server, judges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import referencing

_MAX_STEPS = 10_000  # of checking one call's arguments; an honest schema takes hundreds


class ArgumentError(ValueError):
  """Arguments that do not fit the tool's schema; the message is shown to the policy."""


class SchemaChecker:
  """Checks values by a JSON schema of any draft.

  Args:
    schema: of the arguments, an object's.
  """

  def __init__(self, schema: Mapping[str, Any]):
    self._steps = 0
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checks = {name: self._counted(check) for name, check in kind.VALIDATORS.items()}
    types = kind.TYPE_CHECKER.redefine_many({"number": _is_number, "integer": _is_integer})
    bounded = jsonschema.validators.extend(kind, checks | {"uniqueItems": lambda *_: None}, type_checker=types)
    # An empty registry: a schema that refers elsewhere must not make us fetch anything.
    self._validator = None if _has_patterns(schema) else bounded(
      schema, registry=referencing.Registry())

  def problem(self, arguments: dict[str, Any]) -> str | None:
    """What does not fit; None where all does, or where the schema cannot be checked."""
    if self._validator is None:
      return None
    self._steps = 0
    try:
      found = jsonschema.exceptions.best_match(self._validator.iter_errors(arguments))
    except Exception:  # the schema itself is at fault, or takes too many steps
      return None
    return None if found is None else _sentence(found)

  def _counted(self, check: Callable) -> Callable:
    def counted(*arguments: Any) -> Any:
      self._steps += 1
      if self._steps > _MAX_STEPS:
        raise RecursionError(f"more than {_MAX_STEPS} steps")
      return check(*arguments)
    return counted


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any],
                    aliases: Mapping[str, str], checker: SchemaChecker | None = None) -> dict[str, Any]:
  """Renames aliases, checks against the schema, fills in defaults. Unknown arguments are errors.

  Args:
    checker: of `parameters`; made if it is not given, which takes a millisecond.

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
    result[name] = value
  if problem := (checker or SchemaChecker(parameters)).problem(result):
    raise ArgumentError(problem)
  for name, schema in properties.items():
    if name in result and schema.get("type") == "integer":
      result[name] = int(result[name])  # JSON's 2.0
    elif name not in result and "default" in schema:
      result[name] = schema["default"]
  return result


def _is_number(_: Any, value: Any) -> bool:
  try:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))
  except OverflowError:  # an integer beyond the floats
    return False


def _is_integer(checker: Any, value: Any) -> bool:
  return _is_number(checker, value) and value == int(value)


def _has_patterns(value: Any) -> bool:
  if isinstance(value, list):
    return any(map(_has_patterns, value))
  return isinstance(value, dict) and (
    isinstance(value.get("pattern"), str) or isinstance(value.get("patternProperties"), dict)
    or any(map(_has_patterns, value.values())))


def _sentence(error: jsonschema.ValidationError) -> str:
  """What is wrong, in words that a policy can act on."""
  name = error.json_path.removeprefix("$").removeprefix(".") or "the arguments"
  wanted, got = error.validator_value, _short(error.instance)
  if error.validator == "required":
    missing = next(key for key in wanted if key not in error.instance)
    return f"missing argument {missing!r}"
  if error.validator == "type" and isinstance(wanted, str):
    finite = "finite " if wanted in ("number", "integer") else ""
    article = "an" if wanted[0] in "aeiou" and not finite else "a"
    return f"{name} must be {article} {finite}{wanted}, got {got}"
  if error.validator == "enum":
    return f"{name} must be one of {_short(wanted)}, got {got}"
  if error.validator in ("minItems", "maxItems"):
    low, high = error.schema.get("minItems", 0), error.schema.get("maxItems", math.inf)
    count = f"{low}" if low == high else f"{low} to {high}"
    return f"{name} must have {count} items, got {len(error.instance)}"
  return f"{name}: {error.message[:300]}"


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
