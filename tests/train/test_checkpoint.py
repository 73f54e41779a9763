"""Checkpoints: exact, placed on the running mesh, and never torn."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.model import sharding
from axpo_jax.train.checkpoint import CheckpointError, Checkpoints
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.state import abstract_state, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(1e-3, total_steps=10, mu_dtype="bfloat16"))


def _mesh(**sizes):
  return sharding.make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])


@pytest.fixture(scope="module")
def state(abstract_params):
  """A real train state whose every array holds random bits, NaN and subnormals included."""
  rng = np.random.default_rng(0)

  def noise(x):
    bits = rng.integers(0, 256, size=(*x.shape, x.dtype.itemsize), dtype=np.uint8)
    return jax.device_put(bits.view(x.dtype)[..., 0], x.sharding)

  mesh = _mesh(data=2, fsdp=2, tensor=2)
  return jax.tree.map(noise, abstract_state(abstract_params, OPTIMIZER, mesh))


def _bytes(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("sizes", [
  {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"data": 1}])
def test_restored_bit_for_bit_on_any_mesh(state, tmp_path, sizes):
  host = {"config": {"seed": 3, "name": "é"}, "frontier": [1, 2]}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state, host=host)
    mesh = _mesh(**sizes)
    target = abstract_state(state.params, OPTIMIZER, mesh)
    restored = checkpoints.restore(target)
  assert restored.step == 5 and restored.host == host
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  assert _bytes(restored.state) == _bytes(state)
  for x, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
    assert x.sharding == want.sharding and x.dtype == want.dtype


def test_a_key_of_older_checkpoints_is_left_out(state, tmp_path):
  """States had a key `rng`, which nothing read."""
  key = sharding.put(np.array([0, 5], np.uint32), state.step.sharding)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, {**vars(state), "rng": key}, host={})
    restored = checkpoints.restore(abstract_state(state.params, OPTIMIZER, _mesh(fsdp=2)))
  assert _bytes(restored.state) == _bytes(state)


def test_the_newest_are_kept_and_old_steps_are_not_overwritten(tmp_path):
  tree = {"x": jnp.arange(3)}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 10):
      checkpoints.save(step, tree, host={})
    assert checkpoints.steps() == [3, 10] and checkpoints.latest() == 10
    with pytest.raises(CheckpointError, match="step 10 has a checkpoint already"):
      checkpoints.save(10, tree, host={})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; it has \[3, 10\]"):
      checkpoints.restore(tree, step=2)


def test_donating_right_after_save_does_not_reach_the_file(tmp_path):
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  overwrite = jax.jit(lambda x: -x - 1, donate_argnums=0)
  target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
  host = {"list": [1]}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": x}, host=host)
    host["list"].append(2)
    for _ in range(5):
      x = overwrite(x)
    x.block_until_ready()
    restored = checkpoints.restore(target)
  np.testing.assert_array_equal(restored.state["x"], np.arange(1 << 20))
  assert restored.host == {"list": [1]}


def test_the_data_iterator_goes_on_where_it_was(tmp_path):
  def iterator():
    return iter(grain.MapDataset.range(50).shuffle(seed=3).to_iter_dataset())

  live = iterator()
  for _ in range(7):
    next(live)
  tree = {"x": jnp.zeros(2)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree, host={}, iterator=live)
    want = [next(live) for _ in range(5)]  # while the save is running
    fresh = iterator()
    checkpoints.restore(jax.eval_shape(lambda: tree), iterator=fresh)
    assert [next(fresh) for _ in range(5)] == want
    checkpoints.save(2, tree, host={})
    with pytest.raises(CheckpointError, match="no data iterator"):
      checkpoints.restore(jax.eval_shape(lambda: tree), iterator=fresh)


def test_every_difference_is_listed(tmp_path):
  tree = {"a": nnx.Param(jnp.zeros((2, 3))), "b": jnp.zeros(4), "c": jnp.zeros(1)}
  wrong = jax.eval_shape(lambda: {
    "a": nnx.Param(jnp.zeros((3, 2))), "b": jnp.zeros(4, jnp.bfloat16), "d": jnp.zeros(1)})
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree, host={})
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore(wrong)
  text = str(error.value)
  assert "a/value: float32[2, 3] in the checkpoint, float32[3, 2] wanted" in text
  assert "b: float32[4] in the checkpoint, bfloat16[4] wanted" in text
  assert "c: only in the checkpoint" in text and "d: not in the checkpoint" in text


def test_an_empty_folder_says_so(tmp_path):
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
      checkpoints.restore({})
  with pytest.raises(ValueError, match="keep=0"):
    Checkpoints(tmp_path, keep=0)


_KILLED = """
  import sys, time
  import jax.numpy as jnp
  from axpo_jax.train.checkpoint import Checkpoints
  checkpoints = Checkpoints(sys.argv[1])
  checkpoints.save(1, {"x": jnp.full(8, 1.0)}, host={"step": 1})
  checkpoints.wait()
  print("first", flush=True)
  # Noise, so that it cannot be compressed, and large, so that the kill comes in mid-write.
  import numpy as np
  noise = jnp.asarray(np.random.default_rng(0).normal(size=1 << 26).astype("float32"))
  checkpoints.save(2, {"x": noise}, host={"step": 2})
  print("started", flush=True)
  time.sleep(60)
"""


def test_kill_in_mid_save_leaves_the_checkpoint_before(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path)], stdout=subprocess.PIPE,
    text=True, cwd=pathlib.Path(__file__).parents[2], env=os.environ)
  assert process.stdout.readline() == "first\n"
  assert process.stdout.readline() == "started\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert any("tmp" in path.name for path in tmp_path.iterdir()), "the save was over before the kill"
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(jax.eval_shape(lambda: {"x": jnp.zeros(8)}))
    assert restored.host == {"step": 1}
    np.testing.assert_array_equal(restored.state["x"], np.ones(8))
    checkpoints.save(2, {"x": jnp.zeros(8)}, host={"step": 2})  # the step that was torn
    assert checkpoints.steps() == [1, 2]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
