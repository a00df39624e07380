"""Queries and keys on their way from a layer to attention.

Their norm is over all heads and belongs to the network; their rotation belongs to who
attends, and may wait: keys in a cache may be rotated later. So the network hands out
what its layer made, and norm and rotation are made of it in one pass.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels.norm_rope import norm_rope
from longlive_jax.layers import rope
from longlive_jax.layers.linear import Linear, matmul
from longlive_jax.layers.norm import RMSNorm
from longlive_jax.layers.operand import Operand, read_by
from longlive_jax.quant import fp8
from longlive_jax.quant.weights import W8A8

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
  """Queries or keys that are neither normed nor rotated.

  Attributes:
    x: (b, s, n * d), outputs of a layer without its bias; with scales, sums of codes.
    scale, columns: of a product of codes, float32 (b, s, 1) and (n * d,), or None.
    bias, weight: (n * d,), of the layer and of the norm.
    eps, heads: static.
  """

  x: Array
  scale: Array | None
  columns: Array | None
  bias: Array
  weight: Array
  eps: float = dataclasses.field(metadata={"static": True})
  heads: int = dataclasses.field(metadata={"static": True})

  def numbers(
    self, rotation: rope.Rotation | None = None, dtype: jnp.dtype | None = None
  ) -> Array:
    """(b, s, n, d), normed, and rotated by (b, s, d/2).

    Args:
      dtype: by default that of x, see `norm_rope`.
    """
    turns = None, None
    if rotation is not None:
      shape = *self.x.shape[:2], rotation.cos.shape[-1]
      turns = (jnp.broadcast_to(part, shape) for part in rotation)
    out = norm_rope(
      self.x, self.bias, self.weight, *turns, self.scale, self.columns,
      eps=self.eps, dtype=dtype,
    )  # fmt: skip
    return out.reshape(*out.shape[:2], self.heads, -1)


def projected(layer: Linear, x: Operand, norm: RMSNorm, heads: int) -> Projection:
  """norm(layer(x)) of x (b, s, in), once it is rotated."""
  return projected_rule(layer.weight.get_value(), layer, x, norm, heads)


@functools.singledispatch
def projected_rule(
  weight: Any, layer: Linear, x: Operand, norm: RMSNorm, heads: int
) -> Projection:
  """By type of weight; this one multiplies numbers or codes to numbers."""
  return _of(matmul(x, weight), None, None, layer, norm, heads)


@projected_rule.register
def _(
  weight: W8A8, layer: Linear, x: Operand, norm: RMSNorm, heads: int
) -> Projection:
  # Else XLA makes one product of those of queries and keys, for which it first copies
  # both weights together, and then the sums apart: 1.6% of a chunk at 5B on an H200.
  x, codes = lax.optimization_barrier((read_by(layer, x), weight.weight))
  return _of(fp8.sums(x, codes), x.array.scale, codes.scale[:, 0], layer, norm, heads)


def _of(x, scale, columns, layer, norm, heads) -> Projection:
  parameters = layer.bias[...], norm.weight[...]
  return Projection(x, scale, columns, *parameters, eps=norm.eps, heads=heads)


def numbers(x: Array | Projection) -> Array:
  """(b, s, n, d), normed and not rotated."""
  return x.numbers() if isinstance(x, Projection) else x


@rope.rotate.register
def _(
  x: Projection, rotation: rope.Rotation, dtype: jnp.dtype | None = None
) -> Array:
  return x.numbers(rotation, dtype)
