"""AXPO for a trainer of your own (verl, TRL, …): plan the resamples and credit the tokens, on plain arrays.

    python examples/own_trainer.py

It needs no JAX and no policy of ours. Put your engine in the place of `sample` and your reward in that of `right`: here a coin that
is lucky more often without the tool. What your trainer gets in the end is a list of sequences, each with an
advantage and a mask, as it has them for GRPO; the loss stays its own.
"""

import math
import random

import axpo_jax

CALL, END = 7, 8  # the tokens <tool_call> and </tool_call>
QUESTIONS, ROLLOUTS = 16, 8
PLAN = axpo_jax.ResampleConfig(ratio=0.25, k=4)  # the paper's budget and continuations a prefix


def sample(prefix: list[int], seed: int) -> tuple[list[int], list[float]]:
  """Your engine: token ids from the prefix on, and the log-probability of each."""
  draw = random.Random(seed)
  tail = [draw.randrange(10, 20) for _ in range(3)] + [END, 9] if prefix or draw.random() < 0.4 else [9]
  head = [] if prefix else [draw.randrange(10, 20) for _ in range(4)] + [CALL] * (len(tail) > 1)
  return head + tail, [math.log(draw.uniform(0.3, 1.0)) for _ in head + tail]


def right(ids: list[int], seed: int) -> float:
  """Your reward."""
  return float(random.Random(f"reward {seed}").random() < (0.2 if CALL in ids else 0.6))


def view(rollouts: list[tuple[list[int], list[float], float]], index: int) -> axpo_jax.GroupView:
  """What the plan reads of a question: who was right, who called, and how sure each call was."""
  called = [CALL in ids for ids, _, _ in rollouts]
  sure = [sum(map(math.exp, logp[(at := ids.index(CALL)):])) / len(logp[at:]) if CALL in ids else math.nan
          for ids, logp, _ in rollouts]
  return axpo_jax.GroupView([reward for *_, reward in rollouts], called, called, sure, index=index)


def main() -> None:
  groups = []
  for question in range(QUESTIONS):
    drawn = [(*sample([], seed), seed) for seed in range(question * ROLLOUTS, (question + 1) * ROLLOUTS)]
    groups.append([(ids, logp, right(ids, seed)) for ids, logp, seed in drawn])

  # Prefixes of questions whose calls were all wrong, up to and with <tool_call>: sampled on K times.
  branches = [[] for _ in groups]
  for chosen in axpo_jax.plan_resamples([view(group, i) for i, group in enumerate(groups)], PLAN):
    ids = groups[chosen.group][chosen.rollout][0]
    prefix = ids[:ids.index(CALL) + 1]
    seeds = [1000 * (1 + chosen.group * ROLLOUTS + chosen.rollout) + k for k in range(PLAN.k)]
    again = [prefix + sample(prefix, seed)[0] for seed in seeds]
    rewards = [right(ids, seed) for ids, seed in zip(again, seeds)]
    branches[chosen.group].append((axpo_jax.BranchOutcome(chosen.rollout, rewards), again))

  outcomes = [axpo_jax.GroupOutcome([reward for *_, reward in group], [branch for branch, _ in found])
              for group, found in zip(groups, branches)]
  for credit in axpo_jax.assign_credit(outcomes, axpo_jax.CreditConfig()):
    if credit.branch is None:
      ids = groups[credit.group][credit.rollout][0]
    else:
      ids = branches[credit.group][credit.branch][1][credit.rollout]
    cut = ids.index(CALL) + 1 if credit.region != "all" else 0
    learns = [{"all": True, "prefix": at < cut, "continuation": at >= cut}[credit.region] for at in range(len(ids))]
    if credit.region != "all":  # the rest is GRPO's
      print(f"question {credit.group:2}  {credit.region:12}  advantage {credit.advantage:+.3f}  "
            f"learns {sum(learns)} of {len(ids)} tokens")


if __name__ == "__main__":
  main()
