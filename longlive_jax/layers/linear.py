"""Linear layers. The weight is whatever type holds numbers: `matmul` dispatches."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


@functools.singledispatch
def _matmul(weight: jax.Array, x: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype
  )


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`x @ weight.T`, for any weight type that is registered here.

  Quantised formats register their own rule with `matmul.register(TheirType)`, a
  function `(weight, x) -> y`; networks never ask which one it is.

  Args:
    x: (..., in).
    weight: (out, in), PyTorch's layout, so that 4-bit blocks lie along `in`.

  Returns:
    (..., out) in the dtype of x.
  """
  return _matmul(weight, x)


matmul.register = _matmul.register


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
    self.weight = nnx.Param(init(rngs.params(), (d_out, d_in), dtype))
    self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = matmul(x, self.weight.get_value())
    return y if self.bias is None else y + self.bias[...]
