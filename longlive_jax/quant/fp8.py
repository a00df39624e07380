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


@jax.custom_vjp
def product(x: Array, weight: FP8Array) -> Array:
  """`x @ weight.T` of x quantised by rows, in 8 bits; the weight gets no gradient.

  The product of two codes is exact in float32, so its sum and the two scales, which
  come after it, are all that rounds. Hopper's FP8 units, which XLA uses for a product
  of two float8 arrays, keep fewer bits of that sum; where there are none, XLA
  multiplies the same codes in a wider type. A scale for every token and output row
  must come after the product: before it, XLA matches scales of whole tensors only. The
  gradient of x takes its rounding for the identity.

  Args:
    x: (..., in).
    weight: (out, in), a scale for every row.

  Returns:
    (..., out) in the dtype of x.
  """
  rows = quantise(x)
  total = lax.dot_general(
    rows.codes,
    weight.codes,
    (((x.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # One after the other: the product of two small scales leaves float32's range.
  return (total * rows.scale * weight.scale[:, 0]).astype(x.dtype)


def _backward(weight: FP8Array, gradient: Array) -> tuple[Array, None]:
  return gradient @ dequantise(weight, gradient.dtype), None


product.defvjp(lambda x, w: (product(x, w), w), _backward)
