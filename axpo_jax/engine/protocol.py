"""What a sampler is: the records that go in and come out, and the protocol every engine obeys.

In: token ids (collapsed: ONE pad per image), the processed images, sampling parameters and one seed
per wanted sample. Out: token ids with the policy's log-probability of each. Text never crosses this
line: a transcript is append-only ids, and nothing that was sampled is re-tokenised.

This module imports no accelerator library, so the agent's code and its tests load in milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
  from axpo_jax.model.images import ProcessedImage

FinishReason = Literal["stop", "length", "abort"]


class RequestError(ValueError):
  """A request that can never be served as it stands; raised where it is submitted."""


class PromptTooLong(RequestError):
  """The expanded prompt leaves no room for a single new token."""


class EngineClosed(RuntimeError):
  """The engine was closed while, or before, the request ran."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to draw tokens.

  One step, from the model's logits: banned ids are removed; the policy's distribution is the
  softmax of what is left, divided by `temperature`. Its log-probabilities are the ones reported. The
  draw itself also applies the presence penalty (before the temperature), then top-k and top-p: these
  shape WHAT is drawn and not the reported numbers, which the trainer must be able to recompute. One
  exception: SGLang reports log-probabilities behind a presence penalty, so rollouts that are trained
  on have none there.

  Top-k and top-p are joint, as in SGLang: an id is kept if it is among the k most likely AND the ids
  before it hold at most top_p of the whole vocabulary's mass. vLLM and transformers take top_p of the
  mass that top-k left: at the same settings they draw from fewer ids.

  Attributes:
    max_new_tokens: most tokens to generate, the stop token included.
    temperature: divides the logits (paper: 1 in training). 0 means greedy; log-probabilities are then
      those at temperature 1.
    top_p: nucleus mass in (0, 1]; 1 is off.
    top_k: number of most likely tokens kept; 0 is off.
    presence_penalty: subtracted once from the logit of each id generated so far in this sample.
      Ids of the prompt do not count (vLLM's and SGLang's rule).
    stop_ids: ids that end the sample; the one that ended it is part of the result.
    banned_ids: ids that cannot be drawn and take no share of the normalisation.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  presence_penalty: float = 0.0
  stop_ids: tuple[int, ...] = ()
  banned_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise RequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise RequestError(f"temperature must be finite and >= 0, got {self.temperature}")
    if not 0 < self.top_p <= 1:
      raise RequestError(f"top_p must be in (0, 1], got {self.top_p}")
    if self.top_k < 0:
      raise RequestError(f"top_k must be >= 0 (0 is off), got {self.top_k}")
    if not math.isfinite(self.presence_penalty):
      raise RequestError(f"presence_penalty must be finite, got {self.presence_penalty}")


@dataclasses.dataclass(frozen=True)
class SampleRequest:
  """One prompt and `len(seeds)` independent samples from it.

  Attributes:
    ids: the prompt, collapsed: each image is one pad id.
    images: one per pad, in order.
    params: see SamplingParams; shared by all samples of the request.
    seeds: one per sample. A sample depends on its own seed only, never on its place in a batch.
    session: an opaque name of the episode, for engines that route; the embedded one ignores it.
  """

  ids: tuple[int, ...]
  images: tuple[ProcessedImage, ...]
  params: SamplingParams
  seeds: tuple[int, ...]
  session: str = ""

  def __post_init__(self):
    if not self.ids:
      raise RequestError("ids is empty: a sample needs at least one prompt token to follow")
    if not self.seeds:
      raise RequestError("seeds is empty: give one seed per wanted sample")

  @property
  def prompt_tokens(self) -> int:
    """Length of the prompt with every image pad expanded to the image's merged tokens."""
    return len(self.ids) + sum(image.num_tokens - 1 for image in self.images)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One generated continuation.

  Attributes:
    ids: the new ids; the stop id is included when `finish_reason` is "stop".
    logprobs: the policy's log-probability of each id, as SamplingParams says.
    finish_reason: "stop" (a stop id), "length" (max_new_tokens or the engine's longest sequence),
      "abort" (interrupted by the engine: continue from the prompt and these ids).
    prompt_tokens: expanded prompt length.
    cached_tokens: how many of them were not computed again for this sample.
    weight_version: version of the weights that drew every token of the sample.
  """

  ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  finish_reason: FinishReason
  prompt_tokens: int
  cached_tokens: int
  weight_version: int


@dataclasses.dataclass
class EngineStats:
  """Counters since the last reset. Token counts are expanded (an image counts its merged tokens).

  Attributes:
    requests: requests accepted.
    samples: samples finished.
    prompt_tokens: prompt tokens of the finished and running samples.
    cached_tokens: those of them served from the prefix cache.
    prefill_tokens_computed: real (unpadded) tokens run through prefill.
    decode_tokens: tokens generated.
    images_encoded: images run through the vision tower.
    compilations: distinct compiled shapes the engine has met since it was built (not reset).
  """

  requests: int = 0
  samples: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  prefill_tokens_computed: int = 0
  decode_tokens: int = 0
  images_encoded: int = 0
  compilations: int = 0


@runtime_checkable
class Engine(Protocol):
  """A sampler. Implementations: the embedded JAX engine, a client of a remote server."""

  async def generate(self, request: SampleRequest) -> list[Sample]:
    """Returns one Sample per seed, in the order of the seeds.

    Raises:
      RequestError: the request can never be served (names the numbers); nothing was queued.
      EngineClosed: the engine is closed.
    """

  async def update_weights(self, params: Any, version: int) -> None:
    """Waits for running work or interrupts it, installs a copy of `params`, drops every cached prefix.

    The tokens of one sample come from the old or from the new weights, never from both:
    `Sample.weight_version` says from which.
    """

  def stats(self, *, reset: bool = False) -> EngineStats:
    """A copy of the counters; with `reset` they start again from zero."""

  def gauges(self) -> dict[str, float]:
    """What else a step's log should hold of this kind of engine, by name."""

  async def close(self) -> None:
    """Fails what is queued with EngineClosed and frees the engine's buffers. Idempotent."""


def check_request(
  request: SampleRequest, image_token_id: int, vocab_size: int, max_length: int
) -> None:
  """Raises RequestError when `request` cannot be served by rows of `max_length` expanded tokens, or
  has ids outside the vocabulary: JAX would read the last one's embedding, SGLang's process would end."""
  p = request.params
  for name, ids in (("ids", request.ids), ("stop_ids", p.stop_ids), ("banned_ids", p.banned_ids)):
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
      raise RequestError(f"{name} holds {wrong[:5]}, outside the vocabulary of {vocab_size}")
  if len(set(p.banned_ids)) == vocab_size:
    raise RequestError(f"banned_ids are all {vocab_size} ids of the vocabulary: leave one to draw")
  pads = request.ids.count(image_token_id)
  if pads != len(request.images):
    raise RequestError(
      f"{pads} image pads (id {image_token_id}) in ids but {len(request.images)} images: "
      "send exactly one pad per image, in order"
    )
  if request.ids[-1] == image_token_id:
    raise RequestError("the prompt ends with an image pad: close the image with its end token")
  if request.prompt_tokens + 1 > max_length:
    raise PromptTooLong(
      f"the prompt has {request.prompt_tokens} tokens after image expansion and needs at least one "
      f"more for its answer, but a sequence holds {max_length}: shorten the prompt or raise the "
      "engine's length"
    )
