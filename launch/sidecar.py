"""Starts SGLang servers for rollouts, keeps them alive, and stops them all when it ends.

  python launch/sidecar.py --install --device=cpu       # once: makes the servers' own environment
  python launch/sidecar.py --device=cpu --model=axpo_jax/assets/warm_start
  python launch/sidecar.py --model=/models/Qwen3-VL-8B-Thinking --servers=8 --port=30000
  python launch/sidecar.py --print_sizing               # what fits on a GPU

When all servers are healthy it prints one line of JSON, {"urls": [...], "logs": ...},
and stays; then point the trainer at them: --config.rollout.urls=... (docs/sidecar.md). What happens
later (a restart and its reason) is told on stderr, each server's own words are in its log. Ctrl-C or
SIGTERM stops it. Flags for SGLang itself go behind `--`.

A server that can be reached from other machines needs a key, in the variable AXPO_SIDECAR_API_KEY or
in a file (--api_key_file); a flag would show it to every user of the machine.
"""

import json
import os
import pathlib
import signal
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax.engine.sglang.server import Sidecar, SidecarError, SidecarSpec, environment, sizing
from axpo_jax.engine.sglang.server.spec import API_KEY_VARIABLE, DEVICES

_MODEL = flags.DEFINE_string("model", None, "Checkpoint folder in Hugging Face layout.")
_DEVICE = flags.DEFINE_enum("device", "cuda", DEVICES, "What the servers run on.")
_SERVERS = flags.DEFINE_integer("servers", 1, "How many servers.", lower_bound=1)
_TENSOR = flags.DEFINE_integer(
  "tensor_parallel", 0, "GPUs of one server; 0: as few of --gpu_gb as the model needs.")
_GPU_GB = flags.DEFINE_float("gpu_gb", 80, "Memory of one GPU in GB (1e9 bytes), for sizing.")
_GPUS = flags.DEFINE_list("gpus", [], "GPU ids, in turn for each server. Default: 0, 1, 2, ...")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address that HTTP listens on.")
_PORT = flags.DEFINE_integer("port", 30_000, "Of the first server; the others follow. 0: free ones.")
_KEY_FILE = flags.DEFINE_string("api_key_file", None, "File that holds the key.")
_CONTEXT = flags.DEFINE_integer("context_length", 0, "Most tokens of a sequence; 0: 40,960, or the model's.")
_DTYPE = flags.DEFINE_string("dtype", "", "Default: bfloat16 on GPUs, float32 on a CPU.")
_MEMORY = flags.DEFINE_float(
  "mem_fraction", 0.8, "Share of free GPU memory for weights and KV; images need the rest.", 0.05, 0.95)
_POOL = flags.DEFINE_integer("max_total_tokens", 0, "Size of the KV pool; 0: what memory allows.")
_RUNNING = flags.DEFINE_integer("max_running", 64, "Sequences decoded at once by one server.")
_START = flags.DEFINE_float("start_timeout", 900, "Seconds until a started server must be healthy.")
_PROBE = flags.DEFINE_float("probe_every", 5, "Seconds between two looks at a server.")
_HANG = flags.DEFINE_float(
  "hang_after", 300, "Seconds without an answer until a server is restarted; a push must be shorter.")
_ENV = flags.DEFINE_list(
  "env", [], "Names of further variables of this environment that the servers get; no secret goes to them unasked.")
_URLS_FILE = flags.DEFINE_string("urls_file", None, "Also write the JSON line into this file.")
_LOGS = flags.DEFINE_string("log_folder", "sidecar_logs", "Folder of the servers' logs.")
_INSTALL = flags.DEFINE_bool("install", False, "Make the environment for --device, and stop.")
_SIZING = flags.DEFINE_bool("print_sizing", False, "Print what fits on a GPU of --gpu_gb, and stop.")


def _api_key() -> str:
  if not _KEY_FILE.value:
    return os.environ.get(API_KEY_VARIABLE, "")
  key = pathlib.Path(_KEY_FILE.value).read_text().strip()
  if not key:
    raise SidecarError(f"--api_key_file={_KEY_FILE.value} is empty")
  return key


def _spec(extra_flags: list[str]) -> SidecarSpec:
  if not _MODEL.value:
    raise SidecarError("--model=<checkpoint folder> is needed")
  tensor = _TENSOR.value or sizing.gpus_needed(
    _MODEL.value, _DEVICE.value, _GPU_GB.value, _MEMORY.value)
  return SidecarSpec(
    model=_MODEL.value, device=_DEVICE.value, servers=_SERVERS.value, tensor_parallel=tensor,
    gpus=tuple(_GPUS.value), host=_HOST.value, port=_PORT.value, api_key=_api_key(),
    context_length=_CONTEXT.value, dtype=_DTYPE.value, mem_fraction=_MEMORY.value, max_total_tokens=_POOL.value,
    max_running=_RUNNING.value, extra_flags=tuple(extra_flags), env=tuple(_ENV.value), start_timeout=_START.value,
    probe_every=_PROBE.value, hang_after=_HANG.value,
  )  # fmt: skip


def _tell(message: str) -> None:
  print(f"sidecar: {message}", file=sys.stderr, flush=True)


def _publish(sidecar: Sidecar) -> None:
  """The file first: who has read the line on stdout finds it there."""
  line = json.dumps({"urls": sidecar.urls, "logs": _LOGS.value})
  if _URLS_FILE.value:  # renamed into place: who waits for the file never reads half of it
    part = pathlib.Path(f"{_URLS_FILE.value}.part")
    part.write_text(line + "\n")
    part.rename(_URLS_FILE.value)
  print(line, flush=True)


def _stop(signum, frame):
  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, signal.SIG_IGN)  # stopping is not interrupted
  raise SystemExit(0)


def _run(extra_flags: list[str]) -> None:
  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, _stop)
  try:
    with Sidecar(_spec(extra_flags), _LOGS.value, report=_tell) as sidecar:
      _publish(sidecar)
      while True:
        signal.pause()
  finally:
    if _URLS_FILE.value:
      pathlib.Path(_URLS_FILE.value).unlink(missing_ok=True)


def main(argv: list[str]) -> None:
  try:
    if _INSTALL.value:
      print(environment.install(_DEVICE.value, _tell))
    elif _SIZING.value:
      print(sizing.table(_GPU_GB.value, _MEMORY.value))
    else:
      _run(argv[1:])
  except (SidecarError, OSError) as error:
    sys.exit(f"sidecar: {error}")


if __name__ == "__main__":
  # Not `launch.command`: --install must work where nothing but absl is installed yet.
  app.run(main)
