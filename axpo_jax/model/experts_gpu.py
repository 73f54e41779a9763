"""The grouped matrix product of `model.experts` as Pallas kernels for NVIDIA GPUs, lowered through Triton.

XLA's own lowering of `jax.lax.ragged_dot` for GPUs (jax 0.10) multiplies all rows with every group's matrix:
128 times the memory for 128 experts. Here a program does a tile of rows of one group:

  rows     0 0 0 0 0 1 1 1 1 1 1 2       their groups
  tiles   |- - - -|                      of 4 rows: group 0
                  |-|                    the rest of group 0; its other rows are masked
                    |- - - -|            group 1, and so on: at most R / 4 + E tiles

The kernels have been simulated on a CPU and compiled for an H100 without one, and not yet run on a GPU.

Legend: R rows, E groups, K contracted, N columns, T tiles of rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Of a tile: rows and columns of its result, and how much is contracted at once.
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64


def grouped(x_RxK: jax.Array, w_ExKxN: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
            ) -> jax.Array:
  """As `experts.grouped`. interpret: simulate the kernels on a CPU.

  Raises:
    ValueError: K or N is no multiple of 16, the smallest tile.
  """
  rows = x_RxK.shape[0]
  if rows < _ROWS:  # tiles are whole
    x_RxK = jnp.pad(x_RxK, ((0, _ROWS - rows), (0, 0)))
  return _grouped(x_RxK, w_ExKxN, sizes_E, interpret)[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x_RxK, w_ExKxN, sizes_E, interpret):
  return _by_rows(x_RxK, w_ExKxN, sizes_E, False, interpret)


def _grouped_forward(x_RxK, w_ExKxN, sizes_E, interpret):
  return _grouped(x_RxK, w_ExKxN, sizes_E, interpret), (x_RxK, w_ExKxN, sizes_E)


def _grouped_backward(interpret, saved, g_RxN):
  x_RxK, w_ExKxN, sizes_E = saved
  return (_by_rows(g_RxN, w_ExKxN, sizes_E, True, interpret),
          _by_group(x_RxK, g_RxN, sizes_E, w_ExKxN.dtype, interpret), None)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _tile(size: int, largest: int) -> int:
  """The largest power of two up to `largest` that divides `size`."""
  tile = next((t for t in (128, 64, 32, 16) if t <= largest and size % t == 0), None)
  if tile is None:
    raise ValueError(f"an expert's sizes on one GPU must be multiples of 16, got {size}: set config.mesh.tensor "
                     "to fewer parts")
  return tile


def _call(kernel, arrays, out, grid, flops: float, interpret: bool):
  """`kernel` with whole arrays; its index arrays come first."""
  return pl.pallas_call(
    kernel, out_shape=out, grid=grid,
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    cost_estimate=pl.CostEstimate(
      flops=int(flops), transcendentals=0,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, out))),
    interpret=interpret, name=kernel.func.__name__.strip("_"),
  )(*arrays)


def _by_rows(x_RxK, w_ExKxN, sizes_E, transposed: bool, interpret: bool) -> jax.Array:
  """x @ w, or (`transposed`) x @ w.T, group by group."""
  (R, K), E = x_RxK.shape, len(sizes_E)
  N = w_ExKxN.shape[1 if transposed else 2]
  tiles_E = pl.cdiv(sizes_E, _ROWS)
  last_E, stop_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
  number_T = jnp.arange(pl.cdiv(R, _ROWS) + E)
  group_T = jnp.minimum(jnp.searchsorted(last_E, number_T, side="right"), E - 1)
  # Tiles beyond the last group's begin behind its end, so all of their rows are masked.
  first_T = (stop_E - sizes_E)[group_T] + (number_T - (last_E - tiles_E)[group_T]) * _ROWS
  depth, columns = _tile(K, _DEPTH), _tile(N, _COLUMNS)
  kernel = functools.partial(_rows_kernel, transposed=transposed, depth=depth, columns=columns)
  return _call(kernel, (group_T, first_T, stop_E[group_T], x_RxK, w_ExKxN),
               jax.ShapeDtypeStruct((R, N), x_RxK.dtype), (len(number_T), N // columns), 2.0 * R * K * N,
               interpret)


def _tile_rows(first, stop, rows: int):
  """Where to read a tile from, so that it lies within the array, and which of its rows are its own."""
  base = jnp.minimum(first, rows - _ROWS)
  row = base + jnp.arange(_ROWS)
  return pl.ds(base, _ROWS), ((row >= first) & (row < stop))[:, None]


def _rows_kernel(group_ref, first_ref, stop_ref, x_ref, w_ref, out_ref, *, transposed, depth, columns):
  tile, column = pl.program_id(0), pl.ds(pl.program_id(1) * columns, columns)
  group, first, stop = group_ref[tile], first_ref[tile], stop_ref[tile]

  @pl.when(first < stop)
  def _():
    here, own_Rx1 = _tile_rows(first, stop, x_ref.shape[0])

    def add(i, total_RxN):
      part = pl.ds(i * depth, depth)
      w = w_ref[group, column, part].T if transposed else w_ref[group, part, column]
      return total_RxN + jnp.dot(x_ref[here, part], w, preferred_element_type=jnp.float32)

    total_RxN = jax.lax.fori_loop(0, x_ref.shape[1] // depth, add, jnp.zeros((_ROWS, columns)))
    plgpu.store(out_ref.at[here, column], total_RxN.astype(out_ref.dtype), mask=own_Rx1)


def _by_group(x_RxK, g_RxN, sizes_E, dtype, interpret: bool) -> jax.Array:
  """x.T @ g [E, K, N] over the rows of each group."""
  (R, K), N, E = x_RxK.shape, g_RxN.shape[1], len(sizes_E)
  rows, columns = _tile(K, _ROWS), _tile(N, _COLUMNS)
  stop_E = jnp.cumsum(sizes_E)
  kernel = functools.partial(_group_kernel, rows=rows, columns=columns)
  return _call(kernel, (stop_E - sizes_E, stop_E, x_RxK, g_RxN), jax.ShapeDtypeStruct((E, K, N), dtype),
               (E, K // rows, N // columns), 2.0 * R * K * N, interpret)


def _group_kernel(start_ref, stop_ref, x_ref, g_ref, out_ref, *, rows, columns):
  group = pl.program_id(0)
  row, column = pl.ds(pl.program_id(1) * rows, rows), pl.ds(pl.program_id(2) * columns, columns)
  start, stop = start_ref[group], stop_ref[group]

  def add(i, total_KxN):
    here, own_Rx1 = _tile_rows(start + i * _ROWS, stop, x_ref.shape[0])
    x_RxK, g_RxN = jnp.where(own_Rx1, x_ref[here, row], 0), jnp.where(own_Rx1, g_ref[here, column], 0)
    return total_KxN + jnp.dot(x_RxK.T, g_RxN, preferred_element_type=jnp.float32)

  total_KxN = jax.lax.fori_loop(0, pl.cdiv(stop - start, _ROWS), add, jnp.zeros((rows, columns)))
  out_ref[group, row, column] = total_KxN.astype(out_ref.dtype)
