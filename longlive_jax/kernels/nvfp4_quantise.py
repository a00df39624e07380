"""Quantises activations, keys and values to NVFP4 on the GPU.

The same bits as `nvfp4.quantise`, in one pass over the numbers, or two if the largest
magnitude is not known. What is done to the numbers in front costs no pass of its own:

  token_mean     minus a vector, the mean over tokens of every channel (keys, SPEC 9)
  channel_mean   minus their mean over the last axis
  hadamard       rotated by `nvfp4.hadamard`
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.blocks import (
  encode,
  half,
  largest,
  load_halves,
  load_raw,
  store_blocks,
)
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.quant import nvfp4
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array

FRONTS = ("none", "token_mean", "channel_mean", "hadamard")
_TILE = 128  # blocks a program, one a thread
_WARP = 32  # of four over six: one warp, so that none waits for another's rare branch
_TILES = 4  # that it takes, one after the other
_SIGNS = sum(1 << i for i in range(BLOCK) if nvfp4.hadamard_matrix()[i, 0] < 0)


def quantise(
  x: Array,
  *,
  rule: str = "mse",
  batch_axes: int = 0,
  amax: Array | None = None,
  front: str = "none",
  mean: Array | None = None,
  implementation: str | None = None,
) -> NVFP4Array:
  """Quantises along the last axis.

  Args:
    x: bfloat16 or float32 (*batch, tokens, ..., n), n a multiple of 16.
    rule: of `nvfp4.RULES`.
    batch_axes: how many leading axes have a tensor scale of their own.
    amax: float32 (*batch), the largest magnitudes behind `front` if already known.
    front: what is done to the numbers first, one of FRONTS.
    mean: (*batch, ..., n), what 'token_mean' subtracts.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Raises:
    ValueError: an unknown name, a shape or dtype that does not fit.
  """
  _check(x, rule, batch_axes, amax, front, mean)
  settings = dict(rule=rule, batch_axes=batch_axes, amax=amax, front=front, mean=mean)
  if launching.on_triton(implementation):
    return triton(x, **settings, run=launching.launch)
  return reference(x, **settings)


def reference(
  x: Array,
  *,
  rule: str,
  batch_axes: int,
  amax: Array | None,
  front: str,
  mean: Array | None,
) -> NVFP4Array:
  """`quantise` in jnp, for any backend."""
  if front == "token_mean":
    mean = jnp.expand_dims(mean, batch_axes).astype(jnp.float32)
    x = x.astype(jnp.float32) - mean
  elif front == "channel_mean":
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
  elif front == "hadamard":
    x = nvfp4.hadamard(x)
  return nvfp4.quantise(x, rule=rule, batch_axes=batch_axes, amax=amax)


def triton(
  x: Array,
  *,
  rule: str,
  batch_axes: int,
  amax: Array | None,
  front: str,
  mean: Array | None,
  run: Launcher,
) -> NVFP4Array:
  """`quantise` by its kernels; `run` is `launch`, or in tests the interpreter."""
  chosen = nvfp4.RULES[rule]
  batch, n = x.shape[:batch_axes], x.shape[-1]
  if amax is None:
    (found,) = run(largest_call(x, batch_axes, front, mean))
    amax = jnp.max(found, axis=1).reshape(batch)
  amax = nvfp4.countable(amax)
  codes, scales = run(encode_call(x, batch_axes, front, mean, amax, rule))
  return NVFP4Array(
    codes.reshape(*x.shape[:-1], n // 2),
    scales.reshape(*x.shape[:-1], n // BLOCK),
    amax.astype(jnp.float32),
    chosen.span,
  )


def largest_call(x: Array, batch_axes: int, front: str, mean: Array | None) -> Call:
  """Largest magnitudes: float32 (groups, programs)."""
  groups, constants = _blocks(x, batch_axes, front)
  programs = math.ceil(constants["BLOCKS"] / _TILE)
  return Call(
    _nvfp4_largest,
    (x, x if mean is None else mean),
    (jax.ShapeDtypeStruct((groups, programs), jnp.float32),),
    (programs, groups),
    constants,
  )


def encode_call(
  x: Array,
  batch_axes: int,
  front: str,
  mean: Array | None,
  amax: Array,
  rule: str,
  tiles: int | None = None,
) -> Call:
  """Codes uint8 (groups, 8 blocks) and scales float8_e4m3fn (groups, blocks).

  Args:
    tiles: of a program, one after the other; the next is loaded meanwhile. None is
      what is fastest on an H200: 4 where programs are warps.
  """
  groups, constants = _blocks(x, batch_axes, front)
  chosen, blocks = nvfp4.RULES[rule], constants["BLOCKS"]
  warps = chosen.error is not None and front != "channel_mean"
  tile = _WARP if warps else _TILE
  tiles = tiles or (_TILES if warps else 1)
  return Call(
    _nvfp4_quantise,
    (x, x if mean is None else mean, amax),
    (
      jax.ShapeDtypeStruct((groups, 8 * blocks), jnp.uint8),
      jax.ShapeDtypeStruct((groups, blocks), jnp.float8_e4m3fn),
    ),
    (math.ceil(blocks / (tiles * tile)), groups),
    {
      **constants,
      "TILE": tile,
      "TILES": tiles,
      "M4": chosen.m4,
      "M8": chosen.m8,
      "ERROR": chosen.error,
    },
    num_warps=tile // 32,
  )


def _blocks(x: Array, batch_axes: int, front: str) -> tuple[int, dict]:
  """Groups with a tensor scale each, and the kernels' view of one of them."""
  group = x.shape[batch_axes:]
  return math.prod(x.shape[:batch_axes]), {
    "BLOCKS": math.prod(group) // BLOCK,
    "ROW": math.prod(group[1:]) // BLOCK if len(group) > 1 else group[0] // BLOCK,
    "CHANNELS": x.shape[-1] // BLOCK,
    "FRONT": front,
    "SIGNS": _SIGNS,
    "TILE": _TILE,
  }


def _check(x, rule, batch_axes, amax, front, mean) -> None:
  nvfp4.rule_of(rule)
  if isinstance(x, NVFP4Array):
    raise ValueError("x is an NVFP4Array already; dequantise it first")
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"x.dtype={x.dtype} must be bfloat16 or float32; use x.astype")
  if x.ndim <= batch_axes or x.shape[-1] % BLOCK:
    raise ValueError(
      f"shape={x.shape} cannot be quantised with batch_axes={batch_axes}: the last "
      f"axis must be a multiple of {BLOCK} and no batch axis; pad it with zeros"
    )
  if amax is not None and amax.shape != x.shape[:batch_axes]:
    raise ValueError(
      f"amax.shape={amax.shape} must be the batch axes {x.shape[:batch_axes]} of x"
    )
  if front not in FRONTS:
    raise ValueError(f"front={front!r} is unknown; use {', '.join(FRONTS)}")
  if (mean is not None) != (front == "token_mean"):
    raise ValueError(f"front={front!r} and mean must fit; use both for 'token_mean'")
  if mean is not None:
    wanted = (*x.shape[:batch_axes], *x.shape[batch_axes + 1 :])
    if x.ndim < batch_axes + 2 or mean.shape != wanted:
      raise ValueError(f"mean.shape={mean.shape} must be {wanted}, x without tokens")
  channels = x.shape[-1]
  if front == "channel_mean" and (channels & (channels - 1) or channels > 16 * _TILE):
    raise ValueError(
      f"n={channels} must be a power of two up to {16 * _TILE} for 'channel_mean'"
    )


# ------------------------------------------------------------------ kernels


@jit
def _fronted(
  raw_a,
  raw_b,
  mean_ptr,
  block,
  valid,
  dtype: tl.constexpr,
  ROW: tl.constexpr,
  CHANNELS: tl.constexpr,
  FRONT: tl.constexpr,
  SIGNS: tl.constexpr,
):
  """Blocks as loaded, of a dtype, behind FRONT: float32 halves a, b (blocks, 8)."""
  tile: tl.constexpr = block.shape[0]
  a, b = half(raw_a), half(raw_b)
  if FRONT == "token_mean":
    ma, mb = load_halves(mean_ptr, block % ROW, valid)
    a, b = a - ma, b - mb
  elif FRONT == "channel_mean":
    total = tl.reshape(tl.sum(a + b, axis=1), (tile // CHANNELS, CHANNELS))
    mean = tl.sum(total, axis=1)[:, None] * (1.0 / (16 * CHANNELS))
    mean = tl.reshape(tl.broadcast_to(mean, (tile // CHANNELS, CHANNELS)), (tile,))
    a, b = a - mean[:, None], b - mean[:, None]
  elif FRONT == "hadamard":
    a, b = _rotate(a, b, SIGNS)
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
  return a, b


@jit
def _rotate(a, b, SIGNS: tl.constexpr):
  """16-point Hadamard of blocks in halves; bit i of SIGNS is set if number i flips."""
  lane = tl.arange(0, 8)[None, :]
  a = tl.where((SIGNS >> lane) & 1 != 0, -a, a)
  b = tl.where((SIGNS >> (lane + 8)) & 1 != 0, -b, b)
  a = _butterfly(_butterfly(_butterfly(a, 1), 2), 4)
  b = _butterfly(_butterfly(_butterfly(b, 1), 2), 4)
  a = a * 0.25
  return tl.fma(b, 0.25, a), tl.fma(b, -0.25, a)


@jit
def _butterfly(x, STEP: tl.constexpr):
  """Sums and differences of numbers STEP apart in (blocks, 8)."""
  pairs = tl.reshape(x, (x.shape[0], 4 // STEP, 2, STEP))
  low, high = tl.split(tl.permute(pairs, 0, 1, 3, 2))
  pairs = tl.permute(tl.join(low + high, low - high), 0, 1, 3, 2)
  return tl.reshape(pairs, (x.shape[0], 8))


@jit
def _nvfp4_largest(
  x_ptr,
  mean_ptr,
  largest_ptr,
  BLOCKS: tl.constexpr,
  ROW: tl.constexpr,
  CHANNELS: tl.constexpr,
  FRONT: tl.constexpr,
  SIGNS: tl.constexpr,
  TILE: tl.constexpr,
):
  group = tl.program_id(1).to(tl.int64)
  block = tl.program_id(0) * TILE + tl.arange(0, TILE)
  valid = block < BLOCKS
  a, b = load_raw(x_ptr + group * BLOCKS * 16, block, valid)
  mean_ptr += group * ROW * 16
  dtype: tl.constexpr = x_ptr.dtype.element_ty
  a, b = _fronted(a, b, mean_ptr, block, valid, dtype, ROW, CHANNELS, FRONT, SIGNS)
  program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
  tl.store(largest_ptr + program, largest(a, b))


@jit
def _nvfp4_quantise(
  x_ptr,
  mean_ptr,
  amax_ptr,
  codes_ptr,
  scales_ptr,
  BLOCKS: tl.constexpr,
  ROW: tl.constexpr,
  CHANNELS: tl.constexpr,
  FRONT: tl.constexpr,
  SIGNS: tl.constexpr,
  TILE: tl.constexpr,
  TILES: tl.constexpr,
  M4: tl.constexpr,
  M8: tl.constexpr,
  ERROR: tl.constexpr,
):
  group = tl.program_id(1).to(tl.int64)
  amax = tl.load(amax_ptr + group)
  x_ptr += group * BLOCKS * 16
  mean_ptr += group * ROW * 16
  codes_ptr += group * BLOCKS * 8
  scales_ptr += group * BLOCKS
  dtype: tl.constexpr = x_ptr.dtype.element_ty
  block = tl.program_id(0) * (TILES * TILE) + tl.arange(0, TILE)
  raw_a, raw_b = load_raw(x_ptr, block, block < BLOCKS)
  for i in range(TILES):
    valid = block < BLOCKS
    a, b = _fronted(
      raw_a, raw_b, mean_ptr, block, valid, dtype, ROW, CHANNELS, FRONT, SIGNS
    )
    ahead = block + TILE
    raw_a, raw_b = load_raw(x_ptr, ahead, (ahead < BLOCKS) & (i + 1 < TILES))
    codes, scales = encode(a, b, amax, M4, M8, ERROR)
    store_blocks(codes_ptr, scales_ptr, block, valid, codes, scales)
    block = ahead
