"""Traffic read from HLO: a program written by hand, and one that XLA compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from axpo_jax.train.hlo import HloError, read_traffic

# 27 rounds; in each a kernel reads one of 27 slices (1 KiB) of a stack, writes 1 KiB to HBM, and eight
# chips add up 1 KiB. The kernel's second output stays in VMEM, S(1).
PROGRAM = """HloModule made_by_hand

%fused_computation.1 (param_0: f32[27,256], param_1: s32[]) -> f32[256] {
  %param_0 = f32[27,256]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,256]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,256}
  ROOT %out = f32[256]{0:T(256)} bitcast(%slice)
}

%body (carry: (s32[], f32[27,256])) -> (s32[], f32[27,256]) {
  %carry = (s32[]{:T(128)}, f32[27,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %stack = f32[27,256]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %row = f32[256]{0:T(256)} fusion(%stack, %i), kind=kLoop, calls=%fused_computation.1
  %sum = f32[256]{0:T(256)S(1)} all-reduce(%row), channel_id=1, replica_groups=mesh['a'=2,'b'=8] {'b'}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[27,256]{1,0:T(8,128)}) tuple(%i, %stack)
}

%condition (carry.1: (s32[], f32[27,256])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[27,256]{1,0:T(8,128)}) parameter(0)
  %rounds = s32[]{:T(128)} constant(27)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %rounds), direction=LT
}

ENTRY %main (p: (s32[], f32[27,256])) -> (s32[], f32[27,256]) {
  %p = (s32[]{:T(128)}, f32[27,256]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[27,256]{1,0:T(8,128)}) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_by_hand():
  traffic = read_traffic(PROGRAM)
  kernel, index, reduced = 2 * 1024, 4, 1024  # the sum itself stands in VMEM
  assert traffic.hbm_bytes == 27 * (kernel + index + reduced)
  assert traffic.collectives == {"all-reduce": 27}
  assert traffic.sent_bytes == {"all-reduce": 27 * 1024 * 2 * 7 / 8}


@pytest.mark.parametrize("groups, size", [
  ("{{0,1,2,3},{4,5,6,7}}", 4), ("[4,2]<=[8]", 2),
  ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b'}", 8)])
def test_every_way_to_write_groups(groups, size):
  text = PROGRAM.replace("mesh['a'=2,'b'=8] {'b'}", groups)
  assert read_traffic(text).sent_bytes["all-reduce"] == 27 * 2048 * (size - 1) / size


def test_what_cannot_be_read_is_refused():
  with pytest.raises(HloError, match="ENTRY"):
    read_traffic("module {}")
  with pytest.raises(HloError, match="constants"):
    read_traffic(PROGRAM.replace("constant(27)", "parameter(1)"))
  with pytest.raises(HloError, match="groups"):
    read_traffic(PROGRAM.replace("mesh['a'=2,'b'=8] {'b'}", "?"))


def test_collectives_of_a_compiled_loop():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec(None, "x"))
  whole = NamedSharding(mesh, PartitionSpec())

  def gathered(x_LxN):
    def body(total, x_N):
      return total + jnp.sin(jax.lax.with_sharding_constraint(x_N * 2, whole)), None
    return jax.lax.scan(body, jnp.zeros(64), x_LxN)[0]

  compiled = jax.jit(gathered, in_shardings=rows).lower(jnp.zeros((5, 64))).compile()
  traffic = read_traffic(compiled.as_text())
  (count,) = traffic.collectives.values()
  assert count in (1, 5)  # XLA may take the gather out of the loop: then it is five rows long
  assert sum(traffic.sent_bytes.values()) == 5 * 64 * 4 * 7 / 8
