"""How evenly a mixture of experts is used: a loss that evens it out, and metrics.

In: what a micro-batch's routers did (`experts.Load`). Out: a summand of the micro-batch's loss, and sums that
become train/router_balance, train/expert_load and train/expert_load_max.
"""

from __future__ import annotations

import jax

from axpo_jax.model import experts


def loss_and_sums(load: experts.Load, per_token: int, weight: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The load-balancing loss of one micro-batch, and metric sums. Traced.

  The loss is not a mean over tokens: that of two micro-batches together is not the mean of theirs. So unlike
  all else it depends a little on how a step is cut into micro-batches, as in other trainers.

  Args:
    load: [L, E].
    per_token: experts of a token.
    weight: of the micro-batch's targets; the loss is a sum like the others, which the update divides.
  """
  balance, imbalance_L = experts.balance_loss(load, per_token), experts.imbalance(load)
  tokens = load.copies_E[0].sum() / per_token
  sums = {"router_tokens": tokens, "router_balance": balance * tokens, "expert_load": imbalance_L.mean() * tokens,
          "expert_load_max": imbalance_L.max()}
  return balance * weight, jax.lax.stop_gradient(sums)


def metrics(sums: dict[str, float]) -> dict[str, float]:
  """Logged metrics of an update, whose names are taken out of `sums`; none of a dense model."""
  if "router_tokens" not in sums:
    return {}
  tokens = max(sums.pop("router_tokens"), 1.0)
  return {"train/router_balance": sums.pop("router_balance") / tokens,
          "train/expert_load": sums.pop("expert_load") / tokens,
          "train/expert_load_max": sums.pop("expert_load_max")}
