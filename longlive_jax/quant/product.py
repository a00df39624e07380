"""Products of two NVFP4 arrays: 4-bit arithmetic, simulated exactly (SPEC 9)."""

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.quant import nvfp4
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array

Array = jax.Array


def product(a: NVFP4Array, b: NVFP4Array) -> Array:
  """`dequantise(a) @ dequantise(b).T`, at the speed of a bfloat16 product.

  A code times its block scale has at most 6 significant bits: exact in bfloat16, and
  the product of two is exact in float32. The tensor scales come last, as in hardware
  that multiplies FP4. So the float32 sum is the only thing that rounds, which makes
  this closer to the exact product than one of float32 operands, and much faster where
  float32 has no matrix units.

  Args:
    a: (..., k), with a tensor scale for the whole or for each index of first axes.
    b: (n, k), one tensor scale.

  Returns:
    float32 (..., n).
  """
  total = lax.dot_general(
    _without_tensor_scale(a),
    _without_tensor_scale(b),
    (((a.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return scaled(scaled(total, tensor_factor(a)), tensor_factor(b))


def tensor_factor(array: NVFP4Array) -> Array:
  """amax / span, what code * block scale is multiplied by; rounded here.

  A constant is multiplied because XLA would turn a division into this, but only under
  jit. Products apply one factor after the other: that of two small ones leaves
  float32's range.
  """
  return lax.reduce_precision(array.amax * (1 / array.span), 8, 23)


def scaled(total: Array, scale: Array) -> Array:
  """total times a scale for each index of its first axes."""
  return total * scale.reshape(*scale.shape, *[1] * (total.ndim - scale.ndim))


def _without_tensor_scale(array: NVFP4Array) -> Array:
  """code * block scale, (..., k), bfloat16."""
  blocks = nvfp4.decode(nvfp4.unpack(array.codes)).reshape(*array.scales.shape, BLOCK)
  values = blocks * array.scales.astype(jnp.float32)[..., None]
  return values.reshape(array.shape).astype(jnp.bfloat16)
