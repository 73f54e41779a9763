"""FLOPs counted in a trace against formulas, and the formula of the model against its own trace."""

import jax
import jax.numpy as jnp
import pytest

from axpo_jax.model import flops, sharding
from axpo_jax.train.optimizer_config import OptimizerConfig
from axpo_jax.train.packing import pack
from axpo_jax.train.state import make_optimizer
from axpo_jax.train.step import Learner, supervised_objective

M, K, ROUNDS = 8, 16, 5


def test_scan_and_recomputation_count():
  @jax.checkpoint
  def layer(x_MxK, w_KxK):
    return jnp.tanh(x_MxK @ w_KxK)

  def loss(w_LxKxK, x_MxK):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x_MxK, w_LxKxK)[0].sum()

  shapes = jnp.zeros((ROUNDS, K, K)), jnp.zeros((M, K))
  one = 2 * M * K * K * ROUNDS
  assert flops.count(jax.make_jaxpr(loss)(*shapes)) == one
  # Forward, again in the backward pass, and two products for the gradients.
  assert flops.count(jax.make_jaxpr(jax.grad(loss))(*shapes)) == 4 * one


def test_batched_products_branches_and_unknown_loops():
  a, b = jnp.zeros((3, M, K)), jnp.zeros((3, K, M))
  assert flops.count(jax.make_jaxpr(jnp.matmul)(a, b)) == 2 * 3 * M * K * M
  branch = jax.make_jaxpr(lambda p, a, b: jax.lax.cond(p, lambda: a @ b, lambda: a[..., :M]))
  assert flops.count(branch(True, a, b)) == 2 * 3 * M * K * M
  loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x))
  with pytest.raises(ValueError, match="while loop"):
    flops.count(loop(jnp.zeros((K, K))))


def test_needed_is_what_the_model_traces(config, make_example, make_image):
  """One full row without a saving: every token sees the whole row, every patch the whole image row."""
  image = make_image(0, (8, 8))
  learner = Learner(config, make_optimizer(OptimizerConfig(1e-3, 1)), supervised_objective(),
                    sharding.make_mesh({}, jax.devices()[:1]))
  (batch,) = pack([make_example(0, 48, [image])], rows=1, length=64, vision_config=config.vision,
                  row_buckets=[1])
  traced = learner.trace(jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), batch))
  patches = batch.vision.segments_RxP.size
  needed = flops.needed(config, tokens=64, targets=batch.targets_BxG.size, patches=patches, seen=64,
                        seen_patches=patches)
  assert flops.count(traced["score"].jaxpr) == needed
  assert flops.count(traced["accumulate"].jaxpr) > 2.8 * needed  # no gradient of pixels
