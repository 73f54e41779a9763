"""Simulates training steps: where their time goes, and what each way of using the machines brings.

  python benchmarks/simulate.py [--samplers=4 --trainers=4]  an 8B on H100s
  python benchmarks/simulate.py --gpus=64 --split             how to divide GPUs
  python benchmarks/simulate.py --run=runs/axpo_tiny          a run's own rollouts and speeds
  python benchmarks/simulate.py --run=runs/axpo_tiny --check  predicts half of a run's steps from the other half

Needs neither a GPU nor jax. The events are those of the real loop: requests at servers that batch continuously, tools,
the plan of the continuations by the run's own code, updates, pushes, steps of staleness
(`simulate_steps.py`, `simulate_servers.py`). Where the numbers come from: `simulate_inputs.py`, a comment at each.
`--run` needs a run whose steps were dumped (--config.log.dump_every=1).

Left out: failures, evaluations, checkpoints, image decoding on the client, and that tools share CPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax.rl.resample import ResampleConfig
from benchmarks.simulate_inputs import (
  WORKLOADS,
  Measured,
  MeasuredStep,
  fit_plant,
  h100_8b,
  read_run,
  resample_config,
)
from benchmarks.simulate_servers import Plant
from benchmarks.simulate_steps import Policy, Run, Step

WARM = 4  # steps before those that count: with the same number, all policies are measured on the same questions
TODAY = Policy()
AHEAD = Policy(staleness=1)
ALL = dataclasses.replace(AHEAD, resample="exact", overlap=True)
# Each table compares its rows with the first.
TABLES: dict[str, dict[str, Policy]] = {
  "What does each switch bring alone, strictly in turn?": {
    "as it is": TODAY,
    "whole pushes": Policy(delta=False),
    "resampling at once, same plan": Policy(resample="exact"),
    "resampling at once, first come": Policy(resample="first"),
    "2 rollouts more, slowest dropped": Policy(extra=2),
    "both": Policy(resample="exact", extra=2),
    "staleness 1": AHEAD,
    "staleness 2": Policy(staleness=2),
  },
  "And one step ahead?": {
    "as it is, staleness 1": AHEAD,
    "whole pushes": Policy(1, delta=False),
    "updates throw samples away": Policy(1, on_push="drop"),
    "updates wait for samples": Policy(1, on_push="drain"),
    "resampling at once, same plan": Policy(1, resample="exact"),
    "2 rollouts more, slowest dropped": Policy(1, extra=2),
    "next collection beside stragglers": Policy(1, overlap=True),
    "the same, first come first served": Policy(1, overlap=True, older_first=False),
    "beside stragglers and at once": ALL,
    "and 2 rollouts more": dataclasses.replace(ALL, extra=2),
    "staleness 2": Policy(2),
    "staleness 2, beside stragglers": Policy(2, overlap=True),
  },
}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is simulated, apart from the policy."""

  workload: object
  plant: Plant
  questions: int
  rollouts: int
  config: ResampleConfig
  gpus: int  # a server's
  steps: int
  seed: int

  def run(self, policy: Policy) -> tuple[Run, list[Step]]:
    run = Run(self.workload, self.plant, policy, questions=self.questions, rollouts=self.rollouts,
              config=self.config, seed=self.seed)
    return run, run.train(self.steps, warm=WARM)


def main(argv: Sequence[str] | None = None) -> None:
  args = _arguments(argv)
  if args.check:
    return check(args)
  case = _case(args)
  print(f"{args.run or args.workload}: {case.questions} questions x {case.rollouts} rollouts, {case.plant.servers} "
        f"servers of {case.gpus} GPU(s), {case.plant.chips} chips that train; {case.steps} steps, seed {case.seed}")
  if args.split:
    return split(args, case)
  began = time.perf_counter()
  for title, policies in TABLES.items():
    first, *others = policies
    table(title, case, {name: policies[name] for name in (first, *(name for name in others if args.only in name))})
  if args.plot:
    plot(case, Policy(args.staleness), args.plot)
  print(f"\n{time.perf_counter() - began:.0f} s", file=sys.stderr)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workload", choices=WORKLOADS, default="8b", help="lengths of the preset")
  parser.add_argument("--samplers", type=int, default=4, help="GPUs of the preset that sample")
  parser.add_argument("--trainers", type=int, default=4, help="GPUs of the preset that train")
  parser.add_argument("--gpus", type=int, default=0, help="in place of both: half of them sample")
  parser.add_argument("--tensor_parallel", type=int, default=1, choices=(1, 2, 4), help="GPUs of a server")
  parser.add_argument("--slots", type=int, default=64, help="rollout.sglang.fleet.max_concurrent")
  parser.add_argument("--questions", type=int, default=128, help="B")
  parser.add_argument("--rollouts", type=int, default=8, help="N")
  parser.add_argument("--steps", type=int, default=8, help="steps to simulate, behind those that warm up")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="of each table the first row, and those with this in their name")
  parser.add_argument("--split", action="store_true", help="seconds of a step for ways to divide --gpus")
  parser.add_argument("--run", type=pathlib.Path, help="a run's folder, in place of the preset")
  parser.add_argument("--check", action="store_true", help="predict half of the run's steps from the other half")
  parser.add_argument("--plot", help="write a picture of a step to this file")
  parser.add_argument("--staleness", type=int, default=0, help="of the picture")
  args = parser.parse_args(argv)
  for name in ("samplers", "trainers", "slots", "questions", "rollouts", "steps"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be positive")
  if args.check and not args.run:
    parser.error("--check needs --run=FOLDER, a run to predict")
  if args.split and args.gpus < 2:
    parser.error(f"--split divides --gpus={args.gpus}: name 2 or more")
  if args.gpus:
    args.samplers, args.trainers = args.gpus // 2, args.gpus - args.gpus // 2
  if args.samplers % args.tensor_parallel:
    parser.error(f"--samplers={args.samplers} GPUs are not whole servers of --tensor_parallel={args.tensor_parallel}")
  return args


def _case(args: argparse.Namespace) -> Case:
  if args.run:
    config, steps = read_run(args.run)
    dumped = [step for step in steps if step.questions]
    plant = fit_plant(config, [step for step in steps if not step.compiled], dumped)
    return Case(Measured(dumped), plant, config["rl"]["questions"], config["rl"]["num_rollouts"],
                resample_config(config), 1, args.steps, args.seed)
  return Case(WORKLOADS[args.workload], h100_8b(args.samplers, args.trainers, args.tensor_parallel, args.slots), args.questions,
              args.rollouts, ResampleConfig(), args.tensor_parallel, args.steps, args.seed)


# ---- tables


def table(title: str, case: Case, policies: dict[str, Policy]) -> None:
  """Prints a row for each policy: the step by the clock, then what servers and trainers did meanwhile."""
  print(f"\n**{title}** Seconds; those of the collection overlap with the trainer's where staleness is not 0.\n\n"
        "| | step (10-90 %) | gain | push | rollouts | their tail | continuations | update | server: decode | prefill "
        "| tools | load | idle | GPUs idle, % | trainer idle, % | GB a push | thrown, % | lag |\n" + "|---" * 18 + "|")
  first, notes = None, []
  for name, policy in policies.items():
    run, steps = case.run(policy)
    seconds = np.array([step.step_s for step in steps])
    first = first or seconds.mean()
    notes += [f"- {name}: {_dropped(steps)}"] * bool(policy.extra)
    print(f"| {name} | {_s(seconds.mean())} ({_s(np.percentile(seconds, 10))}-{_s(np.percentile(seconds, 90))}) | "
          f"{first / seconds.mean():.2f} | {' | '.join(_row(case, run, steps))} |", flush=True)
  print("\n".join(["", *notes]))


def _row(case: Case, run: Run, steps: Sequence[Step]) -> list[str]:
  def mean(value):
    return float(np.mean([value(step) for step in steps]))

  total = sum(step.step_s for step in steps)
  spent = {state: sum(server.seconds[state] for server in run.servers) / len(run.servers)
           for state in ("decode", "prefill", "tools", "load", "idle")}
  trainer_idle = 1 - sum(step.update_s for step in steps) / total
  sampling = len(run.servers) * case.gpus
  sampler_idle = (spent["tools"] + spent["load"] + spent["idle"]) / total
  idle = (sampling * sampler_idle + case.plant.chips * trainer_idle) / (sampling + case.plant.chips)
  drawn, thrown = (sum(getattr(server, name) for server in run.servers) for name in ("drawn", "thrown"))
  return [_s(mean(lambda step: step.push_s)), _s(mean(lambda step: step.rolled - step.begin)),
          _s(mean(lambda step: step.rolled - step.tail)), _s(mean(lambda step: step.collected - step.rolled)),
          _s(mean(lambda step: step.update_s)), *(_s(seconds / len(steps)) for seconds in spent.values()),
          f"{100 * idle:.0f}", f"{100 * trainer_idle:.0f}", f"{case.plant.bytes(run.policy.delta) / 1e9:.2f}",
          f"{100 * thrown / (thrown + drawn):.1f}", f"{mean(lambda step: step.lag):.1f}"]


def _dropped(steps: Sequence[Step]) -> str:
  """What over-sampling drops: it prefers what is short and does not act."""
  said = []
  for name in ("dropped", "kept"):
    rollouts = [rollout for step in steps for rollout in getattr(step, name)]
    said.append(f"{name} none" if not rollouts else f"{name} {len(rollouts) / len(steps):,.0f} a step, {np.mean([r.used_tool for r in rollouts]):.0%} with "
                f"tools, {np.mean([r.tokens for r in rollouts]):,.0f} tokens each")
  return "; ".join(said)


def _s(seconds: float) -> str:
  return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.2f}"


def split(args: argparse.Namespace, case: Case) -> None:
  """Prints seconds of a step for ways to divide the GPUs."""
  policies = {"staleness 0": TODAY, "staleness 1": AHEAD, "1, beside stragglers and at once": ALL}
  print("\n| GPUs that sample, train | " + " | ".join(policies) + " |\n" + "|---" * (1 + len(policies)) + "|")
  for eighths in range(1, 8):
    samplers = args.gpus * eighths // 8 // args.tensor_parallel * args.tensor_parallel
    if samplers:
      divided = dataclasses.replace(case, plant=h100_8b(
        samplers, args.gpus - samplers, args.tensor_parallel, args.slots))
      means = [_s(np.mean([step.step_s for step in divided.run(policy)[1]])) for policy in policies.values()]
      print(f"| {samplers}, {args.gpus - samplers} | {' | '.join(means)} |", flush=True)


# ---- against a real run


def check(args: argparse.Namespace) -> None:
  """Takes speeds and rollouts from every second step of a run, and predicts the seconds of the others."""
  config, steps = read_run(args.run)
  quiet = [step for step in steps if not step.compiled]
  fed, held = quiet[::2], quiet[1::2]
  dumped = [step for step in steps if step.questions and step not in held]
  if not dumped:
    sys.exit(f"{args.run}: all dumped steps are to be predicted; dump more of them (--config.log.dump_every=1)")
  plant = fit_plant(config, fed, dumped)
  print(f"{args.run}: speeds of {len(fed)} steps, rollouts of {len(dumped)}; {len(held)} predicted; iteration {plant.iteration_s * 1e3:.2f} ms + "
        f"{plant.sequence_s * 1e3:.3f} ms a sequence, {plant.request_s * 1e3:.2f} ms a request; update "
        f"{plant.update_s:.2f} s + {plant.row_s * 1e6:.0f} us a token\n")
  case = Case(Measured(dumped), plant, config["rl"]["questions"], config["rl"]["num_rollouts"],
              resample_config(config), 1, max(args.steps, 40), args.seed)
  predicted = case.run(TODAY)[1]
  print("| mean seconds | measured (least-most) | predicted | error, % |\n|---|---|---|---|")
  for name, value in {"rollout": lambda step: step.rolled - step.begin,
                      "resample": lambda step: step.collected - step.rolled,
                      "update": lambda step: step.update_s, "step": lambda step: step.step_s}.items():
    measured = np.array([step.metrics[f"time/{name}_s"] for step in held])
    if measured.mean() > 0.01:  # GRPO has no continuations
      found = np.mean([value(step) for step in predicted])
      print(f"| {name} | {measured.mean():.2f} ({measured.min():.2f}-{measured.max():.2f}) | {found:.2f} | "
            f"{100 * (found / measured.mean() - 1):+.0f} |")
  own = [step for step in held if step.questions]
  if own:
    errors = [abs(mine.step_s / step.metrics["time/step_s"] - 1) for mine, step in zip(_replay(case, own), own)]
    print(f"\n{len(own)} steps from their own rollouts: off by {100 * np.median(errors):.0f} % in the median and by "
          f"{100 * max(errors):.0f} % at most.")


def _replay(case: Case, steps: Sequence[MeasuredStep]) -> list[Step]:
  """Simulates each of these steps with its own rollouts."""
  return Run(Measured(steps, replay=True), case.plant, TODAY, questions=case.questions, rollouts=case.rollouts,
             config=case.config, seed=case.seed).train(len(steps))


# ---- a picture


def plot(case: Case, policy: Policy, path: str) -> None:
  """Writes a timeline of a step: running sequences of each server above, the trainer's phases below."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  run, steps = case.run(policy)
  step = steps[len(steps) // 2]
  times = np.linspace(step.end - step.step_s, step.end, 400)
  grid = np.zeros((len(run.servers), len(times)))
  for row, server in zip(grid, run.servers):
    at, count = map(np.array, zip(*server.history))
    row[:] = count[np.maximum(np.searchsorted(at, times, side="right") - 1, 0)]
  figure, (above, below) = plt.subplots(2, 1, figsize=(10, 5), sharex=True, height_ratios=(4, 1),
                                        layout="constrained")
  image = above.imshow(grid, aspect="auto", interpolation="nearest", origin="lower", cmap="viridis",
                       extent=(0, step.step_s, 0, len(grid)))
  above.set(ylabel="server", title=f"A step of {step.step_s:.0f} s, staleness {policy.staleness}")
  figure.colorbar(image, ax=above, label="running sequences")
  left = 0.0
  for name, seconds in (("push", step.push_s), ("waits", step.wait_s), ("update", step.update_s)):
    below.barh(0, seconds, left=left, label=name)
    left += seconds
  for name in ("tail", "rolled", "collected"):  # 90 % of the rollouts, all of them, all continuations
    if times[0] <= getattr(step, name) <= times[-1]:
      above.axvline(getattr(step, name) - times[0], color="white", linestyle=":")
  below.set(yticks=[], xlabel="seconds", ylabel="trainer")
  below.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.5))
  figure.savefig(path, dpi=120)
  print(f"\n{path}")


if __name__ == "__main__":
  main()
