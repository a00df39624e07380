"""Matrix products whose weights, or both operands, stay packed in NVFP4.

  matmul_w4a16   x @ deq(weight).T, for few rows: it reads 4.5 bits a weight
  matmul_w4a4    deq(x) @ deq(weight).T by the block-scaled instruction of Blackwell

Sums are over code * scale, which bfloat16 holds exactly, and the tensor scales multiply
the float32 sum: closer to the true product than weights dequantised to bfloat16.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.blocks import e2m1, e4m3
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.quant import nvfp4
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array
from longlive_jax.quant.product import product

NATIVE = range(100, 110)  # compute capabilities with tcgen05's block-scaled products


def matmul_w4a16(
  x: Array, weight: NVFP4Array, *, implementation: str | None = None
) -> Array:
  """x @ weight.T, weights unpacked inside the product.

  Args:
    x: bfloat16 or float32 (..., k).
    weight: (n, k) with one tensor scale.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Returns:
    (..., n) in the dtype of x.

  Raises:
    ValueError: an unknown name, a shape or dtype that does not fit.
  """
  _check(x, weight)
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"x.dtype={x.dtype} must be bfloat16 or float32; use x.astype")
  if launching.on_triton(implementation):
    return triton(x, weight, dtype=x.dtype, native=False, run=launching.launch)
  return reference(x, weight)


def matmul_w4a4(
  x: NVFP4Array,
  weight: NVFP4Array,
  *,
  dtype: jnp.dtype = jnp.bfloat16,
  implementation: str | None = None,
) -> Array:
  """x @ weight.T in 4-bit arithmetic.

  Args:
    x: (..., k), with a tensor scale for the whole or for each index of first axes.
    weight: (n, k) with one tensor scale.
    dtype: of the result, bfloat16 or float32.
    implementation: 'triton', 'jnp', or None: Triton where the GPU has the instruction,
      else jnp.

  Returns:
    (..., n).

  Raises:
    ValueError: an unknown name, a shape that does not fit, or Triton on a GPU without
      block-scaled 4-bit products.
  """
  _check(x, weight)
  if launching.on_triton(implementation):
    capability = launching.compute_capability()
    if capability in NATIVE:
      return triton(x, weight, dtype=dtype, native=True, run=launching.launch)
    if implementation is not None:
      raise ValueError(
        f"compute_capability={capability} has no block-scaled 4-bit products, which "
        "need a Blackwell data-centre GPU (100 to 109); use implementation='jnp'"
      )
  return product(x, weight).astype(dtype)


def _check(x: Array | NVFP4Array, weight: NVFP4Array) -> None:
  if weight.ndim != 2 or weight.amax.ndim:
    raise ValueError(
      f"weight.shape={weight.shape} must be (n, k) with one tensor scale, not "
      f"{weight.amax.shape}"
    )
  if x.shape[-1] != weight.shape[-1]:
    raise ValueError(f"x.shape={x.shape} must end with k={weight.shape[-1]}")


def reference(x: Array, weight: NVFP4Array) -> Array:
  """`matmul_w4a16` in jnp, for any backend. That of `matmul_w4a4` is `product`."""
  codes = nvfp4.decode(nvfp4.unpack(weight.codes))
  blocks = codes.reshape(*weight.scales.shape, BLOCK)
  values = blocks * weight.scales.astype(jnp.float32)[..., None]
  sums = lax.dot_general(
    x,
    values.reshape(weight.shape).astype(x.dtype),
    (((x.ndim - 1,), (1,)), ((), ())),
    precision=lax.Precision.HIGHEST,  # of float32; bfloat16 products are exact
    preferred_element_type=jnp.float32,
  )
  return (sums * (weight.amax * (1 / weight.span))).astype(x.dtype)


def triton(
  x: Array | NVFP4Array,
  weight: NVFP4Array,
  *,
  dtype: jnp.dtype,
  native: bool,
  run: Launcher,
) -> Array:
  """Both products by their kernel; `run` is `launch`, or in tests the interpreter."""
  (parts,) = run(matmul_call(x, weight, dtype, native))
  y = parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0).astype(dtype)
  return y.reshape(*x.shape[:-1], weight.shape[0])


def matmul_call(
  x: Array | NVFP4Array, weight: NVFP4Array, dtype: jnp.dtype, native: bool
) -> Call:
  """Sums over parts of k: (parts, m, n), in float32 if there are several parts."""
  packed = isinstance(x, NVFP4Array)
  whole = not packed and x.dtype == jnp.float32
  m, (n, k) = math.prod(x.shape[:-1]), weight.shape
  if native:
    tile_m, tile_n, tile_k, parts = 128, 128, 256, 1
  else:
    tile_m, tile_n, tile_k = min(128, max(16, 1 << (m - 1).bit_length())), 64, 128
    # About four programs a multiprocessor: one row of tiles alone cannot fill a GPU.
    programs = math.ceil(m / tile_m) * math.ceil(n / tile_n)
    parts = max(1, min(512 // programs, k // (4 * tile_k)))
  steps = math.ceil(k / tile_k / parts)
  return Call(
    _nvfp4_matmul,
    (
      x.codes if packed else x,
      x.scales if packed else weight.scales,  # not read otherwise
      x.amax if packed else weight.amax,
      weight.codes,
      weight.scales,
      weight.amax,
    ),
    (jax.ShapeDtypeStruct((parts, m, n), jnp.float32 if parts > 1 else dtype),),
    (math.ceil(n / tile_n), math.ceil(m / tile_m), parts),
    {
      "M": m,
      "N": n,
      "K": k,
      "STEPS": steps,
      "X_PACKED": packed,
      "NATIVE": native,
      "X_SPAN": x.span if packed else 1.0,
      "X_ROWS": m // x.amax.size if packed else m,
      "SPAN": weight.span,
      "TILE_M": tile_m,
      "TILE_N": tile_n,
      "TILE_K": tile_k,
    },
    num_warps=4,
    # Three tiles of float32 do not fit the shared memory of a Hopper.
    num_stages=2 if whole else 3,
  )


@jit
def _operand(codes, scales, TILE: tl.constexpr, BYTES: tl.constexpr):
  """Even and odd numbers float32 (TILE, BYTES) of bytes and scales."""
  scale = e4m3(scales)[:, :, None]
  scale = tl.broadcast_to(scale, (TILE, BYTES // 8, 8))
  scale = tl.reshape(scale, (TILE, BYTES))
  codes = codes.to(tl.int32)
  return e2m1(codes) * scale, e2m1(codes >> 4) * scale


@jit
def _nvfp4_matmul(
  x_ptr,
  x_scales_ptr,
  x_amax_ptr,
  codes_ptr,
  scales_ptr,
  amax_ptr,
  out_ptr,
  M: tl.constexpr,
  N: tl.constexpr,
  K: tl.constexpr,
  STEPS: tl.constexpr,
  X_PACKED: tl.constexpr,
  NATIVE: tl.constexpr,
  X_SPAN: tl.constexpr,
  X_ROWS: tl.constexpr,
  SPAN: tl.constexpr,
  TILE_M: tl.constexpr,
  TILE_N: tl.constexpr,
  TILE_K: tl.constexpr,
):
  BYTES: tl.constexpr = TILE_K // 2
  SCALES: tl.constexpr = TILE_K // 16
  n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)[:, None]
  m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)[:, None]
  n64, m64 = n.to(tl.int64), m.to(tl.int64)
  # Weights are the left operand: a tensor core's tile is 64 or 128 of these, and few
  # rows of x are enough for the right one.
  acc = tl.zeros((TILE_N, TILE_M), tl.float32)
  for i in range(STEPS):
    step = tl.program_id(2) * STEPS + i
    byte = step * BYTES + tl.arange(0, BYTES)[None, :]
    block = step * SCALES + tl.arange(0, SCALES)[None, :]
    inside = (n < N) & (byte < K // 2)
    codes = tl.load(codes_ptr + n64 * (K // 2) + byte, mask=inside, other=0)
    inside = (n < N) & (block < K // 16)
    scales = tl.load(scales_ptr + n64 * (K // 16) + block, mask=inside, other=0.0)
    if X_PACKED:
      inside = (m < M) & (byte < K // 2)
      x_codes = tl.load(x_ptr + m64 * (K // 2) + byte, mask=inside, other=0)
      inside = (m < M) & (block < K // 16)
      at = x_scales_ptr + m64 * (K // 16) + block
      x_scales = tl.load(at, mask=inside, other=0.0)
    if NATIVE:
      acc = tl.dot_scaled(
        codes, scales, "e2m1", tl.trans(x_codes), x_scales, "e2m1", acc
      )
    else:
      if X_PACKED:
        x_even, x_odd = _operand(x_codes, x_scales, TILE_M, BYTES)
        x_even, x_odd = x_even.to(tl.bfloat16), x_odd.to(tl.bfloat16)
      else:
        column = step * TILE_K + tl.arange(0, TILE_K)[None, :]
        inside = (m < M) & (column < K)
        x = tl.load(x_ptr + m64 * K + column, mask=inside, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (TILE_M, BYTES, 2)))
      even, odd = _operand(codes, scales, TILE_N, BYTES)
      even, odd = even.to(x_even.dtype), odd.to(x_even.dtype)
      acc = tl.dot(even, tl.trans(x_even), acc, input_precision="ieee")
      acc = tl.dot(odd, tl.trans(x_odd), acc, input_precision="ieee")
  row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)[None, :]
  factor = tl.load(amax_ptr) * (1.0 / SPAN)
  if X_PACKED:
    x_amax = tl.load(x_amax_ptr + row // X_ROWS, mask=row < M, other=0.0)
    acc *= x_amax * (1.0 / X_SPAN) * factor
  else:
    acc *= factor
  part = tl.program_id(2).to(tl.int64) * M * N
  at = out_ptr + part + row.to(tl.int64) * N + n
  tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(row < M) & (n < N))
