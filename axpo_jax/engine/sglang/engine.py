"""The engine whose samples come from SGLang servers.

In: sample requests and, now and then, the trainer's weights. Out: samples drawn by servers that
hold exactly these weights. Starting and restarting servers is somebody else's work (see sidecar.py):
here a server is a base URL.

What goes wrong with one server is not the caller's business: the request is asked again elsewhere,
a few times and within a deadline. What cannot be mended is a typed error: `RequestError` for a request
that no server can serve, `ServerError` when several tries failed, `NoServer` when there was nobody to
ask. A sample that was returned was counted as we count and drawn from one known version.

Seeds: each sample is a request with its own `sampling_seed`, which SGLang heeds only with
--enable-deterministic-inference. Without it samples differ from run to run.

Shared prompts: requests with one prompt that arrive together (the rollouts of a question, the
resamples of a prefix) would each compute it, since none has left it in the cache yet. The first of
them lets the server prefill the prompt, then all are sent. `cached_tokens` of the first tells what
that prefill found in the cache, so sums over samples are what was really saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from axpo_jax.engine.background import LoopThread
from axpo_jax.engine.protocol import (
  EngineClosed,
  EngineStats,
  RequestError,
  Sample,
  SampleRequest,
  check_request,
)
from axpo_jax.engine.settings import SGLangConfig
from axpo_jax.engine.sglang import wire
from axpo_jax.engine.sglang.api import LoadError, Server, ServerError, TooSlow
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

  Nothing can be sampled before the first `update_weights`: whatever checkpoint a server was
  started with, only weights that the trainer pushed count. Servers belong to one run: two engines
  would take turns in putting their own weights back.

  Args:
    urls: base URLs of the servers; they may come up later.
    model_config: sizes and token ids.
    config: see SGLangConfig.

  Attributes:
    folder: where pushes are written.
    last_push: what the last update wrote; or None.
    retries: requests that were asked again because a server failed or was too slow.
    too_slow: requests that took longer than `request_s`.
  """

  def __init__(self, urls: Sequence[str], model_config: ModelConfig, config: SGLangConfig):
    self.config, self._model = config, model_config
    self.folder = PushFolder(config.push, model_config)
    self._images = ImageSender(config.image_folder, config.image_cache_bytes)
    self._stats = EngineStats()
    self._push: Push | None = None
    self._check = WeightCheck(self.folder.server_names)
    self._closed = False
    self.retries = self.too_slow = 0
    self.last_push: Push | None = None
    servers = [Server(url, config.api_key) for url in urls]
    self._fleet = Fleet(servers, config.fleet, self._install,
                        lambda: self._push.tag if self._push else None)
    self._router = Server(config.router_url, config.api_key) if config.router_url else None
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
    """Servers in; since the start, how often one went out, requests asked again, and those too slow; of
    the last push, its seconds and its bytes."""
    found = {
      "servers_in": float(sum(map(self._fleet.is_in, self._fleet.members))),
      "servers_lost": float(self._fleet.times_out),
      "retries": float(self.retries),
      "too_slow": float(self.too_slow),
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
    """One sample, from whichever server gives a sound one."""
    failed: list[Member] = []  # at which, as often as it did
    while True:
      async with self._fleet.lease(request.session, failed) as member:
        try:
          return await self._draw(member, self._push, request, seed, images)
        except NotAsked:
          continue  # another request's failure, not ours
        except ServerError as error:
          self.retries += 1
          if isinstance(error, wire.Aborted) and not self._fleet.gate_is_open:
            continue  # weights change, and what took too long for that was aborted by us
          failed.append(member)
          if len(failed) >= self.config.attempts:
            self.retries -= 1
            raise
      if self._router is None:
        await self._fleet.doubt(member)
      else:  # nobody knows which server it was; the router finds out
        await asyncio.sleep(self.config.fleet.probe_s)

  async def _draw(self, member: Member, push: Push, request: SampleRequest, seed: int,
                  images: Sequence[str]) -> Sample:
    found = await self._share_prefill(member, push, request, images)
    reply = wire.read(await self._ask(member, wire.payload(
      request, seed, images, self.config.length)), request, push.tag)
    cached = reply.cached_tokens if found is None else min(found, reply.cached_tokens)
    sample = wire.sample(request, reply, cached, push.version)
    self._count(request, sample)
    return sample

  async def _ask(self, member: Member, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request. One that takes too long is ended where it runs, by itself."""
    server, rid = self._router or member.server, secrets.token_hex(16)
    try:
      return await member.call(server.generate(payload | {"rid": rid}, self.config.request_s))
    except TooSlow:
      self.too_slow += 1
      # Behind a router any of them may have it.
      for other in [member] if self._router is None else self._fleet.members:
        with contextlib.suppress(ServerError):
          await other.server.abort(rid, self.config.fleet.probe_timeout_s)
      raise

  async def _share_prefill(self, member: Member, push: Push, request: SampleRequest,
                           images: Sequence[str]) -> int | None:
    """Waits for the prefill of a prompt that other requests bring at this moment.

    Returns what was cached before it to the request that led, None to all others.
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
    """Loads the current push into a server and verifies it. A server that fails stays paused: it
    answers nobody until it holds weights that we know."""
    async with self._locks[member]:
      push, server = self._push, member.server
      held, member.tag = member.tag, None
      await self._check_flags(server)
      await server.pause(_CONTROL_S)
      if held == push.tag:
        await server.flush(_CONTROL_S)
      else:
        await self._fleet.while_alive(member, self._load(server, push))
      await server.resume(_CONTROL_S)
      member.tag = push.tag

  async def _load(self, server: Server, push: Push) -> None:
    """Loads a push and verifies that it is there."""
    await server.load(str(push.folder), push.tag, self.config.load_s)
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
    if dtype == "float32" and info.get("dtype") != "float32":
      raise LoadError(f"{server.url} runs in {info.get('dtype')} and weights come in float32: start "
                      "it with --dtype float32, or push bfloat16")


@dataclasses.dataclass
class _Group:
  """Requests with one prompt that arrived together."""

  size: int = 1
  done: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
