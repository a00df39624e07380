"""Causal convolutions of FP8 codes: kernel, reference, and sums in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_runs import compile_offline
from random_weights import normal

from longlive_jax.kernels import fp8_conv
from longlive_jax.kernels.fp8_conv import causal_convolve

pytest_plugins = ["kernel_fixtures"]

S = jax.ShapeDtypeStruct
F8 = jnp.dtype(jnp.float8_e4m3fn)


def codes(*shape: int, seed: int) -> jax.Array:
  return jnp.asarray(normal(*shape, seed=seed), F8)


def exact(x, kernel, scale, sides) -> np.ndarray:
  """Tap by tap in float64."""
  x, kernel = (np.asarray(a).astype(np.float64) for a in (x, kernel))
  _, ky, kx, kt, _ = kernel.shape
  padded = np.pad(x, [(n, n) for n in (0, 0, *sides, 0)])
  t, rows, columns = np.subtract(padded.shape[1:4], (kt - 1, ky - 1, kx - 1))
  total = 0.0
  for i, j, k in itertools.product(range(ky), range(kx), range(kt)):
    part = padded[:, k : k + t, i : i + rows, j : j + columns]
    total = total + part @ kernel[:, i, j, k].T
  return total * np.asarray(scale, np.float64)


@pytest.mark.parametrize(
  ("shape", "outputs", "taps", "sides"),
  [
    # Two videos; a tile of pixels with rows beyond the picture, outputs that fill none.
    ((2, 4, 3, 5, 128), 24, (3, 3, 3), (1, 1)),
    ((1, 3, 4, 40, 256), 16, (3, 3, 3), (1, 1)),  # two tiles of pixels and of channels
    ((1, 2, 3, 3, 128), 16, (1, 3, 2), (0, 1)),
    # Rows, columns, or both lie beside the picture already; again more than a tile.
    ((1, 4, 5, 50, 128), 16, (3, 3, 3), (0, 1)),
    ((2, 3, 4, 6, 128), 16, (3, 3, 3), (1, 0)),
    ((1, 3, 4, 5, 128), 16, (3, 3, 3), (0, 0)),
  ],
)
def test_sums_over_all_taps(run, shape, outputs, taps, sides):
  x = codes(*shape, seed=1)
  kernel = codes(outputs, *taps, shape[-1], seed=2)
  scale = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, outputs), jnp.float32)
  found = run(causal_convolve, x, kernel, scale, dtype=jnp.float32, sides=sides)
  found, want = np.asarray(found), exact(x, kernel, scale, sides)
  assert found.shape == want.shape
  # A GPU's tensor cores keep about 14 bits of sums of FP8 products: of 6,912 of them
  # 6e-3 was seen. A tap that is missing is 10 times that.
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_by_default_the_picture_keeps_its_size():
  x, kernel = codes(1, 3, 4, 5, 128, seed=1), codes(8, 3, 1, 3, 128, seed=2)
  convolve = functools.partial(causal_convolve, x, kernel, jnp.ones(8))
  found = convolve(dtype=jnp.float32)
  np.testing.assert_array_equal(found, convolve(dtype=jnp.float32, sides=(1, 0)))
  assert found.shape == (1, 1, 4, 5, 8)


@pytest.mark.parametrize("capability", [90, 100])
def test_it_compiles_for_gpus_that_are_not_here(tmp_path, monkeypatch, capability):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  inputs = S((1, 6, 352, 640, 256), F8), S((256, 3, 3, 3, 256), F8)
  scale = S((256,), jnp.dtype(jnp.float32))
  call = fp8_conv.conv_call(*inputs, scale, jnp.dtype(jnp.bfloat16), (1, 1))
  ptx = compile_offline(call, capability).asm["ptx"]
  product = "wgmma.mma_async" if capability == 90 else "tcgen05.mma"
  assert product in ptx and "cp.async" in ptx
  assert ".local" not in ptx and ptx.count("Loop Header") == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"codes": jnp.zeros((1, 3, 2, 2, 128))}, "codes=float32.* must be float8_e4m3fn"),
    ({"codes": jnp.zeros((1, 3, 2, 2, 64), F8)}, "do not fit"),
    ({"codes": jnp.zeros((1, 2, 2, 2, 128), F8)}, "at least as many frames"),
    ({"kernel": jnp.zeros((8, 2, 3, 3, 128), F8)}, "odd sides"),
    ({"scale": jnp.ones(4)}, r"scale=float32\(4,\) must be float32 \(8,\)"),
    (
      {"codes": jnp.zeros((1, 3, 2, 2, 64), F8), "implementation": "triton",
       "kernel": jnp.zeros((8, 3, 3, 3, 64), F8)},
      "must have a multiple of 128 inputs for Triton",
    ),
    ({"implementation": "cudnn"}, "implementation='cudnn' is unknown"),
  ],
)
def test_bad_input(change, message):
  good = {
    "codes": jnp.zeros((1, 3, 2, 2, 128), F8),
    "kernel": jnp.zeros((8, 3, 3, 3, 128), F8),
    "scale": jnp.ones(8),
    "dtype": jnp.float32,
  }
  with pytest.raises(ValueError, match=message):
    causal_convolve(**{**good, **change})
