"""FP8 rows made by what produces them: every kernel against its reference and codec."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from kernel_runs import compile_offline, expected
from packed_weights import quantise as quantised_network
from random_weights import normal, random_dit

from longlive_jax.kernels import fp8_gelu, fp8_modulate, fp8_residual, fp8_rows
from longlive_jax.kernels.fp8_gelu import gelu_rows
from longlive_jax.kernels.fp8_modulate import modulate_rows
from longlive_jax.kernels.fp8_residual import residual_rows
from longlive_jax.kernels.fp8_rows import quantise_rows
from longlive_jax.kernels.shapes import SIZES
from longlive_jax.layers import operand
from longlive_jax.layers.linear import Linear, add_bias
from longlive_jax.layers.norm import AffineNorm, LayerNorm, modulate, modulation
from longlive_jax.models import dit
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows
from longlive_jax.quant.weights import W8A8

pytest_plugins = ["kernel_fixtures"]

S = jax.ShapeDtypeStruct
B5 = SIZES["ti2v-5b"]
quantise = jax.jit(fp8.quantise)
BOTH = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])


def assert_same(got: Rows, x) -> None:
  """The bits that the codec makes of numbers x."""
  want = expected(fp8.quantise, jnp.asarray(x))
  np.testing.assert_array_equal(np.asarray(got.array.scale), want.scale)
  codes = np.asarray(got.array.codes)
  assert codes.dtype == ml_dtypes.float8_e4m3fn
  np.testing.assert_array_equal(codes.view(np.uint8), want.codes.view(np.uint8))


def numbers(rows: Rows) -> np.ndarray:
  codes, scale = (np.asarray(a, np.float64) for a in jax.tree.leaves(rows))
  return codes * scale


# ------------------------------------------------------------------ rows
@BOTH
@pytest.mark.parametrize("n", [80, 256])
def test_rows_have_the_bits_of_the_codec(run, dtype, n):
  """Of any magnitude, at the middles between codes, and what is not finite."""
  powers = np.random.default_rng(1).uniform(-30, 30, (3, 9, 1))
  x = normal(3, 9, n) * 10.0**powers
  grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
  grid = grid.astype(np.float32)
  x[0, 0, :76] = ((grid[1:] + grid[:-1]) / 2)[-76:]
  x[0, 0, -1] = 448  # a scale of 1
  x[0, 1], x[0, 2, 3], x[0, 3] = 0.0, -0.0, 1e-36
  x[1, 0, 5], x[1, 1, 6], x[1, 2, 7] = np.nan, np.inf, -np.inf
  x = jnp.asarray(x, dtype)
  got = run(quantise_rows, x)
  assert got.dtype == dtype and got.shape == x.shape
  assert_same(got, x)
  assert np.isnan(numbers(got)).sum() == 3


# ------------------------------------------------------------------ modulate
def test_modulated_rows_in_bfloat16(run):
  # Integers, and as many of them as a power of two: statistics are exact.
  rng = np.random.default_rng(10)
  x = jnp.asarray(rng.integers(-9, 10, (2, 2, 5, 64)), jnp.bfloat16)
  scale, shift = jnp.asarray(rng.normal(size=(2, 2, 2, 1, 64)), jnp.bfloat16)
  got = run(modulate_rows, x, 1 + scale, shift, eps=1e-6)
  # Not jitted, so every step is rounded, as in a block of the DiT.
  assert_same(got, modulate(x, scale, shift, 1e-6))


def test_modulated_rows_in_float32_of_a_width_that_fills_no_tile(run):
  x = jnp.asarray(normal(3, 5, 72, seed=11)) * 5 + 3
  scale, shift = jnp.asarray(normal(2, 3, 1, 72, seed=12))
  got = run(modulate_rows, x, 1 + scale, shift, eps=1e-6)
  want = jax.jit(modulate, static_argnums=3)(x, scale, shift, 1e-6)
  # Statistics differ in their last bit, so a number near the middle of two codes may
  # get the other one.
  other = numbers(got) - numbers(Rows(quantise(want), want.dtype))
  assert np.mean(np.abs(other) > 1e-5) < 0.01
  largest = np.abs(want).max(axis=-1, keepdims=True)
  assert (np.abs(numbers(got) - want) <= np.abs(want) * 0.0626 + largest / 1e5).all()


def test_one_row_for_all_tokens(run):
  x = jnp.asarray(normal(2, 3, 5, 64), jnp.bfloat16)
  factor, shift = jnp.asarray(normal(2, 64, seed=1), jnp.bfloat16)
  got = run(modulate_rows, x, factor, shift, eps=1e-6)
  rows = (jnp.broadcast_to(row, (2, 3, 1, 64)) for row in (factor, shift))
  want = run(modulate_rows, x, *rows, eps=1e-6)
  np.testing.assert_array_equal(numbers(got), numbers(want))


# ------------------------------------------------------------------ residual sums
def end_of_layer(x, sums, scale, columns, bias, gate):
  """x + gate * layer, as layers apart compute it; not jitted, every step is rounded."""
  h = (sums.astype(jnp.float32) * scale * columns).astype(x.dtype)
  h = add_bias(h, bias)
  return x + (h if gate is None else gate * h)


# Behind self-attention, behind cross-attention, and what else there may be.
FLAVOURS = pytest.mark.parametrize(
  "gated, shared", [(True, True), (False, False), (True, False), (False, True)]
)


@FLAVOURS
def test_a_sum_and_its_norm_in_bfloat16(run, gated, shared):
  """The bits of layers apart: x is integers, whose statistics are exact."""
  rng = np.random.default_rng(20)

  def integers(*shape):
    return jnp.asarray(rng.integers(-9, 10, shape), jnp.bfloat16)

  frames = (2, 3)
  scale = jnp.asarray(2.0 ** rng.integers(-3, 1, (*frames, 5, 1)), jnp.float32)
  columns = jnp.asarray(2.0 ** rng.integers(-3, 1, 64), jnp.float32)
  x, sums = integers(*frames, 5, 64), 64 * integers(*frames, 5, 64)
  gate = integers(*frames, 1, 64) if gated else None
  layer = sums, scale, columns, integers(64), gate
  row = (64,) if shared else (*frames, 1, 64)
  norm = AffineNorm(*jnp.asarray(rng.normal(size=(2, *row)), jnp.bfloat16), 1e-6)
  new, rows = run(residual_rows, x, *layer, norm.factor, norm.shift, eps=norm.eps)
  want = end_of_layer(x, *layer)
  np.testing.assert_array_equal(new, want)
  assert new.dtype == jnp.bfloat16 and rows.shape == x.shape
  assert np.abs(want).max() > 256  # where bfloat16 rounds integers
  assert_same(rows, norm(want))


@BOTH
@FLAVOURS
def test_a_sum_of_any_numbers(run, dtype, gated, shared):
  """Each of its steps is rounded; and its norm, of a width that fills no tile."""
  rng = np.random.default_rng(21)
  x, sums = jnp.asarray(normal(2, 3, 7, 72, seed=22), dtype)
  scale = jnp.asarray(rng.uniform(0.1, 0.3, (3, 7, 1)), jnp.float32)
  columns = jnp.asarray(rng.uniform(1, 3, 72), jnp.float32)
  gate = jnp.asarray(normal(3, 1, 72), dtype) if gated else None
  layer = sums, scale, columns, jnp.asarray(normal(72, seed=23), dtype), gate
  row = (72,) if shared else (3, 1, 72)
  norm = AffineNorm(*jnp.asarray(normal(2, *row, seed=24), dtype), 1e-6)
  new, rows = run(residual_rows, x, *layer, norm.factor, norm.shift, eps=norm.eps)
  # XLA fuses products with sums in float32, where no bits are promised.
  near = 0 if dtype == jnp.bfloat16 else 1e-6
  new = jnp.asarray(new)
  want = end_of_layer(x, *layer)
  np.testing.assert_allclose(*np.float64([new, want]), rtol=near, atol=near)
  # The kernel of the norm alone has the same bits of what it reads.
  want = run(modulate_rows, new, norm.factor, norm.shift, eps=norm.eps)
  np.testing.assert_array_equal(numbers(rows), numbers(want))


# ------------------------------------------------------------------ GELU
@BOTH
def test_the_end_of_a_product_and_gelu(run, dtype):
  rng = np.random.default_rng(3)
  sums = jnp.asarray(rng.normal(size=(2, 17, 208)) * 1000, dtype)
  sums = sums.at[0, 0, :3].set(jnp.array([3e5, -3e5, 0], dtype))  # far into both tails
  scale = jnp.asarray(rng.uniform(0.01, 0.03, (2, 17, 1)), jnp.float32)
  columns = jnp.asarray(rng.uniform(0.05, 0.3, 208), jnp.float32)
  bias = jnp.asarray(rng.normal(size=208), dtype)
  got = run(gelu_rows, sums, scale, columns, bias)
  want = expected(gelu_rows, sums, scale, columns, bias, implementation="jnp")
  differ = np.asarray(got.array.codes != want.array.codes)
  assert np.mean(differ) < 1e-3  # exponentials differ in their last bit
  np.testing.assert_allclose(got.array.scale, want.array.scale, rtol=1e-6)
  scaled = np.asarray(sums, np.float64) * np.asarray(scale, np.float64) * columns
  h = scaled + np.asarray(bias, np.float64)
  u = np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)
  exact = 0.5 * h * (1 + np.tanh(u))
  error = np.abs(numbers(got) - exact)
  # Half a step of 3 bits or of the smallest code; float32 before.
  bound = np.abs(exact) * 0.0626 + want.array.scale * 2.0**-10 * 1.01
  bound += (np.abs(scaled) + np.abs(np.asarray(bias, np.float64))) * 1e-6
  assert (error <= bound).all() and (error / bound).max() > 0.9


# ------------------------------------------------------------------ operands
def linear(n_in: int, n_out: int, seed: int, packed: bool, dtype=jnp.float32) -> Linear:
  layer = Linear(n_in, n_out, dtype=dtype, rngs=nnx.Rngs(seed))
  layer.bias[...] = jnp.asarray(normal(n_out, seed=seed), dtype)
  if packed:
    layer.weight = layer.weight.replace(W8A8(quantise(layer.weight.get_value())))
  return layer


multiply = jax.jit(lambda layer, x: layer(x))


def test_readers_choose_the_form():
  x = jnp.asarray(normal(2, 3, 5, 32))
  scale, shift = jnp.asarray(normal(2, 2, 3, 1, 32, seed=1))
  eight, plain = linear(32, 16, 1, True), linear(32, 16, 2, False)
  want = modulate(x, scale, shift, 1e-6)
  norm = modulation(scale, shift, 1e-6)
  for readers in ([plain, plain], [eight, plain], [plain, eight]):
    np.testing.assert_array_equal(operand.normed(x, norm, readers), want)
  rows = jax.jit(operand.normed)(x, norm, [eight, eight])
  assert isinstance(rows, Rows) and rows.shape == x.shape
  np.testing.assert_allclose(rows.numbers(), want, rtol=0.07, atol=0.01)
  # Codes that there are stay; who reads numbers gets numbers.
  assert operand.read_by(eight, rows) is rows
  np.testing.assert_array_equal(operand.read_by(plain, rows), rows.numbers())
  assert operand.read_by(plain, x) is x
  assert_same(jax.jit(operand.read_by)(eight, x), x)
  apart = multiply(eight, rows.reshape(6, 5, 32)).reshape(2, 3, 5, 16)
  np.testing.assert_array_equal(multiply(eight, rows), apart)
  given = jax.jit(operand.read_by)(eight, x)
  np.testing.assert_array_equal(multiply(eight, given), multiply(eight, x))


def test_a_norm_with_weights():
  x, norm = jnp.asarray(normal(2, 3, 64, seed=4)), LayerNorm(64, eps=1e-6)
  norm.weight[...], norm.bias[...] = normal(2, 64, seed=5)
  rows = jax.jit(operand.normed)(x, norm.affine(), [linear(64, 16, 1, True)])
  np.testing.assert_allclose(rows.numbers(), norm(x), rtol=0.07, atol=0.01)
  assert rows.shape == x.shape and rows.array.scale.shape == (2, 3, 1)
  plain = operand.normed(x, norm.affine(), [linear(64, 16, 1, False)])
  np.testing.assert_array_equal(plain, norm(x))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("codes", [True, False])
def test_between_two_parts_of_a_block(codes, packed, gated):
  """Whatever the weights: x + gate * layer(h), and what makes codes of its norm."""
  x, h = jnp.asarray(normal(2, 3, 5, 32, seed=7)), jnp.asarray(normal(2, 15, 48))
  h = Rows(quantise(h), h.dtype) if codes else h
  gate = jnp.asarray(normal(2, 3, 1, 32, seed=8)) if gated else None
  norm = modulation(*jnp.asarray(normal(2, 2, 3, 1, 32, seed=9)), 1e-6)
  layer, reader = linear(48, 32, 1, packed[0]), linear(32, 16, 2, packed[1])
  found, read = operand.added(x, layer, h, gate, norm, [reader])
  change = layer(operand.read_by(layer, h)).reshape(x.shape)
  want = x + (change if gate is None else gate * change)
  np.testing.assert_array_equal(found, want)
  if packed[1]:
    assert_same(read, norm(want))
    # Which kernel it was that shows where none has a derivative.
    kernel = "fp8_residual" if packed[0] else "fp8_modulate"
    with pytest.raises(NotImplementedError, match=f"kernel='{kernel}'"):
      jax.jvp(lambda x: operand.added(x, layer, h, gate, norm, [reader]), [x], [x])
  else:
    np.testing.assert_array_equal(read, norm(want))


@pytest.mark.parametrize("activation", [operand.gelu, jax.nn.silu])
@pytest.mark.parametrize("packed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_between_two_layers(activation, packed):
  x = jnp.asarray(normal(2, 5, 32, seed=6))
  first, second = linear(32, 48, 1, packed[0]), linear(48, 16, 2, packed[1])
  found = jax.jit(operand.activated, static_argnums=2)(first, x, activation, second)
  fused = packed == (1, 1) and activation is operand.gelu
  assert isinstance(found, Rows) == fused
  want = multiply(second, activation(multiply(first, x)))
  # Fused or not, the same numbers but for GELU's last bits.
  tolerance = 0.02 if fused else 1e-6
  np.testing.assert_allclose(multiply(second, found), want, atol=tolerance)


def test_sums_are_written_in_the_dtype_of_activations():
  """float32 sums would cost as many bytes as all operands together."""
  x, weight = jnp.asarray(normal(4, 3, 64), jnp.bfloat16), quantise(normal(8, 64))
  rows = Rows(quantise(x), x.dtype)
  assert fp8.sums(rows, weight).dtype == jnp.bfloat16
  codes, weights = (np.asarray(a.codes, np.float64) for a in (rows.array, weight))
  exact = codes @ weights.T
  np.testing.assert_array_equal(fp8.sums(rows, weight), exact.astype(jnp.bfloat16))
  wide = fp8.product(rows, weight, jnp.float32)
  assert wide.dtype == jnp.bfloat16
  exact = numbers(rows) @ (weights * np.asarray(weight.scale, np.float64)).T
  np.testing.assert_array_equal(wide, exact.astype(np.float32).astype(jnp.bfloat16))
  np.testing.assert_allclose(fp8.product(rows, weight), wide, rtol=2.0**-7)


def test_what_xla_gets():
  """A product of two matrices of codes, into 16 bits: that is one of cuBLAS's."""
  weight = fp8.FP8Array(S((14336, 3072), jnp.float8_e4m3fn), S((14336, 1), jnp.float32))
  codes = fp8.FP8Array(
    S((1, 7040, 3072), jnp.float8_e4m3fn), S((1, 7040, 1), jnp.float32)
  )
  traced = jax.jit(fp8.product).trace(Rows(codes, jnp.dtype(jnp.bfloat16)), weight)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  (line,) = [line for line in text.splitlines() if "dot_general" in line]
  assert line.strip().endswith(
    "(tensor<7040x3072xf8E4M3FN>, tensor<14336x3072xf8E4M3FN>) -> "
    "tensor<7040x14336xbf16>"
  )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what kernels hide")
def test_a_block_quantises_each_operand_once():
  """q, k and v read the same codes."""
  model = jax.eval_shape(lambda: quantised_network(random_dit(), "fp8"))
  block = jax.tree.map(lambda a: S(a.shape[1:], a.dtype), model.blocks)

  def forward(block, x, table, text):
    def attend(layer, q, k, v):
      return q.numbers() + k.numbers() + v, None

    return block(x, table, text, attend, None)[0]

  x, table, text = normal(1, 2, 4, 64), normal(1, 2, 6, 64), normal(1, 1, 8, 64)
  made = str(jax.make_jaxpr(forward)(block, x, table, text))
  # q k v; o; cross q; cross k and v, one each; cross o; fc1; fc2.
  quantised = re.findall("new_dtype=float8_e4m3fn|triton_kernel_call", made)
  assert len(quantised) == 8
  assert isinstance(model.blocks.self_attn.q.weight.get_value(), W8A8)


def test_a_block_has_the_bits_of_its_parts_apart():
  model = quantised_network(random_dit(dtype=jnp.bfloat16), "fp8")
  block = jax.tree.map(lambda a: a[0], model.blocks)
  x, table, text = (
    jnp.asarray(normal(*shape, seed=i), jnp.bfloat16)
    for i, shape in enumerate([(2, 2, 6, 64), (2, 2, 6, 64), (2, 2, 8, 64)])
  )

  def attend(layer, q, k, v):
    return q.numbers() + k.numbers() + v, None

  def plus(x, layer, h, gate):
    return x + gate * layer(operand.read_by(layer, h)).reshape(x.shape)

  def apart(block, x, table, text):
    own, cross = block.self_attn, block.cross_attn
    shift1, scale1, gate1, shift2, scale2, gate2 = block.rows(table)
    h = modulation(scale1, shift1, block.eps)
    h = operand.normed(x, h, [own.q, own.k, own.v])
    x = plus(x, own.o, block.attend_self(h, attend, None)[0], gate1)
    h = operand.normed(x, block.norm3.affine(), [cross.q])
    x = plus(x, cross.o, block.attend_text(h, text), jnp.ones_like(gate1))
    h = modulation(scale2, shift2, block.eps)
    return x + gate2 * block.ffn(operand.normed(x, h, [block.ffn.fc1]))

  def whole(block, x, table, text):
    return block(x, table, text, attend, None)[0]

  # Else XLA leaves out roundings of what it fuses.
  options = {"xla_allow_excess_precision": False}
  found, want = (
    jax.jit(function, compiler_options=options)(block, x, table, text)
    for function in (whole, apart)
  )
  np.testing.assert_array_equal(found, want)


def test_no_gradient_of_codes():
  """Which would be wrong in silence."""
  model = jax.eval_shape(lambda: quantised_network(random_dit(), "fp8"))

  def loss(latents, model):
    time = dit.time_features(np.full((1, 2), 500.0), 32)
    text = jnp.zeros((1, 5, 24))
    return dit.bidirectional_forward(model, latents, time, text).sum()

  with pytest.raises(NotImplementedError, match="before it is quantised"):
    jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 2, 4, 4, 8)), model)


# ------------------------------------------------------------------ errors
X = jnp.ones((2, 3, 32))
ONE = jnp.ones((2, 1, 32))


def residual(**wrong):
  fitting = {
    "x": X, "sums": X, "scale": X[..., :1], "columns": X[0, 0], "bias": X[0, 0],
    "gate": ONE, "factor": ONE, "shift": ONE,
  }  # fmt: skip
  return residual_rows(**{**fitting, **wrong}, eps=1e-6)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: quantise_rows(X, implementation="cuda"), "implementation='cuda'"),
    (lambda: quantise_rows(Rows(quantise(X), X.dtype)), "x is quantised already"),
    (lambda: quantise_rows(X.astype(jnp.float16)), "float16 must be"),
    (lambda: quantise_rows(jnp.ones((2, 16385))), "n from 1 to 16384"),
    (lambda: modulate_rows(X, ONE[0], ONE, eps=1e-6), "factor=.* one row a frame"),
    (lambda: modulate_rows(X, ONE, ONE.astype(jnp.bfloat16), eps=1e-6), "shift=.*bfl"),
    (lambda: modulate_rows(X, X[0, 0], ONE, eps=1e-6), r"shift=.* \(32,\) float32"),
    (lambda: residual(sums=X[0]), r"sums=\(3, 32\) float32 must be \(2, 3, 32\)"),
    (lambda: residual(scale=X), r"scale=.* must be \(2, 3, 1\) float32"),
    (lambda: residual(columns=X), r"columns=.* must be \(32,\) float32"),
    (lambda: residual(bias=X), r"bias=.* must be \(32,\) float32"),
    (lambda: residual(gate=X[0, 0]), r"gate=.* must be \(2, 1, 32\) float32"),
    (lambda: residual(factor=ONE[0]), r"factor=.* must be \(2, 1, 32\) float32"),
    (lambda: residual(shift=X[0, 0]), r"shift=.* must be \(2, 1, 32\) float32"),
    (lambda: residual(x=X.astype(jnp.float16)), "float16 must be"),
    (lambda: gelu_rows(X, X, X[0, 0], X[0, 0]), r"scale=\(2, 3, 32\)"),
    (lambda: gelu_rows(X, X[..., :1], X, X[0, 0]), r"columns=.* must be \(32,\)"),
    (lambda: gelu_rows(X, X[..., :1], X[0, 0], X), r"bias=.* must be \(32,\)"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# ------------------------------------------------------------------ GPUs elsewhere


def calls_at_real_size():
  bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
  frames, tokens, dim = B5.activations
  x, row = S(B5.activations, bf16), S((frames, 1, dim), bf16)
  one, rows, wide = S((dim,), bf16), frames * tokens, B5.ffn_dim
  layer = x, S((frames, tokens, 1), f32), S((dim,), f32), one

  def residual(*gate_and_norm):
    return fp8_residual.residual_call((x, *layer, *gate_and_norm), 1e-6)

  return {
    "rows": fp8_rows.rows_call(x),
    "modulate": fp8_modulate.modulate_call(x, row, row, 1e-6),
    "residual_gated": residual(row, one, one),
    "residual": residual(None, row, row),
    "gelu": fp8_gelu.gelu_call(
      S((rows, wide), bf16), S((rows, 1), f32), S((wide,), f32), S((wide,), bf16)
    ),
  }


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", list(calls_at_real_size()))
def test_kernels_compile_for_gpus_that_are_not_here(
  tmp_path, monkeypatch, name, capability
):
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
  call = calls_at_real_size()[name]
  ptx = compile_offline(call, capability).asm["ptx"]
  assert f".target sm_{capability}" in ptx
  # Codes are rounded by the GPU's own instruction, and 16 bytes go at a time.
  assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
  assert "ld.global" in ptx and ".v4.b32" in ptx
  # Rounded as the reference rounds: no product is fused with a sum.
  assert "mul.f32" not in ptx and "add.f32" not in ptx
  # A row in registers, no second pass over memory: the only loop is over rows.
  assert ptx.count("Loop Header") == (call.constants["ROWS"] > 1)
  assert ".local" not in ptx
