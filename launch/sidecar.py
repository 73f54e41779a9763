"""Starts SGLang servers for rollouts, restarts those that fail, and stops all when it ends.

  python launch/sidecar.py --install --device=cpu       # once: makes the servers' own environment
  python launch/sidecar.py --device=cpu --model=axpo_jax/assets/warm_start
  python launch/sidecar.py --model=/models/Qwen3-VL-8B-Thinking --servers=8 --port=30000
  python launch/sidecar.py --print_sizing               # what fits on a GPU

When all servers are healthy it prints one line of JSON, {"urls": [...], "logs": ...}, and keeps running; then
give the URLs to the trainer: --config.rollout.urls=... (docs/sidecar.md). Later events (a restart and its
reason) are printed on stderr; each server's output is in its log. Ctrl-C or SIGTERM stops it. Flags for SGLang
itself go after `--`.

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
_PROBE = flags.DEFINE_float("probe_every", 5, "Seconds between two health checks of a server.")
_HANG = flags.DEFINE_float(
  "hang_after", 300, "Seconds without an answer until a server is restarted; longer than a push of weights.")
_ENV = flags.DEFINE_list(
  "env", [], "Names of further variables of this environment to pass to the servers; secrets are not passed unless named.")
_URLS_FILE = flags.DEFINE_string("urls_file", None, "Also write the JSON line to this file.")
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


def _report(message: str) -> None:
  print(f"sidecar: {message}", file=sys.stderr, flush=True)


def _publish(sidecar: Sidecar) -> None:
  """Writes the file before the line on stdout, so that a reader of the line finds the file."""
  line = json.dumps({"urls": sidecar.urls, "logs": _LOGS.value})
  if _URLS_FILE.value:  # renamed when complete: nobody reads half of it
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
    with Sidecar(_spec(extra_flags), _LOGS.value, report=_report) as sidecar:
      _publish(sidecar)
      while True:
        signal.pause()
  finally:
    if _URLS_FILE.value:
      pathlib.Path(_URLS_FILE.value).unlink(missing_ok=True)


def main(argv: list[str]) -> None:
  try:
    if _INSTALL.value:
      print(environment.install(_DEVICE.value, _report))
    elif _SIZING.value:
      print(sizing.table(_GPU_GB.value, _MEMORY.value))
    else:
      _run(argv[1:])
  except (SidecarError, OSError) as error:
    sys.exit(f"sidecar: {error}")


if __name__ == "__main__":
  # Not `launch.command`: --install must work where nothing but absl is installed yet.
  app.run(main)
