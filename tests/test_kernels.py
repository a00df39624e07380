"""Every kernel against its jnp reference: in jnp, on Triton's interpreter, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_runs import CPU, compile_offline, compiled, expected, needs_gpu, on_gpu
from random_weights import normal

from longlive_jax.kernels import (
  launch,
  modulate_quantise,
  nvfp4_dequantise,
  nvfp4_matmul,
  nvfp4_quantise,
)
from longlive_jax.kernels.modulate_quantise import modulate_quantise as modulate
from longlive_jax.kernels.nvfp4_dequantise import dequantise
from longlive_jax.kernels.nvfp4_matmul import matmul_w4a4, matmul_w4a16
from longlive_jax.kernels.nvfp4_quantise import FRONTS, quantise
from longlive_jax.kernels.shapes import SIZES
from longlive_jax.layers.norm import layer_norm
from longlive_jax.quant import nvfp4
from longlive_jax.quant.nvfp4 import NVFP4Array

pytest_plugins = ["kernel_fixtures"]

TINY = SIZES["test"]
B5 = SIZES["ti2v-5b"]
def keys(dtype, scale: float = 1.0) -> jax.Array:
  """(frames, tokens, heads, head_dim) of unequal blocks, with zeros of both signs."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal(TINY.chunk_keys) * scale
  x *= np.exp(rng.normal(0, 2, (*TINY.chunk_keys[:-1], 1)))
  x[rng.random(x.shape) < 0.05] *= 0.0
  return jnp.asarray(x, dtype)


def blocks_of(array: NVFP4Array) -> tuple[np.ndarray, np.ndarray]:
  """Bytes (blocks, 8) and scales as bits (blocks,)."""
  scales = np.asarray(array.scales).view(np.uint8).reshape(-1)
  return np.asarray(array.codes).reshape(-1, 8), scales


def assert_same(got: NVFP4Array, want: NVFP4Array) -> None:
  """The same bits. Codes of blocks with scale NaN mean nothing."""
  np.testing.assert_array_equal(np.asarray(got.amax), np.asarray(want.amax))
  (codes, scales), (wanted_codes, wanted_scales) = blocks_of(got), blocks_of(want)
  np.testing.assert_array_equal(scales, wanted_scales)
  sure = scales != 0x7F
  np.testing.assert_array_equal(codes[sure], wanted_codes[sure])


# ------------------------------------------------------------------ quantise
PLAIN = dict(batch_axes=1, amax=None, front="none", mean=None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_codes_and_scales_are_those_of_the_codec(run, rule, dtype):
  x = keys(dtype)
  want = expected(nvfp4.quantise, x, rule=rule, batch_axes=1)
  assert_same(run(quantise, x, rule=rule, **PLAIN), want)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_any_magnitude(run, rule, scale):
  """1e-36 is below 2**-104: zeros."""
  x = keys(jnp.float32, scale)
  want = expected(nvfp4.quantise, x, rule=rule, batch_axes=1)
  assert_same(run(quantise, x, rule=rule, **PLAIN), want)


@pytest.mark.parametrize("rule", ["static_4", "mae"])
def test_special_numbers(run, rule):
  x = np.array(keys(jnp.float32))
  x[0, 0, 0, 0] = np.nan
  x[0, 1, 1, 3] = np.inf
  x[0, 2, 0, 17] = -np.inf
  x[0, 3, 0, 31] = 2.0**111
  x[0, 4, 2, 2] = 2.0**110  # the largest that counts
  x[1] = np.where(x[1] < 0, -0.0, 0.0)
  x = jnp.asarray(x)
  want = expected(nvfp4.quantise, x, rule=rule, batch_axes=1)
  got = run(quantise, x, rule=rule, **PLAIN)
  assert_same(got, want)
  assert np.sum(blocks_of(got)[1] == 0x7F) == 4
  assert not np.any(got.codes[1]) and not np.any(np.asarray(got.scales[1], np.float32))


@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_four_over_six_where_errors_are_equal_or_nearly_so(run, rule):
  """Of programs of 128 blocks some need exact errors in many blocks, some in none."""
  rng = np.random.default_rng(2)
  plain = rng.standard_normal((1280, 16), np.float32)
  alone = np.where(np.arange(16) == 3, plain, 0.0)
  equal = np.broadcast_to(plain[:, :1], plain.shape)
  grid = rng.choice([*nvfp4.E2M1, 4.5, 9.0], plain.shape) * plain[:, :1]
  tiny = plain * np.exp2(rng.integers(-26, -8, (1280, 1)))
  # Scales of one step, to which the maximum is about 8; scales of no step or of one.
  unit = plain / np.max(np.abs(plain), axis=1, keepdims=True) * 2.0**-9 * 6 / 256
  kinds = [plain, alone, equal, grid, tiny, 1.35 * unit, 0.4 * unit, 0 * plain]
  x = np.stack(kinds)[:, None]
  x[:, 0, 0, 0] = 6.0  # every kind of blocks has the same tensor scale
  x = jnp.asarray(x, jnp.float32)
  want = expected(nvfp4.quantise, x, rule=rule, batch_axes=1)
  assert_same(run(quantise, x, rule=rule, **PLAIN), want)


def test_what_is_larger_than_a_given_amax_is_cut_off(run):
  x = keys(jnp.bfloat16)
  amax = jnp.array([0.75, 100.0], jnp.float32)
  settings = {**PLAIN, "amax": amax, "rule": "mse"}
  want = expected(nvfp4.quantise, x, batch_axes=1, amax=amax)
  assert_same(run(quantise, x, **settings), want)


def test_an_amax_too_small_to_divide_by_counts_as_zero(run):
  x = keys(jnp.float32, 1e-37)
  settings = {**PLAIN, "amax": jnp.array([2.0**-120, 2.0**-110]), "rule": "static_6"}
  got = run(quantise, x, **settings)
  assert not np.any(got.codes) and not np.any(blocks_of(got)[1])
  assert_same(got, expected(nvfp4.quantise, x, batch_axes=1, rule="static_6"))


def test_one_row_and_no_batch(run):
  x = keys(jnp.float32).reshape(-1)
  settings = {**PLAIN, "batch_axes": 0, "rule": "mse"}
  assert_same(run(quantise, x, **settings), expected(nvfp4.quantise, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("front", FRONTS)
def test_fronts(run, front, dtype):
  # Small integers: sums are exact in any order.
  x = np.random.default_rng(1).integers(-40, 41, TINY.chunk_keys)
  x = jnp.asarray(x + 7 * (np.arange(TINY.head_dim) % 3), dtype)
  mean = jnp.mean(x.astype(jnp.float32), axis=1).astype(jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  if front == "token_mean":
    exact = exact - np.asarray(mean, np.float64)[:, None]
  elif front == "channel_mean":
    exact = exact - np.mean(exact, axis=-1, keepdims=True)
  elif front == "hadamard":
    blocks = exact.reshape(*exact.shape[:-1], -1, 16) @ nvfp4.hadamard_matrix()
    exact = blocks.reshape(exact.shape).astype(dtype)
  prepared = jnp.asarray(np.asarray(exact, np.float32))
  want = expected(nvfp4.quantise, prepared, batch_axes=1)
  got = run(
    quantise,
    x,
    rule="mse",
    batch_axes=1,
    amax=None,
    front=front,
    mean=mean if front == "token_mean" else None,
  )
  assert_same(got, want)


# ------------------------------------------------------------------ dequantise
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_byte_with_every_scale(run, dtype):
  scales = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
  array = NVFP4Array(
    jnp.asarray(np.tile(np.arange(256, dtype=np.uint8), (2, 128, 1))),
    jnp.asarray(np.tile(scales[:, None], (2, 1, 32))),
    jnp.array([0.3, 2.0**-100], jnp.float32),
    1536.0,
  )
  want = expected(nvfp4.dequantise, array, dtype=dtype)
  got = np.asarray(run(dequantise, array, dtype=jnp.dtype(dtype), mean=None))
  assert got.dtype == want.dtype == dtype
  assert np.sum(np.isnan(got.astype(np.float32))) == 2 * 512
  np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_window_of_frames_with_their_means(run, dtype):
  x = jnp.asarray(normal(2, *TINY.window_keys, seed=2))  # (b, f, p, n, d)
  mean = jnp.asarray(normal(2, TINY.window, TINY.heads, TINY.head_dim, seed=3))
  mean = mean.astype(jnp.bfloat16)
  x *= 1 + jnp.arange(TINY.window)[:, None, None, None]
  array = compiled(nvfp4.quantise, x, batch_axes=2)
  values = expected(nvfp4.dequantise, array)
  want = values + np.asarray(mean, np.float32)[:, :, None]
  got = np.asarray(run(dequantise, array, dtype=jnp.dtype(dtype), mean=mean))
  assert got.dtype == dtype
  # XLA may multiply and add with one rounding.
  got, want = got.astype(np.float64), want.astype(dtype).astype(np.float64)
  assert np.mean(got != want) < (1e-3 if dtype == jnp.bfloat16 else 0.5)
  np.testing.assert_allclose(got, want, rtol=jnp.finfo(dtype).eps, atol=1e-6)


# ------------------------------------------------------------------ products
def product(a, weight) -> np.ndarray:
  """a @ weight.T of what the codes mean, in float64."""
  a, weight = (
    np.asarray(nvfp4.dequantise(v) if isinstance(v, NVFP4Array) else v, np.float64)
    for v in (a, weight)
  )
  return a @ weight.T


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", TINY.rows)
def test_packed_weights(run, rows, dtype):
  n, k = TINY.weights["fc2"]
  weight = compiled(nvfp4.quantise, jnp.asarray(normal(n, k, seed=4)))
  x = jnp.asarray(normal(rows, k, seed=5), dtype)
  internal = dict(dtype=jnp.dtype(dtype), native=False)
  got = np.asarray(run(matmul_w4a16, x, weight, internal=internal))
  assert got.shape == (rows, n) and got.dtype == dtype
  tolerance = 2e-5 if dtype == jnp.float32 else 2.0**-8
  np.testing.assert_allclose(
    got.astype(np.float64), product(x, weight), rtol=tolerance, atol=2e-4
  )


def test_sums_over_parts_of_a_long_row(run):
  weight = compiled(nvfp4.quantise, jnp.asarray(normal(48, 1552, seed=6)))
  x = jnp.asarray(normal(2, 3, 1552, seed=7))
  call = nvfp4_matmul.matmul_call(x, weight, x.dtype, False)
  assert call.outputs[0].shape == (3, 6, 48)
  internal = dict(dtype=x.dtype, native=False)
  got = np.asarray(run(matmul_w4a16, x, weight, internal=internal))
  np.testing.assert_allclose(got, product(x, weight), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_both_operands_packed(request, run, rule):
  on_triton = request.node.callspec.params["run"] == "triton"
  if on_triton and launch.compute_capability() not in nvfp4_matmul.NATIVE:
    pytest.skip("this GPU has no 4-bit products")
  n, k = TINY.weights["fc1"]
  weight = compiled(nvfp4.quantise, jnp.asarray(normal(n, k, seed=8)), rule="static_4")
  x = jnp.asarray(normal(2, 21, k, seed=9)) * jnp.array([1, 50])[:, None, None]
  x = compiled(nvfp4.quantise, x, rule=rule, batch_axes=1)
  internal = dict(native=False)
  got = run(matmul_w4a4, x, weight, dtype=jnp.dtype(jnp.float32), internal=internal)
  np.testing.assert_allclose(got, product(x, weight), rtol=1e-5, atol=1e-3)


# ------------------------------------------------------------------ modulate, quantise
MODULATE = dict(eps=1e-6, rule="mse", batch_axes=1)


def modulated(x, scale, shift):
  """As in models/dit.py; not jitted, so every step is rounded."""
  with jax.default_device(CPU):
    x, scale, shift = jax.device_put((x, scale, shift), CPU)
    return layer_norm(x, 1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("given", [False, True])
def test_modulated_activations_in_bfloat16(run, given):
  # Integers, and as many of them as a power of two: statistics are exact.
  rng = np.random.default_rng(10)
  x = jnp.asarray(rng.integers(-9, 10, (2, 2, 5, 64)), jnp.bfloat16)
  scale, shift = jnp.asarray(rng.normal(size=(2, 2, 2, 1, 64)), jnp.bfloat16)
  h = modulated(x, scale, shift)
  amax = jnp.array([3.5, 4.0], jnp.float32) if given else None  # cuts off
  want = expected(nvfp4.quantise, h, batch_axes=1, amax=amax)
  assert_same(run(modulate, x, scale, shift, **MODULATE, amax=amax), want)


def test_modulated_activations_in_float32(run):
  dim = 3 * 16
  x = jnp.asarray(normal(1, 2, 9, dim, seed=11)) * 5 + 3
  scale, shift = jnp.asarray(normal(2, 1, 2, 1, dim, seed=12))
  h = modulated(x, scale, shift)
  got = run(modulate, x, scale, shift, **MODULATE, amax=None)
  np.testing.assert_allclose(got.amax, jnp.max(jnp.abs(h))[None], rtol=1e-6)
  # Statistics differ in their last bit, so a number near the middle of two codes may
  # get the other one.
  want = expected(nvfp4.quantise, h, batch_axes=1)
  values = expected(nvfp4.dequantise, jax.tree.map(jnp.asarray, got))
  other = np.abs(values - expected(nvfp4.dequantise, want)) > 1e-5
  assert np.mean(other) < 0.01
  np.testing.assert_allclose(values, h, atol=0.2 * np.max(np.abs(h)))


# ------------------------------------------------------------------ errors
X = jnp.ones((2, 32), jnp.float32)
Q = nvfp4.quantise(X)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: quantise(X, implementation="cuda"), "implementation='cuda'"),
    (lambda: quantise(X, rule="mode"), "rule='mode'"),
    (lambda: quantise(Q), "NVFP4Array already"),
    (lambda: quantise(X.astype(jnp.float16)), "float16 must be"),
    (lambda: quantise(X[:, :24]), "multiple of 16"),
    (lambda: quantise(X, batch_axes=2), "batch_axes=2"),
    (lambda: quantise(X, amax=jnp.ones(2)), "amax.shape"),
    (lambda: quantise(X, front="mean"), "front='mean'"),
    (lambda: quantise(X, front="token_mean"), "mean must fit"),
    (lambda: quantise(X, mean=X[0]), "mean must fit"),
    (lambda: quantise(X, front="token_mean", mean=X), "mean.shape"),
    (lambda: quantise(jnp.ones((2, 48)), front="channel_mean"), "power of two"),
    (lambda: dequantise(Q, dtype=jnp.float16), "dtype=float16"),
    (lambda: dequantise(Q, mean=X), "mean.shape"),
    (lambda: matmul_w4a16(X[:, :16], Q), "k=32"),
    (lambda: matmul_w4a16(X.astype(jnp.int8), Q), "int8 must be"),
    (lambda: matmul_w4a16(X, nvfp4.quantise(X, batch_axes=1)), "one tensor scale"),
    (lambda: modulate(X, X, X, eps=1e-6), "one row a frame"),
    (lambda: modulate(X[0], X[0], X[0], eps=1e-6), "tokens, n"),
    (lambda: modulate(X, X[:1], X[:1], eps=1e-6, rule="x"), "rule='x'"),
    (lambda: modulate(X, X[:1], X[:1], eps=1e-6, amax=X[0]), "amax.shape"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.skipif(on_gpu, reason="here it works")
def test_no_kernels_without_a_gpu():
  assert not launch.on_triton(None) and launch.compute_capability() == 0
  with pytest.raises(ValueError, match="use another implementation, as 'jnp'"):
    quantise(X, implementation="triton")
  with pytest.raises(ValueError, match="4-bit products"):
    matmul_w4a4(Q, Q, implementation="triton")


def described(kind: str):
  """A context in which programs are traced for a GPU that need not be there."""
  device = jax.sharding.AbstractDevice(kind, 148, "gpu")
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axes, abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def test_the_mesh_says_what_is_compiled_for():
  with described("NVIDIA B200"):
    assert launch.on_triton(None) and launch.compute_capability() == 100
  with described("NVIDIA H200"):
    assert launch.compute_capability() == 90
    with pytest.raises(ValueError, match="compute_capability=90"):
      matmul_w4a4(Q, Q, implementation="triton")
    np.testing.assert_array_equal(matmul_w4a4(Q, Q), 32 * np.ones((2, 2)))
  with described("NVIDIA X1"), pytest.raises(ValueError, match="'NVIDIA X1'"):
    launch.compute_capability()


def test_kernels_have_no_derivative():
  def codes(x):
    return quantise(x, amax=jnp.float32(1), implementation="triton").scales

  with pytest.raises(NotImplementedError, match="implementation='jnp'"):
    jax.jvp(codes, (X,), (X,))


@needs_gpu
def test_a_kernel_under_vmap_runs_for_each_element():
  x = jnp.stack([X, 2 * X])
  got = jax.vmap(functools.partial(quantise, implementation="triton"))(x)
  want = expected(nvfp4.quantise, x, batch_axes=1)
  assert_same(got, want)


# ------------------------------------------------------------------ GPUs elsewhere
S = jax.ShapeDtypeStruct


def packed(*shape: int, batch_axes: int = 0) -> NVFP4Array:
  *lead, n = shape
  return NVFP4Array(
    S((*lead, n // 2), jnp.uint8),
    S((*lead, n // 16), jnp.float8_e4m3fn),
    S(shape[:batch_axes], jnp.float32),
    1536.0,
  )


def calls_at_real_size() -> dict[str, launch.Call]:
  bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
  frames, _, dim = B5.activations
  x, row = S(B5.activations, bf16), S((frames, 1, dim), bf16)
  k = S(B5.chunk_keys, bf16)
  mean = S((frames, B5.heads, B5.head_dim), bf16)
  amax = S((frames,), f32)
  window = packed(*B5.window_keys, batch_axes=1)
  window_mean = S((B5.window, B5.heads, B5.head_dim), bf16)
  weight = packed(*B5.weights["fc1"])
  quantised = nvfp4_quantise.encode_call
  return {
    "quantise": quantised(x, 0, "none", None, S((), f32), "static_6"),
    "quantise-keys": quantised(k, 1, "token_mean", mean, amax, "mse"),
    "quantise-channels": quantised(k, 1, "channel_mean", None, amax, "abs_max"),
    "quantise-hadamard": quantised(x, 0, "hadamard", None, S((), f32), "mae"),
    "largest": nvfp4_quantise.largest_call(x, 0, "none", None),
    "dequantise": nvfp4_dequantise.dequantise_call(window, bf16, None),
    "dequantise-mean": nvfp4_dequantise.dequantise_call(window, f32, window_mean),
    "w4a16-1": nvfp4_matmul.matmul_call(S((1, dim), bf16), weight, bf16, False),
    "w4a16-256": nvfp4_matmul.matmul_call(S((256, dim), bf16), weight, bf16, False),
    "modulate": modulate_quantise.encode_call(x, row, row, 1e-6, S((), f32), "mse"),
    "modulate-largest": modulate_quantise.largest_call(x, row, row, 1e-6),
  }


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", list(calls_at_real_size()))
def test_kernels_compile_for_gpus_that_are_not_here(
  tmp_path, monkeypatch, name, capability
):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  ptx = compile_offline(calls_at_real_size()[name], capability).asm["ptx"]
  assert f".target sm_{capability}" in ptx
  # Full bandwidth needs 16 bytes a load or store; the codec no fused operations.
  assert ".v4.b32" in ptx
  assert "mul.f32" not in ptx and "add.f32" not in ptx


def test_a_blackwell_gpu_multiplies_4_bits(tmp_path, monkeypatch):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  frames, tokens, dim = B5.activations
  x, weight = packed(frames * tokens, dim), packed(*B5.weights["fc1"])
  call = nvfp4_matmul.matmul_call(x, weight, jnp.dtype(jnp.bfloat16), True)
  ptx = compile_offline(call, 100).asm["ptx"]
  assert "tcgen05.mma" in ptx and "mxf4nvf4.block_scale" in ptx
