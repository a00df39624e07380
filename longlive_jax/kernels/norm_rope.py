"""What follows the products of q and k in one pass on the GPU: bias, norm, rotation.

The outputs of the layer are read once and what attention reads is written: a row with
all heads is in registers when its root mean square is known. XLA reads it twice, and
moves the interleaved pairs of channels one by one.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import launch as launching
from longlive_jax.kernels.fp8_rows import LONGEST
from longlive_jax.kernels.launch import Array, Call, Launcher, jit, tl
from longlive_jax.kernels.modulate_quantise import rounded
from longlive_jax.kernels.rows import Walk, columns_of, load_row, load_shared, row_of
from longlive_jax.quant import fp8

WALK = Walk()


def norm_rope(
  x: Array,
  bias: Array,
  weight: Array,
  cos: Array | None = None,
  sin: Array | None = None,
  scale: Array | None = None,
  columns: Array | None = None,
  *,
  eps: float,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> Array:
  """rotate(rms_norm(x * scale * columns + bias) * weight).

  What rounds: all is float32 up to the norm, whose result is rounded to the dtype of x,
  as is its product with the weight (SPEC 2.5); the rotation is float32 and is rounded
  to the dtype of x, and then to that of the output.

  Args:
    x: bfloat16 or float32 (..., n), outputs of a layer without its bias; with scales,
      sums of codes, see `fp8.sums`.
    bias, weight: (n,) in the dtype of x; of the layer and of the norm.
    cos, sin: float32 (..., d / 2), of the pairs of channels of every head; None does
      not rotate.
    scale, columns: float32 (..., 1) and (n,), of the rows and outputs of a product of
      codes; None for numbers.
    eps: of the norm.
    dtype: of the output, by default that of x; float8_e4m3fn is `fp8.cast` of that.
    implementation: 'triton', 'jnp', or None: Triton on NVIDIA GPUs, else jnp.

  Returns:
    (..., n).

  Raises:
    ValueError: an unknown implementation, a shape or dtype that does not fit.
    TypeError: of the kernel, in forward mode; its gradient is the reference's.
  """
  arrays = x, bias, weight, cos, sin, scale, columns
  _check(*arrays)
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  in_jnp = functools.partial(reference, eps=eps, dtype=dtype)
  if not launching.on_triton(implementation):
    return in_jnp(*arrays)
  on_gpu = functools.partial(triton, eps=eps, dtype=dtype, run=launching.launch)
  return launching.with_gradient_of(in_jnp, on_gpu)(*arrays)


def reference(
  x: Array,
  bias: Array,
  weight: Array,
  cos: Array | None = None,
  sin: Array | None = None,
  scale: Array | None = None,
  columns: Array | None = None,
  *,
  eps: float,
  dtype: jnp.dtype,
) -> Array:
  """`norm_rope` in jnp, for any backend."""
  h = x.astype(jnp.float32)
  if scale is not None:
    h = h * scale * columns
  h = h + bias.astype(jnp.float32)
  h = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
  h = rounded(rounded(h, x.dtype) * weight.astype(jnp.float32), x.dtype)
  if cos is not None:
    pairs = h.reshape(*h.shape[:-1], -1, cos.shape[-1], 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[..., None, :], sin[..., None, :]  # of all heads
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    h = rounded(turned.reshape(h.shape), x.dtype)
  return fp8.as_dtype(h, dtype)


def triton(
  x: Array,
  bias: Array,
  weight: Array,
  cos: Array | None = None,
  sin: Array | None = None,
  scale: Array | None = None,
  columns: Array | None = None,
  *,
  eps: float,
  dtype: jnp.dtype,
  run: Launcher,
) -> Array:
  """`norm_rope` by its kernel; `run` is `launch`, or in tests the interpreter."""
  arrays = x, bias, weight, cos, sin, scale, columns
  (out,) = run(norm_rope_call(arrays, eps, dtype))
  return out.reshape(x.shape)


def norm_rope_call(
  arrays: tuple[Array | None, ...], eps: float, dtype: jnp.dtype, walk: Walk = WALK
) -> Call:
  """x, bias, weight, cos, sin, scale, columns -> (rows, n)."""
  x, bias, weight, cos, sin, scale, columns = arrays
  n, rows = x.shape[-1], math.prod(x.shape[:-1])
  # What there is none of is not read, but every parameter has an array.
  given = [x if a is None else a for a in (bias, weight, cos, sin, scale, columns)]
  return Call(
    _norm_rope,
    (x, *given),
    (jax.ShapeDtypeStruct((rows, n), dtype),),
    (walk.programs(rows),),
    {
      **walk.constants(rows, n),
      "EPS": eps,
      "PAIRS": 0 if cos is None else cos.shape[-1],
      "SCALED": scale is not None,
    },
    num_warps=walk.warps(n),
  )


def _check(x, bias, weight, cos, sin, scale, columns) -> None:
  """Raises ValueError for what does not fit."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"x.dtype={x.dtype} must be bfloat16 or float32; use x.astype")
  if not x.ndim or not 0 < x.shape[-1] <= LONGEST:
    raise ValueError(f"x.shape={x.shape} must be (..., n) with n from 1 to {LONGEST}")
  lead, n, f32 = x.shape[:-1], x.shape[-1], jnp.dtype(jnp.float32)
  for one, other, names in ((cos, sin, "cos, sin"), (scale, columns, "scale, columns")):
    if (one is None) != (other is None):
      raise ValueError(f"{names}: one of them is None; give both or neither")
  pairs = None if cos is None else cos.shape[-1]
  if pairs is not None and (not pairs or n % (2 * pairs)):
    raise ValueError(f"cos.shape={cos.shape} must end in a half of a head of n={n}")
  expected = {
    "bias": (bias, (n,), x.dtype),
    "weight": (weight, (n,), x.dtype),
    "cos": (cos, (*lead, pairs), f32),
    "sin": (sin, (*lead, pairs), f32),
    "scale": (scale, (*lead, 1), f32),
    "columns": (columns, (n,), f32),
  }
  for name, (array, shape, dtype) in expected.items():
    if array is not None and (array.shape != shape or array.dtype != dtype):
      raise ValueError(f"{name}={array.shape} {array.dtype} must be {shape} {dtype}")


@jit
def _norm_rope(
  x_ptr,
  bias_ptr,
  weight_ptr,
  cos_ptr,
  sin_ptr,
  scales_ptr,
  columns_ptr,
  out_ptr,
  N: tl.constexpr,
  COUNT: tl.constexpr,
  TILE: tl.constexpr,
  ROWS: tl.constexpr,
  EPS: tl.constexpr,
  PAIRS: tl.constexpr,
  SCALED: tl.constexpr,
):
  column = columns_of(TILE)
  weight = load_shared(weight_ptr, column, N)
  ahead = load_row(x_ptr, row_of(0, COUNT, ROWS), column, N)
  for i in range(ROWS):
    row, h = row_of(i, COUNT, ROWS), ahead.to(tl.float32)
    dtype = ahead.dtype
    ahead = load_row(x_ptr, row_of(i + 1, COUNT, ROWS), column, N)
    if SCALED:
      h *= tl.load(scales_ptr + row)
      h *= load_shared(columns_ptr, column, N)
    h += load_shared(bias_ptr, column, N).to(tl.float32)
    square = tl.div_rn(tl.sum(h * h, axis=0), N * 1.0)
    h = (h * tl.div_rn(1.0, tl.sqrt_rn(square + EPS))).to(dtype)
    h = (h.to(tl.float32) * weight.to(tl.float32)).to(dtype)
    if PAIRS > 0:
      at = row * PAIRS + tl.arange(0, TILE // 2) % PAIRS
      cos, sin = tl.load(cos_ptr + at), tl.load(sin_ptr + at)
      even, odd = tl.split(tl.reshape(h.to(tl.float32), (TILE // 2, 2)))
      turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
      h = tl.reshape(turned, (TILE,)).to(dtype)
    h = h.to(tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * N + column, h, mask=column < N)
