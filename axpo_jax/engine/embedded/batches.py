"""From a wave of sequences to the padded arrays that the device's functions take (NumPy).

Legend: B rows of a call, T tokens; a job is one sequence's prompt with the row move it was given.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

from axpo_jax.engine.embedded import sampling
from axpo_jax.engine.embedded.device import DecodeInputs, PrefillInputs
from axpo_jax.engine.embedded.prefix_pool import Layout, Move, content_keys
from axpo_jax.engine.protocol import RequestError, SampleRequest, SamplingParams
from axpo_jax.model.buckets import PATCH_BUCKETS, Buckets
from axpo_jax.model.config import ModelConfig, VisionConfig
from axpo_jax.model.images import ProcessedImage
from axpo_jax.model.vision_inputs import VisionInputs, mrope_positions, pack_images

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """A request's prompt, expanded: every image pad repeated for the image's merged tokens.

  tokens_T int32; keys_T int64, what prefixes are compared by; positions_Tx3 int32; image_T int32,
  which image a token belongs to (-1: text); offset_T int32, which of its tokens; digest: of keys_T,
  equal for the requests of one question.
  """

  request: SampleRequest
  tokens_T: np.ndarray
  keys_T: np.ndarray
  positions_Tx3: np.ndarray
  image_T: np.ndarray
  offset_T: np.ndarray
  digest: bytes

  @classmethod
  def of(cls, request: SampleRequest, config: ModelConfig) -> Prompt:
    """Expands the pads of `request`, which has passed `check_request`."""
    merge = config.vision.spatial_merge_size
    ids = np.asarray(request.ids, np.int32)
    pads = np.flatnonzero(ids == config.image_token_id)
    sizes = [image.num_tokens for image in request.images]
    repeats, number = np.ones(len(ids), np.int64), np.full(len(ids), -1, np.int32)
    repeats[pads], number[pads] = sizes, np.arange(len(pads))
    tokens_T, image_T = np.repeat(ids, repeats), np.repeat(number, repeats)
    starts = np.repeat(np.cumsum(repeats) - repeats, repeats)
    grids = [(h // merge, w // merge) for h, w in (image.grid_hw for image in request.images)]
    keys_T = content_keys(tokens_T, image_T, [image.key for image in request.images])
    return cls(
      request=request,
      tokens_T=tokens_T,
      keys_T=keys_T,
      positions_Tx3=mrope_positions(tokens_T, grids, config.image_token_id, config.video_token_id),
      image_T=image_T,
      offset_T=(np.arange(len(tokens_T)) - starts).astype(np.int32),
      digest=hashlib.sha256(keys_T.tobytes()).digest(),
    )

  @property
  def length(self) -> int:
    return len(self.tokens_T)

  @property
  def last_position(self) -> int:
    """Rotary position of the last token: text, hence one number, and the largest of all."""
    return int(self.positions_Tx3[-1, 0])

  def images_from(self, start: int) -> list[ProcessedImage]:
    """Images with a token at `start` or later."""
    return [self.request.images[i] for i in np.unique(self.image_T[start:]) if i >= 0]


@dataclasses.dataclass(eq=False)
class TokenSequence:
  """One seed of one request, from the queue to its result.

  future: set to its Sample, or to what made it fail. row: of the pool, once it runs. cached: tokens of
  the prompt that were not computed for it.
  """

  prompt: Prompt
  seed: int
  future: asyncio.Future
  row: int = -1
  cached: int = 0
  ids: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)

  @property
  def params(self) -> SamplingParams:
    return self.prompt.request.params

  def limit(self, length: int) -> int:
    """Most tokens to draw, in a row of `length`."""
    return min(self.params.max_new_tokens, length - self.prompt.length)


def check_images(request: SampleRequest, config: VisionConfig, most_patches: int) -> None:
  """Raises RequestError for images that the vision tower cannot take, or that are too large."""
  for number, image in enumerate(request.images):
    if image.patch_dim != config.patch_dim or image.format.merge_size != config.spatial_merge_size:
      raise RequestError(f"image {number}: {image.format} does not fit the model, whose patches have "
                         f"{config.patch_dim} values, merged by {config.spatial_merge_size}")
    if image.num_patches > most_patches:
      raise RequestError(f"image {number} has {image.num_patches} patches, but the engine takes images "
                         f"of at most {most_patches}: shrink it, or raise the engine's patch_lengths")


def check_numbers(request: SampleRequest) -> None:
  """Raises RequestError for sampling parameters or seeds that the device's arrays cannot hold."""
  params = [request.params] * len(request.seeds)
  try:
    sampling.row_params(params, request.seeds, rows=len(params), width=sampling.list_width(params))
  except (OverflowError, TypeError, ValueError) as error:
    raise RequestError(f"{request.params}, seeds {request.seeds}: {error}") from error


Job = tuple[Prompt, Move]


def wave_images(
  jobs: Sequence[Job], config: ModelConfig, patch_lengths: Sequence[int] = PATCH_BUCKETS,
  shards: int = 1,
) -> tuple[VisionInputs | None, Mapping[str, int]]:
  """The distinct images that the wave computes: packed, and each key's first merged token.

  patch_lengths: of rows of patches, see `pack_images`.
  shards: devices that share the packed rows.
  """
  images = {
    image.key: image for prompt, move in jobs for image in prompt.images_from(move.cached)
  }
  if not images:
    return None, {}
  vision, offsets = pack_images(list(images.values()), config.vision, patch_buckets=patch_lengths,
                                rows_multiple_of=shards)
  return vision, dict(zip(images, offsets.tolist(), strict=True))


def copy_batches(
  jobs: Sequence[Job], batch: Buckets, slots: Buckets, layout: Layout
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """(source rows, target rows, slots) of the copies that a wave needs.

  A sequence needs one if its whole prompt is cached in another row, or if its prefix is on another
  device: a prefill reads only rows of its own device.

  batch: sizes of a call.
  """
  moves = [m for prompt, m in jobs if m.cached and m.source != m.row and (
    _lacking(prompt, m) == 0 or _is_apart(m, layout))]
  for start in range(0, len(moves), batch.sizes[-1]):
    part = moves[start : start + batch.sizes[-1]]
    source_B, row_B = np.full((2, batch(len(part))), layout.rows, np.int32)
    source_B[: len(part)] = [move.source for move in part]
    row_B[: len(part)] = [move.row for move in part]
    yield source_B, row_B, slots(max(move.cached for move in part))


def prefill_batches(
  jobs: Sequence[Job],
  first_token: Mapping[str, int],
  batch: Buckets,
  tokens: Buckets,
  slots: Buckets,
  *,
  layout: Layout,
  most_tokens: int,
) -> Iterator[tuple[PrefillInputs, int]]:
  """Groups the sequences that lack tokens by padded length; yields inputs and their slots.

  Args:
    first_token: of each image among the merged tokens of the wave, from `wave_images`.
    batch: rows that a device has of a call.
    layout: of the pool's rows, whose number marks padding.
    most_tokens: padded tokens in one call, unless a single sequence of a device has more.
  """
  lacking = [job for job in jobs if _lacking(*job)]
  for size in tokens.sizes:
    group = [job for job in lacking if tokens(_lacking(*job)) == size]
    rows = prefill_rows(batch, size, layout.shards, most_tokens)
    by_shard = [[job for job in group if layout.shard(job[1].row) == shard]
                for shard in range(layout.shards)]
    for start in range(0, max(map(len, by_shard)), rows[-1]):
      part = [job for jobs in by_shard for job in jobs[start : start + rows[-1]]]
      fullest = layout.most(move.row for _, move in part)
      each = next(count for count in rows if count >= fullest)
      yield _prefill_inputs(part, first_token, each, size, layout), slots(
        max(prompt.length - 1 for prompt, _ in part)
      )


def prefill_rows(batch: Buckets, tokens: int, shards: int, most_tokens: int) -> list[int]:
  """How many rows a device may have of a prefill of so many tokens a row; the last is the most.

  The most that the budget allows is a bucket of its own, since a larger one would pad beyond the budget.
  So is one row: after an update of the weights, all others wait for the first prompt's prefix.
  """
  most = max(1, min(batch.sizes[-1], most_tokens // (tokens * shards)))
  return sorted({1, most, *(size for size in batch.sizes if size < most)})


def _is_apart(move: Move, layout: Layout) -> bool:
  return layout.shard(move.source) != layout.shard(move.row)


def _prefill_inputs(
  jobs: Sequence[Job], first_token: Mapping[str, int], each: int, length: int, layout: Layout
) -> PrefillInputs:
  batch, rows = each * layout.shards, layout.rows
  out = PrefillInputs(
    source_B=np.full(batch, rows, np.int32),
    row_B=np.full(batch, rows, np.int32),
    start_B=np.zeros(batch, np.int32),
    tokens_BxT=np.zeros((batch, length), np.int32),
    positions_BxTx3=np.zeros((batch, length, 3), np.int32),
    real_BxT=np.zeros((batch, length), np.int32),
    image_index_BxT=np.full((batch, length), -1, np.int32),
  )
  for b, (prompt, move) in enumerate(jobs):
    new, count = slice(move.cached, prompt.length - 1), _lacking(prompt, move)
    source = move.row if _is_apart(move, layout) else move.source  # has been copied
    out.source_B[b], out.row_B[b], out.start_B[b] = source, move.row, move.cached
    out.tokens_BxT[b, :count] = prompt.tokens_T[new]
    out.positions_BxTx3[b, :count] = prompt.positions_Tx3[new]
    out.real_BxT[b, :count] = 1
    out.image_index_BxT[b, :count] = _image_index(prompt, new, first_token)
  if (out.image_index_BxT < 0).all():
    out = dataclasses.replace(out, image_index_BxT=None)
  return arranged(out, [move.row for _, move in jobs], each, layout)


def arranged(inputs: T, rows: Sequence[int], each: int, layout: Layout) -> T:
  """A call's arrays, whose first len(rows) lines are of sequences in these rows and whose others are
  padding, in the order that gives every device `each` lines, of its own rows."""
  if layout.shards == 1:
    return inputs
  order_B = layout.spread(rows, each)
  return jax.tree.map(lambda x: x[order_B], inputs)


def _image_index(prompt: Prompt, new: slice, first_token: Mapping[str, int]) -> np.ndarray:
  """Each token's index among the wave's merged image tokens, -1 for text."""
  # The last entry is what image number -1 picks; its value is masked below.
  starts = np.array([first_token.get(image.key, 0) for image in prompt.request.images] + [0], np.int32)
  image_T = prompt.image_T[new]
  return np.where(image_T < 0, -1, starts[image_T] + prompt.offset_T[new])


def _lacking(prompt: Prompt, move: Move) -> int:
  """Tokens to compute: all that are not cached, but for the last, which decode feeds."""
  return prompt.length - 1 - move.cached


def decode_inputs(
  running: Sequence[TokenSequence],
  valid: Sequence[int],
  batch: Buckets,
  *,
  block: int,
  layout: Layout,
  length: int,
) -> DecodeInputs:
  """State of the sequences that run, for a block of `block` tokens; each device has its own rows'.

  Args:
    valid: computed tokens in the row of each.
    batch: rows that a device has of a call.
    layout: of the pool's rows, whose number marks padding.
    length: tokens of a row.
  """
  each = batch(layout.most(s.row for s in running))
  size = each * layout.shards

  def column(values, fill=0):
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out

  params = [s.params for s in running]
  generated = None
  if any(p.presence_penalty for p in params):
    generated = _padded_lists([s.ids for s in running], size)
  inputs = DecodeInputs(
    row_B=column([s.row for s in running], layout.rows),
    length_B=column(valid),
    pending_B=column([s.ids[-1] if s.ids else s.prompt.tokens_T[-1] for s in running]),
    position_B=column([s.prompt.last_position + len(s.ids) for s in running]),
    drawn_B=column([len(s.ids) for s in running]),
    limit_B=column([min(s.limit(length) - len(s.ids), block) for s in running]),
    sampling=sampling.row_params(
      params, [s.seed for s in running], rows=size, width=sampling.list_width(params)
    ),
    generated_BxG=generated,
  )
  return arranged(inputs, [s.row for s in running], each, layout)


def padded_list(longest: int) -> int:
  """G, a power of two from 64, so that shapes stay few."""
  return max(64, 1 << (longest - 1).bit_length() if longest else 0)


def _padded_lists(lists: Sequence[Sequence[int]], rows: int) -> np.ndarray:
  """int32 [rows, G], padded with -1."""
  out = np.full((rows, padded_list(max(map(len, lists)))), -1, np.int32)
  for row, values in enumerate(lists):
    out[row, : len(values)] = values
  return out
