"""The Tavily search service: https://docs.tavily.com, POST /search.

In: a query. Out: hits, or a SearchError once the retries are used up. Busy and failing servers are
asked again, later and later and as the server wishes; all calls together keep a rate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from axpo_jax.agent.tools.search import EXCLUDED, Hit, SearchError
from axpo_jax.engine import endpoint

KEY_VARIABLE = "TAVILY_API_KEY"
_LONGEST_WAIT = 30.0  # seconds between two attempts


class MissingKey(RuntimeError):
  """There is no key in the environment."""


class Tavily:
  """The client. Made anywhere, used on one event loop.

  Args:
    key: of the service; by default from the environment variable TAVILY_API_KEY.
    url: of the service.
    excluded: domains that it shall not search.
    per_minute: most requests a minute, retries included.
    attempts: how often one query is tried.
    timeout: seconds of one attempt.
    first_wait: seconds before the second attempt; the wait doubles from there, with jitter.

  Raises:
    MissingKey: there is no key.
  """

  waits = True

  def __init__(self, key: str | None = None, *, url: str = "https://api.tavily.com/search",
               excluded: Sequence[str] = EXCLUDED, per_minute: float = 100.0, attempts: int = 4,
               timeout: float = 20.0, first_wait: float = 1.0):
    try:
      import aiolimiter
      import httpx2
      import tenacity
    except ImportError as error:
      raise ImportError(f"the search tool needs {error.name}: pip install 'axpo_jax[tools]'"
                        ) from error
    key = key or os.environ.get(KEY_VARIABLE)
    if not key:
      raise MissingKey(f"web search needs a key of Tavily in the environment variable {KEY_VARIABLE}")
    self._http, self._tenacity = httpx2, tenacity
    self._url, self._excluded = url, list(excluded)
    self._attempts, self._first_wait = attempts, first_wait
    # Short periods: a minute's whole allowance at once would be a burst.
    self._limiter = aiolimiter.AsyncLimiter(max(per_minute / 60, 1), max(60 / per_minute, 1))
    self._client = httpx2.AsyncClient(timeout=timeout, headers={"Authorization": f"Bearer {key}"})

  async def search(self, query: str, max_results: int) -> list[Hit]:
    """See `search.Backend`."""
    retrying = self._tenacity.AsyncRetrying(
      stop=self._tenacity.stop_after_attempt(self._attempts), wait=self._wait, reraise=True,
      retry=self._tenacity.retry_if_exception_type((_Busy, self._http.TransportError)))
    try:
      return await retrying(self._search_once, query, max_results)
    except (_Busy, self._http.HTTPError, self._http.InvalidURL) as error:
      # The types of these say more than their texts, and neither holds the key.
      raise SearchError(f"{type(error).__name__.lstrip('_')} {error}".strip()) from error

  async def _search_once(self, query: str, max_results: int) -> list[Hit]:
    async with self._limiter:
      response = await self._client.post(self._url, json={
        "query": query, "max_results": max_results, "search_depth": "basic",
        "exclude_domains": self._excluded})
    if response.status_code == 429 or response.status_code >= 500:
      raise _Busy(response.status_code, response.headers.get("retry-after"))
    try:
      content = response.json()
    except ValueError as error:
      raise SearchError(f"the service's answer is not JSON (status {response.status_code})"
                        ) from error
    if response.status_code != 200:
      raise SearchError(f"the service refused it: status {response.status_code}, "
                        f"{_reason(content)}")
    return _hits(content)

  def _wait(self, state: Any) -> float:
    """Seconds to wait, with jitter, or what the server asks for."""
    backoff = self._tenacity.wait_random_exponential(multiplier=self._first_wait, max=_LONGEST_WAIT)
    error = state.outcome.exception()
    return max(backoff(state), min(getattr(error, "retry_after", 0.0), _LONGEST_WAIT))


class _Busy(Exception):
  """The server cannot answer now."""

  def __init__(self, status: int, retry_after: str | None):
    super().__init__(f"(status {status})")
    self.retry_after = endpoint.retry_after(retry_after) or 0.0


def _reason(content: Any) -> str:
  """The service's words: {"detail": {"error": ...}}."""
  detail = content.get("detail") if isinstance(content, dict) else None
  return str(detail.get("error") if isinstance(detail, dict) else detail)[:200]


def _hits(content: Any) -> list[Hit]:
  try:
    return [Hit(str(found.get("title") or ""), str(found.get("url") or ""),
                str(found.get("content") or "")) for found in content["results"]]
  except (TypeError, KeyError, AttributeError) as error:
    raise SearchError("the service's answer has no list of results") from error
