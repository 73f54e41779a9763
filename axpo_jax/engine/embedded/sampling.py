"""Draws one token per row from logits, each row with its own parameters and its own random stream.

In: logits [B, V], the rows' parameters, how many tokens each row has drawn so far. Out: ids [B] and
the log-probability of each under the POLICY'S distribution: banned ids excluded, after temperature
(temperature 1 for greedy rows), before penalty, top-k and top-p. That is the number
a trainer can recompute from the model alone.

The draw, as SGLang's: ban, presence penalty, temperature; then top-k and top-p jointly, each of the whole
distribution (vLLM and transformers take top-p of what top-k left, which keeps fewer ids).

The draw is a two-level Gumbel-max: a block of ids first (by its total mass), then an id in it. Same
distribution as one Gumbel per id, with about 2*sqrt(V) instead of V random numbers per row. The key
is fold_in(seed, index of the drawn token): a row's draws do not depend on its index in the batch or
of its company.

Legend: B rows, V vocabulary, G blocks of W ids (G * W >= V), N ids listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from axpo_jax.engine.protocol import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
  """Sampling parameters of B rows, as arrays. Padding of the id lists is -1."""

  seed_Bx2: jax.Array  # uint32 words, high first
  temperature_B: jax.Array  # 0 = greedy
  top_p_B: jax.Array
  top_k_B: jax.Array  # 0 = off
  presence_B: jax.Array
  stop_BxN: jax.Array
  banned_BxN: jax.Array


def seed_words(seed: int) -> tuple[int, int]:
  """The two 32-bit words of `seed` modulo 2**64, high first."""
  seed %= 1 << 64
  return seed >> 32, seed & 0xFFFFFFFF


def list_width(params: Sequence[SamplingParams]) -> int:
  """Static width of the id lists: the least power of two, from 4, that holds the longest list."""
  longest = max((max(len(p.stop_ids), len(p.banned_ids)) for p in params), default=0)
  return max(4, 1 << (longest - 1).bit_length()) if longest else 4


def row_params(
  params: Sequence[SamplingParams], seeds: Sequence[int], *, rows: int, width: int
) -> RowParams:
  """Host side: NumPy arrays for `rows` rows, the last ones inert padding (greedy, no lists)."""
  arrays = RowParams(
    seed_Bx2=np.zeros((rows, 2), np.uint32),
    temperature_B=np.zeros(rows, np.float32),
    top_p_B=np.ones(rows, np.float32),
    top_k_B=np.zeros(rows, np.int32),
    presence_B=np.zeros(rows, np.float32),
    stop_BxN=np.full((rows, width), -1, np.int32),
    banned_BxN=np.full((rows, width), -1, np.int32),
  )
  for row, (p, seed) in enumerate(zip(params, seeds, strict=True)):
    arrays.seed_Bx2[row] = seed_words(seed)
    arrays.temperature_B[row] = p.temperature
    arrays.top_p_B[row] = p.top_p
    arrays.top_k_B[row] = p.top_k
    arrays.presence_B[row] = p.presence_penalty
    arrays.stop_BxN[row, : len(p.stop_ids)] = p.stop_ids
    arrays.banned_BxN[row, : len(p.banned_ids)] = p.banned_ids
  return arrays


def id_mask(ids_BxN: jax.Array, vocab_size: int) -> jax.Array:
  """bool [B, V], true at the listed ids; negative ids are padding."""
  rows_B, columns = ids_BxN.shape[0], jnp.where(ids_BxN < 0, vocab_size, ids_BxN)
  mask = jnp.zeros((rows_B, vocab_size), bool)
  return mask.at[jnp.arange(rows_B)[:, None], columns].set(True, mode="drop")


def sample(
  logits_BxV: jax.Array,
  params: RowParams,
  banned_BxV: jax.Array,
  noise_BxN: jax.Array,
  seen_BxV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one id per row.

  Args:
    logits_BxV: float32.
    params: B rows of parameters.
    banned_BxV: `id_mask(params.banned_BxN, V)`; apart, so that a loop builds it once.
    noise_BxN: of this draw, from `noise`.
    seen_BxV: ids generated before, for the presence penalty; None where no row asks for it.

  Returns:
    ids [B] int32, logprobs [B] float32 (see the module docstring).
  """
  allowed_BxV = jnp.where(banned_BxV, -jnp.inf, logits_BxV.astype(jnp.float32))
  greedy_B = params.temperature_B == 0
  divisor_B = jnp.where(greedy_B, 1.0, params.temperature_B)
  tempered_BxV = allowed_BxV / divisor_B[:, None]
  draw_BxV = tempered_BxV
  if seen_BxV is not None:
    penalty_B = params.presence_B / divisor_B
    draw_BxV = draw_BxV - jnp.where(seen_BxV, penalty_B[:, None], 0.0)
  ids_B = _draw(_keep_likely(draw_BxV, params), noise_BxN, greedy_B)
  return ids_B, _chosen_logprobs(tempered_BxV, ids_B)


def _chosen_logprobs(z_BxV, ids_B):
  chosen_B = jnp.take_along_axis(z_BxV, ids_B[:, None], axis=1)[:, 0]
  return chosen_B - jax.nn.logsumexp(z_BxV, axis=1)


def _keep_likely(z_BxV, params):
  """-inf outside top-k and top-p, for the rows that ask; the others pass through untouched."""
  asks_B = (params.top_k_B > 0) | (params.top_p_B < 1)
  return jax.lax.cond(jnp.any(asks_B), lambda z: _cut_tail(z, params, asks_B), lambda z: z, z_BxV)


def _cut_tail(z_BxV, params, asks_B):
  """Drops what ranks behind the last kept id of each row; among equals the lower id ranks first.

  The smallest kept value is found by bisection, since sorting the vocabulary takes ten times as long:
  a value is kept if fewer than top_k ids are larger and they have at most top_p of the mass. Over the
  bits of a float in the order of its values the 32 steps are exact.
  """
  vocab = z_BxV.shape[1]
  order_BxV = _ordered_bits(z_BxV)
  mass_BxV = jnp.exp(z_BxV - jnp.max(z_BxV, axis=1, keepdims=True))
  # Of the whole vocabulary's mass, also where top-k cuts: the two filters are joint.
  k_B = jnp.where(params.top_k_B > 0, params.top_k_B, vocab)
  p_B = jnp.where(params.top_p_B < 1, params.top_p_B * jnp.sum(mass_BxV, axis=1), jnp.inf)

  def larger(value_B):
    """How many ids have a larger value, and their mass."""
    is_larger_BxV = order_BxV > value_B[:, None]
    return (jnp.sum(is_larger_BxV, axis=1, dtype=jnp.int32),
            jnp.sum(jnp.where(is_larger_BxV, mass_BxV, 0.0), axis=1))

  def halve(_, bounds):
    low_B, high_B = bounds  # dropped, kept
    middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their sum could overflow
    count_B, before_B = larger(middle_B)
    kept_B = (count_B < k_B) & (before_B <= p_B)
    return jnp.where(kept_B, low_B, middle_B), jnp.where(kept_B, middle_B, high_B)

  lowest_B = jnp.full_like(k_B, _ordered_bits(jnp.float32(-jnp.inf)) - 1)
  _, cut_B = jax.lax.fori_loop(0, 32, halve, (lowest_B, jnp.max(order_BxV, axis=1)))
  count_B, before_B = larger(cut_B)
  tie_BxV = order_BxV == cut_B[:, None]
  each_B = jnp.max(jnp.where(tie_BxV, mass_BxV, 0.0), axis=1)
  in_p_B = jnp.where(each_B > 0, (p_B - before_B) / each_B, vocab)
  ties_B = jnp.minimum(k_B - count_B, jnp.minimum(in_p_B, vocab).astype(jnp.int32) + 1)
  tie_BxV = jax.lax.cond(
    jnp.any(jnp.sum(tie_BxV, axis=1) > ties_B),
    lambda tie: tie & (jnp.cumsum(tie, axis=1) <= ties_B[:, None]), lambda tie: tie, tie_BxV)
  keep_BxV = (order_BxV > cut_B[:, None]) | tie_BxV | ~asks_B[:, None]
  return jnp.where(keep_BxV, z_BxV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
  """int32 that compare as the float32 of `x` do."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def noise(seed_Bx2: jax.Array, index_B: jax.Array, draws: int, vocab: int) -> jax.Array:
  """Gumbel noise [draws, B, N] for the rows' next draws.

  Made for several draws at once: one threefry call costs as much for one draw as for many.

  Args:
    index_B: how many tokens the row has drawn before: the counter of its random stream.
  """
  count = sum(_blocks(vocab))

  def one(seed_2, index):
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, index), (count,), jnp.float32)

  return jax.vmap(lambda t: jax.vmap(one)(seed_Bx2, index_B + t))(jnp.arange(draws))


def _blocks(vocab: int) -> tuple[int, int]:
  """G blocks of W ids, both about sqrt(vocab)."""
  width = 1 << (max(vocab - 1, 1).bit_length() + 1) // 2
  return -(-vocab // width), width


def _draw(z_BxV, noise_BxN, greedy_B):
  """Two-level Gumbel-max; greedy rows take the plain maximum (first id among equals)."""
  rows, vocab = z_BxV.shape
  groups, width = _blocks(vocab)
  z_BxGxW = jnp.pad(
    z_BxV, ((0, 0), (0, groups * width - vocab)), constant_values=-jnp.inf
  ).reshape(rows, groups, width)
  best_BxG = jnp.max(z_BxGxW, axis=2)
  best_B = jnp.max(best_BxG, axis=1)
  mass_BxG = jnp.sum(jnp.exp(z_BxGxW - best_B[:, None, None]), axis=2)
  score_BxG = jnp.where(greedy_B[:, None], best_BxG, jnp.log(mass_BxG) + noise_BxN[:, :groups])
  group_B = jnp.argmax(score_BxG, axis=1)
  inside_BxW = jnp.take_along_axis(z_BxGxW, group_B[:, None, None], axis=1)[:, 0]
  inside_BxW += jnp.where(greedy_B[:, None], 0.0, noise_BxN[:, groups:])
  return (group_B * width + jnp.argmax(inside_BxW, axis=1)).astype(jnp.int32)
