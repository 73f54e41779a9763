"""The main job's speed against plain PyTorch, in miniature.

  python benchmarks/main_job.py [--policy FOLDER] [--repetitions 5] [--parts sampling,training]

Five measurements, each a median with its smallest and largest value:

  sampling  new tokens per second of 32 prompts: the embedded engine against `transformers` `generate`
  rollouts  the same for 4 questions with 8 rollouts each, as in a step of RL
  prefill   prompt tokens computed in an AXPO step, with and without prefix sharing
  training  trajectory tokens per second: the Learner's packed step against a padded PyTorch step
  groups    the same for 8 questions with 8 trajectories each, as in a step of RL

Both sides hold the same weights in float32 and may use all cores (PyTorch uses one where that is
faster for it). They take turns (A B A B ...), so that a machine that drifts slows both. Run it on an
idle machine all the same: next to other work the gains mean nothing. Our first call, which compiles,
is reported apart. What PyTorch is given is said in `torch_side.py`.

Legend: B rows, T tokens.
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
from transformers.utils import logging as transformers_logging

from axpo_jax import seeds
from axpo_jax.agent.transcript import Transcript
from axpo_jax.config import ASSETS
from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import Engine, EngineStats, SampleRequest
from axpo_jax.miniworld.engine import TeacherEngine
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model import flops, hf
from axpo_jax.model.config import ModelConfig
from axpo_jax.model.images import ProcessedImage
from axpo_jax.rl.resample import prefix_budget
from axpo_jax.rollouts import collect
from axpo_jax.stages import actors, engines, learners, policies, sft
from axpo_jax.stages.context import run_context
from axpo_jax.stages.questions import eval_questions, question_batches
from axpo_jax.stages.rl import Recipe
from axpo_jax.train.batch import batch_shards, packing_metrics, targets
from axpo_jax.train.examples import supervised
from axpo_jax.train.packing import Example, pack
from axpo_jax.train.step import Learner, supervised_objective
from benchmarks.torch_side import PyTorch, choose_threads
from configs import axpo_tiny

PARTS = ("sampling", "rollouts", "prefill", "training", "groups")
PROMPTS, NEW_TOKENS = 32, 64
TRAJECTORIES = 64


def main() -> None:
  args = _arguments()
  transformers_logging.set_verbosity_error()
  transformers_logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as scratch:
    config = perception(axpo_tiny.get_config())
    policy = checkpoint(config, args.policy, pathlib.Path(scratch))
    context = run_context(config)
    params = policies.load_params(context, policy, config.seed)
    _print_machine(config, params, args, policy)
    _print_line("median (min-max)", "ours", "compared with", "gain", "aim")
    for part in args.parts.split(","):
      row, note = _MEASURED[part](
        config, context, params, policy, args.repetitions)
      # At once: a run that is cut short keeps what it has measured.
      _print_line(row.name, _spread(row.ours), _spread(row.theirs), _spread(row.gains, 2),
                  f">={row.aim:g}")
      print(f"  {note}", flush=True)


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


def perception(config: ConfigDict) -> ConfigDict:
  """The config with the one family whose prompts all have an image, and its tool."""
  config.data.miniworld.families.update(search=0.0, reasoning=0.0)
  config.agent.update(tools=("image_zoom_in",), scopes=("read_image",))
  return config


def checkpoint(config: ConfigDict, folder: str, scratch: pathlib.Path) -> pathlib.Path:
  """The policy's folder, made of random parameters where there is none; set in the config."""
  path = pathlib.Path(folder)
  if not (path / "config.json").exists():
    path, tokenizer = scratch / "policy", ASSETS / "tiny_tokenizer"
    config.model.update(checkpoint="", preset="tiny", tokenizer=str(tokenizer))
    context = run_context(config)
    params = policies.load_params(context, "", config.seed)
    hf.save_checkpoint_hf(path, params, context.model_config, tokenizer_from=tokenizer)
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
  """Seconds of the first call and of the later ones; CPU seconds (all threads) of the later."""

  first: float
  later: list[float]
  cpu: list[float]


def take_turns(sides: Sequence[Side], repetitions: int) -> list[Times]:
  """A first call of each side, then A B A B ..."""
  wall, cpu = [[] for _ in sides], [[] for _ in sides]
  for _ in range(repetitions + 1):
    for number, side in enumerate(sides):
      side.prepare()
      start, cpu_start = time.perf_counter(), time.process_time()
      side.run()
      wall[number].append(time.perf_counter() - start)
      cpu[number].append(time.process_time() - cpu_start)
  return [Times(w[0], w[1:], c[1:]) for w, c in zip(wall, cpu, strict=True)]


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


def _print_line(*cells: str) -> None:
  print("{:<40} {:>26} {:>26} {:>20} {:>7}".format(*cells), flush=True)


def _print_machine(config: ConfigDict, params, args: argparse.Namespace, policy: pathlib.Path
                   ) -> None:
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")] if cpuinfo.exists() else [platform.processor()]
  versions = ", ".join(f"{name} {metadata.version(name)}"
                       for name in ("jax", "flax", "torch", "transformers"))
  made = "random parameters" if str(policy) != args.policy else args.policy
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  text = ModelConfig.from_hf(policy).text
  load, backend = os.getloadavg()[0], jax.default_backend()
  print(f"machine   {models[0]}, {os.cpu_count()} cores, load {load:.1f} at the start")
  print(f"versions  Python {platform.python_version()}, {versions}; backend {backend}")
  print(f"policy    {made}: {count:,} parameters, {text.num_layers} layers of {text.hidden_size}, "
        f"vocabulary {text.vocab_size}, {config.model.dtype}")
  print(f"sizes     {PROMPTS} prompts x {NEW_TOKENS} new tokens; {config.rl.questions} questions x "
        f"{config.rl.num_rollouts} rollouts; {TRAJECTORIES} trajectories; "
        f"{args.repetitions} repetitions\n", flush=True)
  if load > 0.5 * os.cpu_count():
    print("BUSY MACHINE: the speeds and gains below are not results. A thread that waits for\n"
          "a core holds up its whole pool, which can slow one side tenfold and not the other.\n")


# (a) Sampling ---------------------------------------------------------------------------------


def sampling(config, context, params, policy, repetitions) -> tuple[Row, str]:
  """32 prompts with an image each, the same number of new tokens, nothing cached beforehand."""
  return _sampling("sampling", PROMPTS, config, context, params, policy, repetitions)


def rollouts(config, context, params, policy, repetitions) -> tuple[Row, str]:
  """The same number of prompts, of fewer questions: each is asked as often as a step of RL does."""
  return _sampling("rollouts", PROMPTS // config.rl.num_rollouts, config, context, params, policy,
                   repetitions)


def _sampling(name, questions, config, context, params, policy, repetitions) -> tuple[Row, str]:
  with config.unlocked():
    config = ConfigDict(config)
  config.eval.questions = questions
  with running_engine(config, context, params) as (engine, runner):
    actor = actors.make_actor(config, context, engine)
    different = [actor.start(question) for question in eval_questions(config)]
    starts = [start for start in different for _ in range(PROMPTS // questions)]
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
    threads = choose_threads(sides[1].run)
    times = take_turns(sides, repetitions)
  row = _speed_row(f"{name}, new tokens/s, {questions} x {PROMPTS // questions}",
                   PROMPTS * NEW_TOKENS, *times, aim=10)
  return row, (
    f"{name}: prompts of {min(map(_length, starts))}-{max(map(_length, starts))} tokens; time "
    f"includes images and prefill; {_calls(times, threads)}\n  "
    + _bound(context.model_config, different, statistics.median(times[1].later)))


def _bound(config: ModelConfig, starts: Sequence[Transcript], theirs: float) -> str:
  """What the gain could be at most, if these prompts and the new tokens cost nothing but their matrix
  products and the memory traffic of reading the cache, each at this machine's best speed."""
  prompts = [_length(start) for start in starts]
  longest, new = statistics.mean(prompts) + NEW_TOKENS / 2, PROMPTS * NEW_TOKENS
  patches = [image.shown.num_patches for start in starts for image in start.images]
  prefilled = flops.needed(config, tokens=sum(prompts), targets=0, patches=sum(patches),
                           seen=statistics.mean(prompts) / 2, seen_patches=statistics.mean(patches))
  decoded = flops.needed(config, tokens=new, targets=new, patches=0, seen=longest, seen_patches=0)
  text = config.text
  cache = new * longest * 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
  flop_rate, byte_rate = _machine_speed()
  seconds = (prefilled + decoded) / flop_rate + cache / byte_rate
  return (f"at most {theirs / seconds:.1f}: {(prefilled + decoded) / 1e9:.1f} GFLOP of products at "
          f"{flop_rate / 1e9:.0f} GFLOP/s and {cache / 1e9:.1f} GB of cache at "
          f"{byte_rate / 1e9:.0f} GB/s take {seconds:.3f} s, PyTorch {theirs:.3f} s")


def _machine_speed() -> tuple[float, float]:
  """FLOPs a second of a large float32 product, bytes a second of reading a large array; the best of ten."""
  n = 1024
  square, big = np.ones((n, n), np.float32), jax.numpy.ones(2**25, np.float32)

  def best(call) -> float:
    times = []
    for _ in range(11):
      start = time.perf_counter()
      jax.block_until_ready(call())
      times.append(time.perf_counter() - start)
    return min(times[1:])  # without the first, which compiles

  return (2 * n**3 / best(lambda: square @ square),
          big.nbytes / best(lambda: jax.numpy.sum(big)))


def _expanded(transcript: Transcript) -> tuple[np.ndarray, list[ProcessedImage]]:
  return transcript.expand().ids_T, [image.shown for image in transcript.images]


def _length(transcript: Transcript) -> int:
  return transcript.expanded_length


def _calls(times: Sequence[Times], threads: int) -> str:
  ours, theirs = times
  return (f"PyTorch with {threads} threads of {os.cpu_count()}; CPU s a call: ours "
          f"{_spread(ours.cpu, 2)}, PyTorch {_spread(theirs.cpu, 2)}; our first call, compilation "
          f"included: {ours.first:.1f} s")


@contextlib.contextmanager
def running_engine(config, context, params) -> Iterator[tuple[Engine, asyncio.Runner]]:
  with asyncio.Runner() as runner:
    engine = engines.make_engine(config, context, params, (), pathlib.Path(tempfile.gettempdir()))
    try:
      yield engine, runner
    finally:
      runner.run(engine.close())


# (b) Prefill ----------------------------------------------------------------------------------


def prefill(config, context, params, _policy, repetitions) -> tuple[Row, str]:
  """Steps of AXPO on different questions: rollouts, then the continuations of frozen prefixes.

  Without sharing every request computes its whole prompt but the last token, which is decode's:
  what was computed and what came from the cache, added up.
  """
  batches = question_batches(config)
  computed, whole, forced, branches = [], [], 0, 0
  with running_engine(config, context, params) as (engine, runner):
    actor = actors.make_actor(config, context, engine)
    for number in range(repetitions):
      runner.run(engine.update_weights(params, number))
      engine.stats(reset=True)
      natural, made = runner.run(_step(config, context, actor, next(batches), number))
      forced, branches = forced + (not natural), branches + made
      stats: EngineStats = engine.stats()
      computed.append(stats.prefill_tokens_computed)
      whole.append(stats.prefill_tokens_computed + stats.cached_tokens)
  gains = [b / a for a, b in zip(computed, whole, strict=True)]
  note = (f"prefill: {repetitions} steps on different questions, {branches / repetitions:g} "
          f"prefixes a step with {config.rl.resample.k} continuations each")
  if forced:
    note += (f"; in {forced} of the steps no group triggered, and prefixes of the scripted teacher "
             "took their place (their thinking is not in the cache as a rollout's own would be)")
  return Row("prefill, prompt tokens/step", computed, whole, gains, aim=3), note


async def _step(config, context, actor: collect.Actor, questions: list[Question], number: int
                ) -> tuple[bool, int]:
  """One step's sampling; returns whether groups triggered by themselves, and the prefixes used."""
  recipe, seed = Recipe.from_config(config.rl).resample, seeds.derive(config.seed, "rl", number)
  groups = await collect.sample_groups(actor, questions, config.rl.num_rollouts, seed)
  await collect.resample(actor, groups, recipe, seed)
  if made := sum(len(group.branches) for group in groups):
    return True, made
  budget = prefix_budget(len(questions) * config.rl.num_rollouts, recipe)
  chosen = questions[:budget]
  prefixes = [await _teacher_prefix(config, context, actor, question) for question in chosen]
  await asyncio.gather(*(
    actor.roll(prefix.copy(), question, seeds.derive(seed, "k", i, k))
    for i, (prefix, question) in enumerate(zip(prefixes, chosen)) for k in range(recipe.k)))
  return False, len(chosen)


async def _teacher_prefix(config, context, actor: collect.Actor, question: Question) -> Transcript:
  """The teacher's transcript up to and including its first opening tool-call tag."""
  always = {"p_tool_small": 1.0, "p_tool_large": 1.0}
  habits = TeacherConfig(**dict(config.sft.teacher) | always)
  teacher = dataclasses.replace(
    actor, engine=TeacherEngine(context.chat, {question.id: question}, habits))
  rollout = await teacher.roll(teacher.start(question), question, seed=0)
  return rollout.transcript.cut(rollout.transcript.prefix_end())


# (c) Training ---------------------------------------------------------------------------------


def training(config, context, params, policy, repetitions) -> tuple[Row, str]:
  """64 trajectories of the teacher, of as many questions: they share the system prompt alone."""
  with config.unlocked():
    few = ConfigDict(config)
  few.sft.examples = TRAJECTORIES
  examples, _ = next(iter(sft.sft_batches(few, context)))
  return _training("training", examples, config, context, params, policy, repetitions)


def groups(config, context, params, policy, repetitions) -> tuple[Row, str]:
  """64 trajectories of the teacher in groups, as in a step of RL: each question's share its prompt."""
  examples = asyncio.run(_grouped_examples(config, context))
  return _training("groups of 8", examples, config, context, params, policy, repetitions)


async def _grouped_examples(config, context) -> list[Example]:
  size = config.rl.num_rollouts
  questions = next(question_batches(config))[:TRAJECTORIES // size]
  engine = TeacherEngine(context.chat, {question.id: question for question in questions},
                         TeacherConfig(**config.sft.teacher))
  teacher = actors.make_actor(config, context, engine)
  rollouts = await asyncio.gather(*(
    teacher.roll(teacher.start(question), question, seeds.derive(config.seed, question.id, i))
    for question in questions for i in range(size)))
  return [supervised(rollout, context.model_config.image_token_id) for rollout in rollouts]


def _training(name, examples, config, context, params, policy, repetitions) -> tuple[Row, str]:
  """The same trajectories, the same loss, AdamW."""
  ours, our_losses, batches = _learner_side(config, context, params, examples)
  theirs, their_losses = _pytorch_side(config, policy, examples)
  threads = choose_threads(theirs.run)
  times = take_turns([ours, theirs], repetitions)
  # Both lists begin with the loss of the initial weights.
  np.testing.assert_allclose(our_losses[0], their_losses[0], rtol=1e-4,
                             err_msg="the sides do not compute the same loss")
  tokens = sum(map(len, examples))
  row = _speed_row(f"{name}, trajectory tokens/s", tokens, *times, aim=1.5)
  longest, packed = max(map(len, examples)), packing_metrics(batches, examples)
  return row, (
    f"{name}: {tokens:,} tokens in trajectories of {min(map(len, examples))}-{longest}, of which we "
    f"compute {packed['pack/tokens']:,.0f}; fill: "
    f"ours {packed['pack/fill']:.0%} of {len(batches)} x {config.batch.rows} x "
    f"{config.batch.length}, PyTorch {tokens / len(examples) / longest:.0%} of {len(examples)} x "
    f"{longest}; first loss {our_losses[0]:.5f} and {their_losses[0]:.5f}; "
    f"{_calls(times, threads)}")


def _learner_side(config, context, params, examples: Sequence[Example]):
  learner = Learner(
    context.model_config, learners.optimizer(config.optimizer, 100, False), supervised_objective(),
    context.mesh, context.rules, chunk=config.batch.logprob_chunk)
  batches = pack(
    examples, rows=config.batch.rows, length=config.batch.length,
    vision_config=context.model_config.vision,
    rows_multiple_of=batch_shards(context.mesh, context.rules))
  # The state's buffers are donated at every step: a copy, since `params` are others' too.
  state, losses = learner.init(jax.tree.map(lambda x: x.copy(), params)), []

  def step():
    nonlocal state
    state, result = learner.update(state, batches, targets(batches))
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


_MEASURED = {"sampling": sampling, "rollouts": rollouts, "prefill": prefill, "training": training,
             "groups": groups}

if __name__ == "__main__":
  main()
