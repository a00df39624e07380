"""Linear layers trained with quantised products (SPEC 9).

                NVFP4                                               FP8
  y             Q(x)  Q(W)^T          blocks along `in`             Q(x) Q(W)^T
  grad_input    Q(gy) Q(W^T)^T        blocks along `out`            gy W
  grad_weight   Q(gy^T R) Q(x^T R)^T  blocks along tokens,          gy^T Q(x)
                                      R the Hadamard rotation

NVFP4 may split off means first (`centre`): activations have a part that tokens near
each other share, and a mean M costs few rows in float but needs no bits of every token:

  y = Q(x - M) Q(W)^T + M W^T         grad_weight likewise

Master weights stay in floating point. The gradient takes every rounding for the
identity. In NVFP4 gradients are rounded stochastically, so that small ones do not
vanish. In FP8 x and W have a scale for every row, and the backward pass multiplies in
the dtype of the gradients: their range is wider than that of E4M3.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import nvfp4_quantise
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.quant import fp8, nvfp4, weights
from longlive_jax.quant.fp8 import FP8Array
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array
from longlive_jax.quant.product import product

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """How operands are quantised. Hashable: static under jit.

  Attributes:
    activation, weight, gradient: rules of nvfp4.RULES for x, W and gy.
    stochastic: gy is rounded stochastically, otherwise to nearest.
    tiles: one scale for 16 x 16 weights, so that the transposed weight of the backward
      pass has the numbers of the forward pass.
    hadamard: rotate both operands of grad_weight, which spreads outliers.
    centre: of how many consecutive tokens the mean is split off x; 0 is none. One more
      product of 1 / centre of the rows is in floating point, forward and backward.
      (Of a device's own tokens: as many as it has must be a multiple for the numbers of
      one device.)
    mesh_axes: inside shard_map, those over which tokens are spread. They share the
      tensor scales of all tokens; stochastic rounding has draws of its own on each
      device.
  """

  activation: str = "mse"
  weight: str = "mse"
  gradient: str = "mse"
  stochastic: bool = True
  tiles: bool = True
  hadamard: bool = True
  centre: int = 0
  mesh_axes: tuple[str, ...] = ()

  def __post_init__(self):
    for name in (self.activation, self.weight, self.gradient):
      nvfp4.rule_of(name)
    if self.centre < 0:
      raise ValueError(
        f"centre={self.centre} must not be negative; use 16, or 0 for no means"
      )

  def spread(self, mesh_axes: tuple[str, ...]) -> "TrainingSettings":
    """For use inside shard_map, with tokens spread over these axes."""
    return dataclasses.replace(self, mesh_axes=mesh_axes)

  def prepared(self, weight: Array, key: Array) -> "TrainingWeight":
    """A weight (..., out, in), with a key for each matrix."""
    return TrainingWeight(weight, jax.random.split(key, weight.shape[:-2]), self)


@dataclasses.dataclass(frozen=True)
class FP8TrainingSettings:
  """Products in FP8 have nothing to choose."""

  def spread(self, mesh_axes: tuple[str, ...]) -> "FP8TrainingSettings":
    """As of `TrainingSettings`; no scale is shared by tokens."""
    return self

  def prepared(self, weight: Array, key: Array) -> "FP8TrainingWeight":
    """A weight (..., out, in); no key is needed."""
    return FP8TrainingWeight(weight)


MODES = {"nvfp4": TrainingSettings, "fp8": FP8TrainingSettings}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingWeight:
  """A float weight whose products are quantised.

  Attributes:
    weight: (..., out, in).
    key: typed key, the leading axes of the weight: of stochastic rounding.
    settings: static.
  """

  weight: Array
  key: Array
  settings: TrainingSettings = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8TrainingWeight:
  """A float weight whose product is in FP8.

  Attributes:
    weight: (..., out, in).
  """

  weight: Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape


def prepare_training(
  model: Any,
  patterns: Sequence[str],
  settings: TrainingSettings | FP8TrainingSettings,
  key: Array,
) -> Any:
  """The network with quantised products; call it inside the loss function.

  There, parameters are plain arrays outside and gradients are theirs.

  Args:
    model: a network with float weights.
    patterns: of layers' paths, see `weights.quantise_weights`.
    key: of this step; layers get keys of their own by path and number.

  Raises:
    ValueError: as `weights.map_matrices`; outputs that are no multiple of 16.
  """

  def convert(path: str, weight: Array) -> TrainingWeight | FP8TrainingWeight:
    if weight.shape[-2] % BLOCK:
      raise ValueError(
        f"{path} has {weight.shape[-2]} outputs, which must be a multiple of {BLOCK}, "
        "as products in low precision need; choose patterns that leave it out"
      )
    # By name, not by number: leaving a layer out must not change the others.
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return settings.prepared(weight, own)

  return weights.map_matrices(model, patterns, convert)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def training_product(
  x: Array, weight: Array, key: Array, settings: TrainingSettings
) -> Array:
  """`x @ weight.T`, quantised forward and backward.

  Args:
    x: (..., in), in a multiple of 16.
    weight: (out, in) float, out a multiple of 16.
    key: scalar key, for the backward pass.

  Returns:
    (..., out) in the dtype of x.
  """
  return _forward(x, weight, key, settings)[0]


def _forward(
  x: Array, weight: Array, key: Array, settings: TrainingSettings
) -> tuple[Array, tuple[NVFP4Array, Array | None, Array, Array]]:
  rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
  means = None
  if settings.centre:
    # In the dtype of x, in which they are multiplied: what that loses is in the rest.
    counts = _sums(jnp.ones((len(rows), 1)), settings.centre)
    means = (_sums(rows, settings.centre) / counts).astype(x.dtype)
    rows = rows.astype(jnp.float32) - _for_tokens(means, settings.centre, len(rows))
  packed = nvfp4_quantise.quantise(
    rows, rule=settings.activation, amax=_shared_amax(rows, settings)
  )
  y = product(packed, _quantise_weight(weight, settings))
  if means is not None:
    shared = jnp.matmul(means, weight.T, preferred_element_type=jnp.float32)
    y += _for_tokens(shared, settings.centre, len(rows))
  # Kept for the backward pass: 4.5 bits of an activation instead of all.
  return y.astype(x.dtype).reshape(*x.shape[:-1], -1), (packed, means, weight, key)


def _backward(
  settings: TrainingSettings,
  kept: tuple[NVFP4Array, Array | None, Array, Array],
  gradient: Array,
) -> tuple[Array, Array, None]:
  packed, means, weight, key = kept
  if settings.mesh_axes:
    key = jax.random.fold_in(key, lax.axis_index(settings.mesh_axes))
  input_key, weight_key = jax.random.split(key) if settings.stochastic else (None, None)
  rows = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
  amax = _shared_amax(rows, settings)
  grad_input = product(
    nvfp4.quantise(rows, rule=settings.gradient, amax=amax, key=input_key),
    _quantise_weight(weight.T, settings),
  )
  x = nvfp4.dequantise(packed, gradient.dtype)
  grad_weight = product(
    _quantise_tokens(rows, settings.gradient, weight_key, settings),
    _quantise_tokens(x, settings.activation, None, settings),
  )
  if means is not None:
    sums = _sums(rows, settings.centre)
    grad_weight += jnp.matmul(sums.T, means, preferred_element_type=jnp.float32)
  grad_input = grad_input.astype(gradient.dtype).reshape(*gradient.shape[:-1], -1)
  return grad_input, grad_weight.astype(weight.dtype), None


training_product.defvjp(_forward, _backward)


def _sums(rows: Array, count: int) -> Array:
  """Of each `count` consecutive rows, float32; the last may be of fewer."""
  rows = jnp.pad(rows.astype(jnp.float32), ((0, -len(rows) % count), (0, 0)))
  return jnp.sum(rows.reshape(-1, count, rows.shape[-1]), axis=1)


def _for_tokens(groups: Array, count: int, tokens: int) -> Array:
  """The row of its group of `count` for each token."""
  return jnp.repeat(groups, count, axis=0)[:tokens]


def _quantise_weight(weight: Array, settings: TrainingSettings) -> NVFP4Array:
  return nvfp4.quantise(weight, rule=settings.weight, tiles=settings.tiles)


def _quantise_tokens(
  rows: Array, rule: str, key: Array | None, settings: TrainingSettings
) -> NVFP4Array:
  """(tokens, c) -> (c, tokens), blocks along tokens, which are padded with zeros."""
  columns = jnp.pad(rows.T, ((0, 0), (0, -len(rows) % BLOCK)))
  if key is None and not settings.mesh_axes:
    front = "hadamard" if settings.hadamard else "none"
    return nvfp4_quantise.quantise(columns, rule=rule, front=front)
  if settings.hadamard:
    columns = nvfp4.hadamard(columns)
  amax = _shared_amax(columns, settings)
  if key is None:
    return nvfp4_quantise.quantise(columns, rule=rule, amax=amax)
  return nvfp4.quantise(columns, rule=rule, amax=amax, key=key)


def _shared_amax(x: Array, settings: TrainingSettings) -> Array | None:
  """The largest magnitude of all devices; None where there is but one."""
  axes = settings.mesh_axes
  return nvfp4.largest(x, mesh_axes=axes) if axes else None


# ------------------------------------------------------------------ FP8


@jax.custom_vjp
def fp8_training_product(x: Array, weight: Array) -> Array:
  """`x @ weight.T`, of operands in FP8; the backward pass is not quantised.

  Args:
    x: (..., in).
    weight: (out, in) float.

  Returns:
    (..., out) in the dtype of x.
  """
  return _fp8_forward(x, weight)[0]


def _fp8_forward(x: Array, weight: Array) -> tuple[Array, tuple[FP8Array, Array]]:
  rows = quantise_rows(x)
  # Kept for the backward pass: 8 bits of an activation instead of 16.
  return fp8.product(rows, quantise_rows(weight).array), (rows.array, weight)


def _fp8_backward(
  kept: tuple[FP8Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, weight = kept
  rows = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
  numbers = fp8.dequantise(x, gradient.dtype).reshape(-1, x.shape[-1])
  grad_input = gradient @ weight.astype(gradient.dtype)
  return grad_input, (rows.T @ numbers).astype(weight.dtype)


fp8_training_product.defvjp(_fp8_forward, _fp8_backward)
