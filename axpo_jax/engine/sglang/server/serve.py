"""Starts one SGLang server under the sidecar's own Python; no JAX, nothing of ours.

  python serve.py server --model-path=... --port=...      (SGLang's own flags follow)
  python serve.py check                                    (imports SGLang, prints its version)

In: flags, and these variables. AXPO_SIDECAR_PARENT: the process id that this process must not
outlive. AXPO_SIDECAR_API_KEY: the key that requests must carry; given this way because flags are
seen by everyone in `ps`. SGLANG_USE_CPU_ENGINE=1: serve on a CPU.
Out: a server that dies with its parent. SGLang's own child processes import this file again (as
`__mp_main__`), so everything at module level holds in them too.

A machine without a GPU needs two things that the package registry lacks, both supplied here without
touching an installed file. torchvision's wheel is linked against CUDA, so on a CPU build of torch its
C++ operators are missing and its import fails: we declare the two that it looks for. `sgl_kernel` has
no CPU build: SGLang takes torch code where a kernel is missing, but some modules import the package
or name a kernel when they load, and a module that raises only when a kernel is *called* satisfies them.
"""

import ctypes
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import signal
import sys
import types

KEY = os.environ.get("AXPO_SIDECAR_API_KEY", "")
_ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
_HERE = str(pathlib.Path(__file__).resolve().parent)
# Kernels that a module of SGLang names when it loads (models/qwen3_5.py, for the Qwen-VL processor).
_NAMED_KERNELS = (
  "fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu",
  "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)  # fmt: skip

if sys.path and sys.path[0] == _HERE:
  sys.path.pop(0)  # the folder of a script; its neighbours must not shadow anyone's modules
sys.path.append(_HERE)  # last: SGLang imports axpo_delta by its name


def die_with(parent: int) -> None:
  """This process gets SIGKILL when its parent ends, however that ends. Linux only."""
  ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
  if os.getppid() != parent:  # it ended before we asked, or something stands between us
    sys.exit(f"serve.py: the parent is process {os.getppid()}, not the supervisor {parent}. If "
             "AXPO_SIDECAR_PYTHON is a wrapper, it must exec python.")


def _hide_key_in_logs(key: str) -> None:
  """SGLang logs all of its arguments at the start, the key among them."""
  make = logging.getLogRecordFactory()

  def record(*args, **kwargs):
    made = make(*args, **kwargs)
    if key in (text := made.getMessage()):
      made.msg, made.args = text.replace(key, "***"), None
    return made

  logging.setLogRecordFactory(record)


def _missing_kernel(name: str):
  if name.startswith("__"):
    raise AttributeError(name)

  def kernel(*args, **kwargs):
    raise NotImplementedError(f"sgl_kernel.{name} has no CPU build; serve on a GPU")

  return kernel


def _declare_torchvision_operators(torch):
  """Unless torchvision's library loads as it is, as with a CUDA build of torch. Returns what must
  stay alive."""
  folder = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
  try:
    torch.ops.load_library(folder / "_C.so")
    return None
  except OSError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _prepare_cpu():
  import torch

  library = _declare_torchvision_operators(torch)
  if importlib.util.find_spec("sgl_kernel") is None:
    stub = types.ModuleType("sgl_kernel")
    stub.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    stub.__version__ = "0"
    stub.__getattr__ = _missing_kernel
    sys.modules["sgl_kernel"] = stub
    for name in _NAMED_KERNELS:
      setattr(torch.ops.sgl_kernel, name, _missing_kernel(name))
  return library


def _serve(flags: list[str]) -> None:
  from sglang.launch_server import run_server
  from sglang.srt.server_args import prepare_server_args
  from sglang.srt.utils import kill_process_tree

  try:
    run_server(prepare_server_args([*flags, *(["--api-key", KEY] if KEY else [])]))
  finally:
    kill_process_tree(os.getpid(), include_parent=False)


def main(command: str, *flags: str) -> None:
  if "AXPO_SIDECAR_PARENT" in os.environ:
    die_with(int(os.environ["AXPO_SIDECAR_PARENT"]))
  if command == "check":
    import sglang.launch_server

    print(sglang.__version__)
  else:
    _serve(list(flags))


if KEY:
  _hide_key_in_logs(KEY)
if _ON_CPU:
  _kept = _prepare_cpu()
if __name__ == "__main__":
  main(*sys.argv[1:])
