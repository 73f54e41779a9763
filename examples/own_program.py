"""A policy in one's own program: it acts, is cut and resampled, learns, and its log is read.

    python examples/own_program.py configs/axpo_tiny.py runs/own_reward/rl/policy questions.jsonl runs/own

The arguments: a config, shipped or your own; a policy, here the one that examples/own_reward.py leaves; a file of
questions (docs/data.md); a folder for what comes out. The config names a sampler: `rollout.engine="embedded"`, or
"sglang" with the `rollout.urls` of servers that run. docs/api.md explains the code. Nothing here knows a stage, a
checkpoint's resume or a metrics file: the loop is yours.
"""

import asyncio
import pathlib
import sys

import axpo_jax


async def main(config_file: str, checkpoint: str, questions_file: str, out: str) -> dict:
  config = axpo_jax.load_config(config_file, {"model.checkpoint": checkpoint})
  questions = list(axpo_jax.read_questions(questions_file))

  async with axpo_jax.load_policy(config) as policy:
    rollout = await policy.continue_episode(policy.start(questions[0]), questions[0], seed=0)
    print(rollout.transcript.expanded_length, "tokens, reward", rollout.reward)

    # The same thinking, another call: cut behind the <tool_call> and continue.
    if (end := rollout.transcript.prefix_end()) is not None:
      again = await policy.continue_episode(rollout.transcript.cut(end), questions[0], seed=1)
      print("the same thinking, another call: reward", again.reward)

    for step in range(2):
      groups = await policy.sample(questions[:config.rl.questions], seed=step)
      metrics = await policy.train_step(groups)
      print(f"step {policy.steps_done}: gradient norm {metrics['train/grad_norm']:.3f}")
    policy.write_log(groups, f"{out}/step.jsonl")
    policy.save(f"{out}/policy")

  logs = axpo_jax.read_logs([f"{out}/step.jsonl"])
  figures = axpo_jax.diagnose_logs(logs.traces)
  print(figures["rollouts"], "rollouts,", figures["calls"], "calls")
  return figures


if __name__ == "__main__":
  pathlib.Path(sys.argv[4]).mkdir(parents=True, exist_ok=True)
  asyncio.run(main(*sys.argv[1:]))
