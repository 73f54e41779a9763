"""Rotary positions: interleaved M-RoPE for text, (row, column) rotary for the vision tower.

Angles are computed once outside of the layer scan and passed in as (cos, sin), each with half a
head's size; both halves of a head turn by the same angle. float32 throughout.

Legend: B batch, T tokens or patches, H heads, F frequencies (half of the head's size).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def mrope_axes(section: tuple[int, int, int]) -> np.ndarray:
  """Which position (0 time, 1 height, 2 width) turns each frequency: int [F].

  Interleaved: index 1 mod 3 takes the height, 2 mod 3 the width, as long as these last; all
  others take the time. (24, 20, 20) gives T H W T H W ... for 60 frequencies, then T T T T.
  """
  axes = np.zeros(sum(section), np.int32)
  for axis in (1, 2):
    axes[axis : 3 * section[axis] : 3] = axis
  return axes


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
  """theta^(-2i / dim) for i < dim / 2, rounded as the reference does: float32 [dim / 2]."""
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  # The power in float64, rounded once: NumPy's float32 power differs from one kind of CPU to the next
  # (2 ulp with AVX-512), and an angle is a frequency times a position of up to 262,144.
  power = np.float64(theta) ** exponent.astype(np.float64)
  return np.float32(1.0) / power.astype(np.float32)


def text_rope(
  positions_BxTx3: jax.Array, *, theta: float, section: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of interleaved M-RoPE: float32 [B, T, F], F = sum(section)."""
  frequencies_F = _inverse_frequencies(2 * sum(section), theta)
  turned_BxTxF = positions_BxTx3[..., mrope_axes(section)].astype(jnp.float32)
  angles = turned_BxTxF * frequencies_F
  return jnp.cos(angles), jnp.sin(angles)


def vision_rope(
  positions_RxPx2: jax.Array, *, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of 2-D rotary: rows turn the first F / 2 frequencies, columns the others."""
  frequencies = _inverse_frequencies(head_dim // 2, theta)
  angles = positions_RxPx2[..., None].astype(jnp.float32) * frequencies
  angles = angles.reshape(*positions_RxPx2.shape[:-1], head_dim // 2)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxHxD: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns every head by its token's angles; computed in float32, returned in x's dtype."""
  cos, sin = (r[:, :, None, :] for r in rope)
  a, b = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxD.dtype)
