"""NVFP4 back to numbers on the GPU: activations, weights, or a window of cached frames.

The same bits as `nvfp4.dequantise`. A mean that was subtracted from keys is added back
in the same pass; XLA may round product and sum at once, the kernel rounds both.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.blocks import e2m1, e4m3
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.quant import exact, nvfp4
from longlive_jax.quant.nvfp4 import NVFP4Array

_TILE = 512  # halves of blocks a program, 4 a thread


def dequantise(
  array: NVFP4Array,
  *,
  dtype: jnp.dtype = jnp.float32,
  mean: Array | None = None,
  implementation: str | None = None,
) -> Array:
  """The numbers.

  Args:
    array: (*batch, tokens, ..., n), with a tensor scale for each of `batch`: for each
      frame of a window of cached keys (b, f, p, n, d).
    dtype: bfloat16 or float32.
    mean: (*batch, ..., n), added in float32: what 'token_mean' subtracted.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Returns:
    (*batch, tokens, ..., n) in `dtype`, cast last.

  Raises:
    ValueError: an unknown name, a shape or dtype that does not fit.
  """
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"dtype={dtype} must be bfloat16 or float32; cast the result")
  if mean is not None:
    k = array.amax.ndim
    wanted = (*array.shape[:k], *array.shape[k + 1 :])
    if array.ndim < k + 2 or mean.shape != wanted:
      raise ValueError(
        f"mean.shape={mean.shape} must be {wanted}: the array without its tokens"
      )
  if launching.on_triton(implementation):
    return triton(array, dtype=dtype, mean=mean, run=launching.launch)
  return reference(array, dtype=dtype, mean=mean)


def reference(array: NVFP4Array, *, dtype: jnp.dtype, mean: Array | None) -> Array:
  """`dequantise` in jnp, for any backend."""
  if mean is None:
    return nvfp4.dequantise(array, dtype)
  mean = jnp.expand_dims(mean, array.amax.ndim).astype(jnp.float32)
  return (exact.rounded(nvfp4.dequantise(array)) + mean).astype(dtype)


def triton(
  array: NVFP4Array, *, dtype: jnp.dtype, mean: Array | None, run: Launcher
) -> Array:
  """`dequantise` by its kernel; `run` is `launch`, or in tests the interpreter."""
  (values,) = run(dequantise_call(array, dtype, mean))
  return values.reshape(array.shape)


def dequantise_call(array: NVFP4Array, dtype: jnp.dtype, mean: Array | None) -> Call:
  """Numbers (groups, 16 blocks)."""
  batch, group = array.shape[: array.amax.ndim], array.shape[array.amax.ndim :]
  groups, size = math.prod(batch), math.prod(group)
  return Call(
    _nvfp4_dequantise,
    (array.codes, array.scales, array.amax, array.amax if mean is None else mean),
    (jax.ShapeDtypeStruct((groups, size), dtype),),
    (math.ceil(size / (8 * _TILE)), groups),
    {
      "HALVES": size // 8,
      "ROW": math.prod(group[1:]) // 8,
      "MEAN": mean is not None,
      "SPAN": array.span,
      "TILE": _TILE,
    },
  )


@jit
def _nvfp4_dequantise(
  codes_ptr,
  scales_ptr,
  amax_ptr,
  mean_ptr,
  values_ptr,
  HALVES: tl.constexpr,
  ROW: tl.constexpr,
  MEAN: tl.constexpr,
  SPAN: tl.constexpr,
  TILE: tl.constexpr,
):
  group = tl.program_id(1).to(tl.int64)
  half = tl.program_id(0) * TILE + tl.arange(0, TILE)
  valid = half < HALVES
  at = half[:, None] * 4 + tl.arange(0, 4)
  codes = tl.load(codes_ptr + group * HALVES * 4 + at, mask=valid[:, None], other=0)
  at = scales_ptr + group * (HALVES // 2) + (half >> 1)
  scale = tl.load(at, mask=valid, other=0.0)
  factor = tl.div_rn(tl.load(amax_ptr + group), SPAN)
  scale = e4m3(scale)[:, None]
  codes = codes.to(tl.int32)
  # Code * scale is exact, so one rounding is left.
  even, odd = e2m1(codes) * scale * factor, e2m1(codes >> 4) * scale * factor
  values = tl.reshape(tl.join(even, odd), (TILE, 8))
  lane = tl.arange(0, 8)
  if MEAN:
    at = mean_ptr + group * ROW * 8 + (half % ROW)[:, None] * 8 + lane
    values += tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
  at = values_ptr + group * HALVES * 8 + half[:, None] * 8 + lane
  tl.store(at, values.to(values_ptr.dtype.element_ty), mask=valid[:, None])
