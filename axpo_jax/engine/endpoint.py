"""Asking a stranger's HTTP endpoint: bounded replies, and again where that can help.

In: a coroutine function that makes one request. Out: what it returned. An endpoint that is busy or fails
is asked again after a growing wait, or after the one that it names in `Retry-After`; what it refuses as
it stands (a wrong key, an unknown model, a field it does not take) is not repeated.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

# Statuses below 500 that may differ the next time: time-out, too early, too many requests.
_AGAIN = (408, 425, 429)
_LONGEST_WAIT = 300.0  # seconds, whatever `Retry-After` says
_MOST_BYTES = 64 << 20  # of a reply


class BusyError(RuntimeError):
  """The endpoint failed, and may not the next time.

  Attributes:
    wait_s: seconds after which it asks to be asked again; None: it does not say.
  """

  def __init__(self, message: str, wait_s: float | None = None):
    super().__init__(message)
    self.wait_s = wait_s


class RefusedError(RuntimeError):
  """The endpoint refuses this request; asking again would not help."""

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


async def post_json(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
  """The JSON with which POST `url` is answered.

  Raises:
    BusyError: a status that may pass, or a reply that is no JSON or too large.
    RefusedError: any other status.
    aiohttp.ClientError, TimeoutError: there was no answer.
  """
  async with session.post(url, json=body) as response:
    data = bytearray()
    async for piece in response.content.iter_any():
      data += piece
      if len(data) > _MOST_BYTES:
        raise BusyError(f"a reply of more than {_MOST_BYTES >> 20} MB")
    text = data.decode("utf-8", "replace")
    if response.status in _AGAIN or (response.status >= 500 and response.status != 501):
      raise BusyError(f"status {response.status}: {text[:300]}", retry_after(response.headers.get("Retry-After")))
    if response.status != 200:
      raise RefusedError(f"status {response.status}: {text[:300]}", response.status)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise BusyError(f"not JSON: {text[:300]}") from error


async def ask(request: Callable[[], Awaitable[T]], *, attempts: int, first_wait_s: float) -> T:
  """`request()`, up to `attempts` times while it raises BusyError or gets no answer.

  Args:
    first_wait_s: seconds before the second attempt, doubled for each further one; more where the
      endpoint asks for more, up to 300.

  Raises:
    BusyError: every attempt failed; says in what the last one did.
  """
  for attempt in range(attempts):
    try:
      return await request()
    except (aiohttp.ClientError, TimeoutError, BusyError) as error:
      last = error
    if attempt + 1 < attempts:
      asked = getattr(last, "wait_s", None) or 0.0
      await asyncio.sleep(min(max(first_wait_s * 2**attempt, asked), _LONGEST_WAIT))
  raise BusyError(f"no reply after {attempts} attempts: {last!r}") from last


def retry_after(value: str | None) -> float | None:
  """Seconds that a `Retry-After` header asks for: it has a number or a date."""
  if value is None:
    return None
  try:
    return max(float(value), 0.0) if value.strip().isdigit() else max(0.0, (
      email.utils.parsedate_to_datetime(value) - datetime.datetime.now(datetime.UTC)).total_seconds())
  except (ValueError, TypeError, OverflowError):
    return None
