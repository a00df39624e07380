"""Arithmetic with the same bits on every backend, jitted or not.

IEEE 754 fixes the bits of a single sum or product, but compilers do not keep to it: XLA
divides to within two units in the last place on GPUs, multiplies by reciprocals of
scalars, adds up reductions in any order and fuses a product with the sum behind it. A
codec in which numbers meet the middle between two codes all the time (a bfloat16 number
over a scale of four bits) turns that into other codes: 8% of the bytes on an H200.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_ONE = 1 << 23  # the leading bit of a float32's significand
_INFINITE = 0xFF << 23  # the exponent of inf and NaN


def divide(a: Array | float, b: Array | float) -> Array:
  """a / b, rounded to nearest even: the machine's quotient, corrected in integers.

  Args:
    a: float32, not negative; subnormal numbers count as 0.
    b: float32, positive, normal; broadcast against a.

  Returns:
    float32, without a gradient. A quotient below 2**-126 is 0, one beyond float32 is
    not defined; that of inf and NaN is a itself.
  """
  a, b = (
    lax.bitcast_convert_type(jnp.asarray(v, jnp.float32), jnp.int32)
    for v in jnp.broadcast_arrays(a, b)
  )
  x, y = ((v & (_ONE - 1)) | _ONE for v in (a, b))  # significands, 24 bits
  less = (x < y).astype(jnp.int32)
  x = x << less  # x / y is in [1, 2)
  machine = x.astype(jnp.float32) / y.astype(jnp.float32)  # off by 2 units on a GPU
  significand = (machine * _ONE).astype(jnp.int32)
  # Of 47 bits the lowest 32 are kept, which are all of this small difference.
  rest2 = 2 * ((x << 23) - significand * y)
  exponent = (a >> 23) - (b >> 23) + 127 - less
  bits = (exponent << 23) + significand - _ONE - 3
  # By half units; a quotient of such numbers never ends on one.
  up = rest2[..., None] > jnp.array([-5, -3, -1, 1, 3, 5], jnp.int32) * y[..., None]
  terms = jnp.concatenate([bits[..., None], up.astype(jnp.int32)], axis=-1)
  normal = (a >= _ONE) & (exponent > 0)
  special = (a & _INFINITE) == _INFINITE
  terms = jnp.where((normal & ~special)[..., None], terms, 0)
  terms = terms.at[..., 0].set(jnp.where(special, a, terms[..., 0]))
  # A sum, so that XLA does not repeat all this for each of the 16 numbers of a block.
  bits = jnp.sum(terms, axis=-1)
  return lax.bitcast_convert_type(bits, jnp.float32)


def rounded(x: Array) -> Array:
  """x as float32 holds it: a product is not fused with a sum behind it."""
  return lax.reduce_precision(x, 8, 23)


def e4m3(x: Array) -> Array:
  """x to the numbers of float8_e4m3fn, nearest, ties to even, at most 448; float32.

  Casting these to float8 is exact. The cast alone is not to be relied on: beyond 448
  it gives NaN, and on GPUs XLA drops a cast to float8 and back and goes on with what
  was not rounded (xla_allow_excess_precision), while the stored number is.
  """
  x = jnp.clip(x, -448.0, 448.0)
  small = jnp.round(x * 512) / 512  # below 2**-6 the step is 2**-9
  return jnp.where(jnp.abs(x) < 2.0**-6, small, lax.reduce_precision(x, 8, 3))


def total(x: Array) -> Array:
  """Sum over the last axis, a power of two, in halves: (..., n) -> (..., 1)."""
  while (half := x.shape[-1] // 2) > 0:
    # Rounded, which changes nothing: XLA would make one sum of all.
    x = rounded(jnp.sum(x.reshape(*x.shape[:-1], 2, half), axis=-2))
  return x


def power_of_two(x: Array) -> Array:
  """The largest power of two that is not larger than x; normal float32, or 0 for 0."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def inverse_power_of_two(x: Array) -> Array:
  """1 / power_of_two(x), of normal x. (A division would not be exact everywhere.)"""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return lax.bitcast_convert_type(0x7F000000 - (bits & 0x7F800000), jnp.float32)
