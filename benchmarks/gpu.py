"""What the policy does on an NVIDIA GPU: parity with transformers, MFU of a train step, decoding.

  python benchmarks/gpu.py --sizes 2b,4b

Nothing is downloaded: weights are random, of the sizes' shapes. Every measurement is a process of its
own, so that none finds another's memory taken, and prints one line of JSON:

  parity    log-probabilities of a sequence with an image in bfloat16: how far ours and transformers'
            are from transformers' own in float32, and from each other (nats, mean over tokens)
  training  seconds, tokens/s and MFU of an optimizer step over `--micro_batches` rows of `--tokens`
            tokens each, an image included. The model FLOPs are those of `model.flops.needed` times three:
            recomputation does not count
  decode    new tokens/s of `--batch` prompts, prefill included: the embedded engine against
            transformers' `generate`

Without a GPU it stops, unless --allow_cpu is given, which is for trying the script at `--sizes tiny`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

PARTS = ("parity", "training", "decode")


def main() -> None:
  args = arguments(sys.argv[1:])
  pairs = [(size, part) for size in args.sizes for part in args.parts]
  if len(pairs) > 1:
    failed = [pair for pair in pairs if _in_its_own_process(*pair)]
    sys.exit(f"failed: {', '.join(map(' '.join, failed))}" if failed else 0)
  [(size, part)] = pairs
  _before_jax(part)
  print(json.dumps(measure(part, size, args)), flush=True)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
  def names(known):
    def read(text):
      if unknown := sorted(set(text.split(",")) - set(known)):
        raise argparse.ArgumentTypeError(f"{unknown}; there are {known}")
      return text.split(",")
    return read

  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--sizes", type=names(("2b", "4b", "8b", "tiny")), default=["2b", "4b"])
  parser.add_argument("--parts", type=names(PARTS), default=list(PARTS))
  parser.add_argument("--tokens", type=int, default=16_384, help="of a training row")
  parser.add_argument("--micro_batches", type=int, default=4, help="rows of a train step")
  parser.add_argument("--attention", default="auto", help="auto, xla or gpu")
  parser.add_argument("--remat", default="full", help="none, dots or full")
  parser.add_argument("--param_dtype", default="float32")
  parser.add_argument("--mu_dtype", default="bfloat16")
  parser.add_argument("--batch", type=int, default=64, help="prompts that decode together")
  parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt; of parity too")
  parser.add_argument("--new_tokens", type=int, default=256)
  parser.add_argument("--repetitions", type=int, default=3)
  parser.add_argument("--peak_tflops", type=float, default=0.0, help="of a card not in the table")
  parser.add_argument("--allow_cpu", action="store_true")
  args = parser.parse_args(argv)
  for name in ("micro_batches", "batch", "new_tokens", "repetitions"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1")
  if min(args.tokens, args.prompt) < 64:
    parser.error(f"--tokens={args.tokens}, --prompt={args.prompt}: an image must fit; at least 64")
  return args


def _in_its_own_process(size: str, part: str) -> bool:
  """Whether it failed. The last flag of a kind counts."""
  done = subprocess.run([sys.executable, *sys.orig_argv[1:], "--sizes", size, "--parts", part])
  return done.returncode != 0


def _before_jax(part: str) -> None:
  """Nobody else is on the card while we train; transformers is, beside the other two."""
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  if part == "training":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  else:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def measure(part: str, size: str, args: argparse.Namespace) -> dict:
  """What was asked and what came out. Exits where there is no GPU."""
  import jax
  device = jax.devices()[0]
  if device.platform != "gpu" and not args.allow_cpu:
    sys.exit(f"error: jax has no GPU here, only {device.platform}: install jax[cuda12] and look at "
             "nvidia-smi; --allow_cpu --sizes tiny tries the script without one")
  from benchmarks import gpu_parts
  if part != "training" and gpu_parts.torch_device() == "cpu" and not args.allow_cpu:
    sys.exit("error: PyTorch sees no GPU: install a build with CUDA")
  config = gpu_parts.model_config(size, attention=args.attention, remat=args.remat)
  head = {"part": part, "size": size, "device": device.device_kind, "jax": jax.__version__}
  return head | _MEASURED[part](config, args)


def parity(config, args: argparse.Namespace) -> dict:
  from benchmarks import gpu_parts
  with tempfile.TemporaryDirectory() as scratch:
    folder = gpu_parts.write_random_weights(config, pathlib.Path(scratch))
    example = gpu_parts.example(config, args.prompt, seed=0)
    exact, theirs = gpu_parts.torch_logprobs(folder, example)
    ours = gpu_parts.our_logprobs(folder, config, example)

  def far(a, b):
    return float(abs(a - b).mean())

  out = {"tokens": len(exact), "ours_from_float32": far(ours, exact),
         "theirs_from_float32": far(theirs, exact), "ours_from_theirs": far(ours, theirs)}
  # Rounding of one kind and size: two orders of the same sums are this close, a wrong model is not.
  return out | {"ok": out["ours_from_float32"] < 1.5 * out["theirs_from_float32"] + 1e-3}


def training(config, args: argparse.Namespace) -> dict:
  from benchmarks import gpu_parts
  config = dataclasses.replace(config, param_dtype=args.param_dtype)
  step, flops = gpu_parts.train_step(config, args.tokens, args.micro_batches, args.mu_dtype)
  first, later = _timed(step, args.repetitions)
  peak, seconds = _peak(args), min(later)
  return {"tokens": args.tokens * args.micro_batches, "attention": config.attention,
          "remat": config.remat, "param_dtype": args.param_dtype, "first_s": first,
          "seconds": later, "tokens_per_s": args.tokens * args.micro_batches / seconds,
          "model_tflops": flops / 1e12, "mfu": flops / seconds / peak if peak else None,
          "peak_gib": gpu_parts.peak_gib()}


def decode(config, args: argparse.Namespace) -> dict:
  from benchmarks import gpu_parts
  with tempfile.TemporaryDirectory() as scratch:
    folder = gpu_parts.write_random_weights(config, pathlib.Path(scratch))
    sizes = (args.batch, args.prompt, args.new_tokens)
    with asyncio.Runner() as runner:
      sample, close = gpu_parts.our_sampler(folder, config, runner, *sizes)
      first, ours = _timed(sample, args.repetitions)
      close()
    _, theirs = _timed(gpu_parts.torch_sampler(folder, config, *sizes), args.repetitions)
  tokens = args.batch * args.new_tokens
  return {"batch": args.batch, "prompt": args.prompt, "new_tokens": args.new_tokens,
          "first_s": first, "tokens_per_s": tokens / min(ours),
          "transformers_tokens_per_s": tokens / min(theirs), "gain": min(theirs) / min(ours)}


_MEASURED = {"parity": parity, "training": training, "decode": decode}


def _timed(run: Callable[[], None], repetitions: int) -> tuple[float, list[float]]:
  """Seconds of the first call, which compiles, and of the others. `run` waits for the device."""
  seconds = []
  for _ in range(repetitions + 1):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return seconds[0], seconds[1:]


def _peak(args: argparse.Namespace) -> float:
  """FLOP/s of the card; 0 if it is not known."""
  import jax

  from axpo_jax.model import flops
  return 1e12 * args.peak_tflops or flops.peak(jax.devices()[0].device_kind) or 0.0


if __name__ == "__main__":
  main()
