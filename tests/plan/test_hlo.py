"""Collectives read from HLO: a program written by hand, and ones that XLA compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axpo_jax.plan import chips
from axpo_jax.plan.hlo import Collective, HloError, collectives

# 27 rounds, in each of which eight chips add up 1 KiB that holds one shard of 128 bytes each, in zeros.
PROGRAM = """HloModule made_by_hand

%fused_computation.1 (param_0: f32[256], param_1: f32[32], param_2: s32[]) -> f32[256] {
  %param_0 = f32[256]{0:T(256)} parameter(0)
  %param_1 = f32[32]{0:T(256)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %placed = f32[256]{0:T(256)} dynamic-update-slice(%param_0, %param_1, %param_2)
  ROOT %out = f32[256]{0:T(256)} bitcast(%placed)
}

%body (carry: (s32[], f32[32], f32[256])) -> (s32[], f32[32], f32[256]) {
  %carry = (s32[]{:T(128)}, f32[32]{0:T(256)}, /*index=2*/f32[256]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %shard = f32[32]{0:T(256)} get-tuple-element(%carry), index=1
  %zeros = f32[256]{0:T(256)} get-tuple-element(%carry), index=2
  %whole = f32[256]{0:T(256)} fusion(%zeros, %shard, %i), kind=kLoop, calls=%fused_computation.1
  %sum = f32[256]{0:T(256)S(1)} all-reduce(%whole), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[32]{0:T(256)}, f32[256]{0:T(256)}) tuple(%i, %shard, %sum)
}

%condition (carry.1: (s32[], f32[32], f32[256])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[32]{0:T(256)}, f32[256]{0:T(256)}) parameter(0)
  %rounds = s32[]{:T(128)} constant(27)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %rounds), direction=LT
}

ENTRY %main (p: (s32[], f32[32], f32[256])) -> (s32[], f32[32], f32[256]) {
  %p = (s32[]{:T(128)}, f32[32]{0:T(256)}, f32[256]{0:T(256)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[32]{0:T(256)}, f32[256]{0:T(256)}) while(%p), condition=%condition, body=%body
}
"""
PADDED = Collective("all-reduce", 1024 * 2 * 7 / 8, 27, padded=True)


def test_a_loop_by_hand():
  assert collectives(PROGRAM) == [PADDED]
  assert PADDED.total == 27 * 1024 * 2 * 7 / 8


def test_a_sum_of_whole_arrays_is_not_padded():
  (one,) = collectives(PROGRAM.replace("all-reduce(%whole)", "all-reduce(%zeros)"))
  assert not one.padded and one.sent == PADDED.sent


def test_gpu_text_notes_the_rounds_and_starts_collectives_early():
  """As XLA writes it for GPUs: the condition's constant is in a fusion."""
  text = PROGRAM.replace("%rounds = s32[]{:T(128)} constant(27)", "%rounds = s32[] add(%x, %y)")
  text = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"27"}}')
  assert collectives(text.replace(" all-reduce(", " all-reduce-start(")) == [PADDED]


def test_rounds_that_data_decides_are_the_callers():
  text = PROGRAM.replace("constant(27)", "parameter(1)")
  assert [one.times for one in collectives(text)] == [1]
  assert [one.times for one in collectives(text, rounds=16)] == [16]


@pytest.mark.parametrize("groups, size", [
  ("{{0,1,2,3},{4,5,6,7}}", 4), ("[4,2]<=[8]", 2),
  ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b'}", 8)])
def test_every_way_to_write_groups(groups, size):
  (one,) = collectives(PROGRAM.replace("mesh['a'=2,'b'=8] {'b'}", groups))
  assert one.sent == 2048 * (size - 1) / size


def test_what_cannot_be_read_is_refused():
  with pytest.raises(HloError, match="ENTRY"):
    collectives("module {}")
  with pytest.raises(HloError, match="groups"):
    collectives(PROGRAM.replace("mesh['a'=2,'b'=8] {'b'}", "?"))


def gathered(mesh, layers, width, dtype=jnp.float32) -> list[Collective]:
  """Of a loop over layers whose weights are split over fsdp and used whole."""
  whole = NamedSharding(mesh, PartitionSpec())

  def body(x_N, w_NxN):
    return jnp.sin(x_N @ jax.lax.with_sharding_constraint(w_NxN, whole)), None

  weights = jax.ShapeDtypeStruct((layers, width, width), dtype,
                                 sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
  x_N = jax.ShapeDtypeStruct((width,), dtype, sharding=whole)
  compiled = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0]).lower(x_N, weights).compile()
  return collectives(compiled.as_text())


def test_collectives_of_a_compiled_loop():
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  found = gathered(mesh, 5, 64)
  assert {one.kind for one in found} == {"all-gather"}  # of one layer at a time, or of all at once
  assert sum(one.total for one in found) == 5 * 64 * 64 * 4 * 7 / 8


def test_a_slice_whose_three_dimensions_are_one_axis_gathers_by_all_reduce():
  """libtpu's choice, which the mesh that is proposed instead avoids; so does one that splits a dimension."""
  pytest.importorskip("libtpu", reason="NOT TESTED HERE: compiling for TPUs. libtpu is not installed")
  mesh = chips.slice_mesh("v5p:4x4x4", {"fsdp": -1})
  slow = gathered(mesh, 3, 4096, jnp.bfloat16)
  assert [(one.kind, one.padded, one.times) for one in slow] == [("all-reduce", True, 3)]
  assert chips.better_mesh(mesh) == {"data": 4, "fsdp": 16}
  for shape in ({"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 32}):
    mesh = chips.slice_mesh("v5p:4x4x4", shape)
    assert mesh.shape["fsdp"] == (32 if shape["data"] == 2 else 16)
    fast = gathered(mesh, 3, 4096, jnp.bfloat16)
    assert {one.kind for one in fast} == {"all-gather"}
    assert sum(one.total for one in fast) < 0.51 * slow[0].total
    assert chips.better_mesh(mesh) is None
