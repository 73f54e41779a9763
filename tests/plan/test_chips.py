"""Which collectives libtpu gathers sharded weights by, on meshes of a slice."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axpo_jax.plan import chips


def gathers_by(mesh) -> dict[str, int]:
  """Collectives in a loop over layers whose weights are split over fsdp and used whole."""
  whole = NamedSharding(mesh, PartitionSpec())

  def body(x_N, w_NxN):
    return jnp.sin(x_N @ jax.lax.with_sharding_constraint(w_NxN, whole)), None

  weights = jax.ShapeDtypeStruct((3, 4096, 4096), jnp.bfloat16,
                                 sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
  x_N = jax.ShapeDtypeStruct((4096,), jnp.bfloat16, sharding=whole)
  compiled = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0]).lower(x_N, weights).compile()
  return collections.Counter(re.findall(r" (all-[a-z]+)(?:-start)?\(", compiled.as_text()))


def test_a_slice_whose_three_dimensions_are_one_axis_gathers_by_all_reduce():
  """libtpu's choice, which the mesh that is proposed instead avoids; so does one that splits a dimension."""
  pytest.importorskip("libtpu", reason="NOT TESTED HERE: compiling for TPUs. libtpu is not installed")
  mesh = chips.slice_mesh("v5p:4x4x4", {"fsdp": -1})
  assert gathers_by(mesh) == {"all-reduce": 1}
  assert chips.better_mesh(mesh) == {"data": 4, "fsdp": 16}
  for shape in ({"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 32}):
    mesh = chips.slice_mesh("v5p:4x4x4", shape)
    assert mesh.shape["fsdp"] == (32 if shape["data"] == 2 else 16)
    assert gathers_by(mesh) == {"all-gather": 1}
    assert chips.better_mesh(mesh) is None
