"""The NVFP4 codec: its contract against an oracle in NumPy, bytes and settings."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import normal

from longlive_jax.quant import layout, nvfp4
from longlive_jax.quant.nvfp4 import NVFP4Array

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "nvfp4"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([E2M1, -E2M1])
STATIC = ("rule", "tiles", "batch_axes", "reference")
quantise = jax.jit(nvfp4.quantise, static_argnames=STATIC)
dequantise = jax.jit(nvfp4.dequantise, static_argnames="dtype")

# The same examples in every run, and nothing written beside the tests.
property_test = settings(
  max_examples=40, deadline=None, derandomize=True, database=None
)
rules = st.sampled_from(sorted(nvfp4.RULES))


@st.composite
def arrays(draw, specials: bool = False) -> np.ndarray:
  """Matrices of any magnitude, blocks of unequal size, zeros among them."""
  rows, columns = draw(st.sampled_from([(1, 16), (33, 48)]))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  x = rng.standard_normal((rows, columns))
  spread = draw(st.sampled_from([0.0, 1.0, 6.0]))  # decades between blocks
  blocks = 10.0 ** (spread * rng.uniform(-1, 0, (rows, columns // 16)))
  x *= np.repeat(blocks, 16, axis=1) * 10.0 ** draw(st.floats(-30, 30))
  x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] *= 0.0
  if specials:
    kinds = [np.inf, -np.inf, np.nan, 3e38, -(2.0**111)]
    for _ in range(draw(st.integers(1, 3))):
      x[rng.integers(rows), rng.integers(columns)] = draw(st.sampled_from(kinds))
  return x.astype(np.float32)


def codes_of(array: NVFP4Array) -> np.ndarray:
  """Codes with both zeros as 0."""
  codes = np.asarray(nvfp4.unpack(array.codes))
  return np.where(codes == 8, 0, codes)


def bits(array: NVFP4Array) -> list[np.ndarray]:
  """The leaves as integers, so that NaN equals NaN."""
  leaves = jax.tree.leaves(array)
  return [np.asarray(leaf).view(f"u{leaf.dtype.itemsize}") for leaf in leaves]


def assert_same(a: NVFP4Array, b: NVFP4Array) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for left, right in zip(bits(a), bits(b), strict=True):
    np.testing.assert_array_equal(left, right)


# ------------------------------------------------------------------ the contract
def oracle(x: np.ndarray, rule: nvfp4.Rule) -> tuple[np.ndarray, ...]:
  """SPEC 9 in NumPy, float32 throughout.

  Returns:
    Values on the grid (rows, n / 16, 16) and scales (rows, n / 16).
  """
  one = np.float32(1)
  blocks = x.reshape(len(x), -1, 16)
  amax = np.abs(x).max()
  if amax < 2.0**-104:
    return np.zeros_like(blocks), np.zeros(blocks.shape[:2])
  span = np.float32(rule.m4 * rule.m8)
  enc = span / amax
  unit = np.ldexp(one, np.frexp(amax)[1] - 1)
  wanted = np.abs(blocks).max(-1, keepdims=True) / np.float32(rule.m4) * enc

  def candidate(scale):
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    with np.errstate(all="ignore"):
      v = np.abs(blocks * (one / (one / enc * scale)))
    v = np.where(scale > 0, v, 0)
    q = np.where(
      v < 2, np.round(2 * v) / 2, np.where(v < 4, np.round(v), 2 * np.round(v / 2))
    )
    q = np.copysign(np.minimum(q, 6), blocks)
    difference = np.abs(q * scale * amax / span - blocks) / unit
    error = {
      None: 0 * difference[..., :1],
      "mse": in_halves(difference**2),
      "mae": in_halves(difference),
      "abs_max": difference.max(-1, keepdims=True),
    }[rule.error]
    return q, scale, error

  q, scale, error = candidate(wanted)
  q4, scale4, error4 = candidate(wanted * np.float32(1.5))
  four = error4 < error
  q, scale = np.where(four, q4, q), np.where(four, scale4, scale)
  return q, scale[..., 0]


def in_halves(x: np.ndarray) -> np.ndarray:
  while x.shape[-1] > 1:
    half = x.shape[-1] // 2
    x = x[..., :half] + x[..., half:]
  return x

@property_test
@given(arrays(), rules)
def test_codes_and_scales_are_those_of_the_specification(x, rule):
  array = quantise(x, rule=rule)
  q, scale = oracle(x, nvfp4.RULES[rule])
  values = VALUES[codes_of(array)].reshape(q.shape)
  np.testing.assert_array_equal(values, q)
  np.testing.assert_array_equal(array.scales.astype(np.float32), scale)
  peak = np.abs(x).max()
  assert array.amax == (peak if peak >= 2.0**-104 else 0)


@property_test
@given(arrays(), rules, st.booleans())
def test_what_comes_back_is_near(x, rule, tiles):
  """At most half a step of the block's scale, and half of the smallest scale."""
  array = quantise(x, rule=rule, tiles=tiles)
  back = np.asarray(dequantise(array), np.float64)
  rows = -(-len(x) // 16) * 16
  blocks = np.abs(np.pad(x, ((0, rows - len(x)), (0, 0)))).astype(np.float64)
  block_max = blocks.reshape(rows, -1, 16).max(-1)
  if tiles:
    block_max = block_max.reshape(-1, 16, block_max.shape[1]).max(1).repeat(16, axis=0)
  bound = block_max / 6 * (1 + 2**-4) + 3 * 2**-9 * np.abs(x).max() / array.span
  error = np.abs(back - x).reshape(len(x), -1, 16).max(-1)
  assert (error <= bound[: len(x)] * 1.0001 + 2.0**-104).all()
  assert not (back * x < 0).any()


@property_test
@given(arrays(), rules, st.integers(-20, 20), st.booleans())
def test_sign_and_powers_of_two_pass_through(x, rule, power, tiles):
  """Negated or scaled input: the same codes but for the sign, the same scales."""
  peak = np.abs(x).max()
  if peak and not 1e-25 < peak < 1e25:  # else amax may leave the range
    x = (x / peak).astype(np.float32)
  array = quantise(x, rule=rule, tiles=tiles)
  scaled = quantise(-x * np.float32(2.0**power), rule=rule, tiles=tiles)
  np.testing.assert_array_equal(bits(scaled)[1], bits(array)[1])
  np.testing.assert_array_equal(VALUES[codes_of(scaled)], -VALUES[codes_of(array)])
  assert scaled.amax == array.amax * np.float32(2.0**power)


@property_test
@given(arrays(), rules)
def test_rounding_again_changes_nothing(x, rule):
  """Where the tensor scale is a power of two: then amax itself is reproduced."""
  span = nvfp4.RULES[rule].span
  small = x * (0.5 * span / max(np.abs(x).max(), 1e-33))
  # One block at the top of the range, and none so small that its scale is subnormal.
  x = np.where(np.abs(small) < span / 100, 0, small).astype(np.float32)
  x[0, 0] = span
  once = quantise(x, rule=rule)
  np.testing.assert_array_equal(
    dequantise(quantise(dequantise(once), rule=rule)), dequantise(once)
  )


@property_test
@given(arrays(specials=True), rules, st.booleans())
def test_a_block_with_a_number_out_of_range_reads_as_nan(x, rule, tiles):
  good = np.abs(x) <= 2.0**110
  bad = np.repeat(~good.reshape(len(x), -1, 16).all(-1), 16, axis=1)
  array = quantise(x, rule=rule, tiles=tiles)
  back = np.asarray(dequantise(array))
  np.testing.assert_array_equal(np.isnan(back), bad)
  rest = quantise(np.where(good, x, 0), rule=rule, tiles=tiles)
  np.testing.assert_array_equal(back[~bad], np.asarray(dequantise(rest))[~bad])
  assert array.amax == rest.amax


def test_zeros_and_denormals_count_as_zero():
  smallest = np.float32(2.0**-149)
  x = np.zeros((4, 16), np.float32)
  x[0], x[1], x[2] = -0.0, smallest, -(2.0**-126)
  array = quantise(x)
  assert float(array.amax) == 0
  assert not bits(array)[0].any() and not bits(array)[1].any()
  x[3, 5] = 1  # now an amax, and the denormals are still nothing beside it
  array = quantise(x)
  np.testing.assert_array_equal(dequantise(array), np.where(x == 1, x, 0))
  # A negative number that rounds to zero is code 8; a zero of either sign is 0.
  x[3, :3] = -1e-3, -0.0, 0.0
  assert np.asarray(nvfp4.unpack(quantise(x).codes))[3, :3].tolist() == [8, 0, 0]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_errors_of_any_magnitude(magnitude, rule):
  """In particular, the squares of four over six neither over- nor underflow."""
  x = normal(32, 64)
  back = np.asarray(dequantise(quantise(x * np.float32(magnitude), rule=rule)))
  error = np.linalg.norm(back / magnitude - x) / np.linalg.norm(x)
  bound = {"static_6": 0.101, "static_4": 0.121, "abs_max": 0.096}.get(rule, 0.091)
  assert 0.08 < error < bound


# ------------------------------------------------------------------ bytes
def e4m3(byte: int) -> float:
  """float8_e4m3fn by its definition: sign, exponent of bias 7, three bits."""
  sign, exponent, fraction = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
  if byte & 127 == 127:
    return np.nan
  if exponent == 0:
    return sign * fraction * 2.0**-9
  return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_pairs_of_a_code_byte_and_a_scale_byte(dtype):
  codes = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
  scales = np.arange(256, dtype=np.uint8)[:, None].repeat(32, axis=1)
  array = NVFP4Array(
    jnp.asarray(codes),
    jnp.asarray(scales.view(ml_dtypes.float8_e4m3fn)),
    jnp.float32(2688 / 4),
    2688.0,
  )
  pairs = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=-1)
  scale = np.array([e4m3(byte) for byte in range(256)])
  expected = (scale[:, None] * pairs.reshape(-1) / 4).astype(jnp.dtype(dtype))
  found = dequantise(array, dtype=dtype)
  assert found.dtype == dtype
  np.testing.assert_array_equal(
    np.asarray(found, np.float32), expected.astype(np.float32)
  )


def test_bytes_hold_the_even_element_low():
  codes = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(nvfp4.pack(nvfp4.unpack(codes)), codes)
  assert nvfp4.pack(np.array([[1, 2, 3, 15]], np.uint8)).tolist() == [[0x21, 0xF3]]
  values = nvfp4.decode(np.arange(16, dtype=np.uint8))
  np.testing.assert_array_equal(values, VALUES)
  encoded = nvfp4.encode(jnp.abs(values), jnp.signbit(values))
  np.testing.assert_array_equal(encoded, np.arange(16))


def test_scales_in_the_order_of_the_hardware():
  rows, columns = 256, 12
  scales = np.arange(2 * rows * columns).reshape(2, rows, columns)
  swizzled = layout.swizzle_scales(scales)
  r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
  tile = (r // 128) * (columns // 4) + c // 4
  position = tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
  np.testing.assert_array_equal(swizzled[:, position], scales)
  np.testing.assert_array_equal(
    layout.unswizzle_scales(swizzled, rows, columns), scales
  )
  traced = jax.jit(layout.swizzle_scales)(scales.astype(np.uint8))
  np.testing.assert_array_equal(traced, swizzled.astype(np.uint8))
  with pytest.raises(ValueError, match="rows=100, columns=8 must be multiples of 128"):
    layout.swizzle_scales(scales[0, :100, :8])
  with pytest.raises(ValueError, match="must have a product of 3072"):
    layout.unswizzle_scales(swizzled[0], 128, 12)


@pytest.mark.parametrize("name", ["quantize_1d", "quantize_2d"])
def test_the_reference_bit_for_bit(name):
  golden = np.load(GOLDEN / f"{name}.npz")
  for rule in nvfp4.RULES:
    array = quantise(golden["x"], rule=rule, tiles=name.endswith("2d"), reference=True)
    np.testing.assert_array_equal(array.codes, golden[f"{rule}.packed"])
    scales = array.scales.astype(np.float32)
    np.testing.assert_array_equal(scales, golden[f"{rule}.scales"])
    assert array.amax == golden[f"{rule}.amax"]


def test_a_value_that_would_round_to_eight():
  """With a subnormal scale: 6 here, code 8, which reads as zero, in the reference."""
  x = np.zeros((2, 16), np.float32)
  x[0, 0] = 2688.0
  x[1] = 6 * 2.0**-9 * 1.45  # wants scale 1.45 * 2^-9, gets 2^-9
  assert quantise(x, rule="static_6").scales.astype(np.float32)[1, 0] == 2.0**-9
  back = dequantise(quantise(x, rule="static_6"))
  reference = dequantise(quantise(x, rule="static_6", reference=True))
  np.testing.assert_array_equal(back[1], 6 * 2.0**-9)
  np.testing.assert_array_equal(reference[1], 0)


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize("rule", ["static_6", "abs_max"])
def test_tiles_have_the_codes_of_the_transpose(rule):
  x = normal(48, 80)
  array = quantise(x, rule=rule, tiles=True)
  turned = quantise(x.T, rule=rule, tiles=True)
  np.testing.assert_array_equal(codes_of(array), codes_of(turned).T)
  tiles = array.scales.astype(np.float32).reshape(3, 16, 5)
  np.testing.assert_array_equal(tiles, tiles[:, :1].repeat(16, axis=1))
  turned_tiles = turned.scales.astype(np.float32).reshape(5, 16, 3)[:, 0]
  np.testing.assert_array_equal(tiles[:, 0], turned_tiles.T)


def test_batch_axes_have_scales_of_their_own():
  x = normal(2, 3, 5, 32) * np.float32([[1, 10, 100], [0.1, 0, 1e10]])[..., None, None]
  whole = quantise(x, batch_axes=2)
  assert whole.amax.shape == (2, 3) and whole.shape == x.shape and whole.ndim == 4
  assert whole.nbytes == 960 // 2 + 960 // 16 + 4 * 6
  for i in np.ndindex(2, 3):
    part = jax.tree.map(lambda leaf, i=i: leaf[i], whole)
    assert_same(part, quantise(x[i]))
    np.testing.assert_array_equal(dequantise(part), dequantise(whole)[i])
  known = quantise(x, batch_axes=2, amax=np.abs(x).max((2, 3)))
  assert_same(known, whole)


def test_stochastic_rounding_keeps_the_expected_value():
  levels = np.linspace(0, 6, 49, dtype=np.float32)  # steps of 1/8
  keys = jax.random.split(jax.random.key(0), 4000)
  draws = np.asarray(
    jax.jit(jax.vmap(nvfp4.round_e2m1, in_axes=(None, 0)))(levels, keys)
  )
  assert set(np.unique(draws)) <= set(E2M1.tolist())
  step = np.where(levels < 2, 0.5, np.where(levels < 4, 1, 2))
  assert (np.abs(draws - levels) < step).all()  # a neighbour, and exact on the grid
  # The standard deviation of the mean is at most step / 2 / sqrt(4000).
  np.testing.assert_array_less(np.abs(draws.mean(0) - levels), 0.04 * step + 1e-6)


@pytest.mark.parametrize("rule", sorted(nvfp4.RULES))
def test_stochastic_quantisation_of_a_tensor_has_its_expected_value(rule):
  x = normal(8, 64)
  draw = jax.jit(jax.vmap(lambda key: nvfp4.quantise(x, rule=rule, key=key)))
  drawn = draw(jax.random.split(jax.random.key(3), 400))
  one, two = (jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in (0, 1))
  assert (bits(one)[0] != bits(two)[0]).mean() > 0.2
  np.testing.assert_array_equal(bits(one)[1], bits(two)[1])  # scales are not drawn
  mean = np.asarray(dequantise(drawn), np.float64).mean(0)
  # The standard deviation of this is 3e-4: a clipped maximum, or a choice between 6
  # and 4 that sees the draw, moves it by 4e-3 and more.
  assert abs((mean * x).sum() / (x * x).sum() - 1) < 1.2e-3
  nearest = np.asarray(dequantise(quantise(x, rule=rule)))
  assert np.abs(mean - x).mean() < 0.25 * np.abs(nearest - x).mean()


@pytest.mark.parametrize(
  ("rule", "options"),
  [
    *((rule, {}) for rule in nvfp4.RULES),
    ("abs_max", {"tiles": True}),
    ("mse", {"key": jax.random.key(5)}),
  ],
)
def test_jit_and_eager_are_the_same_bits(rule, options):
  x = normal(33, 48) * np.float32(3.7)
  eager = nvfp4.quantise(x, rule=rule, **options)
  assert_same(quantise(x, rule=rule, **options), eager)
  np.testing.assert_array_equal(dequantise(eager), nvfp4.dequantise(eager))


def test_hadamard_rotation():
  matrix = nvfp4.hadamard_matrix()
  np.testing.assert_array_equal(matrix @ matrix.T, np.eye(16))
  x, y = normal(5, 48), normal(7, 48, seed=1)
  rotated, other = nvfp4.hadamard(x), nvfp4.hadamard(y)
  expected = (x.reshape(5, 3, 16) @ matrix).reshape(5, 48)
  np.testing.assert_allclose(rotated, expected, atol=1e-6)
  np.testing.assert_allclose(rotated @ other.T, x @ y.T, atol=1e-5)
  assert nvfp4.hadamard(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  with pytest.raises(ValueError, match=r"\(5, 40\) must be a multiple of 16"):
    nvfp4.hadamard(x[:, :40])


@pytest.mark.parametrize(
  ("x", "options", "message"),
  [
    (normal(4, 24), {}, "last axis must be a multiple of 16"),
    (normal(4, 15), {}, "last axis must be a multiple of 16"),
    (normal(16), {"batch_axes": 1}, "batch_axes=1"),
    (normal(4, 16), {"rule": "best"}, "rule='best' is unknown; use static_6"),
    (nvfp4.quantise(normal(1, 16)), {}, "is an NVFP4Array already"),
  ],
)
def test_refusals(x, options, message):
  with pytest.raises(ValueError, match=message):
    nvfp4.quantise(x, **options)
