"""The main job's speed against plain PyTorch, in miniature.

  python benchmarks/main_job.py [--policy FOLDER] [--repetitions 5] [--parts sampling,prefill,training]

Three measurements, each a median with its smallest and largest value:

  sampling  new tokens per second: the embedded engine against `transformers` `generate`
  prefill   prompt tokens computed in an AXPO step, with and without prefix sharing
  training  trajectory tokens per second: the Learner's packed step against a padded PyTorch step

Both sides hold the same weights in float32, use all cores, and take turns (A B A B ...), so that a
machine that drifts slows both. Their first call, which compiles, is reported apart. What each side
is given is said at its class; where there was a choice PyTorch has the faster option.

Legend: B rows, T tokens, P patches, C values of a patch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # PyTorch runs on the CPU as well
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from axpo_jax.agent.transcript import Transcript
from axpo_jax.config import ASSETS
from axpo_jax.data.question import Question
from axpo_jax.model import hf
from axpo_jax.model.images import ProcessedImage
from axpo_jax.rl.resample import prefix_budget
from axpo_jax.rollout.engine import EngineStats, SampleRequest
from axpo_jax.rollout.teacher_engine import TeacherEngine
from axpo_jax.train import build, collect, seeds
from axpo_jax.train.batch import batch_shards, packing_metrics
from axpo_jax.train.packing import Example, pack
from axpo_jax.train.rl import Recipe
from axpo_jax.train.step import Learner, supervised_objective
from configs import axpo_tiny

PARTS = ("sampling", "prefill", "training")
PROMPTS, NEW_TOKENS = 32, 64
TRAJECTORIES = 64


def main() -> None:
  args = _arguments()
  transformers_logging.set_verbosity_error()
  torch.set_num_threads(os.cpu_count())
  with tempfile.TemporaryDirectory() as scratch:
    config = axpo_tiny.get_config()
    policy = _policy(config, args.policy, pathlib.Path(scratch))
    bench = build.workbench(config)
    params = build.load_params(bench, policy, config.seed)
    _print_machine(config, params, args, policy)
    rows, notes = [], []
    for part in args.parts.split(","):
      row, note = {"sampling": sampling, "prefill": prefill, "training": training}[part](
        config, bench, params, policy, args.repetitions)
      rows.append(row)
      notes.append(note)
  _print_table(rows)
  print("\n".join(notes))


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--policy", default=str(ASSETS / "warm_start"), help=(
    "folder in Hugging Face layout; random parameters where it does not exist"))
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
  args = parser.parse_args()
  if unknown := set(args.parts.split(",")) - set(PARTS):
    parser.error(f"--parts names {sorted(unknown)}; there are {PARTS}")
  if args.repetitions < 1:
    parser.error(f"--repetitions={args.repetitions} must be at least 1")
  return args


def _policy(config: ConfigDict, folder: str, scratch: pathlib.Path) -> pathlib.Path:
  """The policy's folder, made of random parameters where there is none; set in the config."""
  path = pathlib.Path(folder)
  if not (path / "config.json").exists():
    path, tokenizer = scratch / "policy", ASSETS / "tiny_tokenizer"
    config.model.update(checkpoint="", preset="tiny", tokenizer=str(tokenizer))
    bench = build.workbench(config)
    params = build.load_params(bench, "", config.seed)
    hf.save_checkpoint_hf(path, params, bench.model_config, tokenizer_from=tokenizer)
  config.model.update(checkpoint=str(path), preset="", tokenizer="")
  return path


# Clocks and tables ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
  """One of two that are compared: `run` is timed, `prepare` is not."""

  run: Callable[[], None]
  prepare: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of the first call, and of every later one."""

  first: float
  later: list[float]


def take_turns(sides: Sequence[Side], repetitions: int) -> list[Times]:
  """A first call of each side, then A B A B ..."""
  seconds: list[list[float]] = [[] for _ in sides]
  for _ in range(repetitions + 1):
    for side, measured in zip(sides, seconds, strict=True):
      side.prepare()
      start = time.perf_counter()
      side.run()
      measured.append(time.perf_counter() - start)
  return [Times(measured[0], measured[1:]) for measured in seconds]


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table; `gains` are ours over theirs (or theirs over ours), pair by pair."""

  name: str
  ours: list[float]
  theirs: list[float]
  gains: list[float]
  aim: float


def _speed_row(name: str, tokens: int, ours: Times, theirs: Times, aim: float) -> Row:
  return Row(name, [tokens / s for s in ours.later], [tokens / s for s in theirs.later],
             [b / a for a, b in zip(ours.later, theirs.later, strict=True)], aim)


def _spread(values: Sequence[float], digits: int = 0) -> str:
  def text(value):
    return f"{value:,.{digits}f}"
  return f"{text(statistics.median(values))} ({text(min(values))}-{text(max(values))})"


def _print_table(rows: Sequence[Row]) -> None:
  line = "{:<40} {:>26} {:>26} {:>20} {:>7}"
  print(line.format("median (min-max)", "ours", "compared with", "gain", "aim"))
  for row in rows:
    print(line.format(row.name, _spread(row.ours), _spread(row.theirs),
                      _spread(row.gains, 2), f">={row.aim:g}"))


def _print_machine(config: ConfigDict, params, args: argparse.Namespace, policy: pathlib.Path
                   ) -> None:
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")] if cpuinfo.exists() else [platform.processor()]
  versions = ", ".join(f"{name} {metadata.version(name)}"
                       for name in ("jax", "flax", "torch", "transformers"))
  made = "random parameters" if str(policy) != args.policy else args.policy
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  text = hf.load_config(policy).text
  print(f"machine   {models[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
  print(f"versions  Python {platform.python_version()}, {versions}; backend {jax.default_backend()}")
  print(f"policy    {made}: {count:,} parameters, {text.num_layers} layers of {text.hidden_size}, "
        f"vocabulary {text.vocab_size}, {config.model.dtype}")
  print(f"sizes     {PROMPTS} prompts x {NEW_TOKENS} new tokens; {config.rl.questions} questions x "
        f"{config.rl.num_rollouts} rollouts; {TRAJECTORIES} trajectories; "
        f"{args.repetitions} repetitions\n", flush=True)


# PyTorch --------------------------------------------------------------------------------------


class PyTorch:
  """transformers' own model and `generate`, SDPA attention, all cores.

  Sampling: inference mode, dynamic KV cache, left padding, temperature 1, top-k and top-p off (no
  logits processor at all), no end token.
  Training: right padding, one trajectory a row, all rows in one pass; cross-entropy of the same
  targets, gradient clipping, fused AdamW. Positions, as usual, are the model's own business.
  """

  def __init__(self, policy: pathlib.Path):
    # SDPA beats the eager attention here, and float32 beats bfloat16 at these sizes.
    self.model = Qwen3VLForConditionalGeneration.from_pretrained(
      policy, dtype=torch.float32, attn_implementation="sdpa")
    self._image_id = self.model.config.image_token_id

  def inputs(self, rows: Sequence[tuple[Sequence[int], Sequence[ProcessedImage]]], *,
             left: bool) -> dict[str, torch.Tensor]:
    """Expanded ids and images of every row as the model's arguments."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BxT = np.zeros((len(rows), longest), np.int64)
    mask_BxT = np.zeros_like(ids_BxT)
    for row, (ids, _) in enumerate(rows):
      here = slice(longest - len(ids), None) if left else slice(len(ids))
      ids_BxT[row, here], mask_BxT[row, here] = ids, 1
    images = [image for _, images in rows for image in images]
    arrays = {
      "input_ids": ids_BxT, "attention_mask": mask_BxT,
      "mm_token_type_ids": (ids_BxT == self._image_id).astype(np.int64),
      "pixel_values": np.concatenate([image.patches_PxC for image in images]),
      "image_grid_thw": np.array([(1, *image.grid_hw) for image in images]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

  def generate(self, inputs: dict[str, torch.Tensor], new_tokens: int) -> None:
    options = GenerationConfig(
      do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
      use_cache=True, eos_token_id=None, pad_token_id=0)
    self.model.eval()
    with torch.inference_mode():
      out = self.model.generate(**inputs, generation_config=options)
    assert out.shape[1] == inputs["input_ids"].shape[1] + new_tokens

  def trainer(self, section: ConfigDict) -> Callable[[dict, torch.Tensor], float]:
    """The function (inputs, labels_BxT, -100 = no target) -> loss, one optimizer step."""
    model = self.model.train()
    optimizer = torch.optim.AdamW(
      model.parameters(), lr=section.learning_rate, betas=(section.b1, section.b2),
      eps=section.eps, weight_decay=section.weight_decay, fused=True)

    def step(inputs, labels_BxT):
      logits_BxTxV = model(**inputs, use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(
        logits_BxTxV[:, :-1].flatten(0, 1), labels_BxT[:, 1:].flatten())
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
      optimizer.step()
      return loss.item()

    return step


# (a) Sampling ---------------------------------------------------------------------------------


def sampling(config, bench, params, policy, repetitions) -> tuple[Row, str]:
  """32 prompts with an image each, the same number of new tokens, nothing cached beforehand."""
  with config.unlocked():
    config = ConfigDict(config)
  config.eval.questions = PROMPTS
  with _engine(config, bench, params) as (engine, runner):
    actor = build.actor(config, bench, engine)
    starts = [actor.start(question) for question in build.eval_questions(config)]
    shape = dataclasses.replace(actor.sampling, max_new_tokens=NEW_TOKENS, stop_ids=())
    requests = [
      SampleRequest(tuple(start.ids), tuple(image.shown for image in start.images), shape, (seed,))
      for seed, start in enumerate(starts)]
    theirs = PyTorch(policy)
    inputs = theirs.inputs([_expanded(start) for start in starts], left=True)

    async def sample():
      samples = await asyncio.gather(*map(engine.generate, requests))
      assert all(len(sample.ids) == NEW_TOKENS for [sample] in samples)

    sides = [
      # An update of the weights drops the cached prompts, as every training step does.
      Side(lambda: runner.run(sample()), lambda: runner.run(engine.update_weights(params, 0))),
      Side(lambda: theirs.generate(inputs, NEW_TOKENS))]
    times = take_turns(sides, repetitions)
  row = _speed_row(f"sampling, new tokens/s, batch {PROMPTS}", PROMPTS * NEW_TOKENS, *times, aim=10)
  return row, (
    f"sampling: prompts of {min(map(_length, starts))}-{max(map(_length, starts))} tokens; time "
    f"includes images and prefill; {_first_calls(times)}")


def _expanded(transcript: Transcript) -> tuple[np.ndarray, list[ProcessedImage]]:
  return transcript.expand().ids_T, [image.shown for image in transcript.images]


def _length(transcript: Transcript) -> int:
  return transcript.expanded_length


def _first_calls(times: Sequence[Times]) -> str:
  ours, theirs = times
  return f"first call, compilation included: ours {ours.first:.1f} s, PyTorch {theirs.first:.1f} s"


@contextlib.contextmanager
def _engine(config, bench, params) -> Iterator[tuple[build.Engine, asyncio.Runner]]:
  with asyncio.Runner() as runner:
    engine = build.engine(config, bench, params)
    try:
      yield engine, runner
    finally:
      runner.run(engine.close())


# (b) Prefill ----------------------------------------------------------------------------------


def prefill(config, bench, params, _policy, repetitions) -> tuple[Row, str]:
  """Steps of AXPO on different questions: rollouts, then the continuations of frozen prefixes.

  Without sharing every request computes its whole prompt but the last token, which is decode's; that
  is what was computed and what came from the cache, added up.
  """
  batches = build.question_batches(config)
  computed, whole, forced, branches = [], [], 0, 0
  with _engine(config, bench, params) as (engine, runner):
    actor = build.actor(config, bench, engine)
    for number in range(repetitions):
      runner.run(engine.update_weights(params, number))
      engine.stats(reset=True)
      natural, made = runner.run(_step(config, bench, actor, next(batches), number))
      forced, branches = forced + (not natural), branches + made
      stats: EngineStats = engine.stats()
      computed.append(stats.prefill_tokens_computed)
      whole.append(stats.prefill_tokens_computed + stats.cached_tokens)
  gains = [b / a for a, b in zip(computed, whole, strict=True)]
  note = (f"prefill: {repetitions} steps on different questions, {branches / repetitions:g} prefixes "
          f"a step with {config.rl.resample.k} continuations each")
  if forced:
    note += (f"; in {forced} of the steps no group triggered, and prefixes of the scripted teacher "
             "took their place (their thinking is not in the cache as a rollout's own would be)")
  return Row("prefill, prompt tokens/step", computed, whole, gains, aim=3), note


async def _step(config, bench, actor: collect.Actor, questions: list[Question], number: int
                ) -> tuple[bool, int]:
  """One step's sampling; returns whether groups triggered by themselves, and the prefixes used."""
  recipe, seed = Recipe.from_config(config.rl).resample, seeds.derive(config.seed, "rl", number)
  groups = await collect.sample_groups(actor, questions, config.rl.num_rollouts, seed)
  await collect.resample(actor, groups, recipe, seed)
  if made := sum(len(group.branches) for group in groups):
    return True, made
  budget = prefix_budget(len(questions) * config.rl.num_rollouts, recipe)
  chosen = questions[:budget]
  prefixes = [await _teacher_prefix(config, bench, actor, question) for question in chosen]
  await asyncio.gather(*(
    actor.roll(prefix.copy(), question, seeds.derive(seed, "k", i, k))
    for i, (prefix, question) in enumerate(zip(prefixes, chosen)) for k in range(recipe.k)))
  return False, len(chosen)


async def _teacher_prefix(config, bench, actor: collect.Actor, question: Question) -> Transcript:
  """The teacher's transcript up to and including its first opening tool-call tag."""
  habits = build.TeacherConfig(**config.sft.teacher | {"p_tool_small": 1.0, "p_tool_large": 1.0})
  teacher = dataclasses.replace(
    actor, engine=TeacherEngine(bench.chat, {question.id: question}, habits))
  rollout = await teacher.roll(teacher.start(question), question, seed=0)
  return rollout.transcript.cut(rollout.transcript.prefix_end())


# (c) Training ---------------------------------------------------------------------------------


def training(config, bench, params, policy, repetitions) -> tuple[Row, str]:
  """The same 64 trajectories (the teacher's, of different questions), the same loss, AdamW."""
  examples, _ = next(iter(_with_examples(config, bench)))
  ours, our_losses, batches = _learner_side(config, bench, params, examples)
  theirs, their_losses = _pytorch_side(config, policy, examples)
  times = take_turns([ours, theirs], repetitions)
  np.testing.assert_allclose(our_losses[0], their_losses[0], rtol=1e-4,
                             err_msg="the sides do not compute the same loss")
  tokens = sum(map(len, examples))
  row = _speed_row("training, trajectory tokens/s", tokens, *times, aim=1.5)
  longest, packed = max(map(len, examples)), packing_metrics(batches)
  return row, (
    f"training: {tokens:,} tokens in trajectories of {min(map(len, examples))}-{longest}; fill: ours "
    f"{packed['pack/fill']:.0%} of {len(batches)} x {config.batch.rows} x {config.batch.length}, "
    f"PyTorch {tokens / len(examples) / longest:.0%} of {len(examples)} x {longest}; first loss "
    f"{our_losses[0]:.5f} and {their_losses[0]:.5f}; {_first_calls(times)}")


def _with_examples(config, bench) -> build.SftBatches:
  with config.unlocked():
    config = ConfigDict(config)
  config.sft.examples = TRAJECTORIES
  return build.sft_batches(config, bench)


def _learner_side(config, bench, params, examples: Sequence[Example]):
  learner = Learner(
    bench.model_config, build.optimizer(config.optimizer, 100, False), supervised_objective(),
    bench.mesh, bench.rules, chunk=config.batch.logprob_chunk)
  batches = pack(
    examples, rows=config.batch.rows, length=config.batch.length,
    vision_config=bench.model_config.vision,
    rows_multiple_of=batch_shards(bench.mesh, bench.rules))
  # The state's buffers are donated at every step: a copy, since `params` are others' too.
  state, losses = learner.init(jax.tree.map(lambda x: x.copy(), params), config.seed), []

  def step():
    nonlocal state
    state, result = learner.update(state, batches)
    losses.append(learner.metrics(result, batches, tempfile.gettempdir())["train/loss"])
    jax.block_until_ready(state)

  return Side(step), losses, batches


def _pytorch_side(config, policy, examples: Sequence[Example]):
  pytorch = PyTorch(policy)
  step = pytorch.trainer(config.optimizer)
  inputs = pytorch.inputs([(e.ids_T, e.images) for e in examples], left=False)
  labels_BxT = torch.full_like(inputs["input_ids"], -100)
  for row, example in enumerate(examples):
    labels = np.where(example.loss_mask_T, example.ids_T, -100)
    labels_BxT[row, :len(example)] = torch.from_numpy(labels)
  losses = []
  return Side(lambda: losses.append(step(inputs, labels_BxT))), losses


if __name__ == "__main__":
  main()
