"""What the tests of one room share: the tiny chat, pictures, and an engine that reads a script."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import pytest

from axpo_jax.agent.episode import continue_episode, start_transcript
from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.parse import SpecialIds
from axpo_jax.agent.tools.base import ToolBox
from axpo_jax.agent.tools.zoom import ImageZoomIn
from axpo_jax.agent.transcript import EpisodeImage
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Sample, SampleRequest, SamplingParams
from axpo_jax.model.chat import Chat
from axpo_jax.model.images import ImageLimits, ImageProcessor, ProcessedImage


@pytest.fixture(scope="session")
def special() -> SpecialIds:
  """Made-up ids for tests that need no tokenizer; ordinary tokens are 20 and above."""
  return SpecialIds(image_pad=1, video_pad=2, im_start=3, im_end=4, endoftext=5, think_end=6,
                    tool_call=7, tool_call_end=8)


@pytest.fixture(scope="session")
def fake_image(processor) -> Callable[[int], EpisodeImage]:
  """An image of `n` merged tokens."""

  def make(n: int) -> EpisodeImage:
    picture = PIL.Image.new("RGB", (16 * n, 16), (n % 256, 7, 9))
    return EpisodeImage(picture, ProcessedImage.of(picture, processor.format), "question")

  return make


@dataclasses.dataclass
class ScriptedEngine:
  """Returns the scripted turns in order; an item may be ids, an exception or a whole Sample."""

  turns: Sequence
  finish: str = "stop"
  requests: list[SampleRequest] = dataclasses.field(default_factory=list)

  async def generate(self, request: SampleRequest) -> list[Sample]:
    item = self.turns[len(self.requests)]
    self.requests.append(request)
    if isinstance(item, Exception):
      raise item
    if isinstance(item, Sample):
      return [item]
    ids = tuple(item)[:request.params.max_new_tokens]
    finish = self.finish if len(ids) == len(item) else "length"
    logprobs = tuple(-0.01 * (i % 97) - 1e-3 for i in ids)
    return [Sample(ids, logprobs, finish, request.prompt_tokens, 3, 11)]


@dataclasses.dataclass
class ReplayEngine:
  """Continues any beginning of a known transcript exactly as it went on."""

  transcript: object
  max_chunk: int | None = None

  async def generate(self, request: SampleRequest) -> list[Sample]:
    n, known = len(request.ids), self.transcript
    assert list(request.ids) == known.ids[:n]
    stop = next(turn.stop for turn in known.turns if turn.stop > n)
    return [Sample(tuple(known.ids[n:stop]), tuple(known.logprobs[n:stop]), "stop",
                   request.prompt_tokens, 0, known.versions[n])]


@dataclasses.dataclass
class World:
  """A question, tools and limits; `play` runs one episode against a script."""

  chat: Chat
  processor: ImageProcessor
  question: Question
  tools: ToolBox
  limits: EpisodeLimits
  crop: ImageLimits

  def start(self):
    return start_transcript(self.question, self.chat, self.tools, "Be brief.", self.processor,
                            ImageLimits(64 * 64, 96 * 96))

  def ids(self, text: str) -> list[int]:
    return self.chat.encode(text)

  def resume(self, transcript, engine, seed=5, **changes):
    """Returns the coroutine that continues `transcript`."""
    limits = changes.pop("limits", self.limits)
    tools = changes.pop("tools", self.tools)
    return continue_episode(
        transcript, self.question, engine, tools, limits, SamplingParams(max_new_tokens=1),
        self.chat, self.processor, seed, **changes)


@pytest.fixture(scope="session")
def scripted():
  return ScriptedEngine


@pytest.fixture(scope="session")
def replay():
  return ReplayEngine


@pytest.fixture
def world(chat, processor) -> World:
  pixels = np.random.default_rng(0).integers(0, 256, (400, 512, 3), np.uint8)
  crop = ImageLimits(48 * 48, 48 * 48)
  return World(
      chat=chat, processor=processor,
      question=Question("q1", "What is written in the red box?", (PIL.Image.fromarray(pixels),),
                        ("K",), kind="text"),
      tools=ToolBox([ImageZoomIn(crop, factor=processor.factor)], ["read_image"]),
      limits=EpisodeLimits(max_turns=3, max_new_tokens_per_turn=200, max_response_tokens=1000,
                           max_total_tokens=2000, max_images=4),
      crop=crop)
