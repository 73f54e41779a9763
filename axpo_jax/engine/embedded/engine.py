"""The engine that samples in this process, on the devices that also train.

A request becomes one sequence for each of its seeds. All sequences wait in one queue. One task, the
pump, runs while there is work:

  admit      start waiting sequences, wave by wave (`prefix_pool.plan_wave`)
  decode     one block of tokens for every running sequence
  resolve    answer the sequences that have finished
  yield      let the event loop run: an episode whose turn has just ended runs its tools and submits
             its next turn before the next admission

Device calls block the event loop, which is simple and deterministic. Which sequences share a batch
depends on the order of submission and never on time. What a sequence draws does not depend on its
batch, up to the rounding of the model's matrix products.

A sequence never outgrows its row of the KV pool. `generate` refuses a prompt that does not fit, and a
sequence that reaches the end of its row finishes with "length".

Failures. An unanswered sequence is always in exactly one list, the queue or the running ones, so every
future is answered. `generate` refuses what it can see to be wrong. If a wave cannot start, its requests
start again one by one, and only the request that fails alone is failed. If a block fails, every running
sequence fails with it, because the call has destroyed their cache. Each reason is logged once.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from flax import nnx

from axpo_jax.engine.embedded.batches import (
  Prompt,
  TokenSequence,
  check_images,
  check_numbers,
  copy_batches,
  decode_inputs,
  prefill_batches,
  wave_images,
)  # fmt: skip
from axpo_jax.engine.embedded.call_sizes import CallSizes
from axpo_jax.engine.embedded.device import Device
from axpo_jax.engine.embedded.prefix_pool import Move, PrefixPool, Waiting, plan_wave
from axpo_jax.engine.protocol import (  # fmt: skip
  EngineClosed,
  EngineStats,
  Sample,
  SampleRequest,
  check_request,
)
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import sharding
from axpo_jax.model.config import ModelConfig


class EmbeddedEngine:
  """See the module docstring. Implements `engine.protocol.Engine`.

  Args:
    model_config: sizes and token ids.
    graphdef: of the Qwen3VL that `params` belong to.
    params: its parameters; copied, so the caller may donate them. They are version `version`.
    mesh, rules: where the model is sharded, as for training; None on one device.
  """

  def __init__(
    self,
    model_config: ModelConfig,
    graphdef: nnx.GraphDef,
    params: Any,
    *,
    config: EmbeddedConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules | None = None,
    version: int = 0,
  ):
    self.config = config = config or EmbeddedConfig()
    self._model, self._version = model_config, version
    self._device = Device(
      model_config, graphdef, rows=config.rows, length=config.length,
      dtype=config.dtype or model_config.dtype, mesh=mesh, rules=rules,
    )  # fmt: skip
    self._device.install(params)
    self._device.reset_pool()
    shards = self._device.shards
    self._sizes = sizes = CallSizes.of(config, shards)
    self._pool = PrefixPool(self._device.rows, config.length, shards, sizes.batch.sizes[-1])
    # An unanswered sequence is in exactly one of these two lists.
    self._queue: list[TokenSequence] = []
    self._running: list[TokenSequence] = []
    self._suspects: set[Prompt] = set()  # of a wave that failed: each is started alone
    self._reported: set[str] = set()
    self._broken: Exception | None = None
    self._updates: collections.deque = collections.deque()
    self._pump: asyncio.Task | None = None
    self._stats = EngineStats()
    self._closed = False

  async def generate(self, request: SampleRequest) -> list[Sample]:
    """See `Engine.generate`. A cancelled caller frees its rows after the running block."""
    self._check_open()
    check_request(request, self._model.image_token_id, self._model.text.vocab_size,
                  self.config.length)
    check_images(request, self._model.vision, max(self.config.patch_lengths))
    check_numbers(request)
    prompt = Prompt.of(request, self._model)
    loop = asyncio.get_running_loop()
    sequences = [TokenSequence(prompt, seed, loop.create_future()) for seed in request.seeds]
    self._queue += sequences
    self._stats.requests += 1
    self._wake()
    try:
      return [await sequence.future for sequence in sequences]
    except (asyncio.CancelledError, Exception):
      for sequence in sequences:
        # Cancels what is left; a failure that no one awaits any more counts as seen.
        if not sequence.future.cancel() and not sequence.future.cancelled():
          sequence.future.exception()
      raise

  async def update_weights(self, params: Any, version: int) -> None:
    """See `Engine.update_weights`. Queued sequences that do not run yet wait for the new weights.

    Raises:
      ValueError: `params` do not belong to the engine's model; the old ones stay.
    """
    self._check_open()
    done = asyncio.get_running_loop().create_future()
    self._updates.append((params, version, done))
    self._wake()
    await done

  def stats(self, *, reset: bool = False) -> EngineStats:
    stats = dataclasses.replace(self._stats, compilations=self._device.compilations)
    if reset:
      self._stats = EngineStats()
    return stats

  def gauges(self) -> dict[str, float]:
    return {}

  async def close(self) -> None:
    if not self._closed:
      self._closed = True
      self._fail_all(EngineClosed("the engine was closed while the request waited or ran"))
      self._device.free()

  def _check_open(self) -> None:
    if self._closed:
      raise EngineClosed("the engine is closed; build a new one")
    if self._broken is not None:
      raise EngineClosed(f"the engine is broken: {_reason(self._broken)}") from self._broken

  def _wake(self) -> None:
    loop = asyncio.get_running_loop()
    if self._pump is not None and self._pump.get_loop() is not loop:
      # The old loop was left in the middle of work, so no caller can wait in it any more.
      self._drop(lambda sequence: sequence.future.get_loop() is not loop)
      self._pump = None
    if self._pump is None or self._pump.done():
      self._pump = loop.create_task(self._run())

  async def _run(self) -> None:
    """The pump. There is no await between its last check of the queues and its return, so no
    submission can be missed."""
    try:
      await self._let_others_run()
      while self._queue or self._running or self._updates:
        self._drop(lambda sequence: sequence.future.done())  # cancelled by their callers
        self._install_update()
        self._admit()
        self._decode()
        await self._let_others_run()
    except asyncio.CancelledError as error:  # the loop ends; the pool is in order at an await
      self._fail_all(error)
      raise
    except Exception as error:  # without an answer its callers would wait for ever
      self._report("the embedded engine failed", error)
      self._fail_all(error)
      self._reset_pool()

  async def _let_others_run(self) -> None:
    for _ in range(self.config.loop_passes):
      await asyncio.sleep(0)

  def _fail_all(self, error: BaseException) -> None:
    futures = [sequence.future for sequence in [*self._queue, *self._running]]
    futures += [done for _, _, done in self._updates]
    self._drop(lambda sequence: True)
    self._updates.clear()
    for future in futures:
      if not future.done():
        future.set_exception(error)

  def _fail(self, sequences: Sequence[TokenSequence], error: Exception) -> None:
    """Answers with `error`. They leave the queue; rows of running ones are the caller's to give up."""
    failed = set(sequences)
    self._queue = [s for s in self._queue if s not in failed]
    self._running = [s for s in self._running if s not in failed]
    for sequence in sequences:
      if not sequence.future.done():
        sequence.future.set_exception(error)

  def _reset_pool(self) -> None:
    """Forgets everything cached and allocates the pool anew. Without a pool the engine is broken."""
    if self._closed:
      return
    self._pool.clear()
    try:
      self._device.reset_pool()
    except Exception as error:
      self._report("the embedded engine cannot allocate its KV pool again", error)
      self._broken = error
      self._fail_all(error)

  def _report(self, what: str, error: Exception) -> None:
    """Logs a failure with its traceback, once for each reason."""
    reason = _reason(error)
    if reason not in self._reported:
      self._reported.add(reason)
      logging.error("%s: %s", what, reason, exc_info=error)

  def _drop(self, which: Callable[[TokenSequence], bool]) -> None:
    """Removes sequences from the queue and from their rows; what they computed stays cached."""
    for sequence in self._running:
      if which(sequence):
        self._pool.release(sequence.row)
    self._running = [s for s in self._running if not which(s)]
    self._queue = [s for s in self._queue if not which(s)]

  def _install_update(self) -> None:
    if self._running:
      return  # the running ones finish on the weights they began with
    while self._updates:
      params, version, done = self._updates.popleft()
      try:
        self._device.install(params)
      except Exception as error:  # the caller's to handle; the pump goes on
        if not done.done():
          done.set_exception(error)
        continue
      self._version = version
      self._pool.clear()
      if not done.done():
        done.set_result(None)

  def _admit(self) -> None:
    """Starts waiting sequences, wave by wave, while rows are free and fewer than `max_running` run."""
    while self._queue and not self._updates:
      capacity = self.config.max_running - len(self._running)
      if not capacity:
        return  # before the prompts of all that wait are looked up
      candidates = self._candidates()
      waiting = [Waiting(s.prompt.keys_T, s.prompt.digest) for s in candidates]
      planned = plan_wave(waiting, self._pool, capacity=capacity, defer_gain=self.config.defer_gain)
      if not planned:
        return
      wave = [(candidates[index], move) for index, move in planned]
      try:
        self._start(wave)
      except Exception as error:
        self._wave_failed(wave, error)
        continue
      started = {sequence for sequence, _ in wave}
      self._suspects -= {sequence.prompt for sequence in started}
      self._queue = [s for s in self._queue if s not in started]
      self._running += [sequence for sequence, _ in wave]

  def _candidates(self) -> list[TokenSequence]:
    """Sequences for the next wave: all that wait, or only those of one suspect request."""
    self._suspects &= {sequence.prompt for sequence in self._queue}
    suspect = next((s.prompt for s in self._queue if s.prompt in self._suspects), None)
    return [s for s in self._queue if suspect is None or s.prompt is suspect]

  def _wave_failed(self, wave: Sequence[tuple[TokenSequence, Move]], error: Exception) -> None:
    """Fails the wave's request; of several, each will be started alone."""
    self._report("the embedded engine could not start a wave of prompts", error)
    if self._device.pool_lost:
      self._fail(self._running, error)
      self._reset_pool()
    else:
      self._pool.abandon(move for _, move in wave)
    requests = {sequence.prompt for sequence, _ in wave}
    if len(requests) == 1:
      self._fail([s for s in self._queue if s.prompt in requests], error)
    else:
      self._suspects |= requests

  def _start(self, wave: Sequence[tuple[TokenSequence, Move]]) -> None:
    """Computes the prompts. It changes shared state only at the end, when nothing can fail any more."""
    jobs = [(sequence.prompt, move) for sequence, move in wave]
    vision, first_token = wave_images(jobs, self._model, self.config.patch_lengths, self._device.shards)
    features = None if vision is None else self._device.encode(vision)
    layout, sizes = self._pool.layout, self._sizes
    for batch in copy_batches(jobs, sizes.copy, sizes.slots, layout):
      self._device.copy(*batch)
    for inputs, slots in prefill_batches(
      jobs, first_token, sizes.batch, sizes.tokens, sizes.slots,
      layout=layout, most_tokens=self.config.prefill_tokens,
    ):  # fmt: skip
      shown = None if inputs.image_index_BxT is None else features
      self._device.prefill(inputs, shown, slots)
    self._pool.commit((move, prompt.length - 1) for prompt, move in jobs)
    self._stats.images_encoded += len(first_token)
    for sequence, move in wave:
      sequence.row, sequence.cached = move.row, move.cached
      self._stats.prompt_tokens += sequence.prompt.length
      self._stats.cached_tokens += move.cached
      self._stats.prefill_tokens_computed += sequence.prompt.length - 1 - move.cached

  def _decode(self) -> None:
    """One block for all running sequences. If it fails they all fail: their cache is lost."""
    if not self._running:
      return
    try:
      self._decode_block()
    except Exception as error:
      self._report(f"the embedded engine lost {len(self._running)} running samples", error)
      self._fail(self._running, error)
      self._reset_pool()

  def _decode_block(self) -> None:
    """Decodes for all that run; resolves those that finish."""
    block = self.config.decode_block
    inputs = decode_inputs(
      self._running, [self._pool.valid(s.row) for s in self._running], self._sizes.batch,
      block=block, layout=self._pool.layout, length=self.config.length,
    )  # fmt: skip
    longest = max(self._pool.valid(s.row) for s in self._running) + block
    slots = self._sizes.slots(min(longest, self.config.length))
    out = self._device.decode(inputs, slots=slots, block=block)
    ids_BxT, logprobs_BxT = out.tokens_TxB.T.tolist(), out.logprobs_TxB.T.tolist()
    counts = out.count_B.tolist()
    index_of = {row: index for index, row in enumerate(inputs.row_B.tolist())}
    still = []
    for sequence in self._running:
      index = index_of[sequence.row]
      count = counts[index]
      self._take(sequence, ids_BxT[index][:count], logprobs_BxT[index][:count])
      if not self._resolve_if_finished(sequence):
        still.append(sequence)
    self._running = still

  def _take(self, sequence: TokenSequence, ids: list[int], logprobs: list[float]) -> None:
    sequence.ids += ids
    sequence.logprobs += logprobs
    self._pool.extend(sequence.row, ids)
    self._stats.decode_tokens += len(ids)

  def _resolve_if_finished(self, sequence: TokenSequence) -> bool:
    stopped = sequence.ids[-1] in sequence.params.stop_ids
    if not stopped and len(sequence.ids) < sequence.limit(self.config.length):
      return False
    self._pool.release(sequence.row)
    self._stats.samples += 1
    if not sequence.future.done():
      sequence.future.set_result(Sample(
        ids=tuple(sequence.ids), logprobs=tuple(sequence.logprobs),
        finish_reason="stop" if stopped else "length", prompt_tokens=sequence.prompt.length,
        cached_tokens=sequence.cached, weight_version=self._version,
      ))  # fmt: skip
    return True


def _reason(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"
