"""Computing what trajectories share once changes no number: loss, metrics and gradients on random
trees of text and images equal those of one trajectory a row, written down without `pack`."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from axpo_jax.model import sharding
from axpo_jax.model.sharding import path_name
from axpo_jax.model.vision_inputs import mrope_positions
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.losses import add_metrics
from axpo_jax.rl.weights import sequence_weights
from axpo_jax.train.batch import packing_metrics, with_weights
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import Example, pack
from axpo_jax.train.state import make_optimizer
from axpo_jax.train.step import Learner, policy_objective

LENGTH, BLOCK, TARGETS, IMAGES, BANNED = 64, 16, 192, 6, (3, 4)
LOSS = LossConfig(kl_coef=0.1, entropy_coef=0.01)

# A trajectory continues an earlier one (or the empty one) from some place on with words, of which
# there are few, so that trajectories also agree by chance, and images (negative).
PIECES = st.lists(st.integers(-IMAGES, 8), min_size=1, max_size=10)
TREES = st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1), PIECES), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def images(make_image):
  grids = [(4, 4), (2, 4), (4, 2), (2, 2), (4, 4), (2, 4)]
  return [make_image(number, grid) for number, grid in enumerate(grids)]


@pytest.fixture(scope="module")
def learner(config):
  return _learner(config, LOSS)


@pytest.fixture(scope="module")
def by_sequence(config):
  """A learner whose surrogate reads which tokens are one trajectory."""
  return _learner(config, dataclasses.replace(LOSS, variant="gspo", clip_low=0.02, clip_high=0.03))


def _learner(config, loss):
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  return Learner(config, make_optimizer(OptimizerConfig(1e-2, total_steps=1)),
                 policy_objective(loss), mesh, banned_ids=BANNED, chunk=64)


@pytest.fixture(scope="module")
def policies(host_params):
  """The policy being trained, that of the start of the step, and the reference."""
  def near(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + rng.normal(size=x.shape, scale=0.02)).astype(x.dtype),
                        host_params)
  return host_params, near(1), near(2)


def _grow(tree) -> list[list[int]]:
  grown = [[]]
  for source, share, pieces in tree:
    base = grown[source % len(grown)]
    grown.append((base[:round(share * len(base))] + pieces)[:14])
  return grown[1:]


def _example(pieces, images, rng, image_token_id) -> Example:
  """A trajectory of words and images; some words, but the first token never, are targets."""
  shown = [images[-p - 1] for p in pieces if p < 0]
  sizes = [images[-p - 1].num_tokens if p < 0 else 1 for p in pieces]
  ids = np.repeat([image_token_id if p < 0 else p + 10 for p in pieces], sizes)
  number = np.cumsum([p < 0 for p in pieces]) - 1
  mask = (ids != image_token_id) & (rng.random(len(ids)) < 0.6) & (np.arange(len(ids)) > 0)
  return Example(
    ids_T=ids, images=tuple(shown), loss_mask_T=mask,
    positions_Tx3=mrope_positions(
      ids, [(i.grid_hw[0] // 2, i.grid_hw[1] // 2) for i in shown], image_token_id),
    image_T=np.repeat([n if p < 0 else -1 for p, n in zip(pieces, number)], sizes),
    image_offset_T=np.concatenate([np.arange(size) for size in sizes]),
    advantages_T=(mask * rng.normal()).astype(np.float32),
    behaviour_logp_T=(mask * -rng.uniform(2, 5, len(ids))).astype(np.float32))


def _one_shape(batch):
  """The batch row by row, all padded to one shape, so that a single program serves all trees."""
  def targets(name, x):
    return np.pad(x, ((0, 0), (0, TARGETS - x.shape[1]))) if name.endswith("BxG") else x

  fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  lists, blocks = fields.pop("key_blocks_BxCxN"), LENGTH // BLOCK
  full = np.where(np.tri(blocks, dtype=bool), np.arange(blocks), -1)[None].astype(np.int32)
  lists = np.repeat(full, len(batch.tokens_BxT), 0) if lists is None else np.pad(
    lists, ((0, 0), (0, 0), (0, blocks - lists.shape[2])), constant_values=-1)
  fields["key_blocks_BxCxN"] = lists
  for row in range(len(batch.tokens_BxT)):
    yield dataclasses.replace(batch, **{
      name: x if name == "vision" or x is None else targets(name, x)[row:row + 1]
      for name, x in fields.items()})


def _results(learner, policies, batches):
  """Metric sums (the loss among them) and gradient sums."""
  policy, old, reference = policies
  batches = [row for batch in batches for row in _one_shape(batch)]
  batches = learner.annotate(batches, old=old, reference=reference)
  grads, total = learner.zeros(), None
  for batch in batches:
    grads, sums = learner.accumulate(policy, grads, batch)
    sums = {k: float(v) for k, v in sums.items() if k != "finite"}
    total = sums if total is None else add_metrics(total, sums)
  return total, grads


def _assert_equal(got, want, scale):
  (sums, grads), (wanted_sums, wanted_grads) = got, want
  for name, value in wanted_sums.items():
    assert sums[name] == pytest.approx(value, rel=1e-5, abs=1e-5 * scale), name
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(grads)[0],
                          jax.tree.leaves(wanted_grads), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b)
    assert error <= 1e-5 * np.linalg.norm(b) + 1e-7, f"{path_name(path)}: {error:.2e}"


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(tree=TREES, seed=st.integers(0, 99), weighing=st.sampled_from([
  {"aggregation": "token_mean"}, {"aggregation": "sequence_mean"}, {"resampled_weight": 1.0}]))
def test_random_trees(tree, seed, weighing, config, images, one_a_row, learner, policies):
  _compare(tree, seed, weighing, config, images, one_a_row, learner, policies)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(tree=TREES, seed=st.integers(0, 99))
def test_random_trees_with_a_ratio_of_whole_sequences(
    tree, seed, config, images, one_a_row, by_sequence, policies):
  _compare(tree, seed, {"aggregation": "sequence_mean"}, config, images, one_a_row, by_sequence, policies)


def _compare(tree, seed, weighing, config, images, one_a_row, learner, policies):
  """Rows that share what trajectories share, and rows that do not, against a row for each."""
  rng = np.random.default_rng(seed)
  examples = [_example(p, images, rng, config.image_token_id) for p in _grow(tree)]
  hypothesis.assume(any(e.loss_mask_T.any() for e in examples))
  vision = {"row_buckets": (14,), "patch_buckets": (16,)}
  options = {"rows": 1, "length": LENGTH, "block": BLOCK, "vision_config": config.vision,
             "banned_ids": BANNED, **vision}
  tokens_S = [e.loss_mask_T.sum() for e in examples]
  resampled_S = rng.random(len(examples)) < 0.3
  weights_S, _ = sequence_weights(tokens_S, resampled_S, LossConfig(**weighing), questions=2)
  shared, plain = (with_weights(pack(examples, share_prefixes=share, **options), weights_S)
                   for share in (True, False))
  tokens = [packing_metrics(batches, examples)["pack/tokens"] for batches in (shared, plain)]
  hypothesis.event(f"saved {1 - tokens[0] / max(tokens[1], 1):.1f} of the tokens")
  alone = []
  for example, weight in zip(examples, weights_S):
    batch = one_a_row([example], LENGTH, **vision)
    alone.append(dataclasses.replace(batch, weights_BxG=batch.weights_BxG * weight))
  if not any(e.images for e in examples):  # `pack` leaves the vision inputs out then
    shared, plain = ([dataclasses.replace(
      b, vision=alone[0].vision, image_index_BxT=np.full_like(b.tokens_BxT, -1))
      for b in batches] for batches in (shared, plain))
  want = _results(learner, policies, alone)
  _assert_equal(_results(learner, policies, shared), want, want[0]["weight"])
  _assert_equal(_results(learner, policies, plain), want, want[0]["weight"])
