"""Layer norm, modulation and quantisation of activations in one pass on the GPU.

What a quantised linear layer reads in a block of the DiT: x is read once and 4.5 bits a
number are written, instead of x, its norm and its modulation in 16 bits each. Each step
is rounded to the dtype of x, as in layers/norm.py and SPEC 2.4.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.blocks import encode, largest, load_halves, store_blocks
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.quant import nvfp4
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array


def modulate_quantise(
  x: Array,
  scale: Array,
  shift: Array,
  *,
  eps: float,
  rule: str = "mse",
  batch_axes: int = 0,
  amax: Array | None = None,
  implementation: str | None = None,
) -> NVFP4Array:
  """quantise(layer_norm(x) * (1 + scale) + shift).

  Args:
    x: bfloat16 or float32 (..., tokens, n), n a multiple of 16.
    scale, shift: (..., 1, n) in the dtype of x, a row for all tokens of a frame.
    eps: of the norm.
    rule: of `nvfp4.RULES`.
    batch_axes: how many leading axes have a tensor scale of their own.
    amax: float32 x.shape[:batch_axes], the largest magnitudes to expect; what is larger
      is clipped. None measures them first, in a pass of its own.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Returns:
    (..., tokens, n).

  Raises:
    ValueError: an unknown name, a shape or dtype that does not fit.
  """
  nvfp4.rule_of(rule)
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"x.dtype={x.dtype} must be bfloat16 or float32; use x.astype")
  if x.ndim < 2 + batch_axes or x.shape[-1] % BLOCK:
    raise ValueError(
      f"x.shape={x.shape} must be (..., tokens, n) with n a multiple of {BLOCK} and "
      f"batch_axes={batch_axes} axes before the tokens"
    )
  row = (*x.shape[:-2], 1, x.shape[-1])
  for name, array in (("scale", scale), ("shift", shift)):
    if array.shape != row or array.dtype != x.dtype:
      raise ValueError(
        f"{name}={array.shape} {array.dtype} must be {row} {x.dtype}, one row a frame"
      )
  if amax is not None and amax.shape != x.shape[:batch_axes]:
    raise ValueError(
      f"amax.shape={amax.shape} must be the batch axes {x.shape[:batch_axes]} of x"
    )
  settings = dict(eps=eps, rule=rule, batch_axes=batch_axes, amax=amax)
  if launching.on_triton(implementation):
    return triton(x, scale, shift, **settings, run=launching.launch)
  return reference(x, scale, shift, **settings)


def reference(
  x: Array,
  scale: Array,
  shift: Array,
  *,
  eps: float,
  rule: str,
  batch_axes: int,
  amax: Array | None,
) -> NVFP4Array:
  """`modulate_quantise` in jnp, for any backend."""
  h = modulated(x, rounded(1 + scale.astype(jnp.float32), x.dtype), shift, eps)
  return nvfp4.quantise(h, rule=rule, batch_axes=batch_axes, amax=amax)


def modulated(x: Array, factor: Array, shift: Array, eps: float) -> Array:
  """layer_norm(x) * factor + shift in float32, each step rounded to the dtype of x."""
  h = x.astype(jnp.float32)
  h = h - jnp.mean(h, axis=-1, keepdims=True)
  h = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
  h = rounded(rounded(h, x.dtype) * factor.astype(jnp.float32), x.dtype)
  return rounded(h + shift.astype(jnp.float32), x.dtype)


def rounded(x: Array, dtype: jnp.dtype) -> Array:
  """float32 with the precision of `dtype`. Under jit XLA may leave out casts."""
  return lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def triton(
  x: Array,
  scale: Array,
  shift: Array,
  *,
  eps: float,
  rule: str,
  batch_axes: int,
  amax: Array | None,
  run: Launcher,
) -> NVFP4Array:
  """The same by its kernels; `run` is `launch`, or in tests the interpreter."""
  n, chosen = x.shape[-1], nvfp4.RULES[rule]
  if amax is None:
    (found,) = run(largest_call(x, scale, shift, eps))
    batch = x.shape[:batch_axes]
    amax = jnp.max(found.reshape(*batch, -1), axis=-1)
  amax = nvfp4.countable(amax)
  codes, scales = run(encode_call(x, scale, shift, eps, amax, rule))
  return NVFP4Array(
    codes.reshape(*x.shape[:-1], n // 2),
    scales.reshape(*x.shape[:-1], n // BLOCK),
    amax.astype(jnp.float32),
    chosen.span,
  )


def largest_call(x: Array, scale: Array, shift: Array, eps: float) -> Call:
  """Largest magnitudes of every row: float32 (frames, tokens)."""
  frames, tokens = math.prod(x.shape[:-2]), x.shape[-2]
  return Call(
    _modulate_largest,
    (x, scale, shift),
    (jax.ShapeDtypeStruct((frames, tokens), jnp.float32),),
    (tokens, frames),
    _constants(x, eps),
    num_warps=_warps(x),
  )


def encode_call(
  x: Array, scale: Array, shift: Array, eps: float, amax: Array, rule: str
) -> Call:
  """Codes uint8 (frames, tokens, n / 2) and scales float8_e4m3fn (.., n / 16)."""
  frames, (tokens, n) = math.prod(x.shape[:-2]), x.shape[-2:]
  chosen = nvfp4.RULES[rule]
  return Call(
    _modulate_quantise,
    (x, scale, shift, amax),
    (
      jax.ShapeDtypeStruct((frames, tokens, n // 2), jnp.uint8),
      jax.ShapeDtypeStruct((frames, tokens, n // BLOCK), jnp.float8_e4m3fn),
    ),
    (tokens, frames),
    {
      **_constants(x, eps),
      "FRAMES": frames // amax.size,
      "M4": chosen.m4,
      "M8": chosen.m8,
      "ERROR": chosen.error,
    },
    num_warps=_warps(x),
  )


def _constants(x: Array, eps: float) -> dict:
  blocks = x.shape[-1] // BLOCK
  return {"BLOCKS": blocks, "EPS": eps, "TILE": 1 << (blocks - 1).bit_length()}


def _warps(x: Array) -> int:
  """A thread for each block of a row, in a power of two of warps."""
  return min(16, max(1, _constants(x, 0.0)["TILE"] // 32))


# ------------------------------------------------------------------ kernels


@jit
def _load(
  x_ptr,
  scale_ptr,
  shift_ptr,
  BLOCKS: tl.constexpr,
  EPS: tl.constexpr,
  TILE: tl.constexpr,
):
  """A program's row, modulated: (row, block, valid), float32 halves a, b; 0 outside."""
  frame = tl.program_id(1).to(tl.int64)
  row = frame * tl.num_programs(0) + tl.program_id(0)
  block = tl.arange(0, TILE)
  valid = block < BLOCKS
  a, b = load_halves(x_ptr + row * BLOCKS * 16, block, valid)
  mean = tl.div_rn(tl.sum(tl.sum(a + b, axis=1), axis=0), BLOCKS * 16.0)
  a = tl.where(valid[:, None], a - mean, 0.0)
  b = tl.where(valid[:, None], b - mean, 0.0)
  variance = tl.sum(tl.sum(a * a + b * b, axis=1), axis=0)
  variance = tl.div_rn(variance, BLOCKS * 16.0)
  factor = tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
  dtype: tl.constexpr = x_ptr.dtype.element_ty
  a, b = _rounded(a * factor, dtype), _rounded(b * factor, dtype)
  ga, gb = load_halves(scale_ptr + frame * BLOCKS * 16, block, valid)
  a = _rounded(a * _rounded(ga + 1.0, dtype), dtype)
  b = _rounded(b * _rounded(gb + 1.0, dtype), dtype)
  sa, sb = load_halves(shift_ptr + frame * BLOCKS * 16, block, valid)
  return row, block, valid, _rounded(a + sa, dtype), _rounded(b + sb, dtype)


@jit
def _rounded(x, dtype: tl.constexpr):
  """Float32 x as `dtype` has it."""
  return x.to(dtype).to(tl.float32)


@jit
def _modulate_largest(
  x_ptr,
  scale_ptr,
  shift_ptr,
  largest_ptr,
  BLOCKS: tl.constexpr,
  EPS: tl.constexpr,
  TILE: tl.constexpr,
):
  row, _, _, a, b = _load(x_ptr, scale_ptr, shift_ptr, BLOCKS, EPS, TILE)
  tl.store(largest_ptr + row, largest(a, b))


@jit
def _modulate_quantise(
  x_ptr,
  scale_ptr,
  shift_ptr,
  amax_ptr,
  codes_ptr,
  scales_ptr,
  BLOCKS: tl.constexpr,
  EPS: tl.constexpr,
  TILE: tl.constexpr,
  FRAMES: tl.constexpr,
  M4: tl.constexpr,
  M8: tl.constexpr,
  ERROR: tl.constexpr,
):
  row, block, valid, a, b = _load(x_ptr, scale_ptr, shift_ptr, BLOCKS, EPS, TILE)
  amax = tl.load(amax_ptr + tl.program_id(1) // FRAMES)
  codes, scales = encode(a, b, amax, M4, M8, ERROR)
  store_blocks(
    codes_ptr + row * BLOCKS * 8,
    scales_ptr + row * BLOCKS,
    block,
    valid,
    codes,
    scales,
  )
