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
from longlive_jax.kernels.rows import Walk, columns_of, load_row, load_shared, row_of
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows

WALK = Walk(rows=2)


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
    factor, shift: in the dtype of x; (..., 1, n), a row for all tokens of a frame, or
      (n,), one row for all.
    eps: of the norm.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    NotImplementedError: under differentiation.
  """
  check_rows(x)
  n = x.shape[-1]
  row = (n,) if factor.ndim == 1 else (*x.shape[:-2], 1, n)
  for name, array in (("factor", factor), ("shift", shift)):
    if array.shape != row or array.dtype != x.dtype:
      raise ValueError(
        f"{name}={array.shape} {array.dtype} must be {row} {x.dtype}, one row a frame, "
        f"or {(n,)}, as both of them"
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


def modulate_call(
  x: Array, factor: Array, shift: Array, eps: float, walk: Walk = WALK
) -> Call:
  frames = 1 if factor.ndim == 1 else math.prod(x.shape[:-2])
  return row_call(_fp8_modulate, (x, factor, shift), x, walk, frames, EPS=eps)


@jit
def _fp8_modulate(
  x_ptr,
  factor_ptr,
  shift_ptr,
  codes_ptr,
  scale_ptr,
  N: tl.constexpr,
  COUNT: tl.constexpr,
  TILE: tl.constexpr,
  ROWS: tl.constexpr,
  EPS: tl.constexpr,
):
  frame = tl.program_id(1).to(tl.int64)
  column = columns_of(TILE)
  factor = load_shared(factor_ptr + frame * N, column, N)
  shift = load_shared(shift_ptr + frame * N, column, N)
  x_ptr += frame * COUNT * N
  codes_ptr += frame * COUNT * N
  scale_ptr += frame * COUNT
  ahead = load_row(x_ptr, row_of(0, COUNT, ROWS), column, N)
  for i in range(ROWS):
    row, x = row_of(i, COUNT, ROWS), ahead.to(tl.float32)
    ahead = load_row(x_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    x = normed_row(x, factor, shift, column, N, EPS)
    store_row(codes_ptr, scale_ptr, row, column, x, N)


@jit
def normed_row(x, factor, shift, column, N: tl.constexpr, EPS: tl.constexpr):
  """layer_norm(x) * factor + shift of a row x (TILE,), float32, 0 behind its end.

  Each step is rounded to the dtype of factor and shift.
  """
  dtype = factor.dtype
  x = tl.where(column < N, x - tl.div_rn(tl.sum(x, axis=0), N * 1.0), 0.0)
  variance = tl.div_rn(tl.sum(x * x, axis=0), N * 1.0)
  x = (x * tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))).to(dtype)
  x = (x.to(tl.float32) * factor.to(tl.float32)).to(dtype)
  return (x.to(tl.float32) + shift.to(tl.float32)).to(dtype).to(tl.float32)
