"""A Python function as a tool: its type hints become the schema, its docstring the description.

In: a function with type hints and a Google docstring that describes every argument. Out: a Tool. The
schema is made by `transformers.utils.get_json_schema`, which chat templates are written for.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

import PIL.Image

from axpo_jax.agent.tools.base import EpisodeState, Observation, Tool


def tool(*, scope: str, waits: bool | None = None, time_limit: float | None = None,
         max_concurrent: int = 64, parallel: bool | None = None
         ) -> Callable[[Callable], FunctionTool]:
  """Decorator: `@tool(scope="network")` above a function makes it a tool of the function's name.

  A parameter annotated with `EpisodeState` is not part of the schema: it is given the calling
  episode. The function returns text, an image, an Observation, or a list of texts and images;
  anything else is shown as JSON.

  Args:
    scope: the permission it needs.
    waits: it waits for something outside; by default async functions do and others do not. A
      function that is not async then runs in a thread, which a time limit gives up but cannot stop.
    time_limit: seconds a call may take; None = no limit.
    max_concurrent: calls that run at once, if it waits.
    parallel: several calls of one turn may run at once; by default if it waits and has no parameter for
      the episode.

  Raises:
    ValueError: the function lacks a docstring, a type hint or an argument's description.
  """
  def decorate(function: Callable) -> FunctionTool:
    return FunctionTool(function, scope=scope, waits=waits, time_limit=time_limit,
                        max_concurrent=max_concurrent, parallel=parallel)
  return decorate


class FunctionTool(Tool):
  """See `tool`."""

  def __init__(self, function: Callable, *, scope: str, waits: bool | None = None,
               time_limit: float | None = None, max_concurrent: int = 64, parallel: bool | None = None):
    self.function, self.name, self.scope = function, function.__name__, scope
    self.waits = inspect.iscoroutinefunction(function) if waits is None else waits
    self.time_limit, self.max_concurrent = time_limit, max_concurrent
    hints = typing.get_type_hints(function)
    self._episode = next((name for name, hint in hints.items() if hint is EpisodeState), None)
    self.parallel = self._episode is None if parallel is None else parallel
    self.schema = _schema(function, hints, self._episode)

  async def run(self, arguments: dict[str, Any], episode: EpisodeState) -> Observation:
    """Calls the function; what it raises is an error observation."""
    if self._episode is not None:
      arguments[self._episode] = episode
    if inspect.iscoroutinefunction(self.function):
      result = await self.function(**arguments)
    elif self.waits:
      result = await asyncio.to_thread(self.function, **arguments)
    else:
      result = self.function(**arguments)
    return as_observation(result)


def as_observation(result: Any) -> Observation:
  """What a function returned, as the policy shall see it."""
  if isinstance(result, Observation):
    return result
  texts, images = [], []
  for part in result if isinstance(result, (list, tuple)) and _shows_images(result) else [result]:
    if isinstance(part, PIL.Image.Image):
      images.append(part)
    else:
      texts.append(part if isinstance(part, str) else json.dumps(part, default=repr))
  return Observation("\n".join(texts), tuple(images))


def _shows_images(parts: list | tuple) -> bool:
  return any(isinstance(part, PIL.Image.Image) for part in parts)


def _schema(function: Callable, hints: Mapping[str, Any], episode: str | None) -> dict[str, Any]:
  from transformers.utils import get_json_schema  # takes a second, and only this needs it

  def described(): ...

  signature = inspect.signature(function)
  described.__name__, described.__doc__ = function.__name__, function.__doc__
  described.__annotations__ = {name: hint for name, hint in hints.items() if name != episode}
  described.__signature__ = signature.replace(parameters=[
      parameter for name, parameter in signature.parameters.items() if name != episode])
  try:
    schema = get_json_schema(described)
  except Exception as error:  # its own exceptions, none of which is a ValueError
    raise ValueError(f"{function.__name__} cannot become a tool: {error}") from error
  schema["function"].pop("return", None)
  for name, properties in schema["function"]["parameters"].get("properties", {}).items():
    default = signature.parameters[name].default
    if default is not inspect.Parameter.empty and default is not None:
      properties["default"] = default
  return schema
