"""What linear layers read, in the form in which they multiply.

Most layers read arrays. A layer whose weight is `W8A8` multiplies codes: what it reads
is quantised in the pass that makes the numbers, once for all layers that read it. So
whoever makes numbers says for whom (`readers`), and the types of their weights choose:

  normed      of a layer norm                    (at the start of a block)
  added       of a sum and its layer norm        (between the parts of a block)
  activated   of a layer and what follows it     (between the two of a feed-forward)
  read_by     of numbers or codes that there are (behind attention)

Another type of weight gets forms of its own with `@normed_rule.register` and so on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from longlive_jax.kernels.fp8_gelu import gelu_rows
from longlive_jax.kernels.fp8_modulate import modulate_rows
from longlive_jax.kernels.fp8_residual import residual_rows
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.layers.linear import Linear
from longlive_jax.layers.norm import AffineNorm
from longlive_jax.quant import fp8
from longlive_jax.quant.weights import W8A8

Array = jax.Array
Operand = Array | fp8.Rows


@jax.checkpoint  # else a backward pass keeps five arrays of the hidden width, not one
def gelu(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=True)


def normed(x: Array, norm: AffineNorm, readers: Sequence[Linear]) -> Operand:
  """norm(x).

  Args:
    x: (b, f, p, D).
    norm: with a row for each frame, or with one for all.
    readers: the layers that multiply it.
  """
  return normed_rule(_weight_of(readers), x, norm)


def added(
  x: Array,
  layer: Linear,
  h: Operand,
  gate: Array | None,
  norm: AffineNorm,
  readers: Sequence[Linear],
) -> tuple[Array, Operand]:
  """y = x + gate * layer(h), and norm(y).

  Args:
    x: (b, f, p, D).
    h: (..., in), what attention gave: as many rows as x, in the same order.
    gate: (b, f, 1, D), or None for 1.
    norm, readers: see `normed`.

  Returns:
    both (b, f, p, D).
  """
  weight, h = _weight_of([layer, *readers]), read_by(layer, h)
  return added_rule(weight, x, layer, h, gate, norm, readers)


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
def normed_rule(weight: Any, x: Array, norm: AffineNorm) -> Operand:
  return norm(x)


@functools.singledispatch
def added_rule(
  weight: Any,
  x: Array,
  layer: Linear,
  h: Operand,
  gate: Array | None,
  norm: AffineNorm,
  readers: Sequence[Linear],
) -> tuple[Array, Operand]:
  change = layer(h).reshape(x.shape)
  x = x + (change if gate is None else gate * change)
  return x, normed(x, norm, readers)


@functools.singledispatch
def activated_rule(
  weight: Any, layer: Linear, x: Operand, activation: Callable[[Array], Array]
) -> Operand:
  return activation(layer(x))


@functools.singledispatch
def read_by_rule(weight: Any, x: Operand) -> Operand:
  return x.numbers() if isinstance(x, fp8.Rows) else x


# ------------------------------------------------------------------ codes


@normed_rule.register
def _(weight: W8A8, x: Array, norm: AffineNorm) -> fp8.Rows:
  return modulate_rows(x, norm.factor, norm.shift, eps=norm.eps)


@added_rule.register
def _(
  weight: W8A8,
  x: Array,
  layer: Linear,
  h: fp8.Rows,
  gate: Array | None,
  norm: AffineNorm,
  readers: Sequence[Linear],
) -> tuple[Array, fp8.Rows]:
  h = h.reshape(*x.shape[:-1], -1)
  sums, columns = fp8.sums(h, weight.weight), weight.weight.scale[:, 0]
  layer_end = h.array.scale, columns, layer.bias[...]
  return residual_rows(x, sums, *layer_end, gate, norm.factor, norm.shift, eps=norm.eps)


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
