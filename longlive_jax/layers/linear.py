"""Linear layers. The weight is whatever type holds numbers: `matmul` dispatches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.kernels import launch
from longlive_jax.kernels.nvfp4_dequantise import dequantise
from longlive_jax.quant import fp8, nvfp4, training, weights

Array = jax.Array


def matmul(x: Array | fp8.Rows, weight: Any) -> Array:
  """`x @ weight.T`, for any type of weight that `matmul_rule` knows.

  Networks never ask which one it is.

  Args:
    x: (..., in); quantised already only for weights that multiply codes, see
      layers/operand.py.
    weight: (out, in), PyTorch's layout, so that 4-bit blocks lie along `in`.

  Returns:
    (..., out) in the dtype of x.
  """
  return matmul_rule(weight, x)


@functools.singledispatch
def matmul_rule(weight: Any, x: Array) -> Array:
  """The product by type of weight; this one for arrays.

  Another type is added with `@matmul_rule.register`, a function `(weight, x) -> y`.
  """
  return jax.lax.dot_general(
    x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype
  )


# On an H200 up to here a kernel that reads packed weights is the faster (fc1 of the 5B
# model): 0.025 instead of 0.058 ms for 16 rows, but 2.13 instead of 0.78 for 7,040.
FEW_ROWS = 64


@matmul_rule.register
def _w4a16(weight: nvfp4.NVFP4Array, x: Array) -> Array:
  if x.size // x.shape[-1] <= FEW_ROWS and launch.on_triton(None):
    return weights.packed_product(x, weight)
  return _dequantised_product(x, weight)


@matmul_rule.register
def _w4a4(weight: weights.W4A4, x: Array) -> Array:
  return weights.quantised_product(x, weight)


@matmul_rule.register
def _w8a16(weight: fp8.FP8Array, x: Array) -> Array:
  return _dequantised_product(x, weight)


@matmul_rule.register
def _w8a8(weight: weights.W8A8, x: Array | fp8.Rows) -> Array:
  if isinstance(x, fp8.Rows):
    return fp8.product(x, weight.weight)
  return weights.fp8_product(x, weight.weight)


@jax.custom_vjp
def _dequantised_product(
  x: Array, weight: nvfp4.NVFP4Array | fp8.FP8Array
) -> Array:
  """`x @ weight.T` in the dtype of x; the weight gets no gradient."""
  return matmul_rule(_numbers(weight, x.dtype), x)


def _numbers(weight: nvfp4.NVFP4Array | fp8.FP8Array, dtype: jnp.dtype) -> Array:
  if isinstance(weight, fp8.FP8Array):
    return fp8.dequantise(weight, dtype)
  return dequantise(weight, dtype=dtype)


# The backward pass dequantises again: a scan over layers would otherwise keep the
# numbers of every layer, which is the whole plain network.
_dequantised_product.defvjp(
  lambda x, weight: (_dequantised_product(x, weight), weight),
  lambda weight, gradient: (gradient @ _numbers(weight, gradient.dtype), None),
)


@matmul_rule.register
def _training(weight: training.TrainingWeight, x: Array) -> Array:
  return training.training_product(x, weight.weight, weight.key, weight.settings)


@matmul_rule.register
def _fp8_training(weight: training.FP8TrainingWeight, x: Array) -> Array:
  return training.fp8_training_product(x, weight.weight)


class Linear(nnx.Module):
  """y = x W^T + b with W (out, in) and b (out,) or None."""

  def __init__(
    self,
    d_in: int,
    d_out: int,
    *,
    bias: bool = True,
    dtype: jnp.dtype = jnp.float32,
    zero: bool = False,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform()
    self.weight = weights.Matrix(init(rngs.params(), (d_out, d_in), dtype))
    self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None

  def __call__(self, x: Array | fp8.Rows) -> Array:
    y = matmul(x, self.weight.get_value())
    return y if self.bias is None else add_bias(y, self.bias[...])


def add_bias(y: Array, bias: Array) -> Array:
  """y (..., out) + bias (out,), in the dtype of y."""
  # The sum is that of y's dtype. But the gradient of the bias, a sum over all tokens,
  # is float32 this way: added up in bfloat16, it is 1% off after 128 tokens.
  return (y + bias.astype(jnp.float32)).astype(y.dtype)
