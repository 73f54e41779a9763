"""Sharding rules: names to mesh axes, sizes that do not divide, collisions, and the context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from axpo_jax.model import sharding
from axpo_jax.model.sharding import ShardingError


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_mesh_fills_one_axis_and_refuses_what_does_not_fit():
  assert dict(sharding.make_mesh({"tensor": 2, "fsdp": -1}).shape) == {
    "data": 1, "fsdp": 4, "context": 1, "tensor": 2}
  one = sharding.make_mesh({}, devices=jax.devices()[:1])
  assert one.size == 1
  with pytest.raises(ShardingError, match="needs 4 devices, there are 8"):
    sharding.make_mesh({"data": 4})
  with pytest.raises(ShardingError, match="only one"):
    sharding.make_mesh({"fsdp": -1, "tensor": -1})
  with pytest.raises(ShardingError, match="unknown mesh axes"):
    sharding.make_mesh({"model": 8})
  with pytest.raises(ShardingError, match="fixes 3"):
    sharding.make_mesh({"data": 3, "fsdp": -1})


@dataclasses.dataclass(frozen=True)
class Chip:
  coords: tuple[int, int, int]
  platform: str = "tpu"
  process_index: int = 0


@pytest.mark.parametrize("sides, shape, data, fsdp", [
  ((4, 4, 4), {}, 4, 16), ((4, 4, 8), {}, 4, 32), ((8, 8, 8), {}, 8, 64), ((2, 4, 4), {}, 1, 32),
  ((8, 8, 1), {}, 1, 64), ((4, 4, 4), {"tensor": 4}, 1, 16), ((4, 4, 4), {"data": 1}, 1, 64),
  ((4, 4, 4), {"fsdp": 32}, 2, 32)])
def test_the_mesh_of_a_slice(sides, shape, data, fsdp, monkeypatch):
  """As docs/performance.md has it, by what was compiled."""
  chips = [Chip(coords) for coords in np.ndindex(*sides)]
  monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda sizes, devices, **_: (
    np.array(list(map(str, devices))).reshape(sizes)))
  monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, **_: dict(zip(axes, grid.shape, strict=True)))
  found = sharding.make_mesh({"data": -1, "fsdp": -1} | shape, chips)
  assert (found["data"], found["fsdp"]) == (data, fsdp)


@pytest.mark.parametrize("hosts, each, shape, data, fsdp", [
  (4, 8, {}, 4, 8), (1, 8, {}, 1, 8), (4, 8, {"tensor": 2}, 1, 16), (4, 8, {"data": 1}, 1, 32),
  (8, 1, {}, 1, 8)])  # a process for each GPU: which of them are on one host is unknown
def test_fsdp_stays_within_a_host_of_gpus(hosts, each, shape, data, fsdp, monkeypatch):
  gpus = [Chip((0, host, gpu), "gpu", host) for host in range(hosts) for gpu in range(each)]
  monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda sizes, devices, **_: (
    np.array(list(map(str, devices))).reshape(sizes)))
  monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, **_: dict(zip(axes, grid.shape, strict=True)))
  found = sharding.make_mesh({"data": -1, "fsdp": -1} | shape, gpus)
  assert (found["data"], found["fsdp"]) == (data, fsdp)


def test_devices_that_are_no_torus_are_fsdps():
  assert sharding.make_mesh({"data": -1, "fsdp": -1}).shape["fsdp"] == 8
  assert sharding.make_mesh({"data": -1, "fsdp": 2}).shape["data"] == 4


def test_spec_maps_names_and_finds_collisions():
  assert sharding.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
  assert sharding.spec(("batch", "length", None)) == P(("data", "fsdp"), "context", None)
  with pytest.raises(ShardingError, match="'heads' and 'mlp' both map to the mesh axis 'tensor'"):
    sharding.spec(("heads", "mlp"))
  with pytest.raises(ShardingError, match="no rule for the logical axis 'typo'"):
    sharding.spec(("typo",))


def test_rules_may_not_name_a_mesh_axis_that_is_not_there(mesh):
  with pytest.raises(ShardingError, match="stage"), sharding.use(mesh, {"layers": "stage"}):
    pass


def test_a_dimension_that_the_mesh_does_not_divide_is_an_error(mesh):
  """Never replicated in silence: the message has the tensor, the axis, its size and the mesh's."""
  with pytest.raises(ShardingError, match=(
      r"text/embedding: the axis 'vocab' of size 7 .* 2 parts .* tensor=2; set config.mesh .* 7")):
    sharding.sharding_for(("vocab", "embed"), (7, 4), mesh, label="text/embedding")
  with pytest.raises(ShardingError, match=r"size 2 .* 4 parts of the mesh axes data=2 x fsdp=2"):
    sharding.sharding_for(("batch", "length"), (2, 8), mesh)
  assert sharding.sharding_for(("batch", "vocab"), (8, 4), mesh).spec == P(("data", "fsdp"), "tensor")
  one = sharding.make_mesh({}, devices=jax.devices()[:1])  # splits nothing, so any size will do
  assert sharding.sharding_for(("vocab", "embed"), (7, 3), one).spec == P("tensor", "fsdp")
  with pytest.raises(ShardingError, match="names"):
    sharding.sharding_for(("vocab",), (7, 4), mesh)


def test_constrain_places_under_use_only(mesh):
  x = jnp.ones((8, 4, 6))
  names = ("batch", "length", "act_mlp")
  assert sharding.constrain(x, names) is x

  @jax.jit
  def f(x):
    with sharding.use(mesh):
      return sharding.constrain(x * 2, names)

  assert f(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
  assert sharding.current() is None


def test_parameter_shardings_come_from_the_metadata(mesh):
  class Tiny(nnx.Module):
    def __init__(self, rngs):
      self.kernel = nnx.Param(nnx.initializers.normal()(rngs.params(), (4, 6)),
                              out_sharding=("embed", "mlp"), eager_sharding=False)
      self.scale = nnx.Param(jnp.ones(()))

  state = nnx.state(nnx.eval_shape(lambda: Tiny(nnx.Rngs(0))))
  shardings = sharding.param_shardings({"params": state, "step": jnp.zeros(())}, mesh)
  assert shardings["params"]["kernel"].get_value().spec == P("fsdp", "tensor")
  assert shardings["params"]["scale"].get_value().spec == P()
  assert shardings["step"].spec == P()

  model = jax.jit(lambda: nnx.state(Tiny(nnx.Rngs(0))), out_shardings=shardings["params"])()
  assert model["kernel"].get_value().sharding.spec == P("fsdp", "tensor")


def test_a_parameter_without_names_is_an_error(mesh):
  state = {"a": {"w": nnx.Param(jnp.ones((2, 2)))}}
  with pytest.raises(ShardingError, match=r"a/w.*no logical names"):
    sharding.param_shardings(state, mesh)


def test_local_code_sees_its_own_part(mesh):
  """Here it adds up its rows, which are a quarter, with weights that every device has whole."""
  x, weights = jnp.arange(64.0).reshape(8, 8), jnp.arange(8.0)

  def total(x_BxT, weights_T):
    return x_BxT * 0 + (x_BxT * weights_T).sum()

  def f(x):
    with sharding.use(mesh):
      assert (sharding.parts("batch"), sharding.parts("length")) == (4, 1)
      return sharding.local(total, ("batch", "length"), (None,))(x, weights)

  want = (x * weights).reshape(4, -1).sum(1)
  assert (jax.jit(f)(x)[:, 0] == jnp.repeat(want, 2)).all()
  assert sharding.parts("batch") == 1
  assert (sharding.local(total, ("batch", "length"), (None,))(x, weights) == want.sum()).all()
