"""The tools of a run, from the config: which there are, their scopes and their budgets.

In: the agent section. Out: a ToolBox. Equal settings give the same one, so that a sandbox or a connection to a
server is not made twice.
"""

import importlib
import json
from collections.abc import Callable, Mapping

from etils import epath
from ml_collections import ConfigDict

from axpo_jax.agent.tools import audit, mcp_config
from axpo_jax.agent.tools.base import Tool, ToolBox
from axpo_jax.agent.tools.budget import ToolLimits, Usage
from axpo_jax.agent.tools.corpus import CorpusError, Document, LocalSearch, read_documents
from axpo_jax.agent.tools.image_search import ImageCacheError, ImageSearch
from axpo_jax.agent.tools.kernels import KernelConfig, SandboxError
from axpo_jax.agent.tools.mcp_connection import McpError
from axpo_jax.agent.tools.mcp_server import McpServer
from axpo_jax.agent.tools.python import PythonTool
from axpo_jax.agent.tools.search import Backend, NoBackend, SearchTool
from axpo_jax.agent.tools.shell import ShellTool
from axpo_jax.agent.tools.tavily import MissingKey, Tavily
from axpo_jax.agent.tools.text import middle_cutter
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.errors import ConfigError
from axpo_jax.miniworld import search as miniworld_search
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits
from axpo_jax.stages import plugins

AUDIT_FILE = "audit.jsonl"
_made: dict[str, ToolBox] = {}


def toolbox(config: ConfigDict, chat: Chat, factor: int, *, evaluation: bool = False,
            folder: epath.Path | None = None) -> ToolBox:
  """The tools that the config names, with its scopes and limits.

  Args:
    chat: measures observations in tokens.
    factor: sides of zoomed crops are multiples of this.
    evaluation: also offer `config.eval.extra_tools`.
    folder: of the run, for the audit log; None: no log.

  Raises:
    ConfigError: a tool does not exist, or lacks a package, a key, a file or a sandbox.
  """
  extra = config.eval.extra_tools if evaluation else ()
  key = json.dumps([config.agent.to_json(), config.images.to_json(), list(extra), str(folder),
                    config.data.miniworld.seed, factor, str(chat.tokenizer.name_or_path)])
  if key not in _made:
    try:
      _made[key] = _toolbox(config, chat, factor, tuple(extra), folder)
    except (SandboxError, MissingKey, CorpusError, ImageCacheError, McpError, audit.AuditError,
            ImportError, ValueError) as error:
      raise ConfigError(f"config.agent: {error}") from error
  return _made[key]


def flush() -> None:
  """Uploads audit logs that belong on an object store."""
  for tools in _made.values():
    if tools.audit is not None:
      tools.audit.flush()


def _toolbox(config: ConfigDict, chat: Chat, factor: int, extra: tuple[str, ...],
             folder: epath.Path | None) -> ToolBox:
  agent, log, used = config.agent, None, Usage()
  # Before the log is opened, so that a failure leaves no folder.
  tools = [*_tools(config, factor, extra), *plugins.environment(config).tools]
  if folder is not None and agent.audit:
    path = folder / AUDIT_FILE
    # A resumed run continues the counts of its budgets.
    used = audit.totals(audit.read(path))
    log = audit.AuditLog(path, run=folder.name)
  return ToolBox(
    tools, agent.scopes, dry_run=agent.dry_run, audit=log, used=used,
    cut=middle_cutter(agent.max_observation_tokens, chat.encode_plain, chat.decode),
    describe=agent.describe_tools, overlap=agent.overlap_tools,
    episode_limits=_limits(agent.episode_limits), run_limits=_limits(agent.run_limits))


def _tools(config: ConfigDict, factor: int, extra: tuple[str, ...]) -> list[Tool]:
  agent = config.agent
  crops = ImageLimits(config.images.zoom_min_pixels, config.images.zoom_max_pixels)
  known: Mapping[str, Callable[[], Tool]] = {
    ImageZoomIn.name: lambda: ImageZoomIn(crops, factor=factor),
    PythonTool.name: lambda: _sandboxed(PythonTool, agent.python),
    ShellTool.name: lambda: _sandboxed(ShellTool, agent.python),
    SearchTool.name: lambda: _search(config),
    ImageSearch.name: lambda: ImageSearch(agent.image_search.cache,
                                          max_results=agent.image_search.max_results)}
  names = (*agent.tools, *extra)
  if unknown := [name for name in names if name not in known and ":" not in name]:
    raise ConfigError(f"config.agent.tools names {unknown}; there are {sorted(known)}, and "
                      "functions of yours as 'module:name'")
  tools = [known[name]() if name in known else _imported(name) for name in names]
  if agent.mcp:
    for server in mcp_config.read(agent.mcp):
      tools += McpServer(server).tools()
  return tools


def kernel_config(section: ConfigDict) -> KernelConfig:
  """The kernels' part of config.agent.python; the other fields are the tool's own."""
  return KernelConfig(**{name: value for name, value in section.items()
                         if name not in ("url", "timeout", "max_timeout", "max_concurrent")})


def _sandboxed(kind: type[PythonTool], section: ConfigDict) -> PythonTool:
  tool = kind(kernel_config(section), url=section.url, timeout=section.timeout,
                    max_timeout=section.max_timeout, max_concurrent=section.max_concurrent or None)
  tool.start()
  return tool


def _search(config: ConfigDict) -> SearchTool:
  section = config.agent.search
  return SearchTool(_backend(config), section.record or None, excluded=section.excluded,
                    max_concurrent=section.max_concurrent)


def _backend(config: ConfigDict) -> Backend:
  section = config.agent.search
  if section.backend == "tavily":
    return Tavily(excluded=section.excluded, per_minute=section.per_minute)
  if section.backend == "local":
    return LocalSearch(read_documents(section.corpus))
  if section.backend == "miniworld":
    documents = miniworld_search.documents(config.data.miniworld.seed)
    return LocalSearch([Document(**document) for document in documents])
  return NoBackend()


def _imported(name: str) -> Tool:
  module, _, attribute = name.partition(":")
  tool = getattr(importlib.import_module(module), attribute, None)
  if not isinstance(tool, Tool):
    raise ConfigError(f"config.agent.tools names {name!r}, which is no tool: decorate a function of "
                      f"{module} with axpo_jax.agent.tools.function.tool")
  return tool


def _limits(section: ConfigDict) -> ToolLimits:
  return ToolLimits(**{name: value or None for name, value in section.items()})
