"""What the embedded engine takes is what it was said to take, and what does not fit is refused."""

import jax
import numpy as np
import pytest

from axpo_jax.engine.embedded import memory as embedded_memory
from axpo_jax.engine.embedded.device import Device
from axpo_jax.engine.settings import EmbeddedConfig
from axpo_jax.model import sharding
from axpo_jax.model.presets import PRESETS

LARGE = EmbeddedConfig(rows=32, length=24_576, max_running=32, dtype="bfloat16")


@pytest.mark.parametrize("shape", [{"fsdp": 2, "context": 2, "tensor": 2}, {"data": 4, "fsdp": 2}])
def test_weights_and_rows_take_what_was_said(model_config, reference, shape):
  config = EmbeddedConfig(rows=20, length=96, max_running=9, dtype="bfloat16")
  mesh = sharding.make_mesh(shape)
  need = embedded_memory.needed(model_config, config, mesh.shape)
  device = Device(model_config, reference.graphdef, rows=config.rows, length=config.length,
                  dtype=config.dtype, mesh=mesh)
  device.install(jax.device_put(reference.params, sharding.param_shardings(reference.params, mesh)))
  device.reset_pool()

  def held(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

  assert need.pool == held(device._pool)
  assert need.weights == held(device._params)


def test_the_8b_by_hand():
  """A row of 24,576 tokens is 2 x 36 layers x 8 heads x 128 values, of two bytes."""
  row = 2 * 36 * 8 * 128 * 24_576 * 2
  alone = embedded_memory.needed(PRESETS["8b"], LARGE, {})
  assert alone.pool == 32 * row > 115e9
  assert alone.rows == 2 * row  # a prefill reads and writes one; a decode copies 32 rows of one layer
  assert 16e9 < alone.weights < 18e9
  eight = embedded_memory.needed(PRESETS["8b"], LARGE, {"data": 2, "fsdp": 2, "tensor": 2})
  assert (eight.pool, eight.weights) == pytest.approx((alone.pool / 8, alone.weights / 4), rel=0.1)
  assert eight.workspace < alone.workspace


def test_what_does_not_fit_is_refused_with_the_fields():
  need = embedded_memory.needed(PRESETS["8b"], LARGE, {"fsdp": 8})
  embedded_memory.check(need, 0.0, 80e9, LARGE)
  embedded_memory.check(need, 1e15, None, LARGE)  # nobody says what is there
  with pytest.raises(embedded_memory.MemoryShort, match=(
      r"needs 3\d\.\d GiB \(weights 2\.0, pool 13\.5, .* beside the 46\.6 GiB of training, and 74\.5 GiB "
      r"are free: set fewer config\.rollout\.embedded\.rows \(now 32\) .*engine=sglang")):
    embedded_memory.check(need, 50e9, 80e9, LARGE)


def test_devices_of_a_cpu_share_its_memory():
  one, eight = (embedded_memory.free_bytes(sharding.make_mesh({}, jax.devices()[:1])),
                embedded_memory.free_bytes(sharding.make_mesh({"fsdp": 8})))
  if one is None:
    pytest.skip("no /proc/meminfo")
  assert np.log2(one / eight) == pytest.approx(3, abs=0.5)
