"""Runs the calls of a finished turn, and makes what they bring fit the episode's budget.

In: parsed calls. Out: an `Observed`: texts, images and outcomes for the transcript. If an observation's images fit
neither the image budget nor the token budget, the observation says so and brings no image.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Sequence

import PIL.Image

from axpo_jax.agent import rollout as rollout_lib
from axpo_jax.agent.limits import Budget
from axpo_jax.agent.parse import CallError, ToolCall
from axpo_jax.agent.rollout import CallRecord
from axpo_jax.agent.tools.base import EpisodeState, Observation, ToolBox, failure
from axpo_jax.agent.transcript import EpisodeImage, Outcome
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageError, ImageLimits, ImageProcessor


@dataclasses.dataclass
class Observed:
  """What the calls of one turn brought.

  Attributes:
    texts: the text of every observation, and how many images it shows.
    shown: those images, in order.
    outcomes: of every call.
  """

  texts: list[tuple[str, int]] = dataclasses.field(default_factory=list)
  shown: list[EpisodeImage] = dataclasses.field(default_factory=list)
  outcomes: list[Outcome] = dataclasses.field(default_factory=list)


class CallRunner:
  """Runs the calls of one episode.

  Attributes:
    records: of all calls so far.
  """

  def __init__(self, tools: ToolBox, budget: Budget, chat: Chat, processor: ImageProcessor,
               state: EpisodeState):
    self._tools, self._budget, self._chat = tools, budget, chat
    self._processor, self._state = processor, state
    self.records: list[CallRecord] = []

  def skip(self, calls: Sequence[ToolCall | CallError]) -> None:
    """Records calls that the end of the episode leaves undone."""
    for call in calls:
      self._record(call, "not_run", 0.0)

  async def run(self, calls: Sequence[ToolCall | CallError]) -> Observed:
    """Runs the calls of a turn. Neighbours that may run at once do."""
    observed = Observed()
    for at_once, neighbours in itertools.groupby(calls, self._runs_at_once):
      some, images = list(neighbours), len(self._state.images)
      done = await asyncio.gather(*map(self._timed, some)) if at_once else None
      for number, call in enumerate(some):
        if done is None:
          images = len(self._state.images)
        observation, seconds = done[number] if done else await self._timed(call)
        observed.outcomes.append(Outcome(observation.error, images))
        name = call.name if isinstance(call, ToolCall) else ""
        observation, new = self.fit(observation, name, observed)
        observed.texts.append((observation.text, len(new)))
        observed.shown += new
        self._state.images.extend(new)
        self._record(call, observation.error, seconds)
    return observed

  def fit(self, observation: Observation, origin: str, observed: Observed
          ) -> tuple[Observation, list[EpisodeImage]]:
    """The observation with its images ready to show, or one that says why they are not shown.

    Args:
      origin: the name of the tool that made it.
      observed: what the observation comes after.
    """
    if not observation.images:
      return observation, []
    have, most = len(self._state.images), self._budget.limits.max_images
    if have + len(observation.images) > most:
      return failure(rollout_lib.IMAGE_LIMIT, f"the image is not shown: at most {most} images are "
                     f"allowed and there are {have}"), []
    try:
      new = [self._show(image, origin) for image in observation.images]
    except ImageError as error:
      return failure("bad_image", f"the image cannot be shown: {error}"), []
    ids = self._chat.observation_ids([*observed.texts, (observation.text, len(new))])
    if not self.has_room(ids, [*observed.shown, *new]):
      return failure(rollout_lib.IMAGE_LIMIT,
                     "the image is not shown: it does not fit the rest of the token budget"), []
    return observation, new

  def has_room(self, ids: Sequence[int], shown: Sequence[EpisodeImage]) -> bool:
    """True when this observation leaves room for at least one token of the next turn."""
    return len(ids) + sum(i.shown.num_tokens - 1 for i in shown) < self._budget.tokens()

  def _show(self, image: PIL.Image.Image, origin: str) -> EpisodeImage:
    """A tool's image, with its sides rounded to the factor where the tool has not done so, and
    shrunk where it is larger than any image may be."""
    least = self._processor.factor**2
    pixels = min(image.width * image.height, self._budget.limits.max_image_pixels)
    limits = ImageLimits(least, max(least, pixels))
    return EpisodeImage.of(image, self._processor(image, limits), origin)

  def _runs_at_once(self, call: ToolCall | CallError) -> bool:
    return isinstance(call, ToolCall) and self._tools.runs_beside(call.name)

  async def _timed(self, call: ToolCall | CallError) -> tuple[Observation, float]:
    begin = time.perf_counter()
    if isinstance(call, ToolCall):
      observation = await self._tools.call(call.name, call.arguments, self._state)
    else:
      observation = self._tools.reject(call, self._state)
    return observation, time.perf_counter() - begin

  def _record(self, call: ToolCall | CallError, error: str | None, seconds: float) -> None:
    name, arguments = ((call.name, call.arguments) if isinstance(call, ToolCall) else ("", {}))
    self.records.append(CallRecord(self._state.turn, name, arguments, error, seconds))
