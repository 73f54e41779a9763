"""Checksums of arrays that do not depend on how they are split over devices.

In: a pytree of jax arrays, on a mesh or not. Out: one number for each. One program computes all of them on the
arrays' devices and reads each array once, so they cost next to nothing on an accelerator.

The bits of an array are read as unsigned integers of up to 32 bits. The checksum is the sum of
(2 * index + 1) * value, modulo 2**32. A change of a single value always changes it, since its weight is odd; so
does a swap of two values. Other changes go unnoticed with a chance of one in 2**32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """Name -> checksum. In a run of several processes all of them must call this."""
  names = sorted(arrays)
  sums = np.asarray(_sums([arrays[name] for name in names])) if names else ()
  return {name: int(value) for name, value in zip(names, sums, strict=True)}


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([_sum(x) for x in arrays])


def _sum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  return jnp.sum((2 * place + 1) * bits, dtype=jnp.uint32)
