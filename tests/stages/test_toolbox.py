"""From a config to tools: what is offered, granted, limited, logged; and errors that say the mend."""

import asyncio
import json
import pathlib
import sys

import pytest

from axpo_jax.agent.tools import audit
from axpo_jax.agent.tools.base import EpisodeState
from axpo_jax.agent.tools.function import tool
from axpo_jax.config import base_config
from axpo_jax.config_checks import validate
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld import search
from axpo_jax.stages.toolbox import AUDIT_FILE, toolbox
from tests import sizes

EXAMPLE = str(pathlib.Path(__file__).parents[1] / "agent" / "mcp_example.py")


@tool(scope="tell")
def repeat(text: str) -> str:
  """Says it again.

  Args:
    text: what to say.
  """
  return text


not_a_tool = 3


@pytest.fixture
def config():
  c = base_config()
  c.agent.audit = False
  return c


def build(config, chat, **changes):
  return toolbox(config, chat, 16, **changes)


def names(box):
  return [tool.name for tool in box.tools]


def call(box, name, arguments):
  return asyncio.run(box.call(name, arguments, EpisodeState("q", [])))


def test_the_same_settings_give_the_same_box(config, chat):
  box = build(config, chat)
  assert names(box) == ["image_zoom_in"] and build(config, chat) is box
  config.agent.dry_run = True
  assert build(config, chat) is not box and build(config, chat).dry_run


def test_search_over_the_miniature_worlds_corpus(config, chat):
  config.agent.tools, config.agent.scopes = ("tavily-search",), ("network",)
  config.agent.search.backend = "miniworld"
  box = build(config, chat)
  title = search.documents(config.data.miniworld.seed)[0]["title"]
  assert title in call(box, "tavily-search", {"query": title}).text


def test_tools_of_ones_own_and_of_mcp_servers(config, chat, tmp_path):
  (tmp_path / "servers.json").write_text(json.dumps(
    [{"command": [sys.executable, EXAMPLE], "only": ["add"], "prefix": "my_", "scope": "paint"}]))
  config.agent.mcp = str(tmp_path / "servers.json")
  config.agent.tools, config.agent.scopes = (f"{__name__}:repeat",), ("tell",)
  box = build(config, chat)
  assert names(box) == ["repeat", "my_add"]
  assert call(box, "repeat", {"text": "ho"}).text == "ho"
  assert call(box, "my_add", {"first": 1}).error == "refused"


def test_image_search_is_offered_where_the_config_says_so(config, chat, tmp_path):
  (tmp_path / "cache.json").write_text("{}")
  config.agent.image_search.cache = str(tmp_path / "cache.json")
  config.eval.extra_tools = ("image_search",)
  assert names(build(config, chat)) == ["image_zoom_in"]
  assert names(build(config, chat, evaluation=True)) == ["image_zoom_in", "image_search"]


def test_observations_are_cut_at_the_configs_tokens(config, chat):
  config.agent.tools, config.agent.scopes = (f"{__name__}:repeat",), ("tell",)
  config.agent.max_observation_tokens = 10
  assert "tokens cut ...]" in call(build(config, chat), "repeat", {"text": "word " * 100}).text


def test_the_runs_folder_gets_the_audit_log_and_a_resumed_run_counts_on(config, chat, tmp_path):
  config.agent.tools, config.agent.scopes = (f"{__name__}:repeat",), ("tell",)
  config.agent.audit, config.agent.run_limits.calls = True, 2
  run = tmp_path / "my_run"
  run.mkdir()
  box = build(config, chat, folder=run)
  box.step = 3
  assert call(box, "repeat", {"text": "a"}).error is None
  (entry,) = audit.read(run / AUDIT_FILE)
  assert (entry["run"], entry["step"], entry["tool"]) == ("my_run", 3, "repeat")
  config.agent.max_observation_tokens = 99  # other settings, so another box, as after a restart
  box = build(config, chat, folder=run)
  assert [call(box, "repeat", {"text": "a"}).error for _ in range(2)] == [None, "limit"]


@pytest.mark.parametrize("field, value, says", [
    ("tools", ("browse",), "browse"), ("tools", (f"{__name__}:not_a_tool",), "which is no tool"),
    ("tools", ("nowhere_at_all:x",), "nowhere_at_all"), ("tools", ("tavily-search",), "TAVILY_API_KEY"),
])
def test_tools_that_cannot_be_had(config, chat, monkeypatch, field, value, says):
  monkeypatch.delenv("TAVILY_API_KEY", raising=False)
  config.agent[field] = value
  with pytest.raises(ConfigError, match=says):
    build(config, chat)


@pytest.mark.parametrize("package, name, change", [
    ("IPython", "python", {}), ("bm25s", "tavily-search", {"backend": "miniworld"}),
    ("httpx2", "tavily-search", {"backend": "tavily"}), ("mcp", "", {}),
])
def test_a_tool_without_its_package_names_the_extra(config, chat, monkeypatch, tmp_path, package,
                                                    name, change):
  monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
  monkeypatch.setenv("TAVILY_API_KEY", "k")
  config.agent.tools = (name,) if name else ()
  config.agent.search.update(change)
  config.agent.python.warm = 2  # no other test's box
  if package == "mcp":
    config.agent.mcp = str(tmp_path / "servers.json")
    (tmp_path / "servers.json").write_text('[{"command": ["x"]}]')
  with pytest.raises(ConfigError, match=r"axpo_jax\[tools\]"):
    build(config, chat)


@pytest.mark.parametrize("changes, field", [
    ({"agent.tools": ("tavily-search",), "agent.search.backend": "bing"}, "agent.search.backend"),
    ({"agent.tools": ("tavily-search",), "agent.search.backend": "local"}, "agent.search.corpus"),
    ({"agent.tools": ("tavily-search",), "agent.search.backend": "recorded"}, "agent.search.record"),
    ({"eval.extra_tools": ("image_search",)}, "agent.image_search.cache"),
    ({"agent.mcp": "/nowhere.json"}, "agent.mcp"),
])
def test_what_can_be_checked_is_checked_at_once(config, tmp_path, changes, field):
  config.model.checkpoint = str(sizes.write(tmp_path))
  (tmp_path / "q.jsonl").touch()
  config.data.path = config.data.eval_path = str(tmp_path / "q.jsonl")
  validate(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=field):
    validate(config)
