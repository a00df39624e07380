"""The end of an FP8 product, GELU and FP8 rows in one pass on the GPU.

What stands between the two layers of a feed-forward network: the sums of codes that
cuBLAS writes are read once, in 16 bits, and codes of what the second layer reads are
written. So neither the first layer's output nor its activation is ever in memory.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from longlive_jax.kernels.approximate import power_of_two, reciprocal
from longlive_jax.kernels.fp8_rows import (
  as_rows,
  check_rows,
  row_call,
  run_rows,
  store_row,
)
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.kernels.rows import Walk, columns_of, load_row, load_shared, row_of
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows

# gelu(x) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): tanh of u is half
# of it, without the loss of digits of 1 + tanh(u) where that is small. The kernel has
# powers of two: these are -2 u / ln(2), of x and of x^3.
_LINEAR = -2 * math.sqrt(2 / math.pi) / math.log(2)
_CUBIC = 0.044715 * _LINEAR

WALK = Walk(num_warps=16)


def gelu_rows(
  sums: Array,
  scale: Array,
  columns: Array,
  bias: Array,
  *,
  implementation: str | None = None,
) -> Rows:
  """gelu(sums * scale * columns + bias) in FP8, a scale for every row.

  GELU is that by tanh. All is float32 until the codes: rounding to 16 bits on the way,
  as layers apart do, would cost more time than moving the numbers.

  Args:
    sums: bfloat16 or float32 (..., n), see `fp8.sums`.
    scale: float32 (..., 1), of the rows that were multiplied.
    columns: float32 (n,), of the outputs of the weight.
    bias: (n,) in the dtype of the sums.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    NotImplementedError: under differentiation.
  """
  check_rows(sums)
  for name, array, shape, dtype in (
    ("scale", scale, (*sums.shape[:-1], 1), jnp.float32),
    ("columns", columns, sums.shape[-1:], jnp.float32),
    ("bias", bias, sums.shape[-1:], sums.dtype),
  ):
    if array.shape != shape or array.dtype != dtype:
      raise ValueError(
        f"{name}={array.shape} {array.dtype} must be {shape} {jnp.dtype(dtype)}"
      )
  return run_rows(triton, reference, implementation, sums, scale, columns, bias)


def reference(sums: Array, scale: Array, columns: Array, bias: Array) -> Rows:
  """`gelu_rows` in jnp, for any backend."""
  x = sums.astype(jnp.float32) * scale * columns + bias.astype(jnp.float32)
  x = x / (1 + jnp.exp2(x * (_LINEAR + _CUBIC * x * x)))
  return Rows(fp8.quantise(x), sums.dtype)


def triton(
  sums: Array, scale: Array, columns: Array, bias: Array, *, run: Launcher
) -> Rows:
  """`gelu_rows` by its kernel; `run` is `launch`, or in tests the interpreter."""
  return as_rows(run(gelu_call(sums, scale, columns, bias)), sums)


def gelu_call(
  sums: Array, scale: Array, columns: Array, bias: Array, walk: Walk = WALK
) -> Call:
  inputs = sums, scale, columns, bias
  return row_call(_fp8_gelu, inputs, sums, walk, LINEAR=_LINEAR, CUBIC=_CUBIC)


@jit
def _fp8_gelu(
  sums_ptr,
  scales_ptr,
  columns_ptr,
  bias_ptr,
  codes_ptr,
  scale_ptr,
  N: tl.constexpr,
  COUNT: tl.constexpr,
  TILE: tl.constexpr,
  ROWS: tl.constexpr,
  LINEAR: tl.constexpr,
  CUBIC: tl.constexpr,
):
  column = columns_of(TILE)
  ahead = load_row(sums_ptr, row_of(0, COUNT, ROWS), column, N)
  for i in range(ROWS):
    row, x = row_of(i, COUNT, ROWS), ahead.to(tl.float32)
    ahead = load_row(sums_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    # Not before the loop: registers have no room for them beside two rows.
    scale = load_shared(columns_ptr, column, N)
    bias = load_shared(bias_ptr, column, N).to(tl.float32)
    x = tl.fma(x * tl.load(scales_ptr + row), scale, bias)
    x = x * reciprocal(1.0 + power_of_two(x * tl.fma(x * CUBIC, x, LINEAR)))
    store_row(codes_ptr, scale_ptr, row, column, x, N)
