"""FP8: 8-bit numbers (E4M3) with a scale for every row, or for every slice.

  value = code * scale
  scale = amax / 448               over the numbers that share it; 1 if amax is 0
  code  = e4m3(x * (448 / amax))   nearest, ties to even, at most 448

Numeric contract. Both quotients, the product and the value are float32, each rounded on
its own: codes and scales are the same bits on every backend, jitted or not
(quant/exact.py). Special values:

  zeros      keep their sign
  tiny       an amax below 2**-104 counts as 0: the codes are zeros
  inf, NaN   read as NaN, so nothing vanishes silently; amax is that of the others
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.quant import exact, nvfp4

Array = jax.Array

LARGEST = 448.0  # of E4M3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Array:
  """A quantised array; a pytree whose two leaves share their leading axes.

  So indexing, updating, sharding, stacking and scanning leading axes is the same
  operation on every leaf: `jax.tree.map(lambda leaf: leaf[i], array)`.

  Attributes:
    codes: float8_e4m3fn (..., n).
    scale: float32, the shape of codes with 1 for axes that share a scale; positive.
  """

  codes: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def ndim(self) -> int:
    return self.codes.ndim

  @property
  def nbytes(self) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def quantise(
  x: Array, *, batch_axes: int | None = None, mesh_axes: Sequence[str] = ()
) -> FP8Array:
  """Quantises with one scale for each index of the first axes.

  Args:
    x: (..., n), float.
    batch_axes: how many first axes have scales of their own; by default all but the
      last, so that every row has one.
    mesh_axes: inside shard_map, those over which numbers that share a scale are spread.

  Raises:
    ValueError: batch_axes that leave no axis, or an array that is quantised already.
  """
  if isinstance(x, FP8Array):
    raise ValueError("x is an FP8Array already; dequantise it first")
  if batch_axes is None:
    batch_axes = x.ndim - 1
  if not 0 <= batch_axes < x.ndim:
    raise ValueError(
      f"batch_axes={batch_axes} must leave an axis of shape={x.shape} whose numbers "
      f"share a scale; use 0 to {x.ndim - 1}"
    )
  x = x.astype(jnp.float32)
  finite = jnp.isfinite(x)
  x = jnp.where(finite, x, 0)
  axes = tuple(range(batch_axes, x.ndim))
  amax = jnp.max(jnp.abs(x), axis=axes, initial=0.0)
  amax = nvfp4.countable(lax.pmax(amax, tuple(mesh_axes)) if mesh_axes else amax)
  amax = jnp.where(amax > 0, amax, LARGEST)
  amax = amax.reshape(*amax.shape, *[1] * (x.ndim - batch_axes))
  codes = exact.e4m3(x * exact.divide(LARGEST, amax))
  codes = jnp.where(finite, codes, jnp.nan).astype(jnp.float8_e4m3fn)
  return FP8Array(codes, exact.divide(amax, LARGEST))


def dequantise(array: FP8Array, dtype: jnp.dtype = jnp.float32) -> Array:
  """The numbers (..., n) in `dtype`: in float32, one rounding an element, cast last."""
  return (array.codes.astype(jnp.float32) * array.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Activations in 8 bits: what layers that multiply codes read.

  Attributes:
    array: codes (..., n) and a scale for every row (..., 1).
    dtype: static, of the numbers that were quantised and of products with them.
  """

  array: FP8Array
  dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  def reshape(self, *shape: int) -> "Rows":
    """As of an array; rows may become longer where those joined share a scale."""
    codes = self.array.codes.reshape(shape)
    scale = self.array.scale.reshape(*codes.shape[:-1], -1)[..., :1]
    return dataclasses.replace(self, array=FP8Array(codes, scale))

  def numbers(self) -> Array:
    """(..., n) in `dtype`."""
    return dequantise(self.array, self.dtype)


def sums(rows: Rows, weight: FP8Array, dtype: jnp.dtype | None = None) -> Array:
  """Sums of products of codes, without the scales: (..., out).

  Args:
    rows: (..., in).
    weight: (out, in).
    dtype: what the float32 sums are rounded to, by default that of the rows.
  """
  # Matrices of two axes: what XLA takes cuBLAS's FP8 product for. This has scales of
  # whole tensors only, so those of tokens and outputs come after it; with 16-bit sums
  # it writes half of the bytes.
  total = lax.dot_general(
    rows.array.codes.reshape(-1, rows.shape[-1]),
    weight.codes,
    (((1,), (1,)), ((), ())),
    preferred_element_type=rows.dtype if dtype is None else dtype,
  )
  return total.reshape(*rows.shape[:-1], -1)


def product(rows: Rows, weight: FP8Array, sum_dtype: jnp.dtype | None = None) -> Array:
  """`rows @ weight.T` in 8 bits: (..., out) in the dtype of the rows.

  What rounds: the product of two codes is exact in float32. Their sum is float32
  (Hopper's FP8 units, which XLA uses for a product of two float8 arrays, keep fewer
  bits of it; where there are none, XLA multiplies the same codes in a wider type) and
  is rounded to `sum_dtype`. The two scales follow in float32, and the result is
  rounded to the dtype of the rows. bfloat16 has the range of float32, so sums without
  scales cannot overflow; rounding them costs 2**-9 beside the 2**-4 of codes. All that
  follows the sum XLA fuses with what reads it, so it moves no bytes of its own.

  Args:
    rows: (..., in).
    weight: (out, in), a scale for every row.
    sum_dtype: by default that of the rows.
  """
  total = sums(rows, weight, sum_dtype).astype(jnp.float32)
  # One after the other: the product of two small scales leaves float32's range.
  return (total * rows.array.scale * weight.scale[:, 0]).astype(rows.dtype)


def as_dtype(x: Array, dtype: jnp.dtype) -> Array:
  """x in a dtype; in float8_e4m3fn with scale 1, at most 448, see `cast`."""
  return cast(x) if dtype == jnp.float8_e4m3fn else x.astype(dtype)


def cast(x: Array) -> Array:
  """x as float8_e4m3fn with scale 1: nearest, ties to even, at most 448."""
  if x.dtype == jnp.float8_e4m3fn:
    return x
  # The cast alone makes NaN of what is larger. Not `exact.e4m3`, whose ten operations
  # a number would take longer than moving a window of keys: of 16-bit numbers this is
  # the same.
  return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
