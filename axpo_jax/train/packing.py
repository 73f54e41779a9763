"""Packing: trajectories of any length become micro-batches of few static shapes (host, NumPy).

In: Examples, one per trajectory, everything aligned with the token it belongs to. Out: Batches with
rows of tokens to compute, and for every row a list of the targets that are scored, each with the
position that predicts it. What trajectories share (prompt, images, a frozen prefix) is stored once,
see `train.tree`: a position may then predict several targets, of different weight and advantage.
Tokens after a trajectory's last target are left out. An image that several trajectories of a
micro-batch show is encoded once. All batches of one call have the same shapes, so the step
compiles once for them.

Legend: B rows, T tokens of a row or an example, G targets of a row, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from axpo_jax.model.attention_blocks import key_blocks
from axpo_jax.model.buckets import STEP_PATCH_BUCKETS, STEP_ROW_BUCKETS
from axpo_jax.model.config import VisionConfig
from axpo_jax.model.images import ProcessedImage
from axpo_jax.model.vision_inputs import pack_images
from axpo_jax.train import tree
from axpo_jax.train.batch import Batch

# Tokens of a block of attention; a row's length is a multiple of it. In long rows every block attends to
# thousands of keys, so larger blocks are faster if they divide the row.
BLOCK, LONG_BLOCKS, LONG_ROW = 64, (512, 256, 128), 8192


class PackingError(ValueError):
  """An example that cannot be trained on, or rows that cannot be made."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One trajectory in expanded form (every image pad written out). All arrays have length T.

  Attributes:
    ids_T: int, token ids.
    positions_Tx3: int, (time, height, width) of M-RoPE.
    image_T: int, -1 or which of `images` the token shows.
    image_offset_T: int, which merged token of that image (anything where image_T is -1).
    images: the images, in any order; equal keys mean equal pixels.
    loss_mask_T: bool, the token is a target. Never the first: nothing predicts it.
    advantages_T: float, of each target (1 for supervised learning).
    behaviour_logp_T: float, the sampler's log-probability of each target (0 if there is none).
    lag_T: int, versions by which the weights that drew the target are behind those being trained;
      None: 0 everywhere.
  """

  ids_T: np.ndarray
  positions_Tx3: np.ndarray
  image_T: np.ndarray
  image_offset_T: np.ndarray
  images: tuple[ProcessedImage, ...]
  loss_mask_T: np.ndarray
  advantages_T: np.ndarray
  behaviour_logp_T: np.ndarray
  lag_T: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.ids_T)

  @property
  def computed(self) -> int:
    """How many of its first tokens a target depends on."""
    targets = np.flatnonzero(self.loss_mask_T)
    return int(targets[-1]) if len(targets) else 0


def pack(
  examples: Sequence[Example],
  *,
  rows: int,
  length: int,
  vision_config: VisionConfig,
  share_prefixes: bool = True,
  banned_ids: Sequence[int] = (),
  vocab_size: int | None = None,
  rows_multiple_of: int = 1,
  image_rows_multiple_of: int | None = None,
  image_rows_here: Callable[[int], Collection[int]] | None = None,
  block: int | None = None,
  row_buckets: Sequence[int] = STEP_ROW_BUCKETS,
  patch_buckets: Sequence[int] = STEP_PATCH_BUCKETS,
  list_blocks: bool = True,
) -> list[Batch]:
  """Packs examples into micro-batches of at most [rows, length].

  Deterministic. Micro-batches have `rows` rows or, where that leaves fewer of them empty, half as
  many. Every target weighs 1: `batch.with_weights` changes that.

  Args:
    share_prefixes: compute equal beginnings (ids, positions, images) of examples once per row. The result is
      the same without.
    banned_ids: ids that a target must not have, since the softmax leaves them out.
    vocab_size: ids must be below it; None: not checked.
    rows_multiple_of: the number of rows is a multiple of it, and `rows` is rounded up to a multiple, so that
      every shard holds a row. See `batch.batch_shards`.
    image_rows_multiple_of: the same for vision rows; default `rows_multiple_of`.
    image_rows_here: which vision rows' patches are made, see `pack_images`; None: all.
    block: tokens of a block of attention; None: chosen by the length of a row.
    row_buckets, patch_buckets: shapes of the vision tower, see `pack_images`.
    list_blocks: also make `key_blocks_BxCxN`, for attention that reads it (`attention.reads_key_blocks`). For
      others it would only add compiled programs.

  Raises:
    PackingError: an example that is longer than a row, has arrays of unequal length, an image that is
      too large, a target without a predecessor or a banned one; the message names the example and the
      numbers. Or a length that is not a multiple of `block`.
  """
  block = _block(length, block)
  for number, example in enumerate(examples):
    check_example(example, length, banned_ids, max(patch_buckets), vocab_size, f"example {number}")
  if not examples:
    return []
  pieces_R = _place(examples, length, share_prefixes)
  height = _height(len(pieces_R), rows, rows_multiple_of)
  # Whole micro-batches, at least one: examples without any target still make a step.
  pieces_R += [[]] * (-len(pieces_R) % height or (0 if pieces_R else height))
  whole = _fill(pieces_R, examples, length, block if list_blocks else None)
  cuts = [slice(at, at + height) for at in range(0, len(pieces_R), height)]
  batches = [Batch(**{name: array[cut] for name, array in whole.items()}) for cut in cuts]
  if any(example.images for example in examples):
    options = {"config": vision_config, "rows_here": image_rows_here,
               "rows_multiple_of": image_rows_multiple_of or rows_multiple_of}
    batches = _with_images(batches, [pieces_R[cut] for cut in cuts], examples, row_buckets,
                           patch_buckets, options)
  return batches


def check_example(example: Example, length: int, banned_ids: Sequence[int], most_patches: int,
                  vocab_size: int | None = None, where: str = "the example") -> None:
  """Raises PackingError for an example that `pack` cannot put into rows of `length` tokens."""
  size = len(example)
  if size > length:
    raise PackingError(
      f"{where} has {size} tokens, a row holds {length}; raise batch.length to at least {size} "
      "or drop the example")
  for field in dataclasses.fields(example):
    value = getattr(example, field.name)
    if field.name != "images" and value is not None and len(value) != size:
      raise PackingError(f"{where}: {field.name} has length {len(value)}, ids_T has {size}")
  # The embedding would silently read an id beyond the vocabulary as the last one.
  beyond_T = example.ids_T[(example.ids_T < 0) | (example.ids_T >= (vocab_size or np.inf))]
  if beyond_T.size:
    raise PackingError(f"{where} has the id {int(beyond_T[0])}, the vocabulary {vocab_size}: was it made "
                       "with another tokenizer?")
  if size and example.loss_mask_T[0]:
    raise PackingError(f"{where}: loss_mask_T[0] is set, but nothing predicts the first token")
  banned_T = np.isin(example.ids_T, np.asarray(banned_ids, np.int64)) & example.loss_mask_T
  if banned_T.any():
    at = int(np.argmax(banned_T))
    raise PackingError(
      f"{where}: target {at} has the banned id {int(example.ids_T[at])}; mask it or drop the example")
  if large := [image.num_patches for image in example.images if image.num_patches > most_patches]:
    raise PackingError(f"{where}: an image of {max(large)} patches; the largest may have {most_patches}")
  if (example.image_T >= len(example.images)).any():
    raise PackingError(
      f"{where}: image_T names image {int(example.image_T.max())} of {len(example.images)}")


def _place(examples: Sequence[Example], length: int, share: bool) -> list[list[tree.Placed]]:
  """The examples that have targets, by row."""
  lengths_S = [example.computed for example in examples]
  scored = [i for i, size in enumerate(lengths_S) if size]
  if share:
    order, shared = tree.sort(_tables([examples[i] for i in scored]))
    order = [scored[i] for i in order]
  else:
    order, shared = sorted(scored, key=lambda i: -lengths_S[i]), [0] * len(scored)
  return tree.place(order, shared, lengths_S, length)


def _tables(examples: Sequence[Example]) -> list[np.ndarray]:
  """What tokens are compared by: int32 [T, 6] for the computed tokens of every example."""
  number_of: dict[str, int] = {}
  tables = []
  for example in examples:
    keys = [number_of.setdefault(image.key, len(number_of)) for image in example.images]
    shown_T = example.image_T >= 0
    image_T = np.where(shown_T, np.asarray([*keys, -1])[example.image_T], -1)
    offset_T = np.where(shown_T, example.image_offset_T, 0)
    columns = (example.ids_T, example.positions_Tx3, image_T, offset_T)
    tables.append(np.column_stack(columns).astype(np.int32)[:example.computed])
  return tables


def _height(used: int, rows: int, multiple: int) -> int:
  """Rows of a micro-batch: `rows`, or half of them if that saves an eighth of the step's tokens. More choices would
  mean more programs, without use for steps of many micro-batches."""
  rows, half = (-(-size // multiple) * multiple for size in (rows, -(-rows // 2)))
  padded, padded_half = (-(-used // height) * height for height in (rows, half))
  return half if 8 * padded_half < 7 * padded else rows


def _fill(rows_R, examples, length: int, block: int | None) -> dict[str, np.ndarray]:
  """The fields of all rows, without images."""
  shape = (len(rows_R), length)
  tokens_RxT, ends_RxT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  positions_RxTx3 = np.zeros((*shape, 3), np.int32)
  scored_R = []
  for row, row_placed in enumerate(rows_R):
    places, ends_RxT[row] = tree.lay_out(row_placed, [e.computed for e in examples], length)
    scored = []
    for placed, where_T in zip(row_placed, places, strict=True):
      example = examples[placed.number]
      new = slice(placed.shared, example.computed)
      tokens_RxT[row, where_T[new]] = example.ids_T[new]
      positions_RxTx3[row, where_T[new]] = example.positions_Tx3[new]
      scored.append(_targets(example, where_T, placed.number))
    scored_R.append([np.concatenate(column) for column in zip(*scored)])
  fields = {"tokens_BxT": tokens_RxT, "positions_BxTx3": positions_RxTx3, "ends_BxT": ends_RxT}
  if block and (lists := key_blocks(ends_RxT, block)) is not None:
    fields["key_blocks_BxCxN"] = lists
  return fields | _target_fields(scored_R, length)


def _block(length: int, asked: int | None) -> int:
  """Tokens of a block of attention: `asked`, or chosen for rows of `length` tokens."""
  suiting = [block for block in LONG_BLOCKS if length % block == 0 and length >= LONG_ROW]
  block = asked or (suiting[0] if suiting else BLOCK)
  if length % block:
    raise PackingError(f"rows of {length} tokens: batch.length must be a multiple of {block}")
  return block


_TARGET_FIELDS = {"at_BxG": np.int32, "targets_BxG": np.int32, "weights_BxG": np.float32,
                  "advantages_BxG": np.float32, "behaviour_logp_BxG": np.float32,
                  "lag_BxG": np.int32, "example_BxG": np.int32}


def _targets(example: Example, where_T: np.ndarray, number: int) -> tuple[np.ndarray, ...]:
  """The values of `_TARGET_FIELDS` for example `number`, whose tokens are at `where_T`."""
  mask = np.flatnonzero(example.loss_mask_T)
  return (where_T[mask - 1], example.ids_T[mask], np.ones(len(mask)),
          example.advantages_T[mask], example.behaviour_logp_T[mask],
          np.zeros(len(mask)) if example.lag_T is None else example.lag_T[mask],
          np.full(len(mask), number))


def _target_fields(scored_R: Sequence[Sequence[np.ndarray]], length: int) -> dict[str, np.ndarray]:
  """Targets of all rows, in as many slots as tokens, or that number doubled until they fit. The padding costs a share
  of the output head; a program for every number of targets would cost more."""
  most, width = max((len(s[0]) for s in scored_R if s), default=0), max(length, 1)
  while width < most:
    width *= 2
  shape = (len(scored_R), width)
  fields = {name: np.full(shape, -1 if name == "example_BxG" else 0, dtype)
            for name, dtype in _TARGET_FIELDS.items()}
  for row, scored in enumerate(scored_R):
    for array, values in zip(fields.values(), scored):
      array[row, :len(values)] = values
  return fields


def _with_images(batches, rows_of_batches, examples, row_buckets, patch_buckets, options
                 ) -> list[Batch]:
  """The batches with vision inputs, all in the shape of the largest."""
  distinct = [_shown_images(rows, examples) for rows in rows_of_batches]
  largest = max((im.num_patches for images in distinct for im in images.values()), default=0)
  # The smallest bucket, or all of them, so that pack_images raises its own error.
  patch_buckets = [b for b in sorted(patch_buckets) if b >= largest][:1] or patch_buckets

  def packed(images, buckets):
    return pack_images(list(images.values()), row_buckets=buckets, patch_buckets=patch_buckets,
                       lazy=True, **options)

  results = [packed(images, row_buckets) for images in distinct]
  most = max(len(vision.segments_RxP) for vision, _ in results)
  out = []
  for batch, rows, images, (vision, offsets) in zip(
      batches, rows_of_batches, distinct, results, strict=True):
    if len(vision.segments_RxP) < most:
      vision, offsets = packed(images, (most,))
    start_of = dict(zip(images, offsets.tolist(), strict=True))
    index_BxT = _image_index(batch.tokens_BxT.shape, rows, examples, start_of)
    out.append(dataclasses.replace(batch, vision=vision, image_index_BxT=index_BxT))
  return out


def _new_image_tokens(rows, examples):
  """(row, first position, example, image_T, image_offset_T) of the tokens that each example adds to its row."""
  for row, row_placed in enumerate(rows):
    for placed in row_placed:
      example = examples[placed.number]
      new = slice(placed.shared, example.computed)
      yield row, placed.start, example, example.image_T[new], example.image_offset_T[new]


def _shown_images(rows, examples) -> dict[str, ProcessedImage]:
  """The distinct images of a micro-batch that a computed token shows."""
  return {example.images[i].key: example.images[i]
          for _, _, example, image_T, _ in _new_image_tokens(rows, examples)
          for i in np.unique(image_T[image_T >= 0])}


def _image_index(shape, rows, examples, start_of: dict[str, int]) -> np.ndarray:
  index_BxT = np.full(shape, -1, np.int32)
  for row, at, example, image_T, offset_T in _new_image_tokens(rows, examples):
    # The last entry is what image number -1 picks; its value is masked.
    starts = np.asarray([*(start_of.get(image.key, 0) for image in example.images), 0])
    index_BxT[row, at:at + len(image_T)] = np.where(image_T >= 0, starts[image_T] + offset_T, -1)
  return index_BxT
