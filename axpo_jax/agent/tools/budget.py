"""What tool calls use up, and how much of it an episode or a run may."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Usage:
  """Sums over calls, refused and failed ones included.

  Attributes:
    calls: how many.
    seconds: time inside the tools.
    bytes: returned text and pixels.
    images: returned images.
  """

  calls: int = 0
  seconds: float = 0.0
  bytes: int = 0
  images: int = 0

  def add(self, other: Usage) -> None:
    """Adds another sum to this one."""
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class ToolLimits:
  """The most of each that may be used up; None sets no limit.

  A call is refused once a sum has reached its limit, so that the last call that runs may go beyond
  it by what one call returns.
  """

  calls: int | None = None
  seconds: float | None = None
  bytes: int | None = None
  images: int | None = None

  def exceeded_by(self, usage: Usage) -> str | None:
    """What is used up, in words ("4 calls"); None while everything is in order."""
    for field in dataclasses.fields(self):
      limit = getattr(self, field.name)
      if limit is not None and getattr(usage, field.name) >= limit:
        return f"{limit:g} {field.name}"
    return None


NO_LIMITS = ToolLimits()
