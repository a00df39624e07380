"""What linear layers read, in the form in which they multiply.

Most layers read arrays. A layer whose weight is `W8A8` multiplies codes: what it reads
is quantised in the pass that makes the numbers, once for all layers that read it. So
whoever makes numbers says for whom (`readers`), and the types of their weights choose:

  modulated   of a modulated layer norm          (before q, k, v and the feed-forward)
  normed      of a layer norm with weights       (before the cross-attention)
  activated   of a layer and what follows it     (between the two of a feed-forward)
  read_by     of numbers or codes that there are (behind attention)

Another type of weight gets forms of its own with `@modulated_rule.register` and so on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from longlive_jax.kernels.fp8_gelu import gelu_rows
from longlive_jax.kernels.fp8_modulate import modulate_rows
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.layers.linear import Linear
from longlive_jax.layers.norm import LayerNorm, modulate
from longlive_jax.quant import fp8
from longlive_jax.quant.weights import W8A8

Array = jax.Array
Operand = Array | fp8.Rows


@jax.checkpoint  # else a backward pass keeps five arrays of the hidden width, not one
def gelu(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=True)


def modulated(
  x: Array, scale: Array, shift: Array, eps: float, readers: Sequence[Linear]
) -> Operand:
  """layer_norm(x) * (1 + scale) + shift.

  Args:
    x: (b, f, p, D).
    scale, shift: (b, f, 1, D).
    eps: of the norm.
    readers: the layers that multiply it.
  """
  return modulated_rule(_weight_of(readers), x, scale, shift, eps)


def normed(norm: LayerNorm, x: Array, readers: Sequence[Linear]) -> Operand:
  """norm(x) of x (..., D)."""
  return normed_rule(_weight_of(readers), norm, x)


def activated(
  layer: Linear, x: Operand, activation: Callable[[Array], Array], reader: Linear
) -> Operand:
  """activation(layer(x)) of x (..., in)."""
  return activated_rule(_weight_of([layer, reader]), layer, x, activation)


def read_by(reader: Linear, x: Operand) -> Operand:
  """x (..., in), in numbers or codes, as the layer reads it."""
  return read_by_rule(_weight_of([reader]), x)


def _weight_of(layers: Sequence[Linear]) -> Any:
  """A weight that stands for all if they are of one type, else None."""
  first, *others = (layer.weight.get_value() for layer in layers)
  return first if all(type(other) is type(first) for other in others) else None


# ------------------------------------------------------------------ arrays


@functools.singledispatch
def modulated_rule(
  weight: Any, x: Array, scale: Array, shift: Array, eps: float
) -> Operand:
  return modulate(x, scale, shift, eps)


@functools.singledispatch
def normed_rule(weight: Any, norm: LayerNorm, x: Array) -> Operand:
  return norm(x)


@functools.singledispatch
def activated_rule(
  weight: Any, layer: Linear, x: Operand, activation: Callable[[Array], Array]
) -> Operand:
  return activation(layer(x))


@functools.singledispatch
def read_by_rule(weight: Any, x: Operand) -> Operand:
  return x.numbers() if isinstance(x, fp8.Rows) else x


# ------------------------------------------------------------------ codes


@modulated_rule.register
def _(weight: W8A8, x: Array, scale: Array, shift: Array, eps: float) -> fp8.Rows:
  return modulate_rows(x, 1 + scale, shift, eps=eps)


@normed_rule.register
def _(weight: W8A8, norm: LayerNorm, x: Array) -> fp8.Rows:
  one = x.reshape(1, -1, x.shape[-1])  # as one frame, all of whose tokens share a row
  factor, shift = (p[...].reshape(1, 1, -1) for p in (norm.weight, norm.bias))
  return modulate_rows(one, factor, shift, eps=norm.eps).reshape(*x.shape)


@activated_rule.register
def _(
  weight: W8A8, layer: Linear, x: Operand, activation: Callable[[Array], Array]
) -> Operand:
  if activation is not gelu:
    return activation(layer(x))
  x = read_by(layer, x)
  columns = weight.weight.scale[:, 0]
  sums = fp8.sums(x, weight.weight)
  return gelu_rows(sums, x.array.scale, columns, layer.bias[...])


@read_by_rule.register
def _(weight: W8A8, x: Operand) -> fp8.Rows:
  return x if isinstance(x, fp8.Rows) else quantise_rows(x)
