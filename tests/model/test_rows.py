"""Several trajectories in one row, shared prefixes and images, padding, and query chunks."""

import jax
import numpy as np
import pytest

from axpo_jax.model.attention_blocks import key_blocks

TOLERANCE = 1e-5


def worst(a, b) -> float:
  return float(np.abs(a - b).max() / np.abs(b).max().clip(1e-30))


@pytest.fixture(scope="module")
def forward(untied):
  @jax.jit
  def forward(params, tokens, positions, ends, vision, index, lists=None):
    model = untied.model(params)
    hidden, _ = model(tokens, positions, ends, vision=vision, image_index_BxT=index,
                      key_blocks_BxCxN=lists)
    return model.logits(hidden)

  return forward


def _row(cases, length):
  """Sequences behind one another in one row: tokens, positions, ends, index."""
  out = [np.zeros(length, np.int32), np.zeros((length, 3), np.int32), np.zeros(length, np.int32)]
  out.append(np.full(length, -1, np.int32))
  at, spans = 0, []
  for case in cases:
    span = slice(at, at + len(case.ids_T))
    for array, value in zip(
      out, (case.ids_T, case.positions_Tx3, span.stop, case.index_T), strict=True
    ):
      array[span] = value
    spans.append(span)
    at = span.stop
  return [a[None] for a in out], spans


@pytest.fixture(scope="module")
def trio(make_case, random_image):
  """Three sequences over one set of images: different texts, the same two pictures."""
  first = make_case([(4, 6), (6, 2)], seed=1, text=7)
  second = make_case([(4, 6), (6, 2)], seed=1, text=4)
  text = make_case(seed=5, text=11)
  return [first, second, text]


def test_packed_row_equals_separate_rows(untied, trio, forward):
  alone = []
  for case in trio:
    (tokens, positions, ends, index), (span,) = _row([case], 64)
    logits = forward(untied.params, tokens, positions, ends, trio[0].vision, index)
    alone.append(np.asarray(logits[0, span]))
  (tokens, positions, ends, index), spans = _row(trio, 64)
  packed = forward(untied.params, tokens, positions, ends, trio[0].vision, index)
  for span, want in zip(spans, alone, strict=True):
    assert worst(packed[0, span], want) < TOLERANCE


def test_gradients_of_a_packed_row_are_the_sum(untied, trio):
  vision = trio[0].vision

  @jax.jit
  def gradient(params, tokens, positions, ends, index):
    def loss(params):
      model = untied.model(params)
      hidden, _ = model(tokens, positions, ends, vision=vision, image_index_BxT=index)
      return (model.logits(hidden) ** 2 * (ends > 0)[..., None]).sum()

    return jax.grad(loss)(params)

  def of(cases):
    (tokens, positions, ends, index), _ = _row(cases, 64)
    return gradient(untied.params, tokens, positions, ends, index)

  summed = jax.tree.map(lambda *g: sum(g), *(of([case]) for case in trio))
  errors = jax.tree.map(worst, of(trio), summed)
  assert max(jax.tree.leaves(errors)) < 1e-4


def test_padding_is_inert(untied, trio, forward):
  """What stands at padding (tokens, positions, an image index) changes nothing elsewhere."""
  case = trio[0]
  (tokens, positions, ends, index), (span,) = _row([case], 64)
  want = forward(untied.params, tokens, positions, ends, case.vision, index)
  junk = [a.copy() for a in (tokens, positions, index)]
  for array, value in zip(junk, (17, 900, 3), strict=True):
    array[0, span.stop :] = value
  got = forward(untied.params, junk[0], junk[1], ends, case.vision, junk[2])
  np.testing.assert_array_equal(got[0, span], want[0, span])
  assert np.isfinite(got).all()


@pytest.mark.parametrize("block", [None, 128, 8])
def test_shared_prefix_equals_separate_rows(untied, make_case, forward, block):
  """Text and an image once, then two endings, which stand at the same positions."""
  case = make_case([(4, 6)], seed=1, text=9, tail=12)
  length, cut = len(case.ids_T), len(case.ids_T) - 10
  endings = [case.ids_T[cut:], case.ids_T[cut:][::-1]]
  want = []
  for ending in endings:
    (tokens, positions, ends, index), (span,) = _row([case], 128)
    tokens[0, cut:length] = ending
    logits = forward(untied.params, tokens, positions, ends, case.vision, index)
    want.append(np.asarray(logits[0, span]))
  (tokens, positions, ends, index), _ = _row([case], 128)
  second = slice(length, length + 10)
  tokens[0, second], positions[0, second] = endings[1], positions[0, cut:length]
  ends[0, :cut], ends[0, second] = second.stop, second.stop
  lists = key_blocks(ends, block) if block else None
  assert (lists is None) == (block is None)
  got = np.asarray(forward(untied.params, tokens, positions, ends, case.vision, index, lists))[0]
  assert worst(got[:length], want[0]) < TOLERANCE
  assert worst(np.concatenate([got[:cut], got[second]]), want[1]) < TOLERANCE


def test_images_do_not_see_each_other(untied, random_image, make_case):
  """Features of an image are the same alone, beside others in its row, and in another row."""
  encode = jax.jit(lambda v: untied.model().encode_images(v))
  three = make_case([(4, 6), (6, 2), (2, 10)], seed=1)
  apart = make_case([(4, 6), (6, 2), (2, 10)], seed=1, patch_buckets=(24,))
  alone = make_case([(4, 6)], seed=1)
  assert apart.vision.segments_RxP.shape[0] > three.vision.segments_RxP.shape[0]
  features = [encode(c.vision) for c in (three, apart, alone)]

  def tokens(case, out, number):
    image = _image_index(case, number)
    return [np.asarray(out.embeds_MxD)[image], np.asarray(out.deepstack_NxMxD)[:, image]]

  for number in range(3):
    for a, b in zip(
      tokens(three, features[0], number), tokens(apart, features[1], number), strict=True
    ):
      assert worst(a, b) < TOLERANCE
  for a, b in zip(tokens(three, features[0], 0), tokens(alone, features[2], 0), strict=True):
    assert worst(a, b) < TOLERANCE


def _image_index(case, number):
  """The merged tokens of the case's image `number`."""
  flat = case.index_T
  starts = np.flatnonzero((flat >= 0) & (np.roll(flat, 1) < 0))
  stop = starts[number] + int(np.argmax(flat[starts[number] :] < 0))
  return flat[starts[number] : stop]


def test_query_chunks_equal_one_block(untied, trio):
  """Text and tower together, with a chunk that divides no length; gradients: test_attention.py."""
  (tokens, positions, ends, index), _ = _row(trio, 64)

  def hidden(chunk):
    model = untied.configured(attention_chunk=chunk)
    return model(tokens, positions, ends, vision=trio[0].vision, image_index_BxT=index)[0]

  chunked, whole = (jax.jit(lambda c=c: hidden(c))() for c in (11, 0))
  assert worst(chunked, whole) < TOLERANCE


def test_vision_and_index_come_together(untied, trio):
  case = trio[0]
  with pytest.raises(ValueError, match="together"):
    case.run(untied.model(), vision=None)
