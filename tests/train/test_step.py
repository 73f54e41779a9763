"""The step against a plain second implementation, over packings, meshes, and broken numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from axpo_jax.model import sharding
from axpo_jax.model.qwen3_vl import Qwen3VL
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.surrogates import BY_SEQUENCE
from axpo_jax.train.batch import batch_shards, load_batch, targets
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import pack
from axpo_jax.train.state import copy_params, make_optimizer
from axpo_jax.train.step import Learner, NonFiniteError, policy_objective, supervised_objective

BANNED = (3, 4)
# A large eps keeps the update smooth: with a small one a gradient that is zero but for rounding
# moves its parameter by a full step in a random direction.
OPTIMIZER = OptimizerConfig(1e-2, total_steps=10, weight_decay=0.1, clip_norm=1.0, eps=1e-3)


def _mesh(**sizes):
  return sharding.make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])


def _learner(config, objective, mesh=None, optimizer=OPTIMIZER):
  return Learner(config, make_optimizer(optimizer), objective, mesh or _mesh(data=1),
                 banned_ids=BANNED, chunk=16)


def _put(host_params, learner):
  shardings = sharding.param_shardings(host_params, learner.mesh)
  return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), host_params, shardings)


@pytest.fixture(scope="module")
def examples(make_example, make_image):
  shared, other = make_image(0), make_image(1, (2, 4))
  return [make_example(0, 9, [shared]), make_example(1, 6), make_example(2, 5, [shared, other]),
          make_example(3, 12), make_example(4, 4, [other])]


@pytest.fixture(scope="module")
def pack_with(config, examples):
  """Two micro-batches of rows=2 (with rows that hold several trajectories), or one of rows=4."""
  def run(chosen=examples, rows=2, rows_multiple_of=2):
    return pack(chosen, rows=rows, length=16, block=4, vision_config=config.vision,
                patch_buckets=(16,), row_buckets=(2,), rows_multiple_of=rows_multiple_of)

  return run


@pytest.fixture(scope="module")
def alone(one_a_row, examples):
  return one_a_row(examples, 17)


@pytest.fixture(scope="module")
def supervised(config):
  return _learner(config, supervised_objective())


@pytest.fixture(scope="module")
def plain_loss(config, alone):
  """Mean negative log-likelihood of all targets: one trajectory a row, whole logits."""
  graphdef = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))[0]

  def loss(params):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(alone.tokens_BxT, alone.positions_BxTx3, alone.ends_BxT,
                      vision=alone.vision, image_index_BxT=alone.image_index_BxT)
    logits = model.logits(hidden).at[..., jnp.array(BANNED)].set(-1e9)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), alone.targets_BxG[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(alone.weights_BxG > 0, logp, 0.0)) / alone.weights_BxG.sum()

  return loss


def _assert_close(got, want, rtol):
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want),
                          strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)
    assert error < rtol, f"{sharding.path_name(path)}: relative difference {error:.2e}"


def test_update_equals_a_plain_loss_and_optax(supervised, pack_with, host_params, plain_loss,
                                              tmp_path):
  """Packed, chunked, accumulated over two micro-batches, against none of it."""
  # Unoptimised: it runs once.
  quick = {"xla_backend_optimization_level": 0}
  value, grads = jax.jit(jax.value_and_grad(plain_loss), compiler_options=quick)(host_params)
  mask = jax.tree_util.tree_map_with_path(
    lambda path, _: sharding.path_name(path).endswith("/kernel/value"), host_params)
  reference = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adamw(1e-2, eps=1e-3, weight_decay=0.1, mask=mask))

  @functools.partial(jax.jit, compiler_options=quick)
  def expected(params, grads):
    updates, _ = reference.update(grads, reference.init(params), params)
    return optax.apply_updates(params, updates)

  batches = pack_with()
  assert len(batches) == 2
  params = _put(host_params, supervised)
  accumulated = supervised.zeros()
  for batch in batches:
    accumulated, _ = supervised.accumulate(params, accumulated, batch)
  targets = float(sum(b.weights_BxG.sum() for b in batches))
  _assert_close(jax.tree.map(lambda g: g / targets, accumulated), grads, 1e-4)

  state, result = supervised.update(supervised.init(params), batches, targets)
  metrics = supervised.metrics(result, batches, tmp_path)
  assert metrics["train/loss"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["train/nll"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["train/grad_norm"] == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
  assert metrics["train/learning_rate"] == pytest.approx(1e-2)
  assert metrics["train/loss_tokens"] == targets == metrics["train/divisor"]
  assert int(state.step) == 1
  # The steps, since in the parameters themselves a wrong step would be a small difference.
  moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, host_params)
  wanted = jax.tree.map(lambda a, b: np.asarray(a) - b, expected(host_params, grads), host_params)
  _assert_close(moved, wanted, 1e-4)


def _scored(learner, host_params, batches):
  """{ids up to and with a target: (log-probability, entropy) of that target}"""
  params, out = _put(host_params, learner), {}
  for batch in batches:
    logp, entropy = map(np.asarray, learner.score(params, batch))
    for row, g in np.argwhere(batch.weights_BxG > 0):
      at, ends_T = batch.at_BxG[row, g], batch.ends_BxT[row]
      seen = (np.arange(len(ends_T)) <= at) & (at < ends_T)
      ids = (*batch.tokens_BxT[row, seen], batch.targets_BxG[row, g])
      out[ids] = logp[row, g], entropy[row, g]
  return out


def _assert_same_scores(got, want):
  assert got.keys() == want.keys() and len(got) > 10
  for key in got:
    np.testing.assert_allclose(got[key], want[key], rtol=2e-5, atol=2e-5)


def test_one_trajectory_a_row_scores_like_packed_rows(supervised, pack_with, alone, host_params):
  batches = pack_with()
  assert max(len(np.unique(row[row > 0])) for b in batches for row in b.ends_BxT) >= 2
  _assert_same_scores(_scored(supervised, host_params, batches),
                      _scored(supervised, host_params, [alone]))


def test_a_mesh_changes_no_number(config, supervised, pack_with, host_params, tmp_path):
  """Two micro-batches on one device, the same rows as one micro-batch on eight."""
  eight = _learner(config, supervised_objective(), _mesh(data=2, fsdp=2, tensor=2))
  results = []
  for learner, batches in ((supervised, pack_with()),
                           (eight, pack_with(rows=4, rows_multiple_of=batch_shards(eight.mesh)))):
    scores = _scored(learner, host_params, batches)
    params, grads = _put(host_params, learner), learner.zeros()
    for batch in batches:
      grads, _ = learner.accumulate(params, grads, batch)
    state = learner.init(params)
    for _ in range(2):  # several updates per rollout step
      state, result = learner.update(state, batches, targets(batches))
      metrics = learner.metrics(result, batches, tmp_path)
    results.append((scores, grads, state, metrics))
  (scores, grads, state, metrics), (scores8, grads8, state8, metrics8) = results
  kernel = state8.params["text"]["layers"]["gate"]["kernel"].get_value()
  assert kernel.sharding.spec == sharding.spec(("layers", "embed", "mlp"))
  _assert_same_scores(scores8, scores)
  _assert_close(grads8, grads, 1e-5)
  _assert_close(state8.params, state.params, 1e-5)
  assert metrics8 == pytest.approx(metrics, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", BY_SEQUENCE)
def test_a_sequence_that_devices_share_has_one_ratio(config, pack_with, host_params, variant):
  """Surrogates of whole sequences (GSPO, GMPO): a row's targets lie on two devices, and some sequence's do."""
  loss = LossConfig(variant=variant, kl_coef=0.0, tis_cap=None, clip_low=0.1, clip_high=0.1)
  (whole,) = pack_with(rows=4, rows_multiple_of=4)
  rng = np.random.default_rng(0)
  results = []
  for mesh in (_mesh(data=1), _mesh(data=2, context=2, tensor=2)):
    learner = _learner(config, policy_objective(loss), mesh)
    params = _put(host_params, learner)
    if not results:  # every other sequence is beyond the clip, where it is silenced
      logp = np.asarray(learner.score(params, whole)[0])
      beyond = np.where(whole.example_BxG % 2 == 0, 0.4 * np.sign(whole.advantages_BxG), 0)
      old = logp - beyond + rng.normal(0, 0.05, logp.shape)
      whole = dataclasses.replace(whole, old_logp_BxG=old.astype(np.float32))
    grads, sums = learner.accumulate(params, learner.zeros(), whole)
    results.append((jax.device_get(grads), {name: float(x) for name, x in sums.items()}))
  half = whole.example_BxG.shape[1] // 2
  cut = [set(row[:half]) & set(row[half:]) - {-1} for row in whole.example_BxG]
  assert any(cut), "no sequence crosses the cut"
  (grads, sums), (split_grads, split_sums) = results
  assert sums["clip_low"] + sums["clip_high"] > 0
  assert split_sums == pytest.approx(sums, rel=1e-5, abs=1e-6)
  _assert_close(split_grads, grads, 1e-5)


def test_policy_steps_in_bfloat16_with_a_frozen_vision_tower(
    config, make_params, pack_with, examples, tmp_path):
  """Two updates of one rollout step, by old log-probabilities; an untied head; remat."""
  config = dataclasses.replace(
    config, text=dataclasses.replace(config.text, tie_word_embeddings=False), dtype="bfloat16",
    param_dtype="bfloat16", remat="full")
  host_params = make_params(config)
  learner = _learner(config, policy_objective(LossConfig(kl_coef=0.1, entropy_coef=0.01)),
                     optimizer=dataclasses.replace(OPTIMIZER, freeze_vision=True))
  params = _put(host_params, learner)
  assert "vision" not in learner.zeros()
  state = learner.init(copy_params(params))
  batches = learner.annotate(pack_with(), old=state.params, reference=params)
  history = []
  for _ in range(2):
    state, result = learner.update(state, batches, targets(batches))
    history.append(learner.metrics(result, batches, tmp_path))
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), state.params, host_params)
  assert all(jax.tree.leaves(same["vision"])) and not all(jax.tree.leaves(same["text"]))
  assert not same["text"]["head"].get_value()
  first, second = history
  assert first["train/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
  assert first["train/kl"] == pytest.approx(0.0, abs=1e-6)
  assert second["train/ratio_std"] > 0 and second["train/kl"] > 0
  assert first["train/loss_tokens"] == sum(int(e.loss_mask_T.sum()) for e in examples)
  assert first["train/entropy"] > 0
  # The sampler's log-probabilities are the examples' own.
  logp = np.concatenate([np.asarray(b.old_logp_BxG)[b.weights_BxG > 0] for b in batches])
  behaviour = np.concatenate([b.behaviour_logp_BxG[b.weights_BxG > 0] for b in batches])
  assert first["train/logp_gap_abs_mean"] == pytest.approx(np.abs(logp - behaviour).mean(), rel=1e-4)


def test_without_old_logprobs_the_ratio_is_exactly_one(pack_with):
  batch = pack_with()[0]
  objective = policy_objective(LossConfig(kl_coef=0.0))
  logp = jnp.asarray(np.random.default_rng(0).normal(size=batch.weights_BxG.shape) - 3)

  def loss(logp):
    return objective.loss(logp, jnp.ones_like(logp), batch)

  (_, sums), grad = jax.value_and_grad(loss, has_aux=True)(logp)
  assert float(sums["ratio_max"]) == 1.0 and float(sums["ratio_off_one"]) == 0.0
  # d/dlogp of -min(tis, 2) * ratio * A is -min(tis, 2) * A at ratio one.
  tis = np.minimum(np.exp(np.asarray(logp) - batch.behaviour_logp_BxG), 2.0)
  np.testing.assert_allclose(grad, -tis * batch.advantages_BxG * batch.weights_BxG, rtol=1e-5)


def test_the_vision_tower_learns_otherwise(supervised, pack_with, host_params):
  state, _ = supervised.update(
    supervised.init(_put(host_params, supervised)), pack_with(), 1.0)
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), state.params, host_params)
  assert not any(jax.tree.leaves(same["vision"]))


@pytest.mark.parametrize("where", ["weights_BxG", "vision", "lazy"])
def test_a_non_finite_step_is_refused_and_its_batch_saved(
    supervised, pack_with, host_params, tmp_path, where):
  batches = pack_with()
  bad = jax.tree.map(np.copy, batches[1])
  if where == "vision":
    bad.vision.patches_RxPxC[:] = np.nan
  else:
    if where == "lazy":  # as `pack` leaves them
      bad = dataclasses.replace(bad, vision=batches[1].vision)
    bad.weights_BxG[bad.weights_BxG > 0] = np.inf
  batches[1] = bad
  state, result = supervised.update(
    supervised.init(_put(host_params, supervised)), batches, targets(batches))
  with pytest.raises(NonFiniteError, match=r"update 0: .* micro-batches \[1\]") as error:
    supervised.metrics(result, batches, tmp_path)
  assert error.value.micro_batches == (1,)
  assert error.value.paths == (tmp_path / "step_0_micro_1.npz",)
  for a, b in zip(jax.tree.leaves(load_batch(error.value.paths[0])), jax.tree.leaves(bad),
                  strict=True):
    np.testing.assert_array_equal(a, b)
  # The state is the one before the step, worth a checkpoint.
  assert int(state.step) == 0
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(host_params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_rows_of_padding_add_nothing(supervised, pack_with, host_params):
  batch = pack_with()[0]
  empty = jax.tree.map(np.zeros_like, batch)
  empty = dataclasses.replace(empty, image_index_BxT=np.full_like(batch.image_index_BxT, -1))
  grads, sums = supervised.accumulate(_put(host_params, supervised), supervised.zeros(), empty)
  assert float(sums["loss"]) == 0 and bool(sums["finite"])
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_new_batches_of_one_shape_do_not_recompile(supervised, pack_with, host_params):
  state = supervised.init(_put(host_params, supervised))
  batches = pack_with()
  state, _ = supervised.update(state, batches, 1.0)
  before = (supervised._accumulate._cache_size(), supervised._apply._cache_size())
  for _ in range(2):
    state, _ = supervised.update(state, batches[::-1], 1.0)
  assert (supervised._accumulate._cache_size(), supervised._apply._cache_size()) == before
  assert int(state.step) == 3


def test_an_update_needs_a_micro_batch(supervised, host_params):
  with pytest.raises(ValueError, match="no micro-batches"):
    supervised.update(supervised.init(_put(host_params, supervised)), [], 1.0)


def test_an_update_without_targets_changes_nothing(supervised, pack_with, host_params, tmp_path):
  """Neither weight decay nor the optimizer's moments nor its step."""
  state = supervised.init(_put(host_params, supervised))
  state, _ = supervised.update(state, pack_with(), 1.0)
  before = jax.tree.map(np.copy, jax.device_get((state.params, state.opt_state, state.step)))
  batches = [dataclasses.replace(b, weights_BxG=np.zeros_like(b.weights_BxG)) for b in pack_with()]
  state, result = supervised.update(state, batches, 1.0)
  metrics = supervised.metrics(result, batches, tmp_path)
  assert metrics["train/loss_tokens"] == 0 == metrics["train/grad_norm"]
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state, state.step), before)
  with pytest.raises(ValueError, match="divisor of an update must be positive, got 0"):
    supervised.update(state, batches, 0.0)


def test_what_never_changes_may_stand_in_bfloat16(config, host_params, pack_with):
  """A bfloat16 checkpoint's reference and frozen vision tower, against the same values in float32."""
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), host_params)
  found = {}
  for dtype in ("float32", "bfloat16"):
    learner = Learner(
      config, make_optimizer(dataclasses.replace(OPTIMIZER, freeze_vision=True)),
      policy_objective(LossConfig(kl_coef=0.1)), _mesh(data=1), banned_ids=BANNED, chunk=16,
      frozen_dtype=dtype)
    reference = _put(jax.tree.map(lambda x, to=dtype: x.astype(to), half), learner)
    state = learner.init(learner.own_copy(reference))
    batches = learner.annotate(pack_with(), reference=reference)
    state, _ = learner.update(state, batches, 1.0)
    assert {x.dtype for x in jax.tree.leaves(state.params["vision"])} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.params["text"])} == {jnp.dtype("float32")}
    wanted = learner.abstract_state()
    assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(wanted)]
    found[dtype] = [*(b.ref_logp_BxG for b in batches), *jax.tree.leaves(state)]
  for got, want in zip(found["bfloat16"], found["float32"], strict=True):
    np.testing.assert_array_equal(np.asarray(got).astype(want.dtype), want)
