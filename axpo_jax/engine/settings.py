"""The settings of the engines. They need no JAX, so a config is checked before JAX is loaded."""

from __future__ import annotations

import dataclasses

from axpo_jax.model.buckets import PATCH_BUCKETS

DELTA_LOADER = "axpo_delta.apply"  # the name by which servers load server/axpo_delta.py


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
  """Sizes of the embedded engine. A KV row costs layers * 2 * kv_heads * head_dim * length values.

  Attributes:
    rows: KV rows, running sequences and cached prefixes together.
    length: tokens a row holds: the longest prompt plus its answer.
    max_running: most sequences decoded at once; rows beyond it keep prefixes for later.
    decode_block: tokens between two checks for finished sequences.
    dtype: of the KV rows and the engine's copy of the parameters; None: the model's compute dtype.
    prefill_tokens: most (padded) tokens in one prefill call.
    defer_gain: a sequence waits for another of its wave that computes at least this many tokens of
      its prefix (or all that it lacks).
    loop_passes: passes of the event loop between two blocks.
    min_batch: smallest bucket of rows; each bucket is twice the one before.
    min_tokens: smallest bucket of prompt tokens to compute.
    min_slots: smallest bucket of cache slots; these have half steps too, because attention over
      the cache is most of a decode step.
    patch_lengths: lengths of a row of image patches; an image with more than the last is refused.
  """

  rows: int = 256
  length: int = 1024
  max_running: int = 128
  decode_block: int = 16
  dtype: str | None = None
  prefill_tokens: int = 16_384
  defer_gain: int = 32
  loop_passes: int = 8
  min_batch: int = 16
  min_tokens: int = 32
  min_slots: int = 128
  patch_lengths: tuple[int, ...] = PATCH_BUCKETS

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and value < 1:
        raise ValueError(f"{field.name} must be at least 1, got {value}")
    if self.max_running > self.rows:
      raise ValueError(
        f"max_running={self.max_running} sequences need as many rows, but rows={self.rows}"
      )


@dataclasses.dataclass(frozen=True)
class FleetConfig:
  """Limits of a fleet of servers.

  Attributes:
    max_concurrent: requests at one server at once; more wait here.
    deadline_s: seconds that a request or an update waits for any healthy server.
    probe_s: seconds between two health checks of a server.
    probe_timeout_s: seconds until an unanswered health check counts as failed. SGLang's own check
      takes one second, and longer behind a long prefill.
    misses: failed health checks in a row that make a server unhealthy.
  """

  max_concurrent: int = 64
  deadline_s: float = 300.0
  probe_s: float = 5.0
  probe_timeout_s: float = 20.0
  misses: int = 2

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) <= 0:
        raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True)
class PushConfig:
  """How weights are written.

  Attributes:
    folder: a folder for this run alone, which trainer and servers see under this path. What an
      earlier run left in it is removed.
    dtype: of the written tensors. "bfloat16" unless the servers run in float32.
    skip_vision: leave the vision tower out: it is frozen, and the servers started with it.
    shard_bytes: size of a file.
    writers: files written at once; each holds `shard_bytes` (for a moment twice) of host memory.
    delta: after the first push write changed values alone. The servers need the sidecar's loader, and the
      trainer's processes keep what they pushed in host memory (`dtype` x parameters, split over processes).
  """

  folder: str
  dtype: str = "bfloat16"
  skip_vision: bool = False
  shard_bytes: int = 1 << 30
  writers: int = 4
  delta: bool = True

  def __post_init__(self):
    if not self.folder:
      raise ValueError("folder is empty: name one that trainer and servers both see")
    if self.dtype not in ("bfloat16", "float32"):
      raise ValueError(f"dtype={self.dtype!r}: servers load 'bfloat16' or 'float32'")
    if self.shard_bytes < 1 or self.writers < 1:
      raise ValueError(f"shard_bytes={self.shard_bytes} and writers={self.writers} must be positive")


@dataclasses.dataclass(frozen=True)
class SGLangConfig:
  """How servers are used.

  Attributes:
    length: expanded tokens of the longest sequence. The servers' --context-length must be some more:
      SGLang keeps a few tokens for itself.
    push: how weights get to the servers.
    fleet: deadlines, health checks and concurrency.
    request_s: seconds that one request to one server may take. One that takes longer is aborted there, and
      its tokens so far are kept; it says nothing about the server.
    attempts: servers that a request is tried on before it fails.
    drain_s: seconds that an update waits for running samples before it interrupts them. Their tokens are
      kept, and their episodes continue from the new weights. 0 interrupts at once.
    load_s: seconds that a server may take to load weights.
    verify: compare checksums of the servers' tensors after each push. Switch it off for servers that
      quantise their weights.
    api_key: bearer token of the servers; empty for none.
    image_folder: folder that the servers see under the same path: images are sent as paths into it.
      Empty: of servers that the run starts one in the workdir; to others images are sent with each request.
    image_cache_bytes: encoded images that are kept.
  """

  push: PushConfig
  length: int = 24_576
  fleet: FleetConfig = FleetConfig()
  request_s: float = 600.0
  attempts: int = 3
  drain_s: float = 0.0
  load_s: float = 600.0
  verify: bool = True
  api_key: str = ""
  image_folder: str = ""
  image_cache_bytes: int = 1 << 30

  def __post_init__(self):
    for name in ("length", "request_s", "attempts", "load_s"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    if self.drain_s < 0:
      raise ValueError(f"drain_s must be 0 or more, got {self.drain_s}")


@dataclasses.dataclass(frozen=True)
class OpenAIConfig:
  """An endpoint and how it is used.

  Attributes:
    url: its base, such as http://localhost:8000/v1.
    model: its name there.
    api_key: bearer token; empty for none.
    max_concurrent: requests at once.
    timeout_s: seconds of one attempt.
    attempts: how often one sample is asked for; busy and failing servers are asked again.
    first_wait_s: seconds before the second attempt; doubled for each further one, and more where the
      server asks for it (`Retry-After`).
    omit: fields left out of requests, for endpoints that refuse them. Samples are cut at their limit of
      tokens also without "max_tokens".
    extensions: send what OpenAI's own API does not know and vLLM and SGLang do (top_k, and special
      tokens kept in the text).
  """

  url: str
  model: str
  api_key: str = ""
  max_concurrent: int = 64
  timeout_s: float = 1800.0
  attempts: int = 4
  first_wait_s: float = 2.0
  extensions: bool = True
  omit: tuple[str, ...] = ()
