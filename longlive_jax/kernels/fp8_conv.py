"""Causal convolutions of FP8 codes on the GPU, for the VAE's decoder.

A convolution is a product whose rows are pixels: every tap of its kernel reads the same
rows, some pixels and frames further on. So frames are not put side by side, which is a
copy of all of them, and no more is read than what tiles of pixels share.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl

_TILE_K = 128  # channels at a time; the channels of an input are a multiple of it


def causal_convolve(
  codes: Array,
  kernel: Array,
  scale: Array,
  *,
  dtype: jnp.dtype,
  sides: tuple[int, int] | None = None,
  implementation: str | None = None,
) -> Array:
  """Convolves codes in time, which is not padded, and space, padded with zeros.

  Args:
    codes: float8_e4m3fn (b, t + kt - 1, y, x, i).
    kernel: float8_e4m3fn (o, ky, kx, kt, i), odd ky and kx.
    scale: float32 (o,), what a code of the input times one of the output's kernel is.
    dtype: of the result.
    sides: rows and columns of zeros on each side, 0 where the codes hold what lies
      beside the picture; None is half a kernel, which keeps y and x.
    implementation: 'triton', 'jnp', or None: Triton on GPUs with FP8 products (Hopper
      and newer) where it `runs_here`, else jnp.

  Returns:
    (b, t, y + 2 sides[0] - ky + 1, x + 2 sides[1] - kx + 1, o).

  Raises:
    ValueError: an unknown implementation, shapes or dtypes that do not fit; for Triton
      also inputs that are no multiple of 128.
    NotImplementedError: under differentiation, by Triton.
  """
  _check(codes, kernel, scale)
  if sides is None:
    sides = kernel.shape[1] // 2, kernel.shape[2] // 2
  settings = {"dtype": jnp.dtype(dtype), "sides": sides}
  given = implementation is not None
  if launching.on_triton(implementation) and (given or runs_here(kernel)):
    return triton(codes, kernel, scale, **settings, run=launching.launch)
  return reference(codes, kernel, scale, **settings)


def runs_here(kernel: Array) -> bool:
  """Whether the Triton kernel does by default: FP8 products, whole tiles of inputs."""
  hopper = launching.on_triton(None) and launching.compute_capability() >= 90
  return hopper and kernel.shape[-1] % _TILE_K == 0


def reference(
  codes: Array, kernel: Array, scale: Array, *, dtype: jnp.dtype, sides: tuple[int, int]
) -> Array:
  """`causal_convolve` in jnp, for any backend: frames side by side, in `dtype`."""
  o, ky, kx, kt, i = kernel.shape
  b, total, y, x, _ = codes.shape
  t = total - kt + 1
  taps = [codes[:, k : k + t] for k in range(kt)]
  frames = jnp.concatenate(taps, axis=-1).reshape(b * t, y, x, kt * i)
  sums = lax.conv_general_dilated(
    frames.astype(dtype),
    kernel.reshape(o, ky, kx, kt * i).astype(dtype),
    (1, 1),
    [(side, side) for side in sides],
    dimension_numbers=("NHWC", "OHWI", "NHWC"),
  )
  return (sums * scale).astype(dtype).reshape(b, t, *sums.shape[1:])


def triton(
  codes: Array,
  kernel: Array,
  scale: Array,
  *,
  dtype: jnp.dtype,
  sides: tuple[int, int],
  run: Launcher,
) -> Array:
  """`causal_convolve` by its kernel; `run` is `launch`, or in tests the interpreter."""
  (y,) = run(conv_call(codes, kernel, scale, dtype, sides))
  return y


def conv_call(
  codes: Array,
  kernel: Array,
  scale: Array,
  dtype: jnp.dtype,
  sides: tuple[int, int],
  tile: tuple[int, int] = (128, 256),
  num_warps: int = 8,
  num_stages: int = 4,
) -> Call:
  """Args: tile: pixels and outputs of a program."""
  o, ky, kx, kt, i = kernel.shape
  if i % _TILE_K:
    raise ValueError(
      f"kernel.shape={kernel.shape} must have a multiple of {_TILE_K} inputs for "
      "Triton; use implementation='jnp'"
    )
  b, total, y_in, x_in, _ = codes.shape
  t = total - kt + 1
  y, x = y_in + 2 * sides[0] - ky + 1, x_in + 2 * sides[1] - kx + 1
  tile_m, tile_n = tile[0], min(tile[1], max(16, 1 << (o - 1).bit_length()))
  return Call(
    _fp8_conv,
    (codes, kernel, scale),
    (jax.ShapeDtypeStruct((b, t, y, x, o), dtype),),
    (math.ceil(o / tile_n) * math.ceil(y * x / tile_m), b * t),
    {
      "FRAMES": t,
      "Y": y,
      "X": x,
      "Y_IN": y_in,
      "X_IN": x_in,
      "ABOVE": sides[0],
      "LEFT": sides[1],
      "INPUTS": i,
      "OUTPUTS": o,
      "KY": ky,
      "KX": kx,
      "KT": kt,
      "TILE_M": tile_m,
      "TILE_N": tile_n,
      "TILE_K": _TILE_K,
    },
    num_warps=num_warps,
    num_stages=num_stages,
  )


def _check(codes: Array, kernel: Array, scale: Array) -> None:
  for name, array in (("codes", codes), ("kernel", kernel)):
    if array.dtype != jnp.float8_e4m3fn or array.ndim != 5:
      raise ValueError(
        f"{name}={array.dtype}{array.shape} must be float8_e4m3fn of five axes"
      )
  o, ky, kx, kt, i = kernel.shape
  if codes.shape[-1] != i or codes.shape[1] < kt or not (ky % 2 and kx % 2):
    raise ValueError(
      f"codes.shape={codes.shape} and kernel.shape={kernel.shape} do not fit: use as "
      "many channels, at least as many frames, and a kernel of odd sides"
    )
  if scale.shape != (o,) or scale.dtype != jnp.float32:
    raise ValueError(f"scale={scale.dtype}{scale.shape} must be float32 ({o},)")


@jit
def _fp8_conv(
  x_ptr,
  kernel_ptr,
  scale_ptr,
  y_ptr,
  FRAMES: tl.constexpr,
  Y: tl.constexpr,
  X: tl.constexpr,
  Y_IN: tl.constexpr,
  X_IN: tl.constexpr,
  ABOVE: tl.constexpr,
  LEFT: tl.constexpr,
  INPUTS: tl.constexpr,
  OUTPUTS: tl.constexpr,
  KY: tl.constexpr,
  KX: tl.constexpr,
  KT: tl.constexpr,
  TILE_M: tl.constexpr,
  TILE_N: tl.constexpr,
  TILE_K: tl.constexpr,
):
  # Programs that follow each other share a tile of pixels, and those after them most of
  # the rows of the picture around it: both stay in the cache.
  columns: tl.constexpr = (OUTPUTS + TILE_N - 1) // TILE_N
  pixel = tl.program_id(0) // columns * TILE_M + tl.arange(0, TILE_M)
  output = tl.program_id(0) % columns * TILE_N + tl.arange(0, TILE_N)
  frame = tl.program_id(1).to(tl.int64)  # of all videos
  first = frame // FRAMES * (FRAMES + KT - 1) + frame % FRAMES  # that it reads
  x_ptr += first * (Y_IN * X_IN * INPUTS)
  row, column = pixel // X - ABOVE, pixel % X - LEFT  # of the input, of the first tap
  corner = row * X_IN + column
  channel = tl.arange(0, TILE_K)
  length: tl.constexpr = KY * KX * KT * INPUTS  # of an output's weights
  # Outputs behind the last are those of the last: what they make is not stored.
  weights = kernel_ptr + tl.minimum(output, OUTPUTS - 1)[None, :] * length
  weights = weights + channel[:, None]
  parts: tl.constexpr = INPUTS // TILE_K
  sums = tl.zeros((TILE_M, TILE_N), tl.float32)
  for step in range(KY * KX * KT * parts):
    tap = step // parts  # in the order of a kernel's axes
    down, right = tap // (KX * KT), tap // KT % KX
    inside = (row + down >= 0) & (row + down < Y_IN)
    inside = inside & (column + right >= 0) & (column + right < X_IN)
    at = (tap % KT * Y_IN + down) * X_IN + right + corner
    codes = tl.load(
      x_ptr + (at * INPUTS + step % parts * TILE_K)[:, None] + channel[None, :],
      mask=inside[:, None],
      other=0.0,
    )
    sums = tl.dot(codes, tl.load(weights + step * TILE_K), sums)
  scale = tl.load(scale_ptr + output, mask=output < OUTPUTS, other=0.0)
  y = (sums * scale[None, :]).to(y_ptr.dtype.element_ty)
  y_ptr += frame * (Y * X * OUTPUTS)
  at = pixel[:, None] * OUTPUTS + output[None, :]
  tl.store(
    y_ptr + at, y, mask=(pixel < Y * X)[:, None] & (output < OUTPUTS)[None, :]
  )
