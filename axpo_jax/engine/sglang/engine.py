"""The engine whose samples come from SGLang servers.

In: sample requests and, once a step, the trainer's weights. Out: samples drawn by servers that hold
exactly these weights. A server is a base URL here; `server.sidecar` starts and restarts them.

Errors. A request that fails at one server is retried at another, `attempts` times and within a deadline.
What remains is a typed error: `RequestError` for a request that no server can serve, `ServerError` if all
attempts failed, `NoServer` if no server was healthy. Every returned sample has the token counts that we
expect and comes from one known version of the weights.

Seeds: each sample is a request with its own `sampling_seed`, which SGLang heeds only with
--enable-deterministic-inference. Without it samples differ from run to run.

Shared prompts. Requests with the same prompt that arrive together (the rollouts of a question, the
resamples of a prefix) would each compute it, because the cache does not hold it yet. So the first one has
the server prefill the prompt, and then all are sent:

  request 1   prefill ──▶ sample ─────────▶
  request 2   (waits)     sample ──────▶
  request 3   (waits)     sample ────────▶

`cached_tokens` of the first one is what that prefill found in the cache, so sums over samples are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from axpo_jax.engine.loop_thread import LoopThread
from axpo_jax.engine.protocol import (
  EngineClosed,
  EngineStats,
  RequestError,
  Sample,
  SampleRequest,
  check_request,
)
from axpo_jax.engine.settings import DELTA_LOADER, SGLangConfig
from axpo_jax.engine.sglang import wire
from axpo_jax.engine.sglang.api import LoadError, Server, ServerError
from axpo_jax.engine.sglang.fleet import Fleet, Member, NotAsked
from axpo_jax.engine.sglang.image_sender import ImageSender
from axpo_jax.engine.sglang.weight_check import WeightCheck
from axpo_jax.engine.sglang.weight_push import Push, PushFolder
from axpo_jax.model.config import ModelConfig

# Requests with one prompt that arrive within so many seconds share its prefill.
_GATHER_S = 0.003
_CONTROL_S = 60.0  # limit of calls that do next to nothing


class SGLangEngine:
  """See the module docstring. Implements `engine.protocol.Engine`; use it from any event loop.

  Sampling needs a first `update_weights`: only weights that the trainer has pushed count, not the
  checkpoint that a server started with. Servers belong to one run: two engines would replace each
  other's weights for ever.

  Args:
    urls: base URLs of the servers; they may come up later.
    model_config: sizes and token ids.
    config: see SGLangConfig.

  Attributes:
    folder: where pushes are written.
    last_push: what the last update wrote; or None.
    retries: requests that were asked again because a server failed or was too slow.
    too_slow: requests that took longer than `request_s`.
    interrupted: samples that an update or a time limit cut short; their tokens so far were kept.
  """

  def __init__(self, urls: Sequence[str], model_config: ModelConfig, config: SGLangConfig):
    self.config, self._model = config, model_config
    self.folder = PushFolder(config.push, model_config)
    self._images = ImageSender(config.image_folder, config.image_cache_bytes)
    self._stats = EngineStats()
    self._push: Push | None = None
    self._check = WeightCheck(self.folder.server_names)
    self._closed = False
    self.retries = self.too_slow = self.interrupted = 0
    self.last_push: Push | None = None
    servers = [Server(url, config.api_key) for url in urls]
    self._fleet = Fleet(servers, config.fleet, self._install,
                        lambda: self._push.tag if self._push else None)
    self._locks = {member: asyncio.Lock() for member in self._fleet.members}
    self._updating = asyncio.Lock()
    self._loop = LoopThread("sglang-client")
    self._loop.start(self._begin()).result()

  async def _begin(self) -> None:
    self._fleet.watch()

  # ---- the protocol ----

  async def generate(self, request: SampleRequest) -> list[Sample]:
    """See `Engine.generate`.

    Raises:
      ServerError: `attempts` servers failed; the last one's error.
      NoServer: there was no server to ask within the fleet's deadline.
    """
    self._check_open()
    check_request(request, self._model.image_token_id, self._model.text.vocab_size,
                  self.config.length)
    if self._push is None:
      raise RequestError("there are no weights to sample from: call update_weights first")
    self._stats.requests += 1
    return await self._run(self._generate(request))

  async def update_weights(self, params: Any, version: int) -> None:
    """See `Engine.update_weights`: writes a push, then installs it.

    Raises:
      WrongParameters: `params` do not belong to the model; the old ones stay.
      NoServer: no server took the weights within the fleet's deadline.
    """
    self._check_open()
    # Sampling from the old weights goes on meanwhile.
    await self.install(await asyncio.to_thread(self.folder.write, params, version))

  async def install(self, push: Push) -> None:
    """Gives the servers the weights of a push; raises as `update_weights`."""
    self._check_open()
    await self._run(self._change_weights(push))

  def stats(self, *, reset: bool = False) -> EngineStats:
    stats = dataclasses.replace(self._stats)
    if reset:
      self._stats = EngineStats()
    return stats

  async def close(self) -> None:
    """See `Engine.close`. The servers go on; the files of the pushed weights are removed."""
    if not self._closed:
      self._closed = True
      await asyncio.to_thread(self._loop.stop)
      self.folder.remove_all()
      self._images.close()

  def gauges(self) -> dict[str, float]:
    """Healthy servers; since the start: failures of servers, retries, requests that were too slow and
    samples that were interrupted; the last push's seconds and bytes."""
    found = {
      "servers_healthy": float(sum(map(self._fleet.is_ready, self._fleet.members))),
      "servers_lost": float(self._fleet.failures),
      "retries": float(self.retries),
      "too_slow": float(self.too_slow),
      "interrupted": float(self.interrupted),
    }
    if (push := self.last_push) is not None:
      found |= {"push_s": push.seconds, "push_bytes": float(push.bytes_written)}
    return found

  def _check_open(self) -> None:
    if self._closed:
      raise EngineClosed("the engine is closed; build a new one")

  async def _run(self, coroutine) -> Any:
    """On the engine's loop; what `close` cancels there fails with EngineClosed here."""
    async def guarded():
      try:
        return await coroutine
      except asyncio.CancelledError:
        if self._closed:
          raise EngineClosed("the engine was closed while the request waited or ran") from None
        raise

    return await self._loop.run(guarded())

  # ---- samples ----

  async def _generate(self, request: SampleRequest) -> list[Sample]:
    images = await self._images.encode(request.images)
    tasks = [asyncio.create_task(self._sample(request, seed, images)) for seed in request.seeds]
    try:
      return [await task for task in tasks]
    except BaseException:
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
      raise

  async def _sample(self, request: SampleRequest, seed: int, images: Sequence[str]) -> Sample:
    """One sample, from the first server that gives a valid one."""
    failed: list[Member] = []  # one entry a failed attempt
    while True:
      async with self._fleet.lease(request.session, failed) as member:
        try:
          return await self._draw(member, self._push, request, seed, images)
        except NotAsked:
          continue  # no attempt was made
        except ServerError as error:
          if isinstance(error, wire.Aborted) and not self._fleet.gate_is_open:
            continue  # an update aborted it, which is not a failure
          failed.append(member)
          if len(failed) >= self.config.attempts:
            raise
          self.retries += 1
      await self._fleet.check(member)

  async def _draw(self, member: Member, push: Push, request: SampleRequest, seed: int,
                  images: Sequence[str]) -> Sample:
    found = await self._share_prefill(member, push, request, images)
    reply = wire.read(await self._ask(member, wire.payload(
      request, seed, images, self.config.length)), request, push.tag)
    cached = reply.cached_tokens if found is None else min(found, reply.cached_tokens)
    self.interrupted += reply.finish == "abort"
    sample = wire.sample(request, reply, cached, push.version)
    self._count(request, sample)
    return sample

  async def _ask(self, member: Member, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. One that takes too long is aborted at its server, and answers with the
    tokens that it has.

    Raises:
      TooSlow: the server does not answer to the abort either.
    """
    server, rid = member.server, secrets.token_hex(16)
    limit, grace = self.config.request_s, self.config.fleet.probe_timeout_s
    task = asyncio.ensure_future(member.call(server.generate(payload | {"rid": rid}, limit + grace)))
    try:
      if not (await asyncio.wait([task], timeout=limit))[0]:
        self.too_slow += 1
        with contextlib.suppress(ServerError):
          await server.abort(rid, grace)
      return await task
    finally:
      task.cancel()

  async def _share_prefill(self, member: Member, push: Push, request: SampleRequest,
                           images: Sequence[str]) -> int | None:
    """Prefills a prompt once for all requests that have it at this moment, and waits for that.

    Returns to the first of them what was cached before, to the others None.
    """
    key = (request.ids, tuple(image.key for image in request.images))
    group = member.prefills.get(key)
    if group is not None:
      group.size += 1
      await group.done.wait()
      return None
    group = member.prefills[key] = _Group()
    try:
      await asyncio.sleep(_GATHER_S)
      if group.size == 1:
        return None
      reply = await self._ask(member, wire.prefill_payload(request, images))
      return wire.read_prefill(reply, request, push.tag)
    finally:
      del member.prefills[key]
      group.done.set()

  def _count(self, request: SampleRequest, sample: Sample) -> None:
    stats = self._stats
    stats.samples += 1
    stats.prompt_tokens += sample.prompt_tokens
    stats.cached_tokens += sample.cached_tokens
    stats.prefill_tokens_computed += sample.prompt_tokens - sample.cached_tokens
    stats.decode_tokens += len(sample.ids)
    stats.images_encoded += wire.images_to_encode(
      request, sample.cached_tokens, self._model.image_token_id)

  # ---- weights ----

  async def _change_weights(self, push: Push) -> None:
    async with self._updating:
      self._fleet.close_gate()
      try:
        await self._fleet.drain(self.config.drain_s)
        self._take(push)
        await self._fleet.install_all()
      finally:
        if self._push is not None:
          self._fleet.open_gate()
      self.folder.remove_old()
      self._images.trim()

  def _take(self, push: Push) -> None:
    """Makes `push` the weights that every server must hold."""
    self.last_push = push
    if push is not self._push:
      self._push = push
      self._check.next_push(push)

  async def _install(self, member: Member) -> None:
    """Loads the current push into a server and verifies it. A server that fails stays paused: it must not
    answer while its weights are unknown."""
    async with self._locks[member]:
      push, server = self._push, member.server
      held, member.tag = member.tag, None
      await self._check_flags(server)
      await server.pause(_CONTROL_S)
      if held == push.tag:
        await server.flush(_CONTROL_S)
      else:
        await self._fleet.while_alive(member, self._load(server, push, held))
      await server.resume(_CONTROL_S)
      member.tag = push.tag

  async def _load(self, server: Server, push: Push, held: str | None) -> None:
    """Loads a push, with those that it builds on and that the server lacks; verifies that it is there."""
    for step in push.after(held):
      if step.previous is None:
        await server.load(str(step.folder), step.tag, self.config.load_s)
      else:
        ranks = (await server.info(_CONTROL_S)).get("tp_size", 1)
        await server.apply_delta(str(step.folder), step.tag, ranks, self.config.load_s)
    found = await server.weight_tag(_CONTROL_S)
    if found != push.tag:
      raise LoadError(f"{server.url} reports weights {found!r} after loading {push.tag!r}")
    if self.config.verify:
      self._check.check(server.url, await server.checksums(self.config.load_s), push)

  async def _check_flags(self, server: Server) -> None:
    """Raises LoadError for a server that was started with flags that cannot work."""
    info = await server.info(self.config.fleet.probe_timeout_s)  # and a first sign of life
    length, dtype = self.config.length, self.config.push.dtype
    room = info.get("max_req_input_len", length)
    if room < length:
      raise LoadError(f"{server.url} takes prompts of up to {room} tokens, sequences have up to "
                      f"{length}: start it with --context-length={length + 16} or more")
    if self.config.push.delta and DELTA_LOADER not in (info.get("custom_weight_loader") or ()):
      raise LoadError(f"{server.url} cannot load changed values alone: start it with launch/sidecar.py, or set "
                      "rollout.sglang.push_delta=False")
    if dtype == "float32" and info.get("dtype") != "float32":
      raise LoadError(f"{server.url} runs in {info.get('dtype')} and weights come in float32: start "
                      "it with --dtype float32, or push bfloat16")


@dataclasses.dataclass
class _Group:
  """Requests with one prompt that arrived together."""

  size: int = 1
  done: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
