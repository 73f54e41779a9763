"""Tools: what they are, who may call them, and what happens when a call is wrong.

In: a call by name with JSON arguments. Out: an Observation, always. A call that is malformed,
refused, too slow or that makes the tool raise is answered with an observation that names the
problem, so the policy can mend it; nothing a policy writes can end the run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import PIL.Image

from axpo_jax.agent.parse import CallError, ToolCall

# Kinds of call errors beside those of parse.CallError.
UNKNOWN_TOOL = "unknown_tool"
BAD_ARGUMENTS = "bad_arguments"
REFUSED = "refused"  # the tool's scope is not granted
TIMEOUT = "timeout"
TOOL_ERROR = "tool_error"  # the tool raised
DRY_RUN = "dry_run"  # recorded, not run


@dataclasses.dataclass(frozen=True)
class Observation:
  """What a call returns to the policy.

  Attributes:
    text: shown first.
    images: shown after the text, and appended to the episode's images. At the size the policy
      shall see: the loop only rounds their sides to what the vision tower can take.
    error: None when the call worked, else the kind of the error.
  """

  text: str
  images: tuple[PIL.Image.Image, ...] = ()
  error: str | None = None


def failure(kind: str, message: str) -> Observation:
  """An observation that tells the policy what went wrong."""
  return Observation(f"Error: {message}", error=kind)


@dataclasses.dataclass
class EpisodeState:
  """What a tool may know of the episode that calls it.

  Attributes:
    question_id: whose episode it is.
    images: every image so far at full resolution, the question's first; read only. The next image
      that an observation brings gets the number len(images).
    turn: number of the calling turn, from 0.
    seed: the episode's seed, for tools that draw.
    history: calls of earlier turns. A transcript that was cut and is continued brings them along,
      so that a tool with a state (a kernel) can replay them.
    memory: a tool's own state, by tool name; dies with the episode.
  """

  question_id: str
  images: list[PIL.Image.Image]
  turn: int = 0
  seed: int = 0
  history: list[ToolCall] = dataclasses.field(default_factory=list)
  memory: dict[str, Any] = dataclasses.field(default_factory=dict)


class Tool:
  """Base of all tools. A subclass sets the attributes and writes `run`.

  Attributes:
    name: what the policy calls it.
    schema: OpenAI function schema, `{"type": "function", "function": {...}}`.
    scope: the permission it needs: "read_image", "execute", "network", ...
    aliases: other names that are accepted but not advertised.
    argument_aliases: accepted argument name -> the schema's name.
    time_limit: seconds a call may take; None = no limit. It can only stop a tool that awaits.
  """

  name: str
  schema: Mapping[str, Any]
  scope: str
  aliases: Sequence[str] = ()
  argument_aliases: Mapping[str, str] = {}
  time_limit: float | None = None

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Runs the call. `arguments` have passed the schema, and its defaults are filled in."""
    raise NotImplementedError


def _without_descriptions(schema: Any) -> Any:
  """A JSON schema without the texts that explain it."""
  if isinstance(schema, Mapping):
    return {key: _without_descriptions(value) for key, value in schema.items()
            if not (key == "description" and isinstance(value, str))}
  return schema


class ToolBox:
  """The tools of a run with their permissions.

  Args:
    tools: what the policy may be offered.
    granted_scopes: a call of a tool whose scope is not among these is refused.
    dry_run: record calls and answer that nothing was run.
    audit: receives one JSON-able dict a call, refused and malformed ones included. What it raises
      is not caught: a run whose audit log fails must not go on acting.
    max_text: characters of an observation that are kept.
    describe: False lists the schemas without their descriptions: a shorter prompt, for policies
      that learn the tools by training.

  Raises:
    ValueError: two tools share a name or an alias.
  """

  def __init__(self, tools: Iterable[Tool], granted_scopes: Iterable[str], *,
               dry_run: bool = False, audit: Callable[[dict[str, Any]], None] | None = None,
               max_text: int = 16_384, describe: bool = True):
    self.tools = tuple(tools)
    self.granted_scopes = frozenset(granted_scopes)
    self.dry_run = dry_run
    self._audit = audit
    self._max_text = max_text
    self._describe = describe
    self._by_name: dict[str, Tool] = {}
    for tool in self.tools:
      for name in (tool.name, *tool.aliases):
        if name in self._by_name:
          raise ValueError(f"two tools are called {name!r}; rename one or drop the alias")
        self._by_name[name] = tool

  def schemas(self) -> list[dict[str, Any]]:
    """The schemas to list in the system message."""
    schemas = [dict(tool.schema) for tool in self.tools]
    return schemas if self._describe else [_without_descriptions(s) for s in schemas]

  async def call(self, name: str, arguments: Mapping[str, Any],
                 episode: EpisodeState) -> Observation:
    """Checks and runs one call; every problem becomes an observation with its kind in `error`."""
    tool = self._by_name.get(name)
    begin, observation = time.perf_counter(), None
    try:
      observation = self._clean(await self._checked(tool, name, dict(arguments), episode))
      return observation
    finally:  # a call that is cancelled by a deadline is in the log too
      self._log(name, dict(arguments), tool, observation, episode, time.perf_counter() - begin)

  def reject(self, error: CallError, episode: EpisodeState) -> Observation:
    """The observation for a call that could not even be read."""
    observation = self._clean(failure(error.kind, error.message))
    self._log("", {"text": error.text}, None, observation, episode, 0.0)
    return observation

  async def _checked(self, tool, name, arguments, episode) -> Observation:
    if tool is None:
      known = ", ".join(tool.name for tool in self.tools) or "none"
      return failure(UNKNOWN_TOOL, f"there is no tool {name!r}; the tools are: {known}")
    if tool.scope not in self.granted_scopes:
      return failure(REFUSED, f"{tool.name} needs the permission {tool.scope!r}, which this run "
                              "does not grant")
    try:
      arguments = check_arguments(tool.schema["function"]["parameters"], arguments,
                                  tool.argument_aliases)
    except ArgumentError as error:
      return failure(BAD_ARGUMENTS, f"{tool.name}: {error}")
    if self.dry_run:
      return Observation("Dry run: the call was recorded and not run.", error=DRY_RUN)
    return await _run(tool, arguments, episode)

  def _clean(self, observation: Observation) -> Observation:
    text = observation.text
    if len(text) > self._max_text:
      text = f"{text[:self._max_text]}\n[cut: {len(text) - self._max_text} more characters]"
    # A lone surrogate ("\ud800" is valid JSON) cannot be tokenised.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return dataclasses.replace(observation, text=text)

  def _log(self, name, arguments, tool, observation, episode, seconds) -> None:
    if self._audit is None:
      return
    self._audit({
        "question_id": episode.question_id, "turn": episode.turn, "tool": name,
        "arguments": arguments, "scope": tool.scope if tool else None,
        "granted": bool(tool and tool.scope in self.granted_scopes), "dry_run": self.dry_run,
        "error": observation.error if observation else "cancelled",
        "text": observation.text if observation else "",
        "images": len(observation.images) if observation else 0, "seconds": seconds})


async def _run(tool: Tool, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
  try:
    async with asyncio.timeout(tool.time_limit) as clock:
      return await tool.run(arguments, episode)
  except Exception as error:  # the tool's fault, told to the policy and counted by kind
    if isinstance(error, TimeoutError) and clock.expired():
      return failure(TIMEOUT, f"{tool.name} took longer than {tool.time_limit:g} seconds")
    return failure(TOOL_ERROR, f"{tool.name} failed: {type(error).__name__}: {error}")


class ArgumentError(ValueError):
  """Arguments that do not fit the tool's schema; the message is shown to the policy."""


def check_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any],
                    aliases: Mapping[str, str]) -> dict[str, Any]:
  """Renames aliases, checks against the schema, fills in defaults.

  Knows the part of JSON schema that function schemas use: type, required, default, enum, and for
  arrays items, minItems, maxItems. Unknown arguments are errors.

  Raises:
    ArgumentError: names the first problem.
  """
  properties = parameters.get("properties", {})
  result: dict[str, Any] = {}
  for given, value in arguments.items():
    name = given if given in properties else aliases.get(given, given)
    if name not in properties:
      raise ArgumentError(f"unknown argument {given!r}; it takes: {', '.join(properties)}")
    if name in result:
      raise ArgumentError(f"argument {name!r} is given twice (as {given!r} too)")
    _check_value(name, value, properties[name])
    result[name] = int(value) if properties[name].get("type") == "integer" else value
  missing = [name for name in parameters.get("required", ()) if name not in result]
  if missing:
    raise ArgumentError(f"missing argument {missing[0]!r}")
  for name, schema in properties.items():
    if name not in result and "default" in schema:
      result[name] = schema["default"]
  return result


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: _is_finite_number(value),
    "integer": lambda value: _is_finite_number(value) and value == int(value),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _is_finite_number(value: Any) -> bool:
  try:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))
  except OverflowError:  # an integer beyond the floats
    return False


def _check_value(name: str, value: Any, schema: Mapping[str, Any]) -> None:
  kind = schema.get("type")
  if kind in _TYPES and not _TYPES[kind](value):
    article = "an" if kind[0] in "aeiou" else "a"
    finite = "finite " if kind in ("number", "integer") else ""
    raise ArgumentError(f"{name} must be {'a' if finite else article} {finite}{kind}, "
                        f"got {_short(value)}")
  if "enum" in schema and value not in schema["enum"]:
    raise ArgumentError(f"{name} must be one of {schema['enum']}, got {_short(value)}")
  if kind == "array":
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not low <= len(value) <= high:
      wanted = f"{low}" if low == high else f"{low} to {high}"
      raise ArgumentError(f"{name} must have {wanted} items, got {len(value)}")
    for i, item in enumerate(value):
      _check_value(f"{name}[{i}]", item, schema.get("items", {}))


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
