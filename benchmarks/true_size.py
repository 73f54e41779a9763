"""A rehearsal of a whole run at the real model's size, on a CPU, without a download.

  python benchmarks/true_size.py                      # the 2B: about 15 minutes, 20 GB of memory
  python benchmarks/true_size.py --size=small         # the same path in two minutes

Makes a random checkpoint (`random_policy.py`: the real sizes, vocabulary and file layout) and questions with
images, and then does with it what a user would: `launch/main.py --config=configs/axpo_2b.py` with LoRA in
bfloat16 on the embedded engine, as a process of its own. It is killed (-9) in its second step and started
again, and what it exports is loaded by `transformers`, whose logits are compared with ours.

Prints seconds and memory of every phase. `peak` is the kernel's VmHWM of the process, reset at the start of
every phase; `end` is what it holds when the phase ends. A phase includes compiling its programs. Ends with
an error where something that a run must do was not seen: a tool call, a resampled prefix, an update, the
resume, equal logits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

_LOOK_S = 0.1  # seconds between two looks at a process
_GB = 1e9
# What is changed of configs/axpo_2b.py: LoRA, and sizes for a CPU.
OVERRIDES = {
  "rollout.engine": "embedded",
  "rollout.embedded.rows": 8, "rollout.embedded.max_running": 8, "rollout.embedded.length": 512,
  "model.param_dtype": "bfloat16", "model.attention_chunk": 256,
  "lora.rank": 8, "optimizer.learning_rate": 1e-4,
  "agent.tools": "('image_zoom_in',)",
  "agent.system_prompt": "short", "agent.max_turns": 2, "agent.max_new_tokens": 64,
  "agent.max_response_tokens": 256, "agent.max_total_tokens": 512, "agent.max_images": 3,
  "images.max_pixels": 128 * 128,
  "images.zoom_min_pixels": 64 * 64, "images.zoom_max_pixels": 128 * 128,
  "rl.steps": 2, "rl.questions": 2, "rl.num_rollouts": 4, "rl.resample.k": 2,
  "batch.rows": 1, "batch.length": 512, "batch.image_rows": 4, "batch.logprob_chunk": 128,
  "eval.every": -1, "checkpoint.every": 1, "log.dump_every": 1,
}


def main() -> None:
  args = _arguments()
  if args.part:
    PARTS[args.part](args)
    return
  signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what it started ends too
  folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="true_size_"))
  folder.mkdir(parents=True, exist_ok=True)
  print(f"machine   {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; files go to {folder}", flush=True)
  watch = Watch(args.limit_gb * _GB)
  try:
    rehearse(args, folder, watch)
  finally:
    print("\n" + watch.table(), flush=True)
    if args.folder is None:
      shutil.rmtree(folder, ignore_errors=True)


def rehearse(args: argparse.Namespace, folder: pathlib.Path, watch: Watch) -> None:
  """All phases, in order."""
  policy, run, questions = folder / "policy", folder / "run", folder / "questions.jsonl"
  for old in (policy, run):
    shutil.rmtree(old, ignore_errors=True)

  def part(name: str) -> list[str]:
    return [sys.executable, __file__, f"--part={name}", f"--size={args.size}", f"--folder={folder}"]

  watch.run("make the checkpoint", part("make"))
  command = [sys.executable, str(ROOT / "launch" / "main.py"),
             f"--config={ROOT / 'configs' / 'axpo_2b.py'}", f"--workdir={run}",
             f"--config.model.checkpoint={policy}",
             f"--config.data.path={questions}",
             *(f"--config.{name}={value}" for name, value in OVERRIDES.items()), *args.override]
  print("command   " + " ".join(command), flush=True)
  start, step = r"rl: [\d,]+ parameters", [
    ("weights to the sampler", r"rollouts:\s+0%"),
    # A bar that ends is overwritten by spaces. The rollouts' bar is a line below the other, so its end moves the cursor up.
    ("rollouts, continuations", r"\n {20,}(?!\s*\x1b\[A)")]
  first = watch.run("killed run: ", command, [
    ("start, load", start), *step, ("update, checkpoint", r"axpo 1/2 "),
    ("step 2 until kill -9", r"rollouts:\s+0%")],
    # It is written in the background: a kill before its end would resume from the beginning.
    kill=(run / "rl" / "checkpoints" / "1").exists)
  metrics = _metrics(run)
  again = watch.run("resumed run: ", command, [
    ("start, load, restore", start), *step, ("update, checkpoint", r"axpo 2/2 "),
    ("export", None)])
  metrics = [*metrics[:1], *_metrics(run)[1:]]
  for side in ("transformers", "ours"):
    watch.run(f"logits of the export, {side}", part(side))
  check(first, again, metrics, folder)


def check(first: str, again: str, metrics: Sequence[dict], folder: pathlib.Path) -> None:
  """Prints what was seen; exits if something is missing."""
  print()
  for line in metrics:
    print(f"step {line['step']}:   " + ", ".join(
      f"{label} {line[name]:.3g}" for label, name in _SHOWN.items() if name in line))
  theirs, ours = (np.load(folder / f"{side}.npy") for side in ("transformers", "ours"))
  error = float(np.abs(theirs - ours).max() / np.abs(theirs).max())
  print(f"logits   of {len(ours)} tokens and an image, float32: largest difference {error:.1e} of the "
        f"largest logit, same best word at {np.mean(theirs.argmax(-1) == ours.argmax(-1)):.0%}")
  total = {name: sum(line[name] for line in metrics) for name in ("axpo/prefixes", "train/grad_norm")}
  missing = [what for what, seen in {
    "two steps": [line["step"] for line in metrics] == [1, 2],
    "a kill in the second step": "axpo 2/2 " not in first,
    "a resume after the first step": "axpo 1/2 " not in again,
    "a tool call": any(line["rollout/tool_attempt_rate"] > 0 for line in metrics),
    "a resampled prefix": total["axpo/prefixes"] >= 1,
    "an update": total["train/grad_norm"] > 0,
    "a log-prob gap below 0.05": all(line["train/logp_gap_abs_mean"] < 0.05 for line in metrics),
    "equal logits": error < 1e-3,
  }.items() if not seen]
  if missing:
    sys.exit(f"not seen: {', '.join(missing)}")
  print("seen      " + ", ".join(["a tool call", "a resampled prefix", "updates", "kill and resume",
                                  "equal logits"]))


_SHOWN = {
  "rollouts that call a tool": "rollout/tool_attempt_rate", "reward": "rollout/reward_mean",
  "resampled prefixes": "axpo/prefixes", "gradient norm": "train/grad_norm",
  "log-prob gap": "train/logp_gap_abs_mean", "largest": "train/logp_gap_abs_max",
  "s weights": "time/weights_s", "s rollouts": "time/rollout_s", "s resampling": "time/resample_s",
  "s update": "time/update_s", "sampled tokens/s": "time/sampled_tokens_per_s",
}


# Watching a process ---------------------------------------------------------------------------


@dataclasses.dataclass
class Phase:
  """Seconds, and bytes of resident memory: the most and the last."""

  name: str
  seconds: float
  peak: int
  end: int


class Watch:
  """Runs processes phase by phase and measures them; stops one that takes more than `limit` bytes."""

  def __init__(self, limit: float):
    self.limit, self.phases = limit, []

  def run(self, name: str, command: Sequence[str], phases=(("", None),), *,
          kill: Callable[[], bool] | None = None) -> str:
    """Runs a command to its end, or kills it (-9) behind its last phase; returns what it wrote.

    Args:
      phases: (name, regular expression in the output that ends it; None: the process's end).
      kill: whether it may be killed now; None: it ends by itself.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
      process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
      try:
        at = 0
        for label, pattern in phases:
          at = self._phase(name + label, process, log, at, pattern)
        while kill and process.poll() is None and not kill():
          time.sleep(_LOOK_S)
      finally:
        if process.poll() is None:
          process.kill()
        process.wait()
      text = _read(log)
    if process.returncode and not kill:
      sys.exit(f"{' '.join(command)}\n{text[-6000:]}\nended with {process.returncode}")
    return text

  def _phase(self, name: str, process: subprocess.Popen, log, at: int, pattern: str | None) -> int:
    """Returns the place in the output behind the pattern."""
    start, phase = time.monotonic(), Phase(name, 0.0, 0, 0)
    self.phases.append(phase)
    _reset_peak(process.pid)
    while True:
      ended = process.poll() is not None
      found = pattern and re.compile(pattern).search(_read(log), at)
      if not ended:
        peak, phase.end = _memory(process.pid, phase.end)
        phase.peak = max(phase.peak, peak)
      phase.seconds = time.monotonic() - start
      if phase.end > self.limit:
        process.kill()
        sys.exit(f"{name}: {phase.end / _GB:.1f} GB are more than --limit_gb={self.limit / _GB:g}")
      if ended or found:
        print(f"  {name:44} {phase.seconds:6.1f} s   peak {phase.peak / _GB:5.2f} GB", flush=True)
        if pattern and not found:
          sys.exit(f"{name}: the process ended early:\n{_read(log)[-6000:]}")
        return found.end() if found else at
      time.sleep(_LOOK_S)

  def table(self) -> str:
    rows = ["| phase | seconds | peak GB | GB at its end |", "|---|---|---|---|"]
    rows += [f"| {p.name} | {p.seconds:.1f} | {p.peak / _GB:.2f} | {p.end / _GB:.2f} |"
             for p in self.phases]
    return "\n".join([*rows, f"| in all | {sum(p.seconds for p in self.phases):.0f} | "
                      f"{max((p.peak for p in self.phases), default=0) / _GB:.2f} | |"])


def _read(log) -> str:
  log.seek(0)
  return log.read()


def _reset_peak(pid: int) -> None:
  """Makes VmHWM the memory held now (proc(5), clear_refs)."""
  with contextlib.suppress(OSError):  # it has ended
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def _memory(pid: int, otherwise: int) -> tuple[int, int]:
  """(VmHWM, VmRSS) in bytes; a process that has just ended has neither."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return otherwise, otherwise
  found = [re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmHWM", "VmRSS")]
  return tuple(int(match[1]) * 1024 if match else otherwise for match in found)


def _metrics(run: pathlib.Path) -> list[dict]:
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return [line for line in map(json.loads, lines) if "train/loss" in line]


# The parts that are processes of their own ----------------------------------------------------


def make(args: argparse.Namespace) -> None:
  """The checkpoint, and questions with images."""
  import random_policy
  size = random_policy.write(args.folder / "policy", random_policy.SIZES[args.size])
  print(f"{size / _GB:.2f} GB of weights")
  lines = []
  for i in range(8):
    colour = ("red", "blue")[i % 2]
    image = Image.new("RGB", (512, 384), "white")
    ImageDraw.Draw(image).ellipse((60 + 40 * i, 60, 120 + 40 * i, 120), fill=colour)
    image.save(args.folder / f"{i}.png")
    lines.append({"id": f"q{i}", "question": "What colour is the mark?", "images": [f"{i}.png"],
                  "answer": colour, "category": "perception"})
  (args.folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _prompt(folder: pathlib.Path):
  """(ids_T, image, config, folder of the export): a question, its image expanded."""
  from axpo_jax.model.chat import Chat
  from axpo_jax.model.config import ModelConfig
  from axpo_jax.model.images import ImageLimits, ImageProcessor
  policy = folder / "run" / "rl" / "policy"
  chat, config = Chat.from_pretrained(policy), ModelConfig.from_hf(policy)
  image = ImageProcessor.from_checkpoint(policy)(
    Image.open(folder / "0.png"), ImageLimits(64 * 64, 128 * 128))
  ids = chat.prompt_ids("", [], "What colour is the mark?", 1)
  pad = ids.index(chat.image_pad_id)
  ids = [*ids[:pad], *[chat.image_pad_id] * image.num_tokens, *ids[pad + 1:]]
  return np.array(ids, np.int32), image, config, policy


def transformers_logits(args: argparse.Namespace) -> None:
  """Writes transformers.npy: float32 [T, V]."""
  import torch
  from transformers import Qwen3VLForConditionalGeneration
  ids_T, image, config, policy = _prompt(args.folder)
  model = Qwen3VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
  ids = torch.tensor(ids_T[None].astype(np.int64))
  with torch.no_grad():
    logits = model(
      input_ids=ids, pixel_values=torch.tensor(image.patches()),
      image_grid_thw=torch.tensor([[1, *image.grid_hw]]),
      mm_token_type_ids=(ids == config.image_token_id).int()).logits[0]
  np.save(args.folder / "transformers.npy", logits.numpy())


def our_logits(args: argparse.Namespace) -> None:
  """Writes ours.npy: float32 [T, V]."""
  import jax
  from flax import nnx

  from axpo_jax.model import hf
  from axpo_jax.model.qwen3_vl import Qwen3VL
  from axpo_jax.model.vision_inputs import mrope_positions, pack_images
  ids_T, image, config, policy = _prompt(args.folder)
  config = dataclasses.replace(config, dtype="float32")
  vision, offsets = pack_images([image], config.vision)
  index_T = np.full(len(ids_T), -1, np.int32)
  shown = ids_T == config.image_token_id
  index_T[shown] = offsets[0] + np.arange(shown.sum())
  positions = mrope_positions(ids_T, [image.merged_hw],
                              config.image_token_id, config.video_token_id)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))

  @jax.jit
  def logits(params):
    model = nnx.merge(graphdef, params)
    ends = np.full((1, len(ids_T)), len(ids_T), np.int32)
    hidden, _ = model(ids_T[None], positions[None], ends, vision=vision,
                      image_index_BxT=index_T[None])
    return model.logits(hidden)[0]

  np.save(args.folder / "ours.npy", np.asarray(logits(hf.load_params(policy, config))))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
  "make": make, "transformers": transformers_logits, "ours": our_logits}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="2b", choices=("small", "2b-4layers", "2b"),
                      help="small: 0.1 GB of weights; 2b-4layers: the 2B's widths and its vocabulary, "
                      "1.6 GB; 2b: 4.3 GB")
  parser.add_argument("--folder", type=pathlib.Path,
                      help="keep checkpoint, run and export here; default: a temporary folder")
  parser.add_argument("--limit_gb", type=float, default=20.0,
                      help="a process that holds more is stopped, and the rehearsal fails")
  parser.add_argument("--override", action="append", default=[], metavar="--config.<field>=<value>",
                      help="one more argument of launch/main.py; may be repeated")
  parser.add_argument("--part", choices=(*PARTS, ""), default="", help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
