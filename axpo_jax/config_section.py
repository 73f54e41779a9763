"""A section of the config from the dataclass that reads it, so that a default is written once.

In: a dataclass and the names of its fields. Out: a ConfigDict with their defaults.
"""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def section(record: type, *names: str, **own: Any) -> ConfigDict:
  """A section of fields that a dataclass reads.

  Args:
    names: fields of the dataclass; none: all that have a default.
    own: further fields of the section, and defaults that differ from the dataclass's.
  """
  hints = typing.get_type_hints(record)
  made = ConfigDict(own)
  for field in dataclasses.fields(record):
    has_default = field.default is not dataclasses.MISSING
    if field.name not in own and (field.name in names if names else has_default):
      made[field.name] = _holder(field.default, hints[field.name])
  return made


def _holder(default: Any, hint: Any) -> Any:
  """The default, in a reference where a flag may also set it to None or, from None, to a value."""
  kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
  if types.NoneType in typing.get_args(hint):
    return FieldReference(default, field_type=kinds[0])
  return default
