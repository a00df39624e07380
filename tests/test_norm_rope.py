"""Norm and rotation of queries and keys in one pass: kernel, reference and layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_runs import compile_offline
from random_weights import normal

from longlive_jax.kernels import launch
from longlive_jax.kernels.norm_rope import norm_rope, norm_rope_call
from longlive_jax.kernels.rows import Walk
from longlive_jax.kernels.shapes import SIZES
from longlive_jax.layers import rope
from longlive_jax.layers.norm import RMSNorm
from longlive_jax.quant import fp8

pytest_plugins = ["kernel_fixtures"]

S = jax.ShapeDtypeStruct
B5 = SIZES["ti2v-5b"]
HEADS, D, EPS = 3, 32, 1e-6
N = HEADS * D  # fills no tile


def turns(*shape: int) -> tuple[jax.Array, jax.Array]:
  angles = normal(*shape, D // 2, seed=9) * 3
  return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def vectors(dtype) -> tuple[jax.Array, jax.Array]:
  """Bias and weight."""
  bias, weight = normal(2, N, seed=1)
  return jnp.asarray(bias, dtype), jnp.asarray(1 + 0.3 * weight, dtype)


def exact(x, bias, weight, cos=None, sin=None, scale=None, columns=None) -> np.ndarray:
  """In float64, nothing rounded, rotation by complex numbers."""
  x, bias, weight = (np.asarray(a, np.float64) for a in (x, bias, weight))
  if scale is not None:
    x = x * np.asarray(scale, np.float64) * np.asarray(columns, np.float64)
  h = x + bias
  h = h / np.sqrt((h * h).mean(-1, keepdims=True) + EPS) * weight
  if cos is None:
    return h
  h = h.reshape(*h.shape[:-1], HEADS, D)
  turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
  z = (h[..., 0::2] + 1j * h[..., 1::2]) * turn[..., None, :]
  return np.stack([z.real, z.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_numbers_in_float32(run, scaled, rotated):
  """7 rows: the last program has one row less than it walks over."""
  x = jnp.asarray(normal(7, N)) * (100 if scaled else 3)
  rng = np.random.default_rng(2)
  scale = jnp.asarray(rng.uniform(0.01, 0.1, (7, 1)), jnp.float32)
  columns = jnp.asarray(rng.uniform(0.05, 2, N), jnp.float32)
  arrays = (
    x, *vectors(jnp.float32), *(turns(7) if rotated else (None, None)),
    *((scale, columns) if scaled else (None, None)),
  )  # fmt: skip
  dtype = jnp.dtype(jnp.float32)
  found = np.asarray(run(norm_rope, *arrays, eps=EPS, dtype=dtype))
  assert found.dtype == np.float32 and found.shape == (7, N)
  np.testing.assert_allclose(found, exact(*arrays), rtol=1e-5, atol=3e-6)


def test_bfloat16_is_rounded_where_the_layers_round(run):
  rng = np.random.default_rng(3)
  # Integers: the sum with the bias, which is not rounded here, is exact in bfloat16.
  x, bias = jnp.asarray(rng.integers(-60, 60, (2, 2, 5, N)), jnp.bfloat16)
  bias, (_, weight) = bias[0, 0], vectors(jnp.bfloat16)
  rotation = rope.Rotation(*turns(2, 5))
  norm = RMSNorm(N, eps=EPS, dtype=jnp.bfloat16)
  norm.weight[...] = weight
  # Not jitted, so every step is rounded.
  h = norm(x + bias).reshape(2, 5, HEADS, D)
  want = rope.rotate(h, rotation).reshape(x.shape)
  arrays = x, bias, weight, *rotation
  found = run(norm_rope, *arrays, eps=EPS, dtype=x.dtype)
  found, want = (np.asarray(a, np.float32) for a in (found, want))
  assert np.mean(found != want) < 0.01  # statistics differ in their last bit
  np.testing.assert_allclose(found, want, rtol=2.0**-7, atol=2.0**-9)
  # Codes are those of the very numbers.
  codes = run(norm_rope, *arrays, eps=EPS, dtype=jnp.dtype(jnp.float8_e4m3fn))
  np.testing.assert_array_equal(
    np.asarray(codes).view(np.uint8),
    np.asarray(fp8.cast(jnp.asarray(found))).view(np.uint8),
  )


def test_the_gradient_is_that_of_the_reference():
  found = jax.jit(jax.grad(launch.with_gradient_of(lambda x, y: x * x, lambda x, y: x)))
  assert found(3.0, None) == 6
  x, (bias, weight), rotation = normal(7, N), vectors(jnp.float32), turns(7)

  def by_layers(x, bias, weight):
    norm = RMSNorm(N, eps=EPS)
    norm.weight[...] = weight
    h = norm(x + bias).reshape(1, 7, HEADS, D)
    return jnp.sum(jnp.sin(rope.rotate(h, rope.Rotation(*(r[None] for r in rotation)))))

  def fused(*arrays):
    return jnp.sum(jnp.sin(norm_rope(*arrays, *rotation, eps=EPS)))

  arrays = jnp.asarray(x), bias, weight
  want = jax.jit(jax.grad(by_layers, (0, 1, 2)))(*arrays)
  found = jax.jit(jax.grad(fused, (0, 1, 2)))(*arrays)
  for one, other in zip(found, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


X, ROW, ONE = jnp.ones((4, 64)), jnp.ones(64), jnp.ones((4, 1))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: norm_rope(X, ROW, ROW, eps=EPS, implementation="x"), "tion='x' is"),
    (lambda: norm_rope(X.astype(jnp.int8), ROW, ROW, eps=EPS), "int8 must be"),
    (lambda: norm_rope(X, ROW[:3], ROW, eps=EPS), r"bias=\(3,\) .* must be \(64,\)"),
    (lambda: norm_rope(X, ROW, ROW.astype(jnp.bfloat16), eps=EPS), "weight=.* bfl"),
    (lambda: norm_rope(X, ROW, ROW, X[:, :16], eps=EPS), "cos, sin: one of them"),
    (lambda: norm_rope(X, ROW, ROW, X[:, :24], X[:, :24], eps=EPS), "half of a head"),
    (lambda: norm_rope(X, ROW, ROW, X[:2, :16], X[:, :16], eps=EPS), r"cos=\(2, 16\)"),
    (lambda: norm_rope(X, ROW, ROW, scale=ONE, eps=EPS), "scale, columns: one of them"),
    (lambda: norm_rope(X, ROW, ROW, scale=X, columns=ROW, eps=EPS), r"scale=\(4, 64\)"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_it_compiles_for_gpus_that_are_not_here(
  tmp_path, monkeypatch, dtype, capability
):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
  rows, n, row = B5.frames * B5.tokens, B5.dim, S((B5.dim,), bf16)
  turn = S((rows, B5.head_dim // 2), f32)
  arrays = S((rows, n), bf16), row, row, turn, turn, S((rows, 1), f32), S((n,), f32)
  compiled = compile_offline(norm_rope_call(arrays, EPS, jnp.dtype(dtype)), capability)
  ptx = compiled.asm["ptx"]
  assert f".target sm_{capability}" in ptx and ".v4.b32" in ptx
  assert "mul.f32" not in ptx and "add.f32" not in ptx  # as the reference rounds
  assert ".local" not in ptx
  # A pair of channels is in one thread: only the sum over a row goes between threads.
  assert compiled.metadata.shared <= 1024


def test_how_many_warps_share_a_row():
  """Those whose 16-byte loads divide it, within what registers hold."""
  widths = {3072: 4, 14336: 8, 1536: 2, 8960: 8, 256: 1, 96: 1, 16384: 8, 80: 1}
  assert {n: Walk().warps(n) for n in widths} == widths
  assert Walk(num_warps=2).warps(3072) == 2
  assert Walk(rows=4).programs(7) == 2
