"""The model on a mesh: every name it uses has a rule, and the numbers are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.model import sharding
from axpo_jax.model.cache import KVCache
from axpo_jax.model.text import gather_image

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# Two devices share a row.
LONG = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.fixture(scope="module")
def rows(make_case):
  """Eight rows over one set of images that fills two vision rows of four."""
  case = make_case([(8, 6), (4, 8)], seed=2, rows_multiple_of=4)
  length = len(case.ids_T)
  assert length % 2 == 0  # two devices may share a row
  tokens = np.tile(case.ids_T, (8, 1))
  text = case.index_T < 0
  tokens[:, text] = np.random.default_rng(0).integers(0, 130, (8, text.sum()))
  shape = (8, length)
  return (
    tokens,
    np.broadcast_to(case.positions_Tx3, (*shape, 3)),
    np.full(shape, length, np.int32),
    case.vision,
    np.broadcast_to(case.index_T, shape),
  )


def _loss(model_of, mesh, params, tokens, positions, ends, vision, index):
  with sharding.use(mesh):
    model = model_of(params)
    hidden, _ = model(tokens, positions, ends, vision=vision, image_index_BxT=index)
    return jax.nn.logsumexp(model.logits(hidden), -1).mean()


def test_loss_and_gradients(untied, rows):
  """On the mesh attention goes through each row in chunks, to which both of its devices add."""
  want, wanted = jax.jit(
    jax.value_and_grad(lambda p: _loss(untied.model, None, p, *rows)))(untied.params)
  mesh = sharding.make_mesh(LONG)
  graphdef = nnx.graphdef(untied.configured(attention_chunk=8))
  shardings = sharding.param_shardings(untied.params, mesh)
  params = jax.device_put(untied.params, shardings)
  step = jax.jit(
    jax.value_and_grad(lambda p, *args: _loss(lambda p: nnx.merge(graphdef, p), mesh, p, *args)),
    out_shardings=(None, shardings),
  )
  got, gradient = step(params, *rows)
  assert abs(got - want) < 1e-5 * abs(want)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
    assert np.abs(a - b).max() < 1e-4 * np.abs(b).max() + 1e-7


def test_decode_on_a_mesh(untied, rows):
  mesh = sharding.make_mesh(MESH)
  params = jax.device_put(untied.params, sharding.param_shardings(untied.params, mesh))
  tokens, positions, ends, vision, index = rows

  def run(mesh, params):
    with sharding.use(mesh):
      model = untied.model(params)
      cache = KVCache.empty(untied.config, 8, tokens.shape[1])
      cut = slice(0, -1)
      _, cache = model(
        tokens[:, cut], positions[:, cut], ends[:, cut], vision=vision,
        image_index_BxT=index[:, cut], cache=cache,
      )  # fmt: skip
      last = slice(-1, None)
      hidden, _ = model(tokens[:, last], positions[:, last], ends[:, last], cache=cache)
      return model.logits(hidden)

  got = jax.jit(lambda p: run(mesh, p))(params)
  want = jax.jit(lambda p: run(None, p))(untied.params)
  np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_every_parameter_is_named(untied):
  for path, leaf in jax.tree_util.tree_flatten_with_path(
    untied.params, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )[0]:
    names = sharding.names_of(leaf)
    assert names is not None and len(names) == leaf.get_value().ndim, sharding.path_name(path)
    assert all(n in sharding.DEFAULT_RULES for n in names if n is not None)


def test_no_device_collects_all_features_of_images():
  """Each looks all tokens of its `data` shard up in its part of the width: it needs that part alone."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  rows, tokens, features, width = 8, 32, 512, 1024

  def array(names, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding_for(names, shape, mesh))

  def taken(features_MxD, index_BxT):
    with sharding.use(mesh):
      return gather_image(features_MxD, index_BxT, 0)

  program = jax.jit(taken).lower(
    array(("vision_rows", None), features, width),
    array(("batch", "length"), rows, tokens, dtype=jnp.int32)).compile()
  assert f"f32[{features},{width // mesh.shape['fsdp']}]" in program.as_text()
  assert f"f32[{features},{width}]" not in program.as_text()
