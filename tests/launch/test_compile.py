"""Compiling a run for TPUs and GPUs on a machine that has none."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import axpo_jax
from axpo_jax.errors import ConfigError
from axpo_jax.plan import chips, slice_plan
from configs import axpo_8b
from tests import children

REPO = pathlib.Path(axpo_jax.__file__).parents[1]
# The compiler does not look for the fastest program, which takes several times as long.
HURRY = {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0", "XLA_FLAGS": ""}
# The whole run of the smallest model, which samples by itself.
SMALL = ("--config=configs/axpo_8b.py", "--config.model.preset=tiny", "--config.batch.rows=4",
         "--config.batch.length=256", "--config.images.max_pixels=16384",
         "--config.rollout.engine=embedded", "--config.rollout.embedded.rows=8",
         "--config.rollout.embedded.max_running=8", "--config.rollout.embedded.length=256")
# The 8B at three layers, all its widths, and as many tokens a chip as 131,072 on 64 chips are. Images are
# the small model's: a vision tower of 27 blocks takes half of the time.
WIDE = ("--config=configs/axpo_8b.py", "--config.model.preset=8b", "--layers=3", "--image_share=0",
        "--functions=accumulate", "--config.batch.rows=4", "--config.batch.length=2048")
URLS = "--config.rollout.urls=('http://sampler:30000',)"


def skip_without(platform) -> None:
  package = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}[platform]
  if not importlib.util.find_spec(package):
    extra = {"tpu": "aot", "gpu": "aot-gpu"}[platform]
    pytest.skip(f"NOT TESTED HERE: compiling for {platform.upper()}s. {package} is not installed: "
                f"pip install -e '.[{extra}]'")


def compile_for(topology, *flags) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "launch/compile.py", f"--topology={topology}", *flags], cwd=REPO, text=True,
    capture_output=True, timeout=1800, env={**children.environment(1), **HURRY})


@pytest.fixture(scope="module")
def compiled():
  skip_without("tpu")
  done = compile_for("v5e:2x2", *SMALL)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def cells(text, row) -> list[str]:
  (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} ")]
  return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.slow
def test_the_whole_run_compiles_for_a_slice(compiled):
  assert "4 chips as v5e:2x2, mesh data 1 x fsdp 4 x context 1 x tensor 1; 3 layers" in compiled
  assert "4 rows x 256 = 1,024 tokens" in compiled
  assert compiled.splitlines()[-1].startswith("**The run fits**: at most ")
  assert set(cells(compiled, "limit")) == {"15.75"}
  assert all(float(seconds) >= 0 for seconds in cells(compiled, "core seconds to compile"))
  # A quarter of the FLOPs are a chip's; it does 197e12 a second.
  for flops, seconds in zip(cells(compiled, "PFLOP, all chips"), cells(compiled, "seconds at the chips' peak"),
                            strict=True):
    assert float(seconds) == pytest.approx(float(flops) * 1e15 / 4 / 197e12, abs=0.01)
  assert "twice the bytes" not in compiled  # a slice of two dimensions gathers well


@pytest.mark.slow
@pytest.mark.parametrize("platform, topology, limit", [
  ("tpu", "v5p:2x2x1", "95.74"), ("gpu", "h100:4", "72.78")])
def test_the_8b_compiles_at_three_layers(platform, topology, limit):
  skip_without(platform)
  done = compile_for(topology, *WIDE, URLS)
  assert done.returncode == 0, done.stderr[-4000:]
  assert "3 layers; micro-batches of 4 rows x 2,048 = 8,192 tokens, 2,048 a chip" in done.stdout
  assert "SGLang servers on GPUs of their own (config.rollout.urls)" in done.stdout
  assert "**What was compiled fits**" in done.stdout and cells(done.stdout, "limit") == [limit]
  # A quarter of 3 layers of 192,946,432 parameters, a vocabulary of 151,936 x 4,096 twice and the vision
  # tower of 0.58 billion, in float32.
  parameters = (3 * 192_946_432 + 2 * 151_936 * 4096 + 0.58e9) / 4 * 4 / 2**30
  assert float(cells(done.stdout, "parameters")[0]) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("topology, changes, layers, named", [
  ("v4:2x2x1", {"model.preset": "8b"}, 0, "v5p:4x4x4"),
  ("v5e:2x2", {}, 0, "--config.model.preset=8b"),
  ("v5e:2x2", {"model.preset": "9b"}, 0, "9b"),
  ("v5e:2x2", {"model.preset": "8b"}, 2, "--layers=2"),
  ("v5e:2x2", {"model.preset": "8b", "mesh.tensor": 3}, 0, "config.mesh="),
  ("v5e:2x2", {"model.preset": "8b", "rollout.engine": "embedded", "rollout.embedded.rows": 2}, 0,
   "config.rollout.embedded"),
  ("h100:8x", {"model.preset": "8b"}, 0, "h100:4x8"),
  ("h100:1", {"model.preset": "8b"}, 0, "config.rollout.sidecar"),
])
def test_what_cannot_be_compiled_is_said(topology, changes, layers, named):
  if topology.startswith("v5e"):
    skip_without("tpu")
  config = axpo_8b.get_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises((ConfigError, chips.TopologyError), match=re.escape(named)):
    slice_plan.Plan.from_config(config, topology, layers=layers)


def test_a_mesh_that_gathers_at_twice_the_bytes_is_named():
  skip_without("tpu")
  config = axpo_8b.get_config()
  config.model.preset = "8b"
  better = "twice the bytes: try --config.mesh.data=4 --config.mesh.fsdp=16"
  assert better not in slice_plan.Plan.from_config(config, "v5p:4x4x4").describe()
  config.mesh.data = 1
  assert better in slice_plan.Plan.from_config(config, "v5p:4x4x4").describe()


def test_servers_that_the_run_starts_leave_the_trainer_the_other_gpus():
  skip_without("gpu")
  config = axpo_8b.get_config()
  config.model.preset = "8b"
  plan = slice_plan.Plan.from_config(config, "h100:8")
  assert plan.mesh.size == plan.servers == 4
  config.rollout.urls = ("http://sampler:30000",)
  assert slice_plan.Plan.from_config(config, "h100:8").mesh.size == 8
  config.model.preset = "32b"
  with pytest.raises(ConfigError, match="tensor_parallel=1"):  # 67 GB of weights on a GPU of 80
    slice_plan.Plan.from_config(config, "h100:8").describe()


@pytest.mark.parametrize("kind", [kind for kind, chip in chips.CHIPS.items() if chip.gpu])
def test_every_kind_of_gpu_is_known_to_the_compiler(kind):
  skip_without("gpu")
  mesh = chips.slice_mesh(f"{kind}:2x4", {"data": 2, "fsdp": 4})
  assert mesh.devices.shape == (2, 4, 1, 1)
  assert mesh.devices.flat[0].device_kind == chips.CHIPS[kind].gpu["name"]


def test_a_command_that_cannot_be_done_ends_with_one_line():
  done = compile_for("v5e:2", "--config=configs/axpo_8b.py", "--config.model.preset=8b")
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert "v5e:2" in done.stderr.splitlines()[-1] or "libtpu" in done.stderr.splitlines()[-1]


def test_without_the_compiler_one_is_told_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(chips.TopologyError, match=re.escape("pip install -e '.[aot]'")):
    chips.slice_mesh("v5e:2x2", {"fsdp": -1})
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(chips.TopologyError, match=re.escape("pip install -e '.[aot-gpu]'")):
    chips.slice_mesh("h100:8", {"fsdp": -1})
