"""NVFP4: 4-bit numbers with a scale for every 16 and one for the tensor (SPEC 9).

A number is stored as a code of E2M1 (sign, and one of 0 .5 1 1.5 2 3 4 6), a block of
16 along the last axis shares a scale in E4M3, and a tensor shares one float32:

  value   = (code * scale) * (amax / span)      span = M4 * M8 of the rule
  scale   = e4m3((block_max / M4) * (span / amax))
  code    = e2m1(x / (scale * amax / span))

  rule       M4   M8    which block scale
  static_6    6   448   the block's maximum becomes 6
  static_4    4   448   the block's maximum becomes 4
  mse         6   256   "four over six": both are tried, 6 as above and 4 with 1.5 times
  mae         6   256     the scale; the smaller squared, absolute or largest error
  abs_max     6   256     wins, 6 if they are equal

Numeric contract. Everything is float32, each operation rounded on its own and in the
order of SPEC 9, errors of four over six added up in halves: codes and scales are the
same bits on every backend, jitted or not (quant/exact.py). Rounding is to nearest, ties
to even, or stochastic with a key. Special values:

  zeros      of either sign give code 0; so does a tensor of zeros (amax 0)
  tiny       a tensor with amax below 2**-104 counts as zeros, and so does a block
             whose maximum is below 2**-123.4
  inf, NaN   and anything beyond 2**110: the block's scale becomes NaN, so the whole
             block reads as NaN and nothing vanishes silently; amax is that of the
             other numbers
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.quant import exact

Array = jax.Array

BLOCK = 16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # magnitude of codes 0..7
SMALLEST, LARGEST = 2.0**-104, 2.0**110


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the scale of a block is chosen.

  Attributes:
    m4: the E2M1 magnitude that a block's maximum is mapped to.
    m8: the E4M3 magnitude that the largest block scale is mapped to.
    error: None, or what decides between 6 and 4: 'mse', 'mae' or 'abs_max'.
  """

  m4: float
  m8: float
  error: str | None = None

  @property
  def span(self) -> float:
    return self.m4 * self.m8


RULES = {
  "static_6": Rule(6, 448),
  "static_4": Rule(4, 448),
  "mse": Rule(6, 256, "mse"),
  "mae": Rule(6, 256, "mae"),
  "abs_max": Rule(6, 256, "abs_max"),
}


def rule_of(name: str) -> Rule:
  """The rule of a name. Raises ValueError for an unknown one."""
  if name not in RULES:
    raise ValueError(f"rule={name!r} is unknown; use {', '.join(RULES)}")
  return RULES[name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4Array:
  """A quantised array; a pytree whose three leaves share their leading axes.

  So indexing, updating, sharding, stacking and scanning leading axes is the same
  operation on every leaf: `jax.tree.map(lambda leaf: leaf[i], array)`.

  Attributes:
    codes: uint8 (..., n / 2), element 2j in the low nibble of byte j.
    scales: float8_e4m3fn (..., n / 16).
    amax: float32, the first axes of the array: one tensor scale for each of them.
    span: static, M4 * M8 of the rule.
  """

  codes: Array
  scales: Array
  amax: Array
  span: float = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

  @property
  def ndim(self) -> int:
    return self.codes.ndim

  @property
  def nbytes(self) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def quantise(
  x: Array,
  *,
  rule: str = "mse",
  tiles: bool = False,
  batch_axes: int = 0,
  amax: Array | None = None,
  key: Array | None = None,
  reference: bool = False,
) -> NVFP4Array:
  """Quantises along the last axis.

  Args:
    x: (..., n), n a multiple of 16.
    rule: of RULES.
    tiles: one scale for 16 x 16 tiles of the last two axes instead of 1 x 16 blocks, so
      that the transposed matrix has the same codes (training weights). Scales are
      still stored for every row. Missing rows of the last tile count as zeros.
    batch_axes: how many leading axes have a tensor scale of their own.
    amax: float32 x.shape[:batch_axes], the largest magnitudes if already known; they
      must not be smaller than the true ones.
    key: random key; given, codes are rounded stochastically, so that the expected
      value is x, and scales upwards.
    reference: keep two defects of the reference, for parity only (SPEC 13.15): codes of
      8, which read as zero, in blocks with a subnormal scale, and errors of four over
      six that over- or underflow.

  Raises:
    ValueError: unknown rule, a last axis that is no multiple of 16, or an array that is
      quantised already.
  """
  if isinstance(x, NVFP4Array):
    raise ValueError("x is an NVFP4Array already; dequantise it first")
  chosen = rule_of(rule)
  if x.ndim <= batch_axes or x.shape[-1] % BLOCK:
    raise ValueError(
      f"shape={x.shape} cannot be quantised with batch_axes={batch_axes}: the last "
      f"axis must be a multiple of {BLOCK} and no batch axis; pad it with zeros"
    )
  x = x.astype(jnp.float32)
  good = jnp.abs(x) <= LARGEST  # False for NaN
  x = jnp.where(good, x, 0)
  amax = largest(x, batch_axes) if amax is None else countable(amax)
  blocks = _to_tiles(x) if tiles else x.reshape(*x.shape[:-1], -1, BLOCK)
  wide = amax.reshape(*amax.shape, *[1] * (blocks.ndim - amax.ndim))
  codes, scales = _encode(blocks, wide, chosen, key, reference)
  if tiles:
    codes = _from_tiles(codes, x.shape)
    scales = _repeat_rows(scales[..., 0], x.shape[-2])
  else:
    codes, scales = codes.reshape(x.shape), scales[..., 0]
  bad = ~jnp.all(good.reshape(*scales.shape, BLOCK), axis=-1)
  scales = jnp.where(bad, jnp.nan, scales.astype(jnp.float32))
  return NVFP4Array(
    pack(codes), scales.astype(jnp.float8_e4m3fn), amax.astype(jnp.float32), chosen.span
  )


def dequantise(array: NVFP4Array, dtype: jnp.dtype = jnp.float32) -> Array:
  """The numbers (..., n) in `dtype`: in float32, one rounding an element, cast last."""
  blocks = decode(unpack(array.codes)).reshape(*array.scales.shape, BLOCK)
  factor = exact.divide(array.amax, array.span)
  factor = factor.reshape(*factor.shape, *[1] * (blocks.ndim - factor.ndim))
  # code * scale has at most 6 significant bits: exact, so only one rounding is left.
  values = blocks * array.scales.astype(jnp.float32)[..., None] * factor
  return values.reshape(array.shape).astype(dtype)


def fake_quantise(x: Array, **settings: Any) -> Array:
  """`dequantise(quantise(x, **settings))` in the dtype of x; the gradient is that of x.

  Straight-through: the backward pass takes the rounding for the identity.
  """
  rounded = dequantise(quantise(x, **settings), x.dtype)
  return _through(x, rounded)


@jax.custom_jvp
def _through(x: Array, rounded: Array) -> Array:
  return rounded


@_through.defjvp
def _through_jvp(primals, tangents):
  return primals[1], tangents[0]


def largest(x: Array, batch_axes: int = 0, mesh_axes: Sequence[str] = ()) -> Array:
  """Largest magnitude that counts over all but the batch axes, float32.

  Args:
    mesh_axes: inside shard_map, those over which the numbers that count are spread.
  """
  x = jnp.abs(x.astype(jnp.float32))
  x = jnp.where(x <= LARGEST, x, 0)  # nor does NaN count
  amax = jnp.max(x, axis=tuple(range(batch_axes, x.ndim)), initial=0.0)
  return countable(lax.pmax(amax, tuple(mesh_axes)) if mesh_axes else amax)


def countable(amax: Array) -> Array:
  """A largest magnitude; 0 below 2**-104, where scales would leave float32."""
  return jnp.where(amax < SMALLEST, 0.0, amax)


# ------------------------------------------------------------------ codes and bytes


def round_e2m1(v: Array, key: Array | None = None) -> Array:
  """Magnitudes (float32, not negative) to the E2M1 grid, at most 6.

  To nearest with ties to even, or stochastically with a key: up with the probability
  that makes the expected value v.
  """
  if key is None:
    return jnp.minimum(_round_open(v), 6.0)
  v = jnp.minimum(v, 6.0)
  step = jnp.where(v < 2, 0.5, jnp.where(v < 4, 1.0, 2.0))
  low = jnp.floor(v / step) * step
  up = jax.random.uniform(key, v.shape) < (v - low) / step
  return low + jnp.where(up, step, 0.0)


def _round_open(v: Array) -> Array:
  """To nearest even on the E2M1 grid that goes on with 8, 10 ..."""
  return jnp.where(
    v < 2, jnp.round(2 * v) / 2, jnp.where(v < 4, jnp.round(v), 2 * jnp.round(v / 2))
  )


def encode(rounded: Array, negative: Array) -> Array:
  """Codes uint8 of rounded magnitudes and their signs. 8, if it comes, gives code 8."""
  index = jnp.where(
    rounded < 2, 2 * rounded, jnp.where(rounded < 4, rounded + 2, rounded / 2 + 4)
  ).astype(jnp.uint8)
  return index | (negative.astype(jnp.uint8) << 3)


def decode(codes: Array) -> Array:
  """Values float32 of codes 0..15."""
  exponent, half = (codes >> 1) & 3, (codes & 1).astype(jnp.float32) / 2
  power = (1 << exponent).astype(jnp.float32) / 2  # 2 ** (exponent - 1)
  magnitude = jnp.where(exponent == 0, half, (1 + half) * power)
  return jnp.where(codes >= 8, -magnitude, magnitude)


def pack(codes: Array) -> Array:
  """Codes (..., n) to bytes (..., n / 2), the even element in the low nibble."""
  return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Array) -> Array:
  """Bytes (..., n / 2) to codes (..., n)."""
  pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
  return pairs.reshape(*packed.shape[:-1], -1)


# ------------------------------------------------------------------ scales


def _encode(
  x: Array, amax: Array, rule: Rule, key: Array | None, reference: bool
) -> tuple[Array, Array]:
  """Blocks (..., 16 or 256) to codes of the same shape and scales (..., 1) in float32.

  Args:
    x: finite. amax: broadcastable.
  """
  block_max = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  nonzero = jnp.where(amax > 0, amax, 1.0)
  to_scale = exact.divide(rule.span, nonzero)
  from_scale = exact.divide(1.0, to_scale)
  # Rounded here, as below: XLA would multiply the two scalars first, to_scale * 1.5.
  wanted = exact.rounded(exact.divide(block_max, rule.m4) * to_scale)
  wanted = jnp.where(amax > 0, wanted, 0.0)

  def scaled(scale: Array) -> Array:
    step = jnp.where(scale > 0, from_scale * scale, 1.0)
    return jnp.where(scale > 0, x * exact.divide(1.0, step), 0.0)

  def nearest(scale: Array) -> Array:
    v = scaled(scale)
    rounded = _round_open(jnp.abs(v)) if reference else round_e2m1(jnp.abs(v))
    return jnp.copysign(rounded, v)

  # Upwards where rounding is stochastic: a block's maximum beyond 6 would be cut off,
  # and the expected value would no longer be x. The choice between 6 and 4 is made on
  # the nearest numbers for the same reason: it must not depend on the draw.
  to_e4m3 = exact.e4m3 if key is None else _e4m3_up
  scale = to_e4m3(wanted)
  q = nearest(scale)
  if rule.error is not None:
    scale4 = to_e4m3(wanted * 1.5)
    q4 = nearest(scale4)
    # In units of a power of two that brings amax to about 1, which is exact: squares of
    # errors stay in range.
    unit = 1.0 if reference else exact.inverse_power_of_two(nonzero)

    def error(q: Array, scale: Array) -> Array:
      """Of q * scale * amax / span, divided once a block: q is a power of two, with
      which rounding commutes, or 1.5 times one."""
      q, power = jnp.abs(q), exact.power_of_two(q)
      one = exact.divide(scale * amax, rule.span)
      more = exact.divide(exact.rounded(scale * 1.5) * amax, rule.span)
      value = power * jnp.where(q > power, more, one)
      return _norm(rule.error, (value - jnp.abs(x)) * unit)

    four = error(q4, scale4) < error(q, scale)
    q, scale = jnp.where(four, q4, q), jnp.where(four, scale4, scale)
  if key is not None:
    v = scaled(scale)
    q = jnp.copysign(round_e2m1(jnp.abs(v), key), v)
  return encode(jnp.abs(q), jnp.signbit(q) & (x != 0) & (scale > 0)), scale


def _norm(kind: str, difference: Array) -> Array:
  """Of the last axis, kept with one element."""
  if kind == "mse":
    return exact.total(exact.rounded(difference * difference))
  if kind == "mae":
    return exact.total(jnp.abs(difference))
  return jnp.max(jnp.abs(difference), axis=-1, keepdims=True)


def _e4m3_up(x: Array) -> Array:
  """As `exact.e4m3`, but rounded up; not negative."""
  near = exact.e4m3(x)
  step = exact.power_of_two(jnp.maximum(near, 2.0**-6)) / 8
  return jnp.where(near < jnp.minimum(x, 448.0), near + step, near)


# ------------------------------------------------------------------ tiles


def _to_tiles(x: Array) -> Array:
  """(..., m, n) -> (..., m / 16, n / 16, 256), rows padded with zeros."""
  *lead, m, n = x.shape
  x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -m % BLOCK), (0, 0)])
  x = x.reshape(*lead, -1, BLOCK, n // BLOCK, BLOCK)
  return jnp.swapaxes(x, -3, -2).reshape(*lead, x.shape[-4], n // BLOCK, -1)


def _from_tiles(tiles: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_to_tiles`, cropped to shape (..., m, n)."""
  *lead, m, n = shape
  x = tiles.reshape(*lead, -1, n // BLOCK, BLOCK, BLOCK)
  return jnp.swapaxes(x, -3, -2).reshape(*lead, -1, n)[..., :m, :]


def _repeat_rows(scales: Array, rows: int) -> Array:
  """Scales of tiles (..., m / 16, n / 16) for every row, (..., rows, n / 16)."""
  return jnp.repeat(scales, BLOCK, axis=-2)[..., :rows, :]


# ------------------------------------------------------------------ Hadamard

# The fixed signs of the reference; any would do.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard_matrix() -> np.ndarray:
  """diag(signs) @ Sylvester's 16-point Hadamard matrix / 4, float32; orthogonal."""
  h = np.ones((1, 1), np.float32)
  while len(h) < BLOCK:
    h = np.block([[h, h], [h, -h]])
  return np.asarray(_SIGNS, np.float32)[:, None] * h / 4


def hadamard(x: Array) -> Array:
  """Rotates each 16 consecutive numbers of the last axis; in the dtype of x.

  Both operands of a product rotated along the contracted axis leave the product as it
  is, and outliers are spread over their block.

  Raises:
    ValueError: a last axis that is no multiple of 16.
  """
  if x.shape[-1] % BLOCK:
    raise ValueError(f"the last axis of shape={x.shape} must be a multiple of {BLOCK}")
  blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
  matrix = jnp.asarray(hadamard_matrix(), x.dtype)
  rotated = jnp.matmul(blocks, matrix, precision="highest")
  return rotated.astype(x.dtype).reshape(x.shape)
