"""What servers are wanted, and the command line and environment that start one of them.

In: a `SidecarSpec`. Out: plain lists and dicts of strings for `subprocess`. No process is started
here, and no JAX is loaded.

Only what differs from SGLang's defaults is set, each for a reason:
  images   The cache of image embeddings outlives a weight update and a flush, so it is off.
  ports    The HTTP port is on `host`. Everything else that SGLang opens stays on the machine: torch's
           rendezvous, which would listen on all interfaces, goes through a file; NCCL and gloo are
           bound to the loopback device; ZeroMQ uses sockets in a private folder.
  key      Travels in the environment of the server, never on a command line (see serve.py).
  secrets  Of this process's environment servers get what they may need by name, and no keys of others.
  CPU      torch's own attention and sampling, an explicit size of the KV pool (SGLang would take all
           memory), float32 (it would take 16 bits), no torch compiler (20 s at the first image).
"""

import dataclasses
import ipaddress
import os
import pathlib
import re
import socket
from collections.abc import Mapping

from axpo_jax.engine.settings import DELTA_LOADER
from axpo_jax.model.config import ModelConfig, UnsupportedConfig, VisionConfig

SERVE = pathlib.Path(__file__).with_name("serve.py")
DEVICES = ("cuda", "cpu")
API_KEY_VARIABLE = "AXPO_SIDECAR_API_KEY"
# Variables that servers get: these, and those that begin so, but for what is called a secret.
_PASSED_ON = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "HOSTNAME", "CC", "CXX", "CPATH",
              "LIBRARY_PATH", "NO_PROXY", "no_proxy", "TOKENIZERS_PARALLELISM"}
_PREFIXES = ("LC_", "LD_", "XDG_", "CUDA", "NVIDIA_", "NVTE_", "NVSHMEM_", "NCCL_", "GLOO_", "UCX_", "FI_", "HIP_",
             "ROCR_", "HSA_", "SGLANG_", "SGL_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "OMP_", "KMP_", "MKL_",
             "OPENBLAS_", "MALLOC_")
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
# What no flag behind `--` may say: it is said here, and checked; would show a secret in `ps` and in logs;
# or opens another port.
_RESERVED = ("model-path", "model", "device", "host", "port", "config", "api-key", "admin-api-key",
             "ssl-keyfile-password", "dist-init-addr", "nccl-init-addr")


class SidecarError(RuntimeError):
  """The servers cannot be started as asked; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class SidecarSpec:
  """One or many SGLang servers of one checkpoint on this machine.

  model: folder of a Qwen3-VL checkpoint in Hugging Face layout, with tokenizer and processor files.
  device: "cuda" or "cpu".
  servers: how many. Server i has port `port + i`; port 0 takes free ones.
  tensor_parallel: GPUs of one server.
  gpus: ids as CUDA_VISIBLE_DEVICES takes them, `tensor_parallel` for each server in turn; empty
    means 0, 1, 2, ...
  host: where HTTP listens. Anything but loopback needs `api_key`.
  context_length: most tokens of a sequence, images expanded; 0 means 40,960 (the paper's evaluation
    with room for its prompts) or the model's limit, whichever is less.
  dtype: of weights and KV cache; empty means bfloat16 on GPUs, float32 on CPUs.
  mem_fraction: share of the GPU memory that is free at the start, for weights and KV cache together.
    Images need what is left.
  max_total_tokens: size of the KV pool; 0 means what `mem_fraction` leaves (GPUs), 32768 (CPU).
  max_running: sequences decoded at once.
  extra_flags: for SGLang, last, so that they win. Not those for which there is a field here.
  env: names of further variables of this process that the servers get, such as HF_TOKEN. Without them
    they get what CUDA, torch, SGLang and the shell need, and nothing that is called a key or a secret.
  extra_env: further variables for the servers' processes, with their values.
  start_timeout: seconds from a start to the first healthy answer.
  probe_every: seconds between two looks at a serving server.
  hang_after: seconds without any answer until a server is killed and started again. A server does
    not answer while it loads weights: stay above the longest push.
  pause_limit: seconds for which a server may answer without generating (it is paused in a push).
  backoff: seconds before the first restart in a row; doubles up to `backoff_max`.
  """

  model: str
  device: str = "cuda"
  servers: int = 1
  tensor_parallel: int = 1
  gpus: tuple[str | int, ...] = ()
  host: str = "127.0.0.1"
  port: int = 30000
  api_key: str = dataclasses.field(default="", repr=False)
  context_length: int = 0
  dtype: str = ""
  mem_fraction: float = 0.8
  max_total_tokens: int = 0
  max_running: int = 64
  extra_flags: tuple[str, ...] = ()
  env: tuple[str, ...] = ()
  extra_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  start_timeout: float = 900.0
  probe_every: float = 5.0
  hang_after: float = 300.0
  pause_limit: float = 900.0
  backoff: float = 1.0
  backoff_max: float = 60.0

  def __post_init__(self):
    if self.device not in DEVICES:
      raise SidecarError(f"device={self.device!r}; choose one of {DEVICES}")
    for field in ("servers", "tensor_parallel", "max_running"):
      if getattr(self, field) < 1:
        raise SidecarError(f"{field}={getattr(self, field)}; at least 1 is needed")
    if not self.api_key and not is_loopback(self.host):
      raise SidecarError(
        f"host={self.host!r} can be reached by others, and whoever reaches a server can load weights "
        f"into it: set a key (variable {API_KEY_VARIABLE}), or keep 127.0.0.1"
      )
    for flag in self.extra_flags:
      _check_flag(flag)
    if unset := [name for name in self.env if name not in os.environ]:
      raise SidecarError(f"env names {unset[0]}, which is not set here")
    self._check_sizes()

  def _check_sizes(self):
    needed = self.servers * self.tensor_parallel
    if self.gpus and self.device == "cuda" and len(self.gpus) != needed:
      raise SidecarError(
        f"gpus={self.gpus} are {len(self.gpus)}, but servers={self.servers} x "
        f"tensor_parallel={self.tensor_parallel} takes {needed}"
      )
    config = model_config(self.model)
    text = config.text
    if config.vision.rope_theta != VisionConfig.rope_theta:
      raise SidecarError(f"model={self.model!r}: vision rope_theta={config.vision.rope_theta:g}, and SGLang "
                         f"takes {VisionConfig.rope_theta:g} whatever config.json says")
    if text.experts and len(config.vision.deepstack_layers) != 3:
      raise SidecarError(f"model={self.model!r}: {len(config.vision.deepstack_layers)} DeepStack features, and SGLang "
                         "adds three to a mixture of experts whatever config.json says")
    if text.num_heads % self.tensor_parallel:
      raise SidecarError(
        f"tensor_parallel={self.tensor_parallel} does not divide {text.num_heads} heads")
    if self.context_length > text.max_positions:
      raise SidecarError(f"context_length={self.context_length}; the model has {text.max_positions}")


def _check_flag(flag: str) -> None:
  name = flag.partition("=")[0].removeprefix("--").replace("_", "-")
  # argparse takes beginnings of a flag's name for the flag.
  if flag.startswith("--") and name and any(known.startswith(name) for known in _RESERVED):
    raise SidecarError(f"--{name} cannot be given to SGLang itself: host, port, model and device are fields (flags) of "
                       f"the sidecar, which checks them; a key comes from the variable {API_KEY_VARIABLE}, since flags "
                       "are seen in `ps` and in logs")


def model_config(folder: str) -> ModelConfig:
  """Of a checkpoint folder. Raises: SidecarError if it is none that this project can train."""
  try:
    return ModelConfig.from_hf(folder)
  except OSError as error:
    raise SidecarError(f"model={folder!r} is no checkpoint folder: {error}") from error
  except (UnsupportedConfig, KeyError) as error:
    raise SidecarError(f"model={folder!r}: {error}") from error


def is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def free_port(host: str) -> int:
  with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
    probe.bind((host, 0))
    return probe.getsockname()[1]


_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and what reaches it from this machine


def reachable(host: str) -> str:
  """What others put into a URL: this machine's name where the server listens on everything."""
  return _bracketed(socket.getfqdn() if host in _EVERYWHERE else host)


def local(host: str) -> str:
  """What this machine puts into a URL."""
  return _bracketed(_EVERYWHERE.get(host, host))


def _bracketed(host: str) -> str:
  return f"[{host}]" if ":" in host else host


def server_command(spec: SidecarSpec, port: int) -> list[str]:
  """SGLang's flags, behind serve.py; the interpreter comes before it."""
  flags = {
    "model-path": spec.model,
    "host": spec.host,
    "port": port,
    "device": spec.device,
    "dtype": spec.dtype or ("float32" if spec.device == "cpu" else "bfloat16"),
    "context-length": spec.context_length or min(40_960, model_config(spec.model).text.max_positions),
    "max-running-requests": spec.max_running,
  }
  switches = ["--enable-metrics", "--enable-cache-report", f"--custom-weight-loader={DELTA_LOADER}"]
  total = spec.max_total_tokens
  if spec.device == "cpu":
    flags |= {
      "attention-backend": "torch_native", "mm-attention-backend": "sdpa",
      "sampling-backend": "pytorch", "grammar-backend": "none",
    }  # fmt: skip
    switches += ["--disable-overlap-schedule", "--sleep-on-idle"]
    total = total or 32_768
  else:
    flags |= {"tensor-parallel-size": spec.tensor_parallel, "mem-fraction-static": spec.mem_fraction}
  if total:
    flags["max-total-tokens"] = total
  pairs = [f"--{name}={value}" for name, value in flags.items()]
  return [str(SERVE), "server", *pairs, *switches, *spec.extra_flags]


def process_environment(spec: SidecarSpec, scratch: str) -> dict[str, str]:
  """Variables that all servers get. `scratch`: a private folder, as old as the process."""
  env = {name: value for name, value in os.environ.items() if _passed_on(name) or name in spec.env}
  env |= {
    "AXPO_SIDECAR_PARENT": str(os.getpid()),
    "PYTHONUNBUFFERED": "1",
    "TMPDIR": scratch,
    "NO_PROXY": ",".join(filter(None, (env.get("NO_PROXY"), "127.0.0.1,localhost"))),
  }
  return env | ({API_KEY_VARIABLE: spec.api_key} if spec.api_key else {}) | dict(spec.extra_env)


def _passed_on(name: str) -> bool:
  if name in _PASSED_ON:
    return True
  return name.startswith(_PREFIXES) and not _SECRET.search(name)


def server_environment(spec: SidecarSpec, index: int, scratch: str) -> dict[str, str]:
  """Variables of server `index`."""
  env = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "SGLANG_VLM_CACHE_SIZE_MB": "0",
    "SGLANG_HEALTH_CHECK_TIMEOUT": "5",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch}/rendezvous",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
  }
  if spec.device == "cpu":
    threads = max(1, (os.cpu_count() or 1) // spec.servers)
    env |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(min(threads, 8)))
  else:
    first = index * spec.tensor_parallel
    ids = spec.gpus or range(spec.servers * spec.tensor_parallel)
    env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ids[first : first + spec.tensor_parallel]))
  return process_environment(spec, scratch) | env | dict(spec.extra_env)
