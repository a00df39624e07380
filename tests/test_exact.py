"""Arithmetic whose bits are those of IEEE 754 on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant import exact


def numbers(seed: int, count: int = 1 << 18, low: int = -60, high: int = 60):
  """float32 with random significands and exponents."""
  rng = np.random.default_rng(seed)
  significand = rng.integers(0, 1 << 23, count)
  exponent = rng.integers(low + 127, high + 127, count)
  return ((exponent << 23) | significand).astype(np.uint32).view(np.float32)


def same_bits(got, want):
  got = np.asarray(got)
  assert got.dtype == want.dtype == np.float32
  np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_division_rounds_to_nearest(wrap):
  a, b = numbers(0), numbers(1)
  a[:1000] = b[:1000]
  a[1000:2000] = 2 * b[1000:2000]
  b[2000:3000] = np.nextafter(a[2000:3000], np.float32(np.inf))
  b[3000:4000] = np.nextafter(a[3000:4000], np.float32(0))
  same_bits(wrap(exact.divide)(a, b), a / b)


@pytest.mark.parametrize("b", [4.0, 6.0, 1536.0, 2688.0])
def test_division_by_a_constant(b):
  """Which XLA would turn into a product."""
  a = numbers(2)
  same_bits(jax.jit(lambda a: exact.divide(a, b))(a), a / np.float32(b))
  same_bits(jax.jit(lambda a: exact.divide(b, a))(a), np.float32(b) / a)
  same_bits(jax.vmap(lambda a: exact.divide(a, b))(a), a / np.float32(b))


def test_small_quotients_are_zero():
  a = np.array([0, 1e-45, 2.0**-127, 2.0**-126, 3 * 2.0**-126], np.float32)
  same_bits(exact.divide(a, 1.0), np.array([0, 0, 0, *a[3:]], np.float32))
  same_bits(exact.divide(a, 2.0), np.array([0, 0, 0, 0, a[4] / 2], np.float32))


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_a_sum_in_halves(n):
  x = np.random.default_rng(3).standard_normal((10_000, n)).astype(np.float32)
  want = x * x
  while want.shape[-1] > 1:
    half = want.shape[-1] // 2
    want = want[:, :half] + want[:, half:]
  total = jax.jit(lambda x: exact.total(exact.rounded(x * x)))
  same_bits(total(x), want)


def test_powers_of_two():
  x = np.concatenate([numbers(4), np.float32([0])])
  want = np.ldexp(np.float32(1), np.frexp(x)[1] - 1) * (x > 0)
  same_bits(jax.jit(exact.power_of_two)(x), want)
  same_bits(jax.jit(exact.inverse_power_of_two)(x[:-1]), 1 / want[:-1])


def test_inf_and_nan_do_not_vanish():
  got = jax.jit(exact.divide)(np.float32([np.inf, np.nan, -np.nan, 1]), 3.0)
  np.testing.assert_array_equal(got, np.float32([np.inf, np.nan, np.nan, 1 / 3]))


def test_division_keeps_shapes():
  assert exact.divide(jnp.ones((2, 1, 3)), jnp.ones((4, 1))).shape == (2, 4, 3)
  assert exact.divide(1.0, 3.0).shape == ()
