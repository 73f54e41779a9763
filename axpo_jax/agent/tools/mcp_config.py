"""Which MCP servers a run uses: from a file to records, with variables filled in and secrets known.

In: a JSON list of records with the fields of `McpConfig`, or a file with "mcpServers" as Claude's
programs write it. Out: `McpConfig`s. `$NAME`, `${NAME}` and `${NAME:-default}` stand for variables of
the trainer's environment; `$$` is a dollar sign.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

_TRANSPORTS = {"stdio": "stdio", "http": "http", "streamable-http": "http", "streamableHttp": "http",
               "sse": "sse"}
# What other programs keep in their mcpServers files and what says nothing to us.
_IGNORED = frozenset({"alwaysAllow", "autoApprove", "description", "timeout"})
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)(?::-([^}]*))?\})")
_SECRET_NAME = re.compile(r"key|token|secret|passw|auth|credential|bearer", re.IGNORECASE)
_URL = re.compile(r"\b(https?://)[^\s'\"<>]+")
_SHORTEST_SECRET = 6  # shorter values ("1", "true") are everyday words


@dataclasses.dataclass(frozen=True)
class McpConfig:
  """Where a server is and what its tools may do.

  Attributes:
    command: program and arguments of a local server, or
    url: address of a remote one.
    name: what errors call it; by default its program or its host, since arguments and addresses may
      hold secrets.
    transport: "stdio", "http" or "sse" (the remote servers of 2024); by default by command and url.
    env: variables of a local server; of the trainer's it gets the harmless ones alone (PATH, HOME).
    cwd: folder that a local server starts in.
    headers: sent with every request to a remote one, such as Authorization.
    scope: what all its tools need to be granted.
    prefix: put in front of their names.
    only: names of the tools to offer; empty = all.
    sessions: 0: one session serves all episodes. Otherwise the server keeps state (a browser, a memory):
      every episode that calls it gets a session of its own, and at most this many are open at once.
    time_limit: seconds a call may take.
    max_concurrent: calls of one tool at once.
    connect_seconds: seconds that starting, listing, and waiting for a session may take each.
    secrets: texts that no error may show, beside those that are found by themselves: values of `env`
      and `headers`, and arguments that are named as keys are.
  """

  command: tuple[str, ...] = ()
  url: str = ""
  name: str = ""
  transport: str = ""
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  cwd: str | None = None
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  scope: str = "network"
  prefix: str = ""
  only: tuple[str, ...] = ()
  sessions: int = 0
  time_limit: float = 60.0
  max_concurrent: int = 8
  connect_seconds: float = 60.0
  secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)

  def __post_init__(self):
    if bool(self.command) == bool(self.url):
      raise ValueError(f"an MCP server needs either a command or a url; {self.name or 'one'} has "
                       f"{'both' if self.url else 'neither'}")
    wanted = ("stdio",) if self.command else ("http", "sse")
    if (self.transport or wanted[0]) not in wanted:
      raise ValueError(f"the MCP server {self.label}: transport={self.transport!r}, but one with a "
                       f"{'command' if self.command else 'url'} is reached by {' or '.join(wanted)}")
    if self.sessions < 0:
      raise ValueError(f"the MCP server {self.label}: sessions={self.sessions}; 0 shares one session")

  @property
  def label(self) -> str:
    """What errors call the server."""
    return self.name or (urllib.parse.urlsplit(self.url).hostname or "url" if self.url
                         else pathlib.PurePath(self.command[0]).name)

  def redact(self, text: str) -> str:
    """The text without the secrets of this record, and with no more than the host of any address."""
    text = _URL.sub(lambda found: f"{found[1]}{urllib.parse.urlsplit(found[0]).hostname}/...", text)
    for secret in sorted(self._hidden(), key=len, reverse=True):
      text = text.replace(secret, "***")
    return text

  def _hidden(self) -> set[str]:
    found = {*self.secrets, *self.env.values(), *self.headers.values()}
    found |= {value.partition(" ")[2] for value in self.headers.values()}  # "Bearer ..."
    for flag, value in zip(("", *self.command), self.command):
      name, _, inside = value.partition("=")
      if inside and _SECRET_NAME.search(name):
        found.add(inside)
      elif flag.startswith("-") and "=" not in flag and _SECRET_NAME.search(flag):
        found.add(value)
    return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}


def read(path: str | os.PathLike) -> list[McpConfig]:
  """Servers of a file; see the module docstring.

  Raises:
    ValueError: the file is no such list, names an unknown field or an unset variable, or a record
      cannot work. The message holds no value of the file.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text("utf-8-sig"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  records = content
  if isinstance(content, dict) and isinstance(content.get("mcpServers"), dict):
    records = [{"name": name, **entry} if isinstance(entry, dict) else entry
               for name, entry in content["mcpServers"].items()]
  if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
    raise ValueError(f'{path}: expected a list of servers, or an object with "mcpServers"')
  return [config_of(record, f"{path}, server {record.get('name', number)}")
          for number, record in enumerate(records) if record.get("disabled") is not True]


def config_of(record: Mapping[str, Any], where: str = "MCP server") -> McpConfig:
  """One server as the file describes it. Errors: see `read`."""
  fields = {name: value for name, value in record.items() if name not in _IGNORED | {"disabled"}}
  if "type" in fields:
    fields["transport"] = _TRANSPORTS.get(fields.pop("type"), "?")
  if isinstance(fields.get("command"), str):
    fields["command"] = [fields["command"], *fields.pop("args", ())]
  known = {field.name for field in dataclasses.fields(McpConfig)}
  if unknown := sorted(fields.keys() - known):
    raise ValueError(f"{where}: unknown fields {unknown}; there are {sorted(known)}")
  secrets: set[str] = set(fields.pop("secrets", ()))
  for name in ("command", "url", "env", "cwd", "headers"):
    if name in fields:
      fields[name] = _filled(fields[name], where, secrets)
  for name in ("command", "only"):
    fields[name] = tuple(fields.get(name) or ())
  try:
    return McpConfig(**fields, secrets=tuple(secrets))
  except (TypeError, AttributeError) as error:
    raise ValueError(f"{where}: a field has a value of the wrong type") from error


def _filled(value: Any, where: str, secrets: set[str]) -> Any:
  """The value with its variables; what comes from the environment is added to `secrets`."""
  if isinstance(value, dict):
    return {key: _filled(item, where, secrets) for key, item in value.items()}
  if isinstance(value, list):
    return [_filled(item, where, secrets) for item in value]
  if not isinstance(value, str):
    raise ValueError(f"{where}: expected texts, got {type(value).__name__}")

  def variable(found: re.Match) -> str:
    name = found[2] or found[3]
    if found[1]:
      return "$"
    if name not in os.environ and found[4] is None:
      raise ValueError(f"{where} names ${name}, which is not set: export it, or write $$ for a "
                       "dollar sign")
    text = os.environ.get(name, found[4])
    if name in os.environ and _SECRET_NAME.search(name):
      secrets.add(text)
    return text

  return _VARIABLE.sub(variable, value)
