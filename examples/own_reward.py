"""A reward of your own: the right answer, less a little for every call that failed.

    PYTHONPATH=examples axpo-train --config=configs/axpo_tiny.py --workdir=runs/own_reward \
      --config.agent.reward="exact + own_reward:care" \
      --config.stages="('rl',)" --config.rl.steps=2 --config.rl.questions=4 --config.eval.every=-1

Two steps, in a minute. Without the last line of the command it is the whole run, with SFT before and an evaluation
behind.

`care` and its parts are metrics: rollout/reward/care/failed_calls and so on (docs/metrics.md).
"""

FREE_CHARACTERS = 2000  # of a response; what is longer costs


async def care(rollout) -> dict[str, float]:
  """Two named parts, whose sum is added to the reward.

  Args:
    rollout: an `axpo_jax.agent.reward_functions.Finished`.
  """
  failed = sum(call.error is not None for call in rollout.calls)
  over = max(0, len(rollout.response) - FREE_CHARACTERS)
  return {"failed_calls": -0.1 * min(failed, 3), "length": -0.1 * min(over / FREE_CHARACTERS, 1.0)}
