"""Layer norm, modulation and FP8 rows of activations in one pass on the GPU.

What the layers behind a norm read in a block of the DiT: 16 bits a number are read and
8 are written, instead of x several times, its norm and its modulation.
"""

from __future__ import annotations

import math

from longlive_jax.kernels.fp8_rows import (
  as_rows,
  check_rows,
  row_call,
  run_rows,
  store_row,
)
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.kernels.modulate_quantise import modulated
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows


def modulate_rows(
  x: Array,
  factor: Array,
  shift: Array,
  *,
  eps: float,
  implementation: str | None = None,
) -> Rows:
  """layer_norm(x) * factor + shift in FP8, a scale for every row.

  Each step is rounded to the dtype of x, as in layers/norm.py and SPEC 2.4.

  Args:
    x: bfloat16 or float32 (..., tokens, n).
    factor, shift: (..., 1, n) in the dtype of x, a row for all tokens of a frame.
    eps: of the norm.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    NotImplementedError: under differentiation.
  """
  check_rows(x)
  row = (*x.shape[:-2], 1, x.shape[-1])
  for name, array in (("factor", factor), ("shift", shift)):
    if array.shape != row or array.dtype != x.dtype:
      raise ValueError(
        f"{name}={array.shape} {array.dtype} must be {row} {x.dtype}, one row a frame"
      )
  return run_rows(triton, reference, implementation, x, factor, shift, eps=eps)


def reference(x: Array, factor: Array, shift: Array, *, eps: float) -> Rows:
  """`modulate_rows` in jnp, for any backend."""
  return Rows(fp8.quantise(modulated(x, factor, shift, eps)), x.dtype)


def triton(
  x: Array, factor: Array, shift: Array, *, eps: float, run: Launcher
) -> Rows:
  """`modulate_rows` by its kernel; `run` is `launch`, or in tests the interpreter."""
  return as_rows(run(modulate_call(x, factor, shift, eps)), x)


def modulate_call(x: Array, factor: Array, shift: Array, eps: float) -> Call:
  grid = (x.shape[-2], math.prod(x.shape[:-2]))
  return row_call(_fp8_modulate, (x, factor, shift), x, grid, EPS=eps)


@jit
def _fp8_modulate(
  x_ptr,
  factor_ptr,
  shift_ptr,
  codes_ptr,
  scale_ptr,
  N: tl.constexpr,
  TILE: tl.constexpr,
  EPS: tl.constexpr,
):
  frame = tl.program_id(1).to(tl.int64)
  row = frame * tl.num_programs(0) + tl.program_id(0)
  column = tl.arange(0, TILE)
  valid = column < N
  x = tl.load(x_ptr + row * N + column, mask=valid, other=0.0)
  dtype = x.dtype
  # Read by all rows of a frame: to be kept in the caches that x streams through.
  at = frame * N + column
  factor = tl.load(factor_ptr + at, mask=valid, other=0.0, eviction_policy="evict_last")
  shift = tl.load(shift_ptr + at, mask=valid, other=0.0, eviction_policy="evict_last")
  x = x.to(tl.float32)
  x = tl.where(valid, x - tl.div_rn(tl.sum(x, axis=0), N * 1.0), 0.0)
  variance = tl.div_rn(tl.sum(x * x, axis=0), N * 1.0)
  x = (x * tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))).to(dtype)
  x = (x.to(tl.float32) * factor.to(tl.float32)).to(dtype)
  x = (x.to(tl.float32) + shift.to(tl.float32)).to(dtype)
  store_row(codes_ptr + row * N, scale_ptr, row, column, valid, x.to(tl.float32))
