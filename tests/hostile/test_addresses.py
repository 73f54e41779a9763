"""Addresses of an excluded domain, spelled so that a plain reading of the host misses it."""

import asyncio

import pytest

from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.agent.tools.search import Hit, SearchTool
from tests.hostile import corpus


class Found:
  """A back end that finds one page."""

  waits = False

  def __init__(self, url):
    self.url = url

  async def search(self, query, max_results):
    return [Hit("title", self.url, "content")]


@pytest.mark.parametrize("case", corpus.cases("addresses"))
def test_addresses(case):
  tool = SearchTool(Found(case["url"]), excluded=["huggingface.co"])
  seen = asyncio.run(tool.run({"query": "x", "max_results": 1}, EpisodeState("q", [])))
  assert ("content" in seen.text) == case.get("shown", False), case["bound"]
