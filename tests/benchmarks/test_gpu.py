"""The script that waits for a GPU, at its smallest on a CPU: it must work on the day it gets one."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from axpo_jax.model import flops
from benchmarks import gpu

REPO = pathlib.Path(gpu.__file__).parents[1]
SMALL = ["--allow_cpu", "--tokens=256", "--prompt=128", "--batch=2", "--new_tokens=4",
         "--micro_batches=2", "--repetitions=1", "--peak_tflops=1", "--remat=none"]


@pytest.fixture(autouse=True)
def gpu_parts(monkeypatch):
  """The tiny size with one layer in each tower, which compiles in seconds."""
  from benchmarks import gpu_parts  # imports torch

  whole = gpu_parts.model_config

  def made(*args, **options):
    config = whole(*args, **options)
    return dataclasses.replace(
      config, text=dataclasses.replace(config.text, num_layers=1),
      vision=dataclasses.replace(config.vision, depth=1, deepstack_layers=(0,)))

  monkeypatch.setattr(gpu_parts, "model_config", made)
  return gpu_parts


def test_the_right_model_passes_parity_and_another_does_not(gpu_parts, monkeypatch):
  args = gpu.arguments(SMALL)
  found = gpu.measure("parity", "tiny", args)
  assert found["ok"]
  assert found["tokens"] == 128 - 8 - 1 - 16 - 1  # before the image, its start, 4 x 4 tokens, its end
  assert 0 < found["theirs_from_float32"] < 0.1  # bfloat16 is not exact, and not noise
  right = gpu_parts.our_logprobs
  monkeypatch.setattr(gpu_parts, "our_logprobs", lambda *args: right(*args)[::-1])
  assert not gpu.measure("parity", "tiny", args)["ok"]


def test_mfu_of_a_step(gpu_parts):
  found = gpu.measure("training", "tiny", gpu.arguments(SMALL))
  assert found["tokens"] == 2 * 256
  seconds = min(found["seconds"])
  assert found["tokens_per_s"] == pytest.approx(512 / seconds)
  config = gpu_parts.model_config("tiny", attention="auto", remat="none")
  # 256 tokens with an image of 10 x 10 patches: the largest whose tokens are an eighth of them.
  once = flops.needed(config, tokens=256, targets=256 - 8 - 1 - 25 - 1, patches=100, seen=128,
                      seen_patches=100)
  assert found["mfu"] == pytest.approx(2 * 3 * once / seconds / 1e12)


def test_decoding_is_compared_with_transformers():
  found = gpu.measure("decode", "tiny", gpu.arguments(SMALL))
  assert found["gain"] == pytest.approx(found["tokens_per_s"] / found["transformers_tokens_per_s"])


def test_without_a_gpu_it_says_so():
  with pytest.raises(SystemExit, match="no GPU"):
    gpu.measure("training", "2b", gpu.arguments([]))


def test_every_pair_is_a_process_and_a_failure_is_named():
  done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--sizes=2b,4b", "--parts=decode"],
                        cwd=REPO, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1
  assert "failed: 2b decode, 4b decode" in done.stderr
