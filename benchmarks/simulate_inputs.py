"""What `simulate.py` is fed with: shipped presets, and what a run has measured of itself.

A preset names the source of each number; "guess" means that there is none. A run's folder gives rollouts (from its
dumps: tokens of each turn, seconds of each call, rewards) and, from its metrics, the speeds of sampling and updates.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from axpo_jax.agent.transcript import SAMPLED_KINDS, Kind
from axpo_jax.rl.resample import ResampleConfig
from benchmarks.simulate_servers import Plant
from benchmarks.simulate_steps import Question, Rollout, Turn

# ---- the 8B on H100s


def h100_8b(samplers: int, chips: int, tensor_parallel: int = 1, slots: int = 64) -> Plant:
  """`samplers` GPUs sample, `chips` train; a server has so many slots (rollout.sglang.fleet.max_concurrent)."""
  servers, hosts = max(samplers // tensor_parallel, 1), math.ceil(samplers / 8)
  # Guess: each doubling of a server's GPUs makes it 1.6 times as fast.
  faster = 1.6 ** math.log2(tensor_parallel)
  return Plant(
    servers=servers, hosts=hosts, chips=chips,
    # Qwen3-8B, SGLang 0.5.3 on an H100: 7.19 ms a token with 4 requests at once (gpustack's performance lab).
    iteration_s=7.0e-3 / faster,
    # 2 FLOP for each of 8.2e9 parameters; guess: at 60 % of 989 TFLOP/s.
    sequence_s=2.8e-5 / faster,
    # 144 KiB a token (docs/sidecar.md), 3.35 TB/s (XLA's h100_sxm.txtpb); guess: at 75 % of it.
    context_s=5.9e-8 / faster,
    # Llama-3.1-8B, prompts of 8,192 tokens: 27,670 tokens/s (sgl-project/sglang, pull request 1060).
    prefill_s=1 / 27_670 / faster,
    request_s=1e-3,  # guess
    slots=slots,
    pool={1: 315_116, 2: 749_143, 4: 1_617_199}[tensor_parallel],  # docs/sidecar.md
    # 13.5 PFLOP of update and 3.1 of scoring for four rows of 24,576 tokens that are 96 % full (docs/performance.md,
    # benchmarks/README.md), at 25 % of 989 TFLOP/s: 1,400 tokens/s a chip. prime-rl, 4B, RL at 16k: 3,253 a chip.
    row_tokens=0.96 * 24_576, row_s=16.8,
    update_s=3.0,  # guess: packing, and the optimizer
    push_bytes=17.5e9,  # docs/sidecar.md
    delta_share=0.003,  # 0.15 % of the values, 4 bytes each (docs/sidecar.md)
    # Guesses: fetched, compared and summed at 4 GB/s, written at 6. verl: 5.5-6.0 s in all, 2.2-4.9 s by deltas.
    prepare_s=4.4, write_rate=6e9, load_rate=6e9,
    shared_rate=math.inf if hosts == 1 else 10e9,  # guess: one file server for all hosts; tmpfs within one
    control_s=1.5,  # guess
  )


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """Log-normal rollouts. Half of the variance of a length lies between questions, half within them (guess).

  The triggered share is what the paper reports: tools in 30 % of the rollouts, and all of them wrong in 40 % of
  the questions that try.
  """

  think: tuple[float, float]  # median tokens of a turn's thinking, sigma
  answer: tuple[float, float] = (250, 0.5)
  prompt: tuple[float, float] = (250, 0.4)
  image: tuple[float, float] = (590, 0.8)
  call: int = 60
  observed: int = 200  # with its crop
  tool_s: tuple[float, float] = (0.3, 1.5)  # guess: crops and cells in ms, searches and slow cells in seconds
  limit: int = 16_384  # agent.max_response_tokens
  hard: float = 0.25  # of the questions: no call helps

  def step(self, seed: int, number: int, questions: int, rollouts: int) -> list[Question]:
    return [self._question(np.random.default_rng([seed, number, index]), rollouts) for index in range(questions)]

  def _question(self, rng: np.random.Generator, n: int) -> Question:
    def draw(median: float, sigma: float) -> float:
      return median * math.exp(sigma * rng.normal())

    prompt = int(draw(*self.prompt) + draw(*self.image))
    # Within the question.
    think = draw(self.think[0], self.think[1] / math.sqrt(2)), self.think[1] / math.sqrt(2)
    acts, able = rng.beta(1.2, 2.8), 0.0 if rng.random() < self.hard else rng.uniform(0.2, 0.9)
    knows = rng.uniform(0.1, 0.9)
    seeds = rng.integers(1 << 62)

    def rollout(rng: np.random.Generator, tool: bool, first: int | None = None) -> Rollout:
      draw = lambda median, sigma: int(median * math.exp(sigma * rng.normal())) + 1  # noqa: E731
      turns, left, new = [], self.limit, 0
      for _ in range(int(rng.integers(1, 3)) if tool else 0):
        tokens = min((draw(*think) if first is None else first) + self.call, left)
        turns.append(Turn(new, tokens, min(self.tool_s[0] * math.exp(self.tool_s[1] * rng.normal()), 60.0)))
        left, new, first = left - tokens, self.observed, None
      turns.append(Turn(new, max(min(draw(*think) + draw(*self.answer), left), 1)))
      return Rollout(turns, tool, bool(rng.random() < (able if tool else knows)),
                     max(turns[0].tokens - self.call, 0) if tool else 0, float(rng.uniform(0.6, 1.0)))

    rollouts = [rollout(rng, bool(rng.random() < acts)) for _ in range(n)]
    return Question(prompt, rollouts, lambda i, k: rollout(np.random.default_rng([seeds, i, k]), True, first=0))


WORKLOADS = {
  "8b": Synthetic(think=(700, 0.7)),  # the lengths of benchmarks/programs.py
  "8b-long": Synthetic(think=(2_000, 0.9)),  # guess: a thinking model; 4 % of the rollouts reach the limit
}

# ---- what a run has measured


@dataclasses.dataclass(frozen=True)
class MeasuredStep:
  """questions: (prompt tokens, rollouts, continuations by the rollout that they continue), if the step was dumped.
  metrics: its line of metrics.jsonl. compiled: something was compiled in it, so its seconds say nothing."""

  questions: Sequence[tuple[int, list[Rollout], dict[int, list[Rollout]]]]
  metrics: dict[str, float]
  compiled: bool

  @property
  def tokens(self) -> int:
    """To train on, prompts once a question; counted as in the simulation."""
    return sum(prompt + sum(rollout.tokens for many in (own, *branches.values()) for rollout in many)
               for prompt, own, branches in self.questions)


@dataclasses.dataclass(frozen=True)
class Measured:
  """A workload of dumped questions: drawn from those of all `steps`, or those of each step in turn (`replay`)."""

  steps: Sequence[MeasuredStep]
  replay: bool = False

  def step(self, seed: int, number: int, questions: int, rollouts: int) -> list[Question]:
    rng, chosen = np.random.default_rng([seed, number]), self.steps[number % len(self.steps)].questions
    pool = [question for step in self.steps for question in step.questions]
    if not self.replay:
      chosen = [pool[i] for i in rng.integers(len(pool), size=questions)]
    branches = [one for *_, continued in pool for many in continued.values() for one in many]

    def question(prompt: int, own: list[Rollout], continued: dict[int, list[Rollout]]) -> Question:
      more = [own[i] for i in rng.integers(len(own), size=max(rollouts - len(own), 0))]
      salt = int(rng.integers(1 << 62))

      def continuation(i: int, k: int) -> Rollout:
        """One that was measured, of this prefix if there is one."""
        several = continued.get(i) or branches
        return several[np.random.default_rng([salt, i, k]).integers(len(several))]

      return Question(prompt, (own + more)[:rollouts], continuation)

    return [question(*one) for one in chosen]


def read_run(folder: pathlib.Path) -> tuple[dict, list[MeasuredStep]]:
  """A run's config and its steps.

  Raises:
    SystemExit: there is too little to read, or the run sampled with servers.
  """
  config = json.loads((folder / "config.json").read_text())
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  steps, programs = [], 0
  for number, metrics in enumerate((line for line in lines if "time/rollout_s" in line), 1):
    dump = folder / "rl" / "rollouts" / f"step_{number:06d}.jsonl"
    records = map(json.loads, dump.read_text().splitlines()) if dump.exists() else ()
    compiled = bool(metrics["time/compile_s"]) or metrics["time/engine_compilations"] != programs
    programs = metrics["time/engine_compilations"]
    steps.append(MeasuredStep(_questions(records), metrics, compiled))
  if sum(not step.compiled for step in steps) < 4 or not any(step.questions for step in steps):
    sys.exit(f"{folder} needs 4 steps in which nothing is compiled, and one that is dumped: run 20 or more, with "
             "--config.log.dump_every=1")
  if config["rollout"]["engine"] != "embedded":
    sys.exit(f"rollout.engine={config['rollout']['engine']}: speeds are fitted for the embedded engine only")
  return config, steps


def _questions(records: Iterable[dict]) -> list[tuple[int, list[Rollout], dict[int, list[Rollout]]]]:
  groups: dict[int, tuple[int, list[Rollout], dict[int, list[Rollout]]]] = {}
  for record in records:
    extra = record["extra"]
    _, own, branches = groups.setdefault(extra["group"], (record["first_prompt_tokens"], [], {}))
    rollout = _rollout(record, extra.get("prefix_end", record["start"]))
    (branches.setdefault(extra["source"], []) if "branch" in extra else own).append(rollout)
  return [groups[index] for index in sorted(groups)]


def _rollout(record: dict, begin: int) -> Rollout:
  """The turns of a dumped rollout behind its first `begin` tokens."""
  kinds = list(itertools.chain(*([kind] * count for kind, count in record["transcript"]["kinds"])))[begin:]
  turns, new = [], 0
  for sampled, run in itertools.groupby(kinds, lambda kind: kind in SAMPLED_KINDS):
    length = len(list(run))
    if sampled:
      seconds = sum(call["seconds"] for call in record["calls"] if call["turn"] == len(turns))
      turns.append(Turn(new, length, seconds))
    new = 0 if sampled else length
  call_at = kinds.index(Kind.CALL) + 1 if Kind.CALL in kinds else 0
  return Rollout(turns, bool(record["calls"]), record["reward"] > 0, call_at, (record["seed"] % 997) / 997)


def fit_plant(config: dict, steps: Sequence[MeasuredStep], dumped: Sequence[MeasuredStep]) -> Plant:
  """The speeds of a run with the embedded engine. None is negative.

    seconds of rollouts = a * decode iterations + b * tokens + c * turns;   of an update = d + e * tokens

  The longest rollout has as many tokens as there are iterations. Continuations are not fitted.

  Args:
    steps: whose metrics are read. dumped: that say how the run's count of tokens differs from the simulation's.
  """
  from scipy.optimize import nnls  # comes with jax

  block = config["rollout"]["embedded"]["decode_block"]

  def counts(metrics: dict[str, float]) -> list[float]:
    """Each turn draws on to the end of its block."""
    turns, more = metrics["rollout/turns_mean"] * metrics["rollout/rollouts"], (block - 1) / 2
    return [metrics["rollout/length_max"] + more * metrics["rollout/turns_max"],
            metrics["rollout/length_mean"] * metrics["rollout/rollouts"] + more * turns, turns]

  seconds = np.array([step.metrics["time/rollout_s"] for step in steps])
  # Relative errors: where others use the machine, slow steps are the wrong ones.
  rows = np.array([counts(step.metrics) for step in steps]) / seconds[:, None]
  (iteration_s, sequence_s, request_s), _ = nnls(rows, np.ones(len(rows)))
  tokens = np.array([[1.0, step.metrics["pack/tokens"]] for step in steps])
  (update_s, token_s), _ = nnls(tokens, np.array([step.metrics["time/update_s"] for step in steps]))
  counted = [step for step in dumped if step.questions]
  shared = sum(step.metrics["pack/tokens"] for step in counted) / sum(step.tokens for step in counted)
  return Plant(servers=1, iteration_s=iteration_s, sequence_s=sequence_s, request_s=request_s, block=block,
               slots=config["rollout"]["embedded"]["max_running"], update_s=update_s, row_s=token_s * shared,
               control_s=float(np.mean([step.metrics["time/weights_s"] for step in steps])))


def resample_config(config: dict) -> ResampleConfig:
  chosen = config["rl"]["resample"]
  return ResampleConfig(ratio=chosen["ratio"] if config["rl"].get("recipe") != "grpo" else 0, k=chosen["k"])
