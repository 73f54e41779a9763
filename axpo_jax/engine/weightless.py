"""What engines share that hold no weights of ours: counters, the version's number, being closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axpo_jax.engine.protocol import EngineClosed, EngineStats, Sample, SampleRequest


class WeightlessEngine:
  """All of `engine.protocol.Engine` but `generate`, for teachers."""

  def __init__(self):
    self._stats = EngineStats()
    self._version = 0
    self._closed = False

  def _check_open(self) -> None:
    if self._closed:
      raise EngineClosed(f"this {type(self).__name__} is closed; build a new one")

  def _count(self, request: SampleRequest, samples: Sequence[Sample]) -> None:
    self._stats.requests += 1
    self._stats.samples += len(samples)
    self._stats.prompt_tokens += request.prompt_tokens * len(samples)
    self._stats.decode_tokens += sum(len(sample.ids) for sample in samples)

  async def update_weights(self, params: Any, version: int) -> None:
    """Takes the version's number alone."""
    self._version = version

  def stats(self, *, reset: bool = False) -> EngineStats:
    stats = self._stats
    self._stats = EngineStats() if reset else EngineStats(**vars(stats))
    return stats

  def gauges(self) -> dict[str, float]:
    return {}

  async def close(self) -> None:
    self._closed = True
