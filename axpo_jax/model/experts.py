"""A mixture of experts: each token goes through a few of a layer's small MLPs, which a router picks.

  logits = x @ router                      one number an expert
  the k largest probabilities, divided by their sum, are the weights of the chosen experts
  y = sum over them of weight * down(silu(gate(x)) * up(x))

Nothing is dropped and there is no capacity. Tokens are sorted by expert, and one grouped matrix product does
all experts:

  token    0 0 1 1 2 2   copies, k = 2           sizes of the groups: 1, 3, 2
  expert   1 2 0 1 1 2
  sorted   1 | 0 1 2 | 0 2   copies of tokens for expert 0 | 1 | 2

Experts are split over the mesh as they are stored, and have no mesh axis of their own: a layer's are collected
where its tokens are, like all other weights. Sending tokens to experts instead would move more bytes where a
device has many tokens: 24,576 tokens with 8 experts each are 1.6 GB there and back in a layer of
Qwen3-VL-30B-A3B, its experts 1.2 GB. Decoding has few tokens: there experts stay, and all devices see all
tokens.

Legend: B rows, T tokens of a row, D model, E experts, k experts of a token, F an expert's width,
R copies of tokens (B * T * k), L layers.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from axpo_jax.model import experts_gpu, sharding
from axpo_jax.model.config import TextConfig
from axpo_jax.model.layers import Linear, Maker

_TOKENS = ("batch", "length", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
  """What the routers did with the real tokens, in each layer (L in front, behind the scan).

  copies_E: how many tokens chose the expert.
  probs_E: float32, the sum of its probabilities, before the choice.
  """

  copies_E: jax.Array
  probs_E: jax.Array


class Experts(nnx.Module):
  """The router and the experts of a layer."""

  def __init__(self, config: TextConfig, make: Maker):
    D, E, F = config.hidden_size, config.experts.count, config.experts.intermediate_size
    self.per_token = config.experts.per_token
    self.router = Linear(make, (D, E), ("embed", None))
    # gate and up in one array, as in the checkpoints; an axis apart, so that F can be split.
    self.names = ("expert", "expert_in", None, "mlp"), ("expert", "mlp", "expert_in")
    self.gate_up = make.normal((E, D, 2, F), self.names[0], D)
    self.down = make.normal((E, F, D), self.names[1], F)

  def __call__(self, x_BxTxD: jax.Array, real_BxT: jax.Array) -> tuple[jax.Array, Load]:
    """Padding (where `real` is false) comes out as zeros, and is not counted."""
    probs_BxTxE = jax.nn.softmax(self.router(x_BxTxD).astype(jnp.float32), axis=-1)
    # By each device for its tokens: not every compiler splits a top-k.
    choose = sharding.local(lambda probs: tuple(jax.lax.top_k(probs, self.per_token)), _TOKENS,
                            out=(_TOKENS, _TOKENS))
    weights_BxTxk, chosen_BxTxk = choose(probs_BxTxE)
    weights_BxTxk /= weights_BxTxk.sum(-1, keepdims=True)
    weights_BxTxk = jnp.where(real_BxT[..., None], weights_BxTxk, 0).astype(x_BxTxD.dtype)
    gate_up, down = (w[...].astype(x_BxTxD.dtype) for w in (self.gate_up, self.down))
    stay = sharding.parts("expert") > 1 and sharding.stays(gate_up, x_BxTxD)
    tokens = (None,) * 3 if stay else _TOKENS
    apply = sharding.local(functools.partial(_apply, stay=stay), tokens, tokens, tokens, ("expert",), *self.names)
    y_BxTxD = apply(x_BxTxD, weights_BxTxk, chosen_BxTxk, jnp.arange(len(gate_up)), gate_up, down)
    hit_BxTxE = jnp.any(chosen_BxTxk[..., None] == jnp.arange(len(gate_up)), axis=-2) & real_BxT[..., None]
    return y_BxTxD, Load(hit_BxTxE.sum((0, 1)), jnp.where(real_BxT[..., None], probs_BxTxE, 0).sum((0, 1)))


def _apply(x_BxTxD, weights_BxTxk, chosen_BxTxk, ids_E, gate_up_ExDx2xF, down_ExFxD, *, stay: bool):
  """The weighted sum of the chosen experts: on each device of its own tokens, or (`stay`) of all tokens, to
  which every device adds what its own experts give."""
  if not stay:
    ids_E, gate_up_ExDx2xF, down_ExFxD = (
      sharding.collected(w, 0, "expert") for w in (ids_E, gate_up_ExDx2xF, down_ExFxD))
  (B, T, D), k, E = x_BxTxD.shape, chosen_BxTxk.shape[-1], len(ids_E)
  own_R = chosen_BxTxk.reshape(-1) - ids_E[0]
  here_R = (own_R >= 0) & (own_R < E)
  order_R = jnp.argsort(jnp.where(here_R, own_R, E), stable=True)  # other devices' copies stand last
  back_R = jnp.argsort(order_R)
  sizes_E = jnp.sum(own_R[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

  def product(x, w):
    if not stay:
      return grouped(x, w, sizes_E)
    # A grouped product and its gradient leave rows behind the last group undefined.
    here_Rx1 = here_R[order_R, None]
    return jnp.where(here_Rx1, grouped(jnp.where(here_Rx1, x, 0), w, sizes_E), 0)

  x_RxD = _take(x_BxTxD.reshape(-1, D), order_R // k, back_R, k)
  y_Rx2xF = product(x_RxD, gate_up_ExDx2xF.reshape(E, D, -1)).reshape(len(order_R), 2, -1)
  y_RxD = product(jax.nn.silu(y_Rx2xF[:, 0]) * y_Rx2xF[:, 1], down_ExFxD)
  y_BxTxkxD = _take(y_RxD, back_R, order_R, 1).reshape(B, T, k, D)
  y_BxTxD = jnp.einsum("btkd,btk->btd", y_BxTxkxD, weights_BxTxk, preferred_element_type=jnp.float32)
  y_BxTxD = sharding.summed(y_BxTxD.astype(x_BxTxD.dtype), "mlp")
  return sharding.summed(y_BxTxD, "expert") if stay else y_BxTxD


def grouped(x_RxD: jax.Array, w_ExDxF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """x @ w [R, F]: the first sizes[0] rows of x with w[0], the next sizes[1] with w[1], and so on.

  Rows behind the last group are undefined.
  """
  # XLA for GPUs would multiply all rows with all experts.
  if sharding.platform() == "gpu":
    return experts_gpu.grouped(x_RxD, w_ExDxF, sizes_E)
  return jax.lax.ragged_dot(x_RxD, w_ExDxF, sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x: jax.Array, index: jax.Array, back: jax.Array, copies: int) -> jax.Array:
  """x[index], where `index` names every row of x `copies` times, and row i of x became rows
  back[i * copies : (i + 1) * copies].

  So the gradient is a gather too. XLA would scatter, which adds row by row.
  """
  return x[index]


def _take_forward(x, index, back, copies):
  return x[index], back


def _take_backward(copies, back, g):
  return g[back].reshape(-1, copies, g.shape[-1]).sum(1), None, None


_take.defvjp(_take_forward, _take_backward)


def balance_loss(load: Load, per_token: int) -> jax.Array:
  """The load-balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4), as transformers computes it: over
  all layers and tokens together, `per_token` if all experts are used alike.

  Args:
    load: [L, E].
  """
  copies_E, probs_E = load.copies_E.sum(0), load.probs_E.sum(0)
  count = jnp.maximum(load.copies_E.sum() / per_token, 1)  # tokens, of all layers
  return len(probs_E) * jnp.sum(copies_E / count * (probs_E / count))


def imbalance(load: Load) -> jax.Array:
  """[L] the copies of the most used expert of each layer, over the mean; 1 is even."""
  return load.copies_E.max(-1) / jnp.maximum(load.copies_E.mean(-1), 1e-9)
