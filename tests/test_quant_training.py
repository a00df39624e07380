"""Training with quantised products: the three products, noise, FP8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import normal

from longlive_jax.layers import linear
from longlive_jax.quant import fp8, nvfp4, training, weights
from longlive_jax.quant.training import (
  FP8TrainingWeight,
  TrainingSettings,
  TrainingWeight,
)

NEAREST = TrainingSettings(stochastic=False)
STATIC = TrainingSettings("static_6", "static_6", "static_6")  # the soonest compiled


@functools.partial(jax.jit, static_argnums=4)
def products(x, weight, outer, key, settings):
  """y, gradient of x, gradient of the weight."""
  y, backward = jax.vjp(
    lambda x, w: linear.matmul(x, TrainingWeight(w, key, settings)), x, weight
  )
  return y, *backward(outer)


quantise = jax.jit(nvfp4.quantise, static_argnames=("rule", "tiles"))


def rounded(x, **options) -> np.ndarray:
  """Quantised and back, in float64."""
  return np.asarray(nvfp4.dequantise(quantise(x, **options)), np.float64)


# ------------------------------------------------------------------ the products
@pytest.mark.parametrize(
  ("settings", "dtype"),
  [
    (TrainingSettings("static_6", "abs_max", "static_4", False, True, True), "float32"),
    (TrainingSettings("mse", "static_4", "mae", False, False, False), "bfloat16"),
  ],
)
def test_all_three_products_are_of_quantised_operands(settings, dtype):
  """21 tokens: no multiple of 16, so that some of the rotated ones are padding."""
  x, outer = (
    jnp.asarray(normal(3, 7, n, seed=n), dtype) for n in (32, 48)
  )  # (b, s, in), (b, s, out)
  weight = jnp.asarray(normal(48, 32, seed=1), dtype)
  y, grad_x, grad_weight = products(x, weight, outer, jax.random.key(0), settings)

  rows, outer_rows = x.reshape(21, 32), outer.reshape(21, 48)
  forward = rounded(rows, rule=settings.activation)
  options = {"rule": settings.weight, "tiles": settings.tiles}
  expected_y = forward @ rounded(weight, **options).T
  gradient = rounded(outer_rows, rule=settings.gradient)
  expected_x = gradient @ rounded(weight.T, **options).T

  def along_tokens(rows, rule):
    columns = jnp.pad(jnp.asarray(rows, dtype).T, ((0, 0), (0, 11)))
    columns = nvfp4.hadamard(columns) if settings.hadamard else columns
    return rounded(columns, rule=rule)

  expected_weight = (
    along_tokens(outer_rows, settings.gradient)
    @ along_tokens(forward, settings.activation).T
  )
  tolerance = 1e-6 if dtype == "float32" else 2**-8
  for found, expected, like in (
    (y, expected_y.reshape(3, 7, 48), x),
    (grad_x, expected_x.reshape(3, 7, 32), x),
    (grad_weight, expected_weight, weight),
  ):
    assert found.dtype == like.dtype
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=2e-6 * 48)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_of_each_few_tokens_is_not_quantised(dtype):
  """21 tokens in groups of 8, of which the last is short."""
  settings = dataclasses.replace(STATIC, stochastic=False, hadamard=False, centre=8)
  x, outer = (jnp.asarray(normal(3, 7, n, seed=n), dtype) for n in (32, 48))
  x += jnp.asarray(normal(32, seed=2), dtype)
  weight = jnp.asarray(normal(48, 32, seed=1), dtype)
  y, grad_x, grad_weight = products(x, weight, outer, jax.random.key(0), settings)

  rows, outer_rows = (np.asarray(a, np.float32).reshape(21, -1) for a in (x, outer))
  means = jnp.asarray([rows[i : i + 8].mean(0) for i in (0, 8, 16)], dtype)
  means = np.asarray(means, np.float32).repeat(8, 0)[:21]
  rest = rounded(rows - means, rule="static_6")
  exact_weight = np.asarray(weight, np.float64)
  forward = rest @ rounded(weight, rule="static_6", tiles=True).T
  gradient = rounded(outer_rows, rule="static_6")
  expected_x = gradient @ rounded(weight.T, rule="static_6", tiles=True).T

  def along_tokens(rows):
    columns = np.pad(np.asarray(rows, np.float32).T, ((0, 0), (0, 11)))
    return rounded(jnp.asarray(columns, dtype), rule="static_6")

  expected_weight = along_tokens(outer_rows) @ along_tokens(rest).T
  tolerance = 1e-6 if dtype == "float32" else 2**-8
  for found, expected, like in (
    (y, (forward + means @ exact_weight.T).reshape(3, 7, 48), x),
    (grad_x, expected_x.reshape(3, 7, 32), x),
    (grad_weight, expected_weight + outer_rows.T @ means, weight),
  ):
    assert found.dtype == like.dtype
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=4e-6 * 48)


def test_tokens_that_are_all_alike_are_multiplied_in_float():
  """Forward and in the gradient of the weight."""
  settings = dataclasses.replace(STATIC, centre=16)
  x, outer = np.tile(normal(1, 32), (32, 1)), normal(32, 48, seed=2)
  weight = normal(48, 32, seed=1)
  y, _, grad_weight = products(x, weight, outer, jax.random.key(0), settings)
  np.testing.assert_allclose(y, x @ weight.T, atol=2e-5)
  np.testing.assert_allclose(grad_weight, outer.T @ x, atol=1e-4)


def test_the_products_are_near_those_of_floats():
  x, weight, outer = normal(128, 64), normal(96, 64, seed=1), normal(128, 96, seed=2)
  found = products(x, weight, outer, jax.random.key(0), NEAREST)
  for product, exact in zip(
    found, (x @ weight.T, outer @ weight, outer.T @ x), strict=True
  ):
    error = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    assert 0.09 < error < 0.17  # two operands, each off by about 9%


def test_stochastic_gradients_have_the_right_mean():
  x, weight, outer = normal(32, 32), normal(32, 32, seed=1), normal(32, 32, seed=2)
  draw = jax.jit(jax.vmap(lambda key: products(x, weight, outer, key, STATIC)[1:]))
  drawn = draw(jax.random.split(jax.random.key(0), 512))
  # What the mean must come to: all operands rounded but the gradient.
  exact_x = outer @ rounded(weight.T, rule="static_6", tiles=True).T
  columns = nvfp4.hadamard(jnp.asarray(rounded(x, rule="static_6"), jnp.float32).T)
  exact_weight = (
    np.asarray(nvfp4.hadamard(outer.T)) @ rounded(columns, rule="static_6").T
  )
  settings = dataclasses.replace(STATIC, stochastic=False)
  nearest = products(x, weight, outer, jax.random.key(0), settings)[1:]
  for found, exact, one in zip(drawn, (exact_x, exact_weight), nearest, strict=True):
    scale = np.linalg.norm(exact)
    single = np.linalg.norm(found[0] - exact) / scale
    mean = np.linalg.norm(np.mean(found, 0) - exact) / scale
    assert np.linalg.norm(one - exact) / scale < single < 0.25  # the price
    assert mean < single / 8  # noise alone would be single / 22
    assert (found[0] != found[1]).mean() > 0.9


def test_without_noise_the_key_does_not_matter():
  x, weight, outer = normal(128, 64), normal(96, 64, seed=1), normal(128, 96, seed=2)
  runs = [products(x, weight, outer, jax.random.key(i), NEAREST) for i in (0, 1)]
  for one, two in zip(*runs, strict=True):
    np.testing.assert_array_equal(one, two)


# ------------------------------------------------------------------ FP8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_fp8_the_forward_pass_alone_is_quantised(dtype):
  x, outer = (jnp.asarray(normal(3, 7, n, seed=n), dtype) for n in (32, 48))
  weight = jnp.asarray(normal(48, 32, seed=1), dtype)
  # A scale a row: large rows do not drown small ones.
  x, weight = (a * jnp.asarray(2.0 ** (jnp.arange(a.shape[-2]) - 3), dtype)[:, None]
               for a in (x, weight))  # fmt: skip

  @jax.jit
  def run(x, weight):
    y, backward = jax.vjp(
      lambda x, w: linear.matmul(x, FP8TrainingWeight(w)), x, weight
    )
    return y, *backward(outer)

  def numbers(a):
    return np.asarray(fp8.dequantise(fp8.quantise(a)), np.float64)

  float64 = functools.partial(np.asarray, dtype=np.float64)
  rows = numbers(x).reshape(21, 32)
  wanted = (
    (numbers(x) @ numbers(weight).T, x),
    (float64(outer) @ float64(weight), x),
    (float64(outer).reshape(21, 48).T @ rows, weight),
  )
  step = 2.0**-22 if dtype == "float32" else 2.0**-7
  for found, (want, like) in zip(run(x, weight), wanted, strict=True):
    assert found.dtype == like.dtype and found.shape == want.shape
    # Of sums, whose terms may cancel.
    np.testing.assert_allclose(
      float64(found), want, rtol=step, atol=step * np.abs(want).max()
    )
  assert np.abs(float64(run(x, weight)[0]) - float64(x) @ float64(weight).T).max() > 0


# ------------------------------------------------------------------ bad input
def test_refusals():
  with pytest.raises(ValueError, match="rule='best' is unknown"):
    TrainingSettings(gradient="best")
  with pytest.raises(ValueError, match="centre=-1 must not be negative; use 16"):
    TrainingSettings(centre=-1)
  layers = {"a": linear.Linear(32, 24, rngs=nnx.Rngs(0))}
  prepare = functools.partial(
    training.prepare_training, settings=NEAREST, key=jax.random.key(0)
  )
  with pytest.raises(ValueError, match="a has 24 outputs, which must be a multiple"):
    prepare(layers, ["a"])
  with pytest.raises(ValueError, match=r"\['b'\] matches no linear layer"):
    prepare(layers, ["b"])
  packed = weights.quantise_weights(layers, ["a"])
  with pytest.raises(ValueError, match="a is quantised already"):
    prepare(packed, ["a"])
