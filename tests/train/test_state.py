"""The optimizer against optax's own AdamW and formulas by hand; the state's place on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from axpo_jax.model import sharding
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.state import (
  copy_params,
  init_params,
  init_state,
  make_optimizer,
  make_schedule,
  move_params,
)


def _one_device():
  return sharding.make_mesh({}, jax.devices()[:1])


def _flat_arrays(tree):
  return {sharding.path_name(k): x for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _leaves(tree):
  return {name: np.asarray(x) for name, x in _flat_arrays(tree).items()}


def test_schedules_by_hand():
  constant = make_schedule(OptimizerConfig(2.0, total_steps=100, warmup=0.1))
  assert [float(constant(s)) for s in (0, 4, 9, 10, 99)] == pytest.approx([0.2, 1.0, 2, 2, 2])
  cosine = make_schedule(OptimizerConfig(2.0, total_steps=110, warmup=10 / 110, schedule="cosine"))
  want = [0.2, 2.0, 2.0, 1.0, 1 + np.cos(np.pi * 0.99), 0.0, 0.0]
  got = [float(cosine(s)) for s in (0, 9, 10, 60, 109, 110, 500)]
  assert got == pytest.approx(want, abs=1e-6)
  assert float(make_schedule(OptimizerConfig(2.0, total_steps=3))(0)) == 2.0


@pytest.mark.parametrize(("options", "match"), [
  ({"schedule": "linear"}, "linear"), ({"warmup": 3.0}, "warmup=3.0"), ({"total_steps": 0}, "0")])
def test_bad_options_are_refused(options, match):
  with pytest.raises(ValueError, match=match):
    OptimizerConfig(**({"learning_rate": 1.0, "total_steps": 10} | options))


def test_updates_equal_optax_adamw(host_params):
  """Decay on kernels alone; optax gets its mask spelled out leaf by leaf."""
  config = OptimizerConfig(1e-2, total_steps=10, weight_decay=0.1, clip_norm=0.5)
  optimizer = make_optimizer(config)
  mask = jax.tree_util.tree_map_with_path(
    lambda path, x: sharding.path_name(path).endswith("/kernel/value"), host_params)
  reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(
    1e-2, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, mask=mask))
  ours, theirs = host_params, host_params
  state, ref_state = jax.jit(optimizer.init)(ours), jax.jit(reference.init)(theirs)
  rng = np.random.default_rng(1)
  ours_step, theirs_step = jax.jit(optimizer.step), jax.jit(reference.update)
  for _ in range(3):
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), host_params)
    ours, state = ours_step(ours, grads, state)
    updates, ref_state = theirs_step(grads, ref_state, theirs)
    theirs = jax.tree.map(np.add, theirs, updates)
  for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
  decayed = {name for name, on in _leaves(mask).items() if on}
  assert "text/layers/q/kernel/value" in decayed and len(decayed) > 10
  assert not any("norm" in name or "bias" in name or "embedding" in name for name in decayed)


# Kernel -> how many of its axes after the stack's are inputs.
_KERNELS = {"text/layers/q": 1, "text/layers/o": 2, "text/layers/down": 1, "vision/blocks/qkv": 1,
            "vision/blocks/proj": 2}


def test_muon_orthogonalises_every_matrix_of_a_stack(host_params):
  """The first update of a kernel has nearly equal singular values, layer by layer, at AdamW's size;
  what is no kernel is Adam's (with Nesterov momentum, as optax has it)."""
  rng = np.random.default_rng(2)
  grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), host_params)
  options = dict(learning_rate=1.0, total_steps=10, weight_decay=0.0, clip_norm=0.0)

  def updates():
    optimizer = make_optimizer(OptimizerConfig(name="muon", **options))
    new, _ = jax.jit(optimizer.step)(host_params, grads, jax.jit(optimizer.init)(host_params))
    return _leaves(jax.tree.map(np.subtract, new, host_params))

  muon = updates()
  for name, inputs in _KERNELS.items():
    for matrix in muon[f"{name}/kernel/value"]:
      matrix = matrix.reshape(int(np.prod(matrix.shape[:inputs])), -1)
      singular = np.linalg.svd(matrix, compute_uv=False)
      # Five Newton-Schulz steps do not lift a square matrix's very smallest value.
      assert singular.max() / np.quantile(singular, 0.1) < 2.5, name
      assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.4, name
  for name in ("text/embedding/value", "vision/positions/value", "text/norm/scale/value"):
    sizes = np.abs(muon[name])  # Adam's first update is a sign: every entry moves as far
    np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-2)


def test_a_frozen_vision_tower_has_no_optimizer_state(host_params):
  optimizer = make_optimizer(OptimizerConfig(1e-2, total_steps=10, freeze_vision=True))
  trained, frozen = optimizer.split(host_params)
  assert {name.split("/")[0] for name in _leaves(trained)} == {"text"}
  assert {name.split("/")[0] for name in _leaves(frozen)} == {"vision"}
  assert not any("vision" in name for name in _flat_arrays(jax.eval_shape(optimizer.init, host_params)))


def test_bfloat16_parameters_keep_float32_moments(host_params):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), host_params)
  optimizer = make_optimizer(OptimizerConfig(1e-2, total_steps=10))
  state = jax.jit(optimizer.init)(half)
  grads = jax.tree.map(lambda x: np.ones(x.shape, np.float32), half)
  new, state = jax.jit(optimizer.step)(half, grads, state)
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
  low = make_optimizer(OptimizerConfig(1e-2, total_steps=10, mu_dtype="bfloat16"))
  low = _flat_arrays(jax.eval_shape(low.init, half))
  assert {x.dtype for name, x in low.items() if "/mu/" in name} == {jnp.dtype("bfloat16")}
  assert {x.dtype for name, x in low.items() if "/nu/" in name} == {jnp.dtype("float32")}


def test_moments_lie_where_their_parameters_lie(host_params):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  params = jax.device_put(host_params, sharding.param_shardings(host_params, mesh))
  state = init_state(params, make_optimizer(OptimizerConfig(1e-2, total_steps=10)), mesh)
  kernel = state.params["text"]["layers"]["q"]["kernel"]
  assert kernel.get_value().sharding.spec == sharding.spec(("layers", "embed", "heads", "head_dim"))
  shardings = {name: x.sharding for name, x in _flat_arrays(state.opt_state).items()}
  for name, x in _flat_arrays(state.params).items():
    for moment in ("mu", "nu"):
      found = [s for key, s in shardings.items() if key.endswith(f"{moment}/{name}")]
      assert found == [x.sharding]
  assert int(state.step) == 0


def test_a_copy_outlives_a_donated_original(host_params):
  params = jax.device_put(host_params, jax.devices()[0])
  copy, half = copy_params(params), copy_params(
    params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params))
  consume = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
  consume(params)
  for got, want in zip(jax.tree.leaves(copy), jax.tree.leaves(host_params), strict=True):
    np.testing.assert_array_equal(got, want)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_parameters_wait_in_the_hosts_memory(host_params):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  params = jax.device_put(host_params, sharding.param_shardings(host_params, mesh))
  away = move_params(params, "pinned_host")
  assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
  for x, y in zip(jax.tree.leaves(move_params(away, "device")), jax.tree.leaves(params), strict=True):
    assert x.sharding == y.sharding
    np.testing.assert_array_equal(x, y)


def test_equal_seeds_give_equal_parameters_on_any_mesh(config):
  one = _leaves(init_params(config, 3, _one_device()))
  eight = _leaves(init_params(config, 3, sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
  assert one.keys() == eight.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], eight[name], err_msg=name)
  kernel = one["text/layers/gate/kernel/value"]
  assert kernel.std() == pytest.approx(config.text.hidden_size**-0.5, rel=0.1)  # fan-in
