"""Quantises rows of activations to FP8 on the GPU, and what such kernels share.

A program holds a whole row, so its largest magnitude costs no pass of its own: 16 bits
a number are read and 8 are written. The bits are those of `fp8.quantise`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.kernels.rows import Walk, columns_of, load_row, row_of
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import FP8Array, Rows

T = TypeVar("T")

LONGEST = 16384  # numbers of a row that a program's registers hold
WALK = Walk()


def quantise_rows(x: Array, *, implementation: str | None = None) -> Rows:
  """x in FP8, a scale for every row.

  Args:
    x: bfloat16 or float32 (..., n).
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    NotImplementedError: under differentiation.
  """
  check_rows(x)
  return run_rows(triton, reference, implementation, x)


def reference(x: Array) -> Rows:
  """`quantise_rows` in jnp, for any backend."""
  return Rows(fp8.quantise(x), x.dtype)


def triton(x: Array, *, run: Launcher) -> Rows:
  """`quantise_rows` by its kernel; `run` is `launch`, or in tests the interpreter."""
  return as_rows(run(rows_call(x)), x)


def rows_call(x: Array, walk: Walk = WALK) -> Call:
  return row_call(_fp8_rows, (x,), x, walk)


# ------------------------------------------------------------------ what they share


def run_rows(
  on_gpu: Callable[..., T],
  elsewhere: Callable[..., T],
  implementation: str | None,
  *arrays: Array | None,
  **settings: Any,
) -> T:
  """Runs one of the two forms of a kernel that makes Rows: `triton` or `reference`."""
  if launching.on_triton(implementation):
    function = functools.partial(on_gpu, run=launching.launch, **settings)
  else:
    function = functools.partial(elsewhere, **settings)
  name = on_gpu.__module__.rpartition(".")[2]
  instead = "take the gradient of the network before it is quantised"
  return launching.without_derivative(name, function, instead)(*arrays)


def check_rows(x: Array) -> None:
  """Raises ValueError for what is no array of rows that these kernels take."""
  if isinstance(x, FP8Array | Rows):
    raise ValueError("x is quantised already; dequantise it first")
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"x.dtype={x.dtype} must be bfloat16 or float32; use x.astype")
  if not x.ndim or not 0 < x.shape[-1] <= LONGEST:
    raise ValueError(f"x.shape={x.shape} must be (..., n) with n from 1 to {LONGEST}")


def row_call(
  kernel: Any,
  inputs: tuple[Array, ...],
  x: Array,
  walk: Walk,
  groups: int = 1,
  first: tuple[jax.ShapeDtypeStruct, ...] = (),
  **constants: Any,
) -> Call:
  """A kernel that walks over the rows of x: codes (rows, n) and scales (rows,).

  Args:
    groups: of as many consecutive rows each; a program stays within one.
    first: what is written besides, before them among the kernel's parameters.
  """
  rows, n = math.prod(x.shape[:-1]), x.shape[-1]
  return Call(
    kernel,
    inputs,
    (
      *first,
      jax.ShapeDtypeStruct((rows, n), jnp.float8_e4m3fn),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    (walk.programs(rows // groups), groups),
    {**walk.constants(rows // groups, n), **constants},
    num_warps=walk.warps(n),
  )


def as_rows(outputs: list[Array], x: Array) -> Rows:
  """Rows of the shape of x from what a `row_call` gave."""
  codes, scale = outputs
  array = FP8Array(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1))
  return Rows(array, x.dtype)


# ------------------------------------------------------------------ kernels


@jit
def store_row(codes_ptr, scale_ptr, row, column, x, N: tl.constexpr):
  """Quantises a row x (TILE,), float32, 0 behind its end, and writes it."""
  # Where x is finite this is x, else NaN, which a maximum leaves out. In one operation:
  # these kernels are as short of instructions as of bandwidth.
  x = tl.fma(x, 0.0, x)
  amax = tl.max(tl.abs(x), axis=0)
  amax = tl.where(amax >= 2.0**-104, amax, 448.0)
  codes = (x * tl.div_rn(448.0, amax)).to(tl.float8e4nv)
  tl.store(codes_ptr + row * N + column, codes, mask=column < N)
  tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))


@jit
def _fp8_rows(
  x_ptr,
  codes_ptr,
  scale_ptr,
  N: tl.constexpr,
  COUNT: tl.constexpr,
  TILE: tl.constexpr,
  ROWS: tl.constexpr,
):
  column = columns_of(TILE)
  ahead = load_row(x_ptr, row_of(0, COUNT, ROWS), column, N)
  for i in range(ROWS):
    row, x = row_of(i, COUNT, ROWS), ahead.to(tl.float32)
    ahead = load_row(x_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    store_row(codes_ptr, scale_ptr, row, column, x, N)
