"""Triton functions that the kernels share: blocks of 16 to 4 bits and back (SPEC 9).

They follow `quant/nvfp4.py` operation by operation, in float32 and with divisions that
round correctly (and launches forbid fusing products with sums), so codes and scales are
the same bits. A thread holds a block as two halves of 8, `a` and `b`, each (blocks, 8):
what a 16-byte load of bf16 gives it. So nothing is computed twice or exchanged between
threads.

A scale of 4 over 6 costs 60 instructions a number and not the bandwidth, so what is
done for every number is done with few. Small floats are handled through their bits: an
anchor is added whose unit in the last place is the step of the small format, which
rounds to nearest even.
"""

from __future__ import annotations

from longlive_jax.kernels.launch import jit, tl


@jit
def bits(x):
  """int32 bits of a float32."""
  return x.to(tl.int32, bitcast=True)


@jit
def number(x):
  """The float32 of int32 bits."""
  return x.to(tl.float32, bitcast=True)


@jit
def load_halves(pointer, block, valid):
  """Halves (blocks, 8) of blocks `block` (blocks,) of an array; 0 where not valid."""
  at = pointer + block[:, None] * 16 + tl.arange(0, 8)
  a = tl.load(at, mask=valid[:, None], other=0.0)
  return a, tl.load(at + 8, mask=valid[:, None], other=0.0)


@jit
def store_blocks(codes_pointer, scales_pointer, block, valid, codes, scales):
  """Writes bytes (blocks, 8) and scale bits (blocks,) of blocks `block`."""
  at = codes_pointer + block[:, None] * 8 + tl.arange(0, 8)
  tl.store(at, codes, mask=valid[:, None])
  tl.store(scales_pointer + block, scales.to(tl.float8e4nv, bitcast=True), mask=valid)


@jit
def largest(a, b):
  """Largest magnitude of halves; numbers beyond 2**110 and NaN do not count."""
  a, b = tl.abs(a), tl.abs(b)
  a = tl.where(a <= 2.0**110, a, 0.0)
  b = tl.where(b <= 2.0**110, b, 0.0)
  return tl.max(tl.max(tl.maximum(a, b), axis=1), axis=0)


@jit
def encode(a, b, amax, M4: tl.constexpr, M8: tl.constexpr, ERROR: tl.constexpr):
  """Quantises blocks as `nvfp4.quantise` does.

  Args:
    a, b: float32 (blocks, 8), halves.
    amax: float32 scalar, of the tensor.
    M4, M8, ERROR: of the rule.

  Returns:
    bytes (blocks, 8) and bits of the scales (blocks,), both uint8. A block with a
    number that is not finite, or beyond 2**110, has scale NaN and codes 0.
  """
  # Floats that are not negative are ordered like their bits; NaN comes last.
  highest = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
  highest = tl.max(bits(highest), axis=1)
  finite = highest <= 0x76800000  # 2**110
  block_max = tl.where(finite, number(highest), 0.0)
  nonzero = tl.where(amax > 0, amax, 1.0)
  to_scale = tl.div_rn(M4 * M8, nonzero)
  from_scale = tl.div_rn(1.0, to_scale)
  wanted = tl.where(amax > 0, _divide(block_max, M4) * to_scale, 0.0)
  scale, factor = _scale(wanted, from_scale)
  ta, qa = _round(a, factor)
  tb, qb = _round(b, factor)
  if ERROR is not None:
    scale4, factor4 = _scale(wanted * 1.5, from_scale)
    ta4, qa4 = _round(a, factor4)
    tb4, qb4 = _round(b, factor4)
    # A power of two that brings amax to about 1: exact, and squares stay in range.
    unit = number(0x7F000000 - (bits(nonzero) & 0x7F800000))
    xa, xb = tl.abs(a) * unit, tl.abs(b) * unit
    error = _error(qa, qb, xa, xb, scale, amax, unit, M4 * M8, ERROR)
    error4 = _error(qa4, qb4, xa, xb, scale4, amax, unit, M4 * M8, ERROR)
    four = error4 < error
    scale = tl.where(four, scale4, scale)
    ta = tl.where(four[:, None], ta4, ta)
    tb = tl.where(four[:, None], tb4, tb)
  live = finite & (scale > 0)
  codes = tl.join(_bytes(ta, a, live), _bytes(tb, b, live))  # (blocks, 4, 2)
  codes = tl.reshape(tl.permute(codes, 0, 2, 1), (a.shape[0], 8))
  scale_bits = bits(scale * 2.0**-120) >> 20  # exponents now as float32 counts them
  return codes.to(tl.uint8), tl.where(finite, scale_bits, 0x7F).to(tl.uint8)


@jit
def _divide(x, divisor: tl.constexpr):
  """x / divisor rounded correctly, for a divisor of 4 or 3 * 2**k: 4 instructions.

  Products with powers of two and both differences (of numbers at most a factor of two
  apart) are exact, and a third never lies near the middle of two float32 numbers.
  """
  if divisor == 4:
    return x * 0.25
  quotient = x * (1.0 / divisor)
  rest = tl.fma(quotient, -2.0 * divisor / 3.0, x)
  rest = tl.fma(quotient, -divisor / 3.0, rest)
  return tl.fma(rest, 1.0 / divisor, quotient)


@jit
def _scale(wanted, from_scale):
  """The scale in E4M3 and what numbers are multiplied by, float32; 0 if it is 0."""
  v = tl.minimum(wanted, 448.0)
  power = number(bits(tl.maximum(v, 2.0**-6)) & 0x7F800000)
  anchor: tl.constexpr = 1.5 * 2.0**20  # its unit in the last place is 1/8
  scale = tl.fma(power, -anchor, tl.fma(power, anchor, v))
  divisor = tl.where(scale > 0, from_scale * scale, 1.0)
  return scale, tl.where(scale > 0, tl.div_rn(1.0, divisor), 0.0)


@jit
def _round(x, factor):
  """Magnitudes of x (blocks, 8) times `factor` in E2M1.

  Returns:
    t, the codes 0..7 in its lowest bits, and the magnitudes, both float32 (blocks, 8).
  """
  v = tl.minimum(tl.abs(x) * factor[:, None], 6.0)
  # The first and the last bit of the exponent: from 2 the number 2, from 4 the number
  # 4, below that 0 or nearly so. The anchor is 1.5 * 2**22, about 3.5 * 2**22 or
  # 5.5 * 2**22, whose steps are 0.5, 1 and 2, and ends in the bits 0, 2 or 4, so that
  # the last bits of the sum are the code.
  from_2 = number(bits(v) & 0x40800000)
  anchor = tl.fma(from_2, tl.fma(from_2, 0.5, 2.0**22), 1.5 * 2.0**22)
  t = v + anchor
  return t, t - anchor


@jit
def _error(qa, qb, xa, xb, scale, amax, unit, SPAN: tl.constexpr, ERROR: tl.constexpr):
  """Error (blocks,) of magnitudes q against x, which is in units, of halves a and b."""
  # q * scale * amax / span takes two divisions a block, not one a number: q is a power
  # of two, with which rounding commutes, or 1.5 times one.
  one = _divide(scale * amax, SPAN) * unit
  more = _divide(scale * 1.5 * amax, SPAN) * unit
  da, db = _difference(qa, one, more, xa), _difference(qb, one, more, xb)
  if ERROR == "mse":
    return _sum(da * da + db * db)
  elif ERROR == "mae":
    return _sum(tl.abs(da) + tl.abs(db))
  else:
    return tl.max(tl.maximum(tl.abs(da), tl.abs(db)), axis=1)


@jit
def _sum(x):
  """Sums (blocks,) of (blocks, 8), in an order that no version of Triton changes."""
  x = _fold(_fold(_fold(x)))
  return tl.reshape(x, (x.shape[0],))


@jit
def _fold(x):
  """(blocks, n) -> (blocks, n / 2), number i and number i + n / 2 added."""
  n: tl.constexpr = x.shape[1]
  near, far = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, n // 2)), 0, 2, 1))
  return near + far


@jit
def _difference(q, one, more, x):
  power = number(bits(q) & 0x7F800000)
  by_power = tl.where((bits(q) & 0x400000) != 0, more[:, None], one[:, None])
  return tl.fma(power, by_power, -x)  # the product is exact


@jit
def _bytes(t, x, live):
  """Bytes int32 (blocks, 4) of codes in t (blocks, 8) and signs of x; 0 if not live."""
  code, sign = tl.where(live, 7, 0)[:, None], tl.where(live, 8, 0)[:, None]
  # + 0.0: zero has no sign.
  codes = (bits(t) & code) | ((bits(x + 0.0) >> 28) & sign)
  even, odd = tl.split(tl.reshape(codes, (t.shape[0], 4, 2)))
  return even | (odd << 4)


@jit
def e2m1(code):
  """float32 of codes 0..15, int32."""
  return number(((code & 7) << 22) | ((code & 8) << 28)) * 2.0**126


@jit
def e4m3(scales):
  """float32 of scales, which are float8 and not negative."""
  code = scales.to(tl.uint8, bitcast=True).to(tl.int32)
  return tl.where(code == 0x7F, float("nan"), number(code << 20) * 2.0**120)
