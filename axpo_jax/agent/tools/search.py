"""`tavily-search`: text search on the web, over a folder of documents, or from a record.

In: a query. Out: titles, addresses and passages. One tool, whose back end is the Tavily service
(`tavily`), a local index (`corpus`), or nothing but the record: every answer of a service is kept
on disk by its query, so that a rerun costs nothing and sees the same pages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import threading
import unicodedata
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from axpo_jax.agent.tools.base import EpisodeState, Observation, Tool, failure

EXCLUDED = ("huggingface.co",)  # where benchmarks lie with their answers
SEARCH_ERROR = "search_error"
MOST_RESULTS = 20

SCHEMA = {"type": "function", "function": {
    "name": "tavily-search",
    "description": "Searches the web and returns the best pages with the passages that fit.",
    "parameters": {"type": "object", "required": ["query"], "properties": {
        "query": {"type": "string", "description": "What to search for."},
        "max_results": {"type": "integer", "description": "How many pages to return.",
                        "default": 5}}}}}


class SearchError(RuntimeError):
  """A search that failed; the message is shown to the policy."""


@dataclasses.dataclass(frozen=True)
class Hit:
  """One result."""

  title: str
  url: str
  content: str


class Backend(Protocol):
  """Who finds pages. `waits`: over a network, and its answers are worth keeping."""

  waits: bool

  async def search(self, query: str, max_results: int) -> Sequence[Hit]:
    """The best pages first. Raises SearchError."""


class NoBackend:
  """For a tool that replays its record and asks nobody."""

  waits = False

  async def search(self, query: str, max_results: int) -> Sequence[Hit]:
    raise SearchError(f"there is no recorded result for {query!r}")


class SearchTool(Tool):
  """The tool.

  Args:
    backend: who finds pages.
    record: folder of earlier answers, read first and added to; None keeps none.
    excluded: domains (with all below them) whose pages are left out, wherever they come from.
    time_limit: seconds a search may take, retries included.
    max_concurrent: searches at once.
  """

  name = "tavily-search"
  scope = "network"
  parallel = True
  aliases = ("search", "tavily_search", "web_search")
  schema = SCHEMA

  def __init__(self, backend: Backend, record: str | os.PathLike | None = None, *,
               excluded: Sequence[str] = EXCLUDED, time_limit: float = 60.0,
               max_concurrent: int = 16):
    self._backend, self._excluded = backend, tuple(excluded)
    self._record = None if record is None else Record(record)
    self.waits, self.time_limit, self.max_concurrent = backend.waits, time_limit, max_concurrent
    self._asked: dict[tuple[str, int], asyncio.Task] = {}

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Searches and lists what was found."""
    query, most = arguments["query"].strip(), arguments["max_results"]
    most = min(max(most, 1), MOST_RESULTS)
    try:
      if not query:
        raise SearchError("the query is empty")
      hits = self._record.get(query, most) if self._record else None
      if hits is None:
        hits = await self._ask_once(query, most)
    except SearchError as error:
      return failure(SEARCH_ERROR, f"the search failed: {error}")
    return Observation(_listed(query, [hit for hit in hits if self._allowed(hit)]))

  async def _ask_once(self, query: str, most: int) -> Sequence[Hit]:
    """Asks the back end; rollouts of one question that ask the same at once share the answer."""
    if not self.waits:
      return await self._backend.search(query, most)
    task = self._asked.get((query, most))
    if task is None:
      task = self._asked[query, most] = asyncio.create_task(self._ask(query, most))
      task.add_done_callback(lambda _: self._asked.pop((query, most)))
    # One who gives up must not cancel the search of the others. It ends by its own time limits.
    return await asyncio.shield(task)

  async def _ask(self, query: str, most: int) -> Sequence[Hit]:
    hits = await self._backend.search(query, most)
    if self._record:
      self._record.put(query, most, hits)
    return hits

  def _allowed(self, hit: Hit) -> bool:
    hosts = _hosts(hit.url)
    return not any(host == domain or host.endswith(f".{domain}")
                   for domain in self._excluded for host in hosts)


class Record:
  """Answers on disk: one JSON file a query, written whole or not at all."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)

  def get(self, query: str, max_results: int) -> list[Hit] | None:
    """The recorded answer; None where there is none. A damaged file counts as none."""
    try:
      content = json.loads(self._path(query, max_results).read_bytes())
      return [Hit(**hit) for hit in content["hits"]]
    except (OSError, ValueError, TypeError, KeyError):
      return None

  def put(self, query: str, max_results: int, hits: Iterable[Hit]) -> None:
    """Keeps an answer."""
    path = self._path(query, max_results)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rollouts of several processes may share the folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps({"query": query, "max_results": max_results,
                                     "hits": [dataclasses.asdict(hit) for hit in hits]}))
    os.replace(temporary, path)

  def _path(self, query: str, max_results: int) -> pathlib.Path:
    key = hashlib.sha256(json.dumps([query, max_results]).encode()).hexdigest()
    return self.folder / key[:2] / f"{key}.json"


def _hosts(url: str) -> set[str]:
  """Every host that an address may lead to, read as leniently as a browser reads it: without a scheme,
  with backslashes, full-width dots or percent signs, and inside another address (an archive's)."""
  for _ in range(2):
    url = urllib.parse.unquote(url)
  url = unicodedata.normalize("NFKC", url).casefold().replace("\\", "/").replace("\u3002", ".")
  # Spaces, control and invisible characters: a browser drops them.
  url = "".join(mark for mark in url if unicodedata.category(mark)[0] not in "CZ")
  parts = re.split("//+", re.sub(":/+", "://", url.lstrip("/")))
  heads = (re.split("[/?#]", part, maxsplit=1)[0] for part in parts)
  # A scheme, a user or a port may stand beside the host: they are no domain that one would exclude.
  return {name.strip(".") for head in heads for name in re.split("[:@]", head)}


def _listed(query: str, hits: Sequence[Hit]) -> str:
  if not hits:
    return f"No results for {query!r}."
  return "\n\n".join(f"[{number}] {hit.title}\n{hit.url}\n{hit.content.strip()}"
                     for number, hit in enumerate(hits, 1))
