"""Tools: what they are, who may call them, and what happens when a call is wrong.

In: a call by name with JSON arguments. Out: an Observation, always. A call that is malformed,
refused, too slow or that makes the tool raise is answered with an observation that names the
problem, so the policy can correct it; nothing a policy writes can end the run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import PIL.Image
from absl import logging

from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.tools import background
from axpo_jax.agent.tools.arguments import ArgumentError, SchemaChecker, check_arguments
from axpo_jax.agent.tools.budget import NO_LIMITS, ToolLimits, Usage
from axpo_jax.model.pictures import upright_rgb

# Kinds of call errors beside those of parse.CallError.
UNKNOWN_TOOL = "unknown_tool"
BAD_ARGUMENTS = "bad_arguments"
REFUSED = "refused"  # the tool's scope is not granted
LIMIT = "limit"  # the episode or the run has used up what it may
TIMEOUT = "timeout"
TOOL_ERROR = "tool_error"  # the tool raised
DRY_RUN = "dry_run"  # recorded, not run
# The tool has not seen calls that were answered so.
NOT_RUN = frozenset({UNKNOWN_TOOL, BAD_ARGUMENTS, REFUSED, LIMIT, DRY_RUN})


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

  @property
  def num_bytes(self) -> int:
    """Size of what the tool returned: UTF-8 text, and three bytes a pixel."""
    return (len(self.text.encode("utf-8", "replace"))
            + sum(3 * image.width * image.height for image in self.images))

  def digest(self) -> str:
    """A short name of exactly this observation."""
    content = hashlib.blake2b(f"{self.error}\0{self.text}".encode("utf-8", "replace"),
                              digest_size=16)
    for image in self.images:
      content.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return content.hexdigest()


def failure(kind: str, message: str) -> Observation:
  """An observation that says what went wrong."""
  return Observation(f"Error: {message}", error=kind)


@dataclasses.dataclass(frozen=True)
class PastCall:
  """A call of an earlier turn.

  Attributes:
    call: what was called.
    error: kind of its error, None when it worked.
    images: how many images the episode had when it ran.
  """

  call: ToolCall
  error: str | None
  images: int


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
    usage: what the episode has used up; calls of the past count.
    id: of this episode in the audit log.
    running: calls that have begun and not ended.
  """

  question_id: str
  images: Sequence[PIL.Image.Image]
  turn: int = 0
  seed: int = 0
  history: list[PastCall] = dataclasses.field(default_factory=list)
  memory: dict[str, Any] = dataclasses.field(default_factory=dict)
  usage: Usage = dataclasses.field(default_factory=Usage)
  id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:16])
  running: int = 0

  def __post_init__(self):
    self.usage.calls += len(self.history)


class Tool:
  """Base of all tools. A subclass sets the attributes and writes `run`.

  Attributes:
    name: what the policy calls it.
    schema: OpenAI function schema, `{"type": "function", "function": {...}}`.
    scope: the permission it needs: "read_image", "execute", "network", "write", ...
    aliases: other names that are accepted but not advertised.
    argument_aliases: accepted argument name -> the schema's name.
    time_limit: seconds a call may take; None = no limit. It can only stop a tool that awaits.
    waits: it waits for something outside (a process, a server): it runs on the tools' own event
      loop (`background`), beside the sampling. Others run on the spot and should take milliseconds.
    max_concurrent: calls of a waiting tool that run at once; further ones queue, and their time
      limit begins when they start.
    parallel: several calls of one turn may run at once, if it waits: none needs what another one does,
      nor the number of images so far.
  """

  name: str
  schema: Mapping[str, Any]
  scope: str
  aliases: Sequence[str] = ()
  argument_aliases: Mapping[str, str] = {}
  time_limit: float | None = None
  waits: bool = False
  max_concurrent: int = 64
  parallel: bool = False

  def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as `run` takes them, defaults filled in.

    Raises:
      ArgumentError: says what does not fit the schema.
    """
    return check_arguments(self.schema["function"]["parameters"], arguments, self.argument_aliases,
                           self._checker)

  @functools.cached_property
  def _checker(self) -> SchemaChecker:
    return SchemaChecker(self.schema["function"]["parameters"])

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Runs the call. `arguments` come from `check`."""
    raise NotImplementedError

  def end(self, episode: EpisodeState) -> None:
    """The episode is over: releases what `episode.memory` holds for this tool."""


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
    max_text: characters of an observation that are kept; more is cut in the middle.
    cut: cuts a text by a finer measure, such as tokens; see `text.middle_cutter`.
    describe: False lists the schemas without their descriptions: a shorter prompt, for policies
      that learn the tools by training.
    episode_limits: what one episode may use up.
    run_limits: what all calls through this box may use up.
    used: what an earlier part of this run has used up already.
    overlap: waiting tools run beside the sampling. False runs them on the spot, one at a time: slow,
      but which episodes share a batch no longer depends on time.

  Attributes:
    usage: what all calls so far have used up.
    step: of training, for the audit log; whoever counts the steps sets it.

  Raises:
    ValueError: two tools share a name or an alias.
  """

  def __init__(self, tools: Iterable[Tool], granted_scopes: Iterable[str], *,
               dry_run: bool = False, audit: Callable[[dict[str, Any]], None] | None = None,
               max_text: int = 65_536, cut: Callable[[str], str] = str, describe: bool = True,
               episode_limits: ToolLimits = NO_LIMITS, run_limits: ToolLimits = NO_LIMITS,
               used: Usage | None = None, overlap: bool = True):
    self.tools = tuple(tools)
    self.granted_scopes = frozenset(granted_scopes)
    self.dry_run = dry_run
    self.audit = audit
    self.usage = used or Usage()
    self.step = 0
    self._max_text = max_text
    self._cut = cut
    self._describe = describe
    self._limits = {"this episode": episode_limits, "this run": run_limits}
    self.overlap = overlap
    self._free = {tool.name: asyncio.Semaphore(tool.max_concurrent) for tool in self.tools}
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
    clock, observation = _Clock(), None
    episode.running += 1
    try:
      observation = self.clean(await self._checked(tool, name, dict(arguments), episode, clock))
      return observation
    finally:  # a call that is cancelled by a deadline is counted, and in the log too
      episode.running -= 1
      self._account(name, dict(arguments), tool, observation, episode, clock.seconds())

  def runs_beside(self, name: str) -> bool:
    """Whether calls of this tool in one turn may run at once."""
    tool = self._by_name.get(name)
    return self.overlap and tool is not None and tool.waits and tool.parallel

  def reject(self, error: CallError, episode: EpisodeState) -> Observation:
    """The observation for a call that could not even be read."""
    observation = self.clean(failure(error.kind, error.message))
    self._account("", {"text": error.text, "message": error.message}, None, observation, episode, 0.0)
    return observation

  def end_episode(self, episode: EpisodeState) -> None:
    """Every tool releases what it holds for the episode, also where another one fails to."""
    for tool in self.tools:
      try:
        tool.end(episode)
      except Exception as error:  # the tool's fault; the rollout is finished
        logging.log_first_n(logging.WARNING, "the tool %s did not end its episode: %r", 5, tool.name, error)

  async def _checked(self, tool, name, arguments, episode, clock) -> Observation:
    if tool is None:
      known = ", ".join(tool.name for tool in self.tools) or "none"
      return failure(UNKNOWN_TOOL, f"there is no tool {name!r}; the tools are: {known}")
    if tool.scope not in self.granted_scopes:
      return failure(REFUSED, f"{tool.name} needs the permission {tool.scope!r}, which this run "
                              "does not grant")
    if used_up := self._used_up(episode):
      return failure(LIMIT, f"{tool.name} is not run: {used_up}")
    try:
      arguments = tool.check(arguments)
    except ArgumentError as error:
      return failure(BAD_ARGUMENTS, f"{tool.name}: {error}")
    if self.dry_run:
      return Observation("Dry run: the call was recorded and not run.", error=DRY_RUN)
    return await self._start(tool, arguments, episode, clock)

  async def repeat(self, past: PastCall, episode: EpisodeState) -> Observation | None:
    """Runs a call of an earlier turn again, for what it does to the tool's state. Neither counted nor logged.

    Returns:
      What it answers now; None for a call that was not run then, or that this box does not permit.
    """
    tool = self._by_name.get(past.call.name)
    if past.error in NOT_RUN or tool is None or tool.scope not in self.granted_scopes or self.dry_run:
      return None
    try:
      return await self._start(tool, tool.check(past.call.arguments), episode, _Clock())
    except ArgumentError as error:
      return failure(BAD_ARGUMENTS, f"{tool.name}: {error}")

  async def _start(self, tool, arguments, episode, clock) -> Observation:
    if not tool.waits:
      return await _run(tool, arguments, episode, clock)
    work = self._take_turn(tool, arguments, episode, clock)
    return await background.submit(work) if self.overlap else background.run(work)

  async def _take_turn(self, tool, arguments, episode, clock) -> Observation:
    async with self._free[tool.name]:
      return await _run(tool, arguments, episode, clock)

  def _used_up(self, episode: EpisodeState) -> str | None:
    # Calls of this turn that run beside this one count too.
    own = dataclasses.replace(episode.usage, calls=episode.usage.calls + episode.running - 1)
    usages = {"this episode": own, "this run": self.usage}
    for whose, limits in self._limits.items():
      if what := limits.exceeded_by(usages[whose]):
        return f"{whose} has used up its {what}"
    return None

  def clean(self, observation: Observation) -> Observation:
    """The observation with a text that can be tokenised and is no longer than it may be."""
    text = observation.text
    if (over := len(text) - self._max_text) > 0:
      head, tail = self._max_text - self._max_text // 2, self._max_text // 2
      text = f"{text[:head]}\n[cut: {over} characters]\n{text[len(text) - tail:]}"
    # A lone surrogate ("\ud800" is valid JSON) cannot be tokenised.
    text = self._cut(text.encode("utf-8", "replace").decode("utf-8"))
    return dataclasses.replace(observation, text=text)

  def _account(self, name, arguments, tool, observation, episode, seconds) -> None:
    used = Usage(calls=1, seconds=seconds)
    if observation is not None:
      used.bytes, used.images = observation.num_bytes, len(observation.images)
    episode.usage.add(used)
    self.usage.add(used)
    if self.audit is not None:
      self.audit({
          "step": self.step, "question": episode.question_id, "episode": episode.id, "seed": episode.seed,
          "turn": episode.turn, "tool": name, "arguments": arguments,
          "scope": tool.scope if tool else None, "granted_scopes": sorted(self.granted_scopes),
          "dry_run": self.dry_run,
          "outcome": (observation.error or "ok") if observation else "cancelled",
          "digest": observation.digest() if observation else "",
          "seconds": seconds, "bytes": used.bytes, "images": used.images,
          "images_before": len(episode.images)})


class _Clock:
  """Seconds since a call really began: waiting for its turn is not the tool's time."""

  def __init__(self):
    self.begin: float | None = None

  def seconds(self) -> float:
    return 0.0 if self.begin is None else time.perf_counter() - self.begin


async def _run(tool: Tool, arguments: dict[str, Any], episode: EpisodeState,
               clock: _Clock) -> Observation:
  clock.begin = time.perf_counter()
  try:
    async with asyncio.timeout(tool.time_limit) as limit:
      observation = await tool.run(arguments, episode)
    # Converted once, here: what the policy sees, what later calls get and what is dumped are alike.
    return dataclasses.replace(observation, images=tuple(map(upright_rgb, observation.images)))
  except Exception as error:  # the tool's fault: shown to the policy, and counted by kind
    if isinstance(error, TimeoutError) and limit.expired():
      return failure(TIMEOUT, f"{tool.name} took longer than {tool.time_limit:g} seconds")
    return failure(TOOL_ERROR, f"{tool.name} failed: {type(error).__name__}: {error}")
