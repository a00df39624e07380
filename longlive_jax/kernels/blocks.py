"""Triton functions that the kernels share: blocks of 16 to 4 bits and back (SPEC 9).

They follow `quant/nvfp4.py` operation by operation, in float32 and with divisions that
round correctly (and launches forbid fusing products with sums), so codes and scales are
the same bits. A thread holds a block as two halves of 8, `a` and `b`, each (blocks, 8):
what a 16-byte load of bf16 gives it. So nothing is computed twice or exchanged between
threads.

Instructions bound these kernels, not the bandwidth, so what is done for every number is
done with few. Small floats are handled through their bits: an anchor is added whose
unit in the last place is the step of the small format, which rounds to nearest even.
Four over six is decided by estimated errors, and by exact ones where these are too
close to tell: about 28 instructions a number.
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
  """Float32 halves (blocks, 8) of blocks `block` (blocks,); 0 where not valid."""
  low, high = load_raw(pointer, block, valid)
  return half(low), half(high)


@jit
def load_raw(pointer, block, valid):
  """The same as they lie in memory, in half the registers: for loads ahead of use."""
  if pointer.dtype.element_ty == tl.bfloat16:
    # As pairs: one instruction a number, where Triton's own conversion takes 1.5.
    at = pointer.to(tl.pointer_type(tl.int32)) + block[:, None] * 8 + tl.arange(0, 4)
    low = tl.load(at, mask=valid[:, None], other=0)
    return low, tl.load(at + 4, mask=valid[:, None], other=0)
  else:
    at = pointer + block[:, None] * 16 + tl.arange(0, 8)
    low = tl.load(at, mask=valid[:, None], other=0.0)
    return low, tl.load(at + 8, mask=valid[:, None], other=0.0)


@jit
def half(raw):
  """Float32 (blocks, 8) of what `load_raw` gives."""
  if raw.dtype == tl.int32:
    return _unpair(raw)
  else:
    return raw.to(tl.float32)


@jit
def _unpair(x):
  """Float32 (blocks, 2 n) of int32 (blocks, n), each two bfloat16, the first below."""
  both = tl.join(number(x << 16), number(x & -65536))
  return tl.reshape(both, (x.shape[0], 2 * x.shape[1]))


@jit
def store_blocks(codes_pointer, scales_pointer, block, valid, codes, scales):
  """Writes words (blocks, 2) and scale bits (blocks,) of blocks `block`."""
  at = codes_pointer.to(tl.pointer_type(tl.int32)) + block[:, None] * 2
  tl.store(at + tl.arange(0, 2), codes, mask=valid[:, None])
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
    words of 8 codes, int32 (blocks, 2), and bits of the scales, uint8 (blocks,). A
    block with a number that is not finite, or beyond 2**110, has scale NaN and codes 0.
  """
  # Floats that are not negative are ordered like their bits; NaN comes last.
  highest = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
  highest = tl.max(bits(highest), axis=1)
  finite = highest <= 0x76800000  # 2**110
  block_max = tl.where(finite, number(highest), 0.0)
  nonzero = tl.where(amax > 0, amax, 1.0)
  to_scale = tl.div_rn(M4 * M8, nonzero)
  from_scale = _inverse(to_scale)
  wanted = tl.where(amax > 0, _divide(block_max, M4) * to_scale, 0.0)
  if ERROR is None:
    scale, factor = _scale(wanted, from_scale)
    va, ta, _ = _round(a, factor, 6.0)
    vb, tb, _ = _round(b, factor, 6.0)
    words = _codes(ta, tb) | _signs(va, vb)
  elif ERROR == "abs_max":  # errors are equal too often for an estimate
    words, scale = _exact(a, b, wanted, from_scale, amax, nonzero, M4 * M8, ERROR)
  else:
    words, scale, sure = _estimated(a, b, wanted, from_scale, M4, ERROR)
    if tl.min(sure.to(tl.int32), axis=0) == 0:
      words, scale = _exact(a, b, wanted, from_scale, amax, nonzero, M4 * M8, ERROR)
  words = tl.where(finite[:, None], words, 0)
  scale_bits = bits(scale * 2.0**-120) >> 20  # exponents now as float32 counts them
  return words, tl.where(finite, scale_bits, 0x7F).to(tl.uint8)


@jit
def _estimated(a, b, wanted, from_scale, M4: tl.constexpr, ERROR: tl.constexpr):
  """Four over six by errors in units of the scale, good to some of their last bits.

  What rounding took off a number times `factor`, where the codec's error is that of a
  value which is rounded, too. Only blocks whose errors are nearly equal are not `sure`.

  Returns:
    words (blocks, 2), scales (blocks,) and whether they are those of `_exact`.
  """
  scale, factor = _scale(wanted, from_scale)
  va, ta, qa = _round(a, factor, None)
  vb, tb, qb = _round(b, factor, None)
  scale4, factor4 = _scale(wanted * 1.5, from_scale)
  va4, ta4, qa4 = _round(a, factor4, None)
  vb4, tb4, qb4 = _round(b, factor4, None)
  da, db = qa - tl.abs(va), qb - tl.abs(vb)
  da4, db4 = qa4 - tl.abs(va4), qb4 - tl.abs(vb4)
  # A difference d, at most 1, is off by less than 47 * 2**-24: 5 roundings of v, below
  # 7, and 2 of the codec's value, at most 6. So 16 squares of sum e are by
  #   2 * 47 * 2**-24 * sqrt(16 e) <= 376 * 2**-24 * (e + 1/4)
  # and 16 magnitudes by 752 * 2**-24. Roundings of sums, 14 * 2**-24 of them, are in
  # what 2**-15 and 2**-13 have above that. The scale of four is the larger one.
  if ERROR == "mse":
    error = _squares(da, db) * (scale * scale)
    error4 = _squares(da4, db4) * (scale4 * scale4)
    doubt = (error + error4 + 0.5 * scale4 * scale4) * 2.0**-15
  else:
    error = _sum(tl.abs(da) + tl.abs(db)) * scale
    error4 = _sum(tl.abs(da4) + tl.abs(db4)) * scale4
    doubt = (error + error4 + scale4) * 2.0**-13
  # What rounds to 8, as it does with a scale that was cut off or has few bits, is not
  # cut to 6 here. And a scale of 0 is sure for blocks of zeros only.
  small = wanted * M4 <= scale * 6.5
  sure = small & (tl.abs(error - error4) >= doubt)
  four = error4 < error
  # Codes are packed before one of the two is taken: in registers they need an eighth.
  codes = tl.where(four[:, None], _codes(ta4, tb4), _codes(ta, tb))
  return codes | _signs(va, vb), tl.where(four, scale4, scale), sure


@jit
def _exact(
  a, b, wanted, from_scale, amax, nonzero, SPAN: tl.constexpr, ERROR: tl.constexpr
):
  """Four over six: words (blocks, 2) and scales (blocks,)."""
  # A power of two that brings amax to about 1: exact, and squares stay in range.
  unit = number(0x7F000000 - (bits(nonzero) & 0x7F800000))
  scale, best = tl.zeros_like(wanted), tl.zeros_like(wanted)
  words = tl.zeros((a.shape[0], 2), tl.int32)
  # A loop: both candidates at once would take more registers than all the rest, and
  # leave room for half the threads even where this is a rare branch.
  for four in tl.range(2):
    scale_here, factor = _scale(wanted * (1.0 + 0.5 * four), from_scale)
    va, ta, qa = _round(a, factor, 6.0)
    vb, tb, qb = _round(b, factor, 6.0)
    xa, xb = tl.abs(a) * unit, tl.abs(b) * unit
    error = _error(qa, qb, xa, xb, scale_here, amax, unit, SPAN, ERROR)
    better = (error < best) | (four == 0)
    best = tl.where(better, error, best)
    scale = tl.where(better, scale_here, scale)
    words = tl.where(better[:, None], _codes(ta, tb) | _signs(va, vb), words)
  return words, scale


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
def _inverse(x):
  """1 / x rounded correctly, where x and 1 / x are normal: 3 instructions.

  What a GPU's own division comes down to, without its cases for other numbers.
  """
  return tl.inline_asm_elementwise(
    "{ .reg .f32 y, e; rcp.approx.ftz.f32 y, $1; neg.f32 e, $1; "
    "fma.rn.f32 e, e, y, 0f3F800000; fma.rn.f32 $0, e, y, y; }",
    "=f,f",
    [x],
    tl.float32,
    is_pure=True,
    pack=1,
  )


@jit
def _scale(wanted, from_scale):
  """The scale in E4M3 and what numbers are multiplied by, float32; 0 if it is 0."""
  v = tl.minimum(wanted, 448.0)
  power = number(bits(tl.maximum(v, 2.0**-6)) & 0x7F800000)
  anchor: tl.constexpr = 1.5 * 2.0**20  # its unit in the last place is 1/8
  scale = tl.fma(power, -anchor, tl.fma(power, anchor, v))
  divisor = tl.where(scale > 0, from_scale * scale, 1.0)
  return scale, tl.where(scale > 0, _inverse(divisor), 0.0)


@jit
def _round(x, factor, LIMIT: tl.constexpr):
  """x (blocks, 8) times `factor`, and its magnitude, at most LIMIT, in E2M1.

  Returns:
    the product, without a sign where it is zero, t, the codes 0..7 in its lowest three
    bits, and the rounded magnitudes: float32 (blocks, 8). None as LIMIT serves
    magnitudes below 7.
  """
  product = tl.fma(x, factor[:, None], 0.0)  # -0.0 + 0.0 is 0.0
  v = tl.abs(product)
  exponent = bits(product)
  if LIMIT is not None:
    v = tl.minimum(v, LIMIT)
    exponent = bits(v)
  # The first and the last bit of the exponent: from 2 the number 2, from 4 the number
  # 4, below that 0 or nearly so. The anchor is about 1.5, 3.5 or 5.5 times 2**22, where
  # steps are 0.5, 1 and 2, and ends in the bits 0, 2 or 4, so that the last bits of the
  # sum are the code.
  from_2 = number(exponent & 0x40800000)
  anchor = tl.fma(from_2, 2.0**22 + 3, 1.5 * 2.0**22 + 12)
  t = v + anchor
  return product, t, t - anchor


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
  near, far = _halve(x)
  return near + far


@jit
def _halve(x):
  n: tl.constexpr = x.shape[1]
  return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, n // 2)), 0, 2, 1))


@jit
def _squares(a, b):
  """Sums (blocks,) of squares of halves."""
  a, a4 = _halve(a)
  b, b4 = _halve(b)
  x = tl.fma(a, a, tl.fma(a4, a4, tl.fma(b, b, b4 * b4)))
  return tl.reshape(_fold(_fold(x)), (x.shape[0],))


@jit
def _difference(q, one, more, x):
  power = number(bits(q) & 0x7F800000)
  by_power = tl.where((bits(q) & 0x400000) != 0, more[:, None], one[:, None])
  return tl.fma(power, by_power, -x)  # the product is exact


@jit
def _codes(ta, tb):
  """int32 (blocks, 2): of halves, codes in the last bits of t."""
  # One instruction a number and word: its first or last 4 bits are shifted in.
  return tl.join(_code_word(ta), _code_word(tb))


@jit
def _code_word(t):
  t0, t1, t2, t3, t4, t5, t6, t7 = _columns(t)
  word = _trail(_trail(_trail(_trail(0, t0), t1), t2), t3)
  word = _trail(_trail(_trail(_trail(word, t4), t5), t6), t7)
  return (word & 0x77777777).to(tl.int32, bitcast=True)


@jit
def _signs(va, vb):
  """int32 (blocks, 2): of halves, signs where their codes have them."""
  return tl.join(_sign_word(va), _sign_word(vb))


@jit
def _sign_word(v):
  v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v)
  word = _lead(_lead(_lead(_lead(0, v7), v6), v5), v4)
  word = _lead(_lead(_lead(_lead(word, v3), v2), v1), v0)
  return (word & 0x88888888).to(tl.int32, bitcast=True)


@jit
def _lead(word, x):
  return (word << 4) | (x >> 28)


@jit
def _trail(word, x):
  return (word >> 4) | (x << 28)


@jit
def _columns(x):
  """The bits, uint32 (blocks,), of the columns of float32 (blocks, 8)."""
  x = tl.reshape(x.to(tl.uint32, bitcast=True), (x.shape[0], 2, 2, 2))
  even, odd = tl.split(x)
  x0_4, x2_6 = tl.split(even)
  x1_5, x3_7 = tl.split(odd)
  x0, x4 = tl.split(x0_4)
  x1, x5 = tl.split(x1_5)
  x2, x6 = tl.split(x2_6)
  x3, x7 = tl.split(x3_7)
  return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def e2m1(code):
  """float32 of codes 0..15, int32."""
  return number(((code & 7) << 22) | ((code & 8) << 28)) * 2.0**126


@jit
def e4m3(scales):
  """float32 of scales, which are float8 and not negative."""
  code = scales.to(tl.uint8, bitcast=True).to(tl.int32)
  return tl.where(code == 0x7F, float("nan"), number(code << 20) * 2.0**120)
