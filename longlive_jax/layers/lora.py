"""A weight with a low-rank adapter beside it (SPEC 12), applied without merging.

It stands where a weight stands, over a base of any type. Over `W8A8` its layer reads
numbers, not codes: the adapter multiplies what was not rounded, the base rounds it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.layers import linear

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
  """base + b a.

  Attributes:
    base: (..., out, in), any type of weight that `linear.matmul_rule` knows.
    a: (..., rank, in).
    b: (..., out, rank), alpha / rank included.
  """

  base: Any
  a: Array
  b: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape


def beside(weight: Any, a: Array, b: Array) -> LoraWeight:
  """A weight with one more adapter: several are one, stacked along their rank."""
  if not isinstance(weight, LoraWeight):
    return LoraWeight(weight, a, b)
  a = jnp.concatenate([weight.a, a], axis=-2)
  b = jnp.concatenate([weight.b, b], axis=-1)
  return LoraWeight(weight.base, a, b)


@linear.matmul_rule.register
def _matmul_lora(weight: LoraWeight, x: Array) -> Array:
  change = linear.matmul(linear.matmul(x, weight.a), weight.b)
  return linear.matmul(x, weight.base) + change
