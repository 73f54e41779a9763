"""Memory, model FLOPs and the overview of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from axpo_jax.model import flops
from axpo_jax.model.presets import PRESETS
from axpo_jax.stages import gauges


def test_memory_is_that_of_this_process():
  before = gauges.memory()["memory/host_gb"]
  held = np.ones(10**8, np.uint8)
  after = gauges.memory()
  assert 0.05 < after["memory/host_gb"] - before < 0.2
  assert after["memory/host_peak_gb"] >= after["memory/host_gb"] - 0.05
  del held


@pytest.mark.parametrize("kind, tera", [
  ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918), ("NVIDIA H100 80GB HBM3", 989),
  ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", None)])
def test_peaks(kind, tera):
  assert flops.peak(kind) == (tera and tera * 1e12)


class Device:
  device_kind = "TPU v5p"


class Batch:
  """Two rows of four tokens: a trajectory of three, and a shared prefix of two with two branches."""

  ends_BxT = np.array([[3, 3, 3, 0], [4, 4, 3, 4]])
  weights_BxG = np.array([[0.5, 0, 0], [0, -1.0, 1.0]])
  vision = None


def test_utilisation_by_hand():
  config = PRESETS["tiny"]
  # Attended to: 3+2+1 of the first row, 4+3+1+1 of the second; over 7 tokens.
  needed = 3 * flops.needed(config, tokens=7, targets=3, patches=0, seen=15 / 7, seen_patches=0)
  found = gauges.utilisation(config, [Batch()], 0.5, [Device(), Device()])
  assert found["time/model_tflops_per_s"] == pytest.approx(needed / 0.5 / 2 / 1e12)
  assert found["time/mfu"] == pytest.approx(needed / 0.5 / 2 / 459e12)
  assert "time/mfu" not in gauges.utilisation(config, [Batch()], 0.5, jax.devices()[:1])


def test_overview_counts_what_is_trained():
  class Model(nnx.Module):
    def __init__(self):
      self.text = nnx.Dict(a=nnx.Param(jnp.zeros((3, 4))), b=nnx.Param(jnp.zeros(5, jnp.bfloat16)))
      self.vision = nnx.Dict(c=nnx.Param(jnp.zeros(7)))

  state = nnx.state(Model())
  trained, frozen = nnx.State({"text": state["text"]}), nnx.State({"vision": state["vision"]})
  line, table = gauges.overview(trained, frozen)
  assert line.startswith("24 parameters, 17 of them trained")
  rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
  assert ["text.b", "trained", "5", "0.000", "bfloat16"] in rows and ["vision.c", "frozen", "7", "0.000", "float32"] in rows
