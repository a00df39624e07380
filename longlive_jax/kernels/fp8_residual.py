"""The end of an FP8 product, its sum with x, layer norm and FP8 rows in one GPU pass.

What stands between two parts of a block of the DiT: x and the sums of codes that cuBLAS
writes are read once; x with what the layer adds to it is written, and codes of its norm
for the next layer are. Apart from the sum, kernels/fp8_modulate.py reads x once more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from longlive_jax.kernels.fp8_modulate import normed_row
from longlive_jax.kernels.fp8_rows import (
  as_rows,
  check_rows,
  row_call,
  run_rows,
  store_row,
)
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.kernels.modulate_quantise import modulated, rounded
from longlive_jax.kernels.rows import Walk, columns_of, load_row, load_shared, row_of
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows

WALK = Walk()  # two rows of two arrays leave registers for half as many programs


def residual_rows(
  x: Array,
  sums: Array,
  scale: Array,
  columns: Array,
  bias: Array,
  gate: Array | None,
  factor: Array,
  shift: Array,
  *,
  eps: float,
  implementation: str | None = None,
) -> tuple[Array, Rows]:
  """x + gate * (sums * scale * columns + bias), and its layer norm in FP8.

  The norm is layer_norm(x) * factor + shift, with a scale for every row. Each step is
  rounded to the dtype of x, as by layers apart (`fp8.product`, layers/linear.py and
  layers/norm.py); only the two scales follow each other in float32.

  Args:
    x: bfloat16 or float32 (..., tokens, n).
    sums: of the shape and dtype of x, see `fp8.sums`.
    scale: float32 (..., tokens, 1), of the rows that were multiplied.
    columns: float32 (n,), of the outputs of the weight.
    bias: (n,) in the dtype of x.
    gate: (..., 1, n) in the dtype of x, a row for all tokens of a frame; None for 1.
    factor, shift: as gate, or (n,), one row for all.
    eps: of the norm.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Returns:
    the sum and its norm, both (..., tokens, n).

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    NotImplementedError: under differentiation.
  """
  check_rows(x)
  n, f32 = x.shape[-1], jnp.dtype(jnp.float32)
  frame = (*x.shape[:-2], 1, n)
  row = (n,) if factor.ndim == 1 else frame
  for name, array, shape, dtype in (
    ("sums", sums, x.shape, x.dtype),
    ("scale", scale, (*x.shape[:-1], 1), f32),
    ("columns", columns, (n,), f32),
    ("bias", bias, (n,), x.dtype),
    ("gate", gate, frame, x.dtype),
    ("factor", factor, row, x.dtype),
    ("shift", shift, row, x.dtype),
  ):
    if array is not None and (array.shape != shape or array.dtype != dtype):
      raise ValueError(f"{name}={array.shape} {array.dtype} must be {shape} {dtype}")
  arrays = x, sums, scale, columns, bias, gate, factor, shift
  return run_rows(triton, reference, implementation, *arrays, eps=eps)


def reference(
  x: Array,
  sums: Array,
  scale: Array,
  columns: Array,
  bias: Array,
  gate: Array | None,
  factor: Array,
  shift: Array,
  *,
  eps: float,
) -> tuple[Array, Rows]:
  """`residual_rows` in jnp, for any backend."""

  def plus(a: Array, b: Array) -> Array:
    return rounded(a + b.astype(jnp.float32), x.dtype)

  h = rounded(sums.astype(jnp.float32) * scale * columns, x.dtype)
  h = plus(h, bias)
  if gate is not None:
    h = rounded(gate.astype(jnp.float32) * h, x.dtype)
  x = plus(h, x).astype(x.dtype)
  return x, Rows(fp8.quantise(modulated(x, factor, shift, eps)), x.dtype)


def triton(
  x: Array,
  sums: Array,
  scale: Array,
  columns: Array,
  bias: Array,
  gate: Array | None,
  factor: Array,
  shift: Array,
  *,
  eps: float,
  run: Launcher,
) -> tuple[Array, Rows]:
  """`residual_rows` by its kernel; `run` is `launch`, or in tests the interpreter."""
  arrays = x, sums, scale, columns, bias, gate, factor, shift
  new, *outputs = run(residual_call(arrays, eps))
  return new.reshape(x.shape), as_rows(outputs, x)


def residual_call(
  arrays: tuple[Array | None, ...], eps: float, walk: Walk = WALK
) -> Call:
  """x, sums, scale, columns, bias, gate, factor, shift -> (rows, n), codes, scales."""
  x, *before, gate, factor, shift = arrays
  # What there is none of is not read, but every parameter has an array.
  given = (x, *before, x if gate is None else gate, factor, shift)
  return row_call(
    _fp8_residual,
    given,
    x,
    walk,
    math.prod(x.shape[:-2]),
    (jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype),),
    EPS=eps,
    GATED=gate is not None,
    SHARED=factor.ndim == 1,
  )


@jit
def _fp8_residual(
  x_ptr,
  sums_ptr,
  scales_ptr,
  columns_ptr,
  bias_ptr,
  gate_ptr,
  factor_ptr,
  shift_ptr,
  new_ptr,
  codes_ptr,
  scale_ptr,
  N: tl.constexpr,
  COUNT: tl.constexpr,
  TILE: tl.constexpr,
  ROWS: tl.constexpr,
  EPS: tl.constexpr,
  GATED: tl.constexpr,
  SHARED: tl.constexpr,
):
  frame = tl.program_id(1).to(tl.int64)
  column = columns_of(TILE)
  if not SHARED:
    factor_ptr += frame * N
    shift_ptr += frame * N
  gate_ptr += frame * N
  x_ptr += frame * COUNT * N
  sums_ptr += frame * COUNT * N
  scales_ptr += frame * COUNT
  new_ptr += frame * COUNT * N
  codes_ptr += frame * COUNT * N
  scale_ptr += frame * COUNT
  x_ahead = load_row(x_ptr, row_of(0, COUNT, ROWS), column, N)
  sums_ahead = load_row(sums_ptr, row_of(0, COUNT, ROWS), column, N)
  for i in range(ROWS):
    row, x, h = row_of(i, COUNT, ROWS), x_ahead, sums_ahead.to(tl.float32)
    dtype = x.dtype
    x_ahead = load_row(x_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    sums_ahead = load_row(sums_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    # What rows share is not read before the loop: registers have no room for it.
    h = h * tl.load(scales_ptr + row)
    h = (h * load_shared(columns_ptr, column, N)).to(dtype)
    h = _plus(h, load_shared(bias_ptr, column, N))
    if GATED:
      gate = load_shared(gate_ptr, column, N)
      h = (gate.to(tl.float32) * h.to(tl.float32)).to(dtype)
    x = _plus(x, h)
    tl.store(new_ptr + row * N + column, x, mask=column < N)
    factor = load_shared(factor_ptr, column, N)
    shift = load_shared(shift_ptr, column, N)
    h = normed_row(x.to(tl.float32), factor, shift, column, N, EPS)
    store_row(codes_ptr, scale_ptr, row, column, h, N)


@jit
def _plus(a, b):
  return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)
