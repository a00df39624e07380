"""Attention in 8 bits: its numbers, what is asked of cuDNN, and where it is used."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import logging
from flax import nnx
from random_weights import normal, random_dit

from longlive_jax.generate import sampler
from longlive_jax.generate.cached_forward import cached_forward
from longlive_jax.generate.sampler import Sampling
from longlive_jax.kernels import launch
from longlive_jax.layers import fp8_attention, kv_cache, kv_slots, operand
from longlive_jax.layers.attention import attention
from longlive_jax.layers.fp8_attention import OUTPUT_SCALE
from longlive_jax.layers.fp8_attention import fp8_attention as attend
from longlive_jax.layers.kv_slots import KVFormat
from longlive_jax.layers.linear import Linear
from longlive_jax.models import dit
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows
from longlive_jax.quant.weights import W8A8

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


def qkv(dtype=jnp.bfloat16, queries=24, keys=72, d=32):
  shapes = (2, queries, 3, d), (2, keys, 3, d), (2, keys, 3, d)
  return [jnp.asarray(2 * normal(*s, seed=i), dtype) for i, s in enumerate(shapes)]


def exact(q, k, v) -> np.ndarray:
  """Attention of what the codes mean, in float64; the output is not rounded."""
  q, k, v = (np.asarray(fp8.cast(x), np.float64) for x in (q, k, v))
  logits = np.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_numbers(dtype):
  q, k, v = qkv(dtype)
  found = jax.jit(attend)(q, k, v)
  assert isinstance(found, Rows) and found.shape == q.shape and found.dtype == dtype
  assert found.array.scale.shape == (2, 24, 3, 1)
  want = exact(q, k, v)
  error = np.abs(np.asarray(found.numbers(), np.float64) - want)
  # The output's own rounding, and that of the weights, which averages out.
  size = np.abs(want).max()
  assert (error <= np.abs(want) * 2.0**-4 + size * 2.0**-5 + 2.0**-9).all()
  assert error.max() > size * 2.0**-8
  # Against the numbers before they were rounded.
  plain = np.asarray(attention(q, k, v), np.float64)
  assert np.linalg.norm(found.numbers() - plain) < 0.1 * np.linalg.norm(plain)


def test_codes_are_attended_as_they_are():
  """The codes that it would make itself."""
  numbers = qkv()
  want = jax.jit(attend)(*numbers)
  codes = [fp8.cast(x) for x in numbers]
  assert all(fp8.cast(x) is x for x in codes)
  found = jax.jit(lambda *a: attend(*a, dtype=jnp.bfloat16))(*codes)
  assert found.dtype == want.dtype == jnp.bfloat16
  for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_cast_saturates():
  x = jnp.asarray([449.0, 1e9, -1e9, 464, 2.0**-10, 2.0**-9, 17, 19, -0.0])
  want = [448, 448, -448, 448, 0, 2.0**-9, 16, 20, 0]
  np.testing.assert_array_equal(fp8.cast(x).astype(jnp.float32), want)
  assert np.isnan(fp8.cast(jnp.asarray([jnp.nan])).astype(jnp.float32))[0]


def test_what_is_asked_of_cudnn(monkeypatch):
  """A stand-in computes from the very parameters that cuDNN would get."""
  real = fp8_attention._entry()
  assert real is not None, f"jax {jax.__version__} has moved its private entry"
  private = fp8_attention._private()

  def cudnn(q, k, v, *, fp8_params, **settings):
    inspect.signature(real).bind(q, k, v, fp8_params=fp8_params, **settings)
    private.check_fp8_params(fp8_params)
    assert all(p.shape == (1, 1, 1, 1) for p in fp8_params.values())
    assert settings["use_fp8"] and settings["qkv_layout"] == "BTNH"
    assert {x.dtype for x in (q, k, v)} == {jnp.dtype(jnp.float8_e4m3fn)}
    p = {name: value.item() for name, value in fp8_params.items()}
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k) * p["descale_q"] * p["descale_k"]
    logits *= settings["scale"]
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    codes = fp8.cast(weights * p["scale_s"]).astype(jnp.float32)
    total = jnp.einsum("bnqk,bknd->bqnd", codes, v) * p["descale_s"] * p["descale_v"]
    out = total / jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
    assert p["descale_o"] * p["scale_o"] == 1
    return fp8.cast(out * p["scale_o"]), None, None

  monkeypatch.setattr(fp8_attention, "_entry", lambda: cudnn)
  args = qkv()
  found = fp8_attention._cudnn(*args, jnp.bfloat16)
  want = fp8_attention.reference(*args, jnp.bfloat16)
  assert found.dtype == want.dtype == jnp.bfloat16
  for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    assert np.mean(one != other) < 0.01  # sums in another order
    np.testing.assert_allclose(one, other, rtol=0.13, atol=2.0**-9)


def test_what_xla_gets(monkeypatch):
  """Lowered for a GPU that need not be there: one call, on codes as they lie."""
  private = fp8_attention._private()
  monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda _: False)
  q, k = (jax.ShapeDtypeStruct((1, s, 24, 128), jnp.bfloat16) for s in (7040, 28160))
  traced = jax.jit(lambda *a: attend(*a, implementation="cudnn")).trace(q, k, k)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  (call,) = [line for line in text.splitlines() if "fmhaSoftmaxF8" in line]
  operands, result = call.rsplit(" : (", 1)[1].split(") -> ")
  assert operands.split(", ") == [
    f"tensor<1x{s}x24x128xf8E4M3FN>" for s in (7040, 28160, 28160)
  ] + 6 * ["tensor<1x1x1x1xf32>"]
  assert "tensor<1x24x7040x128xf8E4M3FN>" in result


def h200():
  device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axes, abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def test_where_cudnn_cannot_it_says_so(monkeypatch):
  lines = []
  monkeypatch.setattr(
    logging, "log_first_n", lambda level, text, n, *args: lines.append((text % args, n))
  )
  if jax.default_backend() == "cpu":
    assert fp8_attention.default_implementation(24) == "jnp"
  with h200():
    assert fp8_attention.default_implementation(128) == "cudnn" and not lines
    assert fp8_attention.default_implementation(24) == "plain"
    monkeypatch.setattr(fp8_attention, "_private", lambda: None)
    assert fp8_attention.default_implementation(128) == "plain"
    monkeypatch.setattr(launch, "compute_capability", lambda: 80)
    assert fp8_attention.default_implementation(128) == "plain"
    q, k, v = qkv(jnp.float32)
    np.testing.assert_array_equal(
      attend(q, k, v), attention(q, k, v, implementation="blockwise")
    )
  reasons = ["head_dim=24", "no private cuDNN", "Hopper", "Hopper"]
  assert len(lines) == len(reasons) and {n for _, n in lines} == {1}
  for (text, _), reason in zip(lines, reasons, strict=True):
    assert reason in text and "attention is in 16 bits" in text


def test_what_it_refuses():
  q, k, v = qkv(jnp.float32)
  with pytest.raises(ValueError, match="implementation='x' is unknown; use 'cudnn'"):
    attend(q, k, v, implementation="x")
  with pytest.raises(NotImplementedError, match="use attention_format=''"):
    jax.make_jaxpr(jax.grad(lambda q: attend(q, k, v).numbers().sum()))(q)
  with pytest.raises(ValueError, match="attention_format='e5m2' is unknown; use ''"):
    Sampling(attention_format="e5m2")


def test_the_layer_behind_multiplies_the_codes():
  out = jax.jit(attend)(*qkv(jnp.float32)).reshape(2, 24, 96)
  layer = Linear(96, 16, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(operand.read_by(layer, out), out.numbers())
  weight = layer.weight.get_value()
  layer.weight = layer.weight.replace(W8A8(jax.jit(fp8.quantise)(weight)))
  assert operand.read_by(layer, out) is out
  numbers = np.asarray(out.array.codes, np.float64) / OUTPUT_SCALE
  want = numbers @ np.asarray(fp8.dequantise(layer.weight.get_value().weight)).T
  np.testing.assert_allclose(layer(out), want, atol=1e-5)


# ------------------------------------------------------------------ the cache
def test_slots_without_a_scale_are_read_as_stored():
  """Every code, through the dtype of the network and back."""
  empty = kv_slots.zeros(KVFormat("e4m3"), (1, 1, 2, 4, 2, 32), jnp.bfloat16, keys=True)
  assert empty.dtype == jnp.float8_e4m3fn and empty.nbytes == 512
  slots = jnp.asarray(CODES.reshape(1, 2, 2, 2, 32))
  for dtype in (jnp.bfloat16, jnp.float32):
    back = jax.jit(lambda s, dtype=dtype: fp8.cast(kv_slots.read(s, dtype)))(slots)
    finite = np.isfinite(CODES)
    found = np.asarray(back).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(found[finite], CODES.view(np.uint8)[finite])
  x = jnp.asarray(normal(1, 2, 2, 2, 32), jnp.bfloat16) * 300
  new = kv_slots.encode(empty[0], x)
  np.testing.assert_array_equal(new, fp8.cast(x))
  assert np.isfinite(np.asarray(new, np.float32)).all()
  np.testing.assert_array_equal(kv_slots.own(empty[0], x), x)


N, Y, X = 2, 4, 4
FORMAT = Sampling(
  frames_per_chunk=N, window_frames=2 * N, sink_frames=0, multi_shot_sink=False,
  steps=1, solver="euler", attention_format="fp8", kv_format="e4m3",
)  # fmt: skip


def test_full_windows_are_attended_in_eight_bits():
  """Others by length, as without; one program for both."""
  model = random_dit()
  config = model.config
  frames = jnp.arange(N, dtype=jnp.int32)[None]
  latents, text = normal(1, N, Y, X, config.in_channels), normal(1, 1, 8, config.dim)
  time = dit.time_features(np.full((1, N), 500.0), config.freq_dim)

  def forward(cache, frames, temporal, attention_format):
    placement = kv_cache.place(cache, frames)
    velocity, kv = cached_forward(
      model, cache, placement, latents, time, text, temporal,
      attention_format=attention_format, keep=True,
    )  # fmt: skip
    return velocity, kv_cache.commit(cache, placement, *kv)

  forward = jax.jit(forward, static_argnums=3)
  found = {}
  for name in ("", "fp8"):
    sampling = dataclasses.replace(FORMAT, attention_format=name)
    cache = sampler.init_cache(model, sampling, 1, Y, X)
    assert cache.k.dtype == jnp.float8_e4m3fn
    for chunk in range(3):
      now = frames + chunk * N
      shot = np.zeros(1, np.int32)
      temporal = sampler.chunk_temporal(config, sampling, np.asarray(now), shot)
      velocity, cache = forward(cache, now, temporal, name)
      found[name, chunk] = np.asarray(velocity)
  assert forward._cache_size() == 2  # one for each format, whatever the length
  np.testing.assert_allclose(found["fp8", 0], found["", 0], rtol=1e-5, atol=1e-5)
  for chunk in (1, 2):
    error = np.linalg.norm(found["fp8", chunk] - found["", chunk])
    size = np.linalg.norm(found["", chunk])
    assert 1e-4 * size < error < 0.05 * size


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kv_format", ["", "e4m3", "fp8", "nvfp4"])
def test_any_cache_and_relative_positions(kv_format, relative, monkeypatch):
  """Traced only: numbers are the business of the tests above."""
  read, reference = [], fp8_attention.reference

  def spy(q, k, v, dtype):
    read.append([x.dtype.name for x in (q, k, v)])
    return reference(q, k, v, dtype)

  monkeypatch.setattr(fp8_attention, "reference", spy)
  monkeypatch.setattr(fp8_attention, "default_implementation", lambda head_dim: "jnp")
  model = jax.eval_shape(random_dit)
  sampling = dataclasses.replace(FORMAT, kv_format=kv_format, relative_rope=relative)
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 1, Y, X))
  shape = (1, N, Y, X, model.config.in_channels)
  temporal = sampler.chunk_temporal(
    model.config, sampling, np.arange(N)[None], np.zeros(1, np.int32)
  )
  chunk = sampler.ChunkInputs(
    noise=np.zeros(shape, np.float32), text=np.zeros((1, 5, 24), np.float32),
    negative=None, frames=np.arange(N, dtype=np.int32)[None], temporal=temporal,
    cut=np.zeros(1, bool), known=np.zeros((1, N), bool),
    given=np.zeros(shape, np.float32),
  )  # fmt: skip
  latents, after = jax.eval_shape(
    lambda *a: sampler.denoise_chunk(*a, sampling), model, cache, chunk
  )
  assert latents.shape == shape
  assert jax.tree.structure(after) == jax.tree.structure(cache)
  for one, other in zip(*map(jax.tree.leaves, (after, cache)), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
  # Codes from where they are made; a window is moved as it is stored.
  whole = kv_format == "e4m3"
  want = [True, whole or relative, whole]
  assert read == len(read) * [["float8_e4m3fn" if w else "float32" for w in want]]
  assert len(read) >= 2
