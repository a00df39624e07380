"""FP8: the codec against NumPy, products, weights of a network, slots of the cache."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packed_weights import quantise as quantised_network
from packed_weights import same
from random_weights import normal, random_dit

from configs.generate import get_config
from launch import generate
from longlive_jax.checkpoint import quantised, store
from longlive_jax.generate import networks, resuming
from longlive_jax.generate.precision import Precision
from longlive_jax.layers import kv_slots, linear
from longlive_jax.layers.kv_slots import KVFormat
from longlive_jax.models import dit
from longlive_jax.quant import exact, fp8, weights
from longlive_jax.quant.fp8 import FP8Array
from longlive_jax.quant.weights import W8A8
from longlive_jax.train import state

E4M3 = ml_dtypes.float8_e4m3fn
CODES = np.arange(256, dtype=np.uint8).view(E4M3)
quantise = jax.jit(fp8.quantise, static_argnames="batch_axes")
matmul = jax.jit(linear.matmul)


def bits(array) -> np.ndarray:
  array = np.asarray(array)
  return array.view(f"u{array.dtype.itemsize}")


def assert_same(a: FP8Array, b: FP8Array) -> None:
  for left, right in ((a.codes, b.codes), (a.scale, b.scale)):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(bits(left), bits(right))


def oracle(x: np.ndarray, axes: tuple[int, ...] = (-1,)) -> FP8Array:
  """The contract in NumPy, float32 throughout."""
  x = np.asarray(x, np.float32)
  finite = np.isfinite(x)
  x = np.where(finite, x, np.float32(0))
  amax = np.abs(x).max(axes, keepdims=True)
  amax = np.where(amax < 2.0**-104, np.float32(448), amax)
  inverse = np.float32(448) / amax
  codes = np.clip(x * inverse, -448, 448).astype(E4M3)
  codes = np.where(finite, codes, np.array(np.nan, E4M3))
  return FP8Array(codes, amax / np.float32(448))


def float64(array: FP8Array) -> np.ndarray:
  return np.asarray(array.codes, np.float64) * np.asarray(array.scale, np.float64)


# ------------------------------------------------------------------ the codec
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_rounding_is_to_nearest_even_and_saturates(wrap):
  """At every number of the format, between every two, and beyond the last."""
  grid = np.sort(CODES[np.isfinite(CODES)].astype(np.float32))
  middles = (grid[1:] + grid[:-1]) / 2
  x = np.concatenate(
    [grid, middles, *(np.nextafter(middles, np.float32(s)) for s in (-1e9, 1e9))]
  )
  found = np.asarray(wrap(exact.e4m3)(x))
  np.testing.assert_array_equal(bits(found), bits(x.astype(E4M3).astype(np.float32)))
  beyond = np.float32([448.1, 464, 465, 1e30, np.inf])
  assert (np.asarray(wrap(exact.e4m3)(beyond)) == 448).all()
  assert (np.asarray(wrap(exact.e4m3)(-beyond)) == -448).all()
  assert np.isnan(exact.e4m3(np.float32(np.nan)))


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**40])
def test_all_256_codes_come_back(scale):
  """NaN has two; numbers have one each, zeros of either sign among them."""
  x = CODES.astype(np.float32) * np.float32(scale)
  array = quantise(x)
  assert array.scale.shape == (1,) and array.scale[0] == scale
  back = np.asarray(fp8.dequantise(array))
  np.testing.assert_array_equal(back, x)
  finite = np.isfinite(CODES)
  assert finite.sum() == 254
  np.testing.assert_array_equal(bits(array.codes)[finite], bits(CODES)[finite])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decades", [(0, 0), (-30, 30)], ids=str)
def test_codes_and_scales_are_those_of_numpy(dtype, decades):
  """One scale a row, whatever the rows' magnitudes; jitted or not, the same bits."""
  powers = np.random.default_rng(1).uniform(*decades, (7, 33, 1))
  x = jnp.asarray(normal(7, 33, 80) * 10.0**powers, dtype)
  want = oracle(x)
  assert want.scale.shape == (7, 33, 1)
  assert_same(quantise(x), want)
  assert_same(fp8.quantise(x), want)
  array = quantise(x)
  np.testing.assert_array_equal(
    fp8.dequantise(array), want.codes.astype(np.float32) * want.scale
  )
  # Within half a step of 3 bits, or of the smallest number.
  error = np.abs(float64(array) - np.asarray(x, np.float64))
  bound = np.abs(np.asarray(x, np.float64)) * 2.0**-4 + want.scale * 2.0**-10
  assert (error <= bound * (1 + 2.0**-20)).all()
  assert np.asarray(error / bound).max() > 0.9


def test_quantised_and_read_in_one_program():
  """Not what XLA makes of a cast to float8 and back, which it may drop."""
  x = normal(64, 64)
  both = jax.jit(lambda x: fp8.dequantise(fp8.quantise(x)))(x)
  np.testing.assert_array_equal(both, fp8.dequantise(quantise(x)))
  assert (np.asarray(both) != x).any()


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_scales_of_the_first_axes(axes):
  x = normal(2, 3, 4, 5) * np.float32([1, 50, 1e-3])[:, None, None]
  array = quantise(x, batch_axes=axes)
  assert array.shape == x.shape and array.ndim == 4
  assert array.scale.shape == (*x.shape[:axes], *[1] * (4 - axes))
  assert_same(array, oracle(x, tuple(range(axes, 4))))
  assert array.nbytes == x.size + 4 * array.scale.size
  # Every leaf has the leading axes.
  if axes:
    one = jax.tree.map(lambda leaf: leaf[1], array)
    assert_same(one, quantise(x[1], batch_axes=axes - 1))


def test_zeros_and_tiny_numbers():
  x = np.zeros((4, 8), np.float32)
  x[1] = -0.0
  x[2, 3] = 2.0**-105
  x[3, 3] = 2.0**-104
  array = quantise(x)
  np.testing.assert_array_equal(array.scale[:3, 0], 1)
  assert not np.asarray(fp8.dequantise(array))[:3].any()
  assert np.signbit(np.asarray(array.codes)[1]).all()
  np.testing.assert_array_equal(fp8.dequantise(array)[3], x[3])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_reads_as_nan_alone(bad):
  x = normal(3, 32)
  x[1, 5] = bad
  array = quantise(x)
  assert_same(array, oracle(x))
  found = np.asarray(fp8.dequantise(array))
  assert np.isnan(found[1, 5]) and np.isnan(found).sum() == 1
  np.testing.assert_allclose(found[0], x[0], rtol=0.07, atol=1e-2)
  weight = quantise(normal(4, 32, seed=1))
  rows = np.isnan(matmul(x, W8A8(weight))).all(axis=1)
  assert rows.tolist() == [False, True, False]


def test_the_largest_float32_number():
  x = np.float32([[3.4e38, -3.4e38, 1e38, 0]])
  np.testing.assert_allclose(fp8.dequantise(quantise(x)), x, rtol=0.07)


def test_what_the_codec_refuses():
  x = normal(2, 16)
  with pytest.raises(ValueError, match="x is an FP8Array already; dequantise it"):
    fp8.quantise(quantise(x))
  for axes in (2, -1):
    with pytest.raises(ValueError, match=f"batch_axes={axes} must leave .* to 1"):
      fp8.quantise(x, batch_axes=axes)


# ------------------------------------------------------------------ products
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-15, 1.0, 1e12])
def test_the_product_is_that_of_the_rounded_numbers(magnitude, dtype):
  tokens = np.float32(magnitude) * np.float32([1, 100, 1e-3, 1, 7])[:, None]
  x = jnp.asarray(normal(2, 5, 96) * tokens, dtype)
  outputs = np.float32([1, 30, 1e-2, 1, 1, 1, 1])[:, None]
  weight = quantise(normal(7, 96, seed=1) * np.float32(magnitude) * outputs)
  found = matmul(x, W8A8(weight))
  assert found.shape == (2, 5, 7) and found.dtype == dtype
  want = float64(oracle(x)) @ float64(weight).T
  # Of each output's own scale: no token or output hides behind a larger one.
  size = np.abs(float64(oracle(x))) @ np.abs(float64(weight)).T
  error = np.abs(np.asarray(found, np.float64) - want) / size
  assert error.max() < (2.0**-8 if dtype == jnp.bfloat16 else 1e-6)
  exact_product = np.asarray(x, np.float64) @ float64(weight).T
  assert 1e-3 < (np.abs(want - exact_product) / size).max() < 2.0**-4


def test_tokens_do_not_see_each_other():
  x, weight = normal(4, 32), W8A8(quantise(normal(16, 32, seed=1)))
  other = x * np.float32([1, 7, 0.3, 1e6])[:, None]
  np.testing.assert_array_equal(matmul(x, weight)[0], matmul(other, weight)[0])
  assert matmul(x[0], weight).shape == (16,)


def test_float_activations_with_rounded_weights():
  x, weight = jnp.asarray(normal(2, 5, 32)), quantise(normal(16, 32, seed=1))
  np.testing.assert_allclose(matmul(x, weight), x @ float64(weight).T, atol=1e-5)
  assert matmul(x.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [lambda w: w, W8A8])
def test_the_gradient_of_activations_is_that_of_the_rounded_weights(kind):
  x, weight = jnp.asarray(normal(2, 3, 32)), quantise(normal(16, 32, seed=1))
  outer = normal(2, 3, 16, seed=2)
  gradient = jax.jit(jax.grad(lambda x: jnp.vdot(outer, matmul(x, kind(weight)))))(x)
  np.testing.assert_allclose(gradient, outer @ float64(weight), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ networks
@jax.jit
def forward(model: dit.CausalDiT) -> jax.Array:
  latents, text = normal(2, 4, 4, 4, 8), normal(2, 5, 24, seed=1)
  time = dit.time_features(np.full((2, 4), 500.0), 32)
  return dit.bidirectional_forward(model, latents, time, text)


def test_a_network_in_eight_bits():
  model = random_dit()
  packed = {mode: quantised_network(model, mode) for mode in weights.FP8_MODES}
  value = packed["fp8"].blocks.ffn.fc1.weight.get_value()
  plain = model.blocks.ffn.fc1.weight.get_value()
  assert isinstance(value, W8A8)
  assert_same(value.weight, oracle(plain))  # stacked: layers and rows of their own
  assert value.weight.scale.shape == (*plain.shape[:-1], 1)
  assert_same(packed["w8a16"].blocks.ffn.fc1.weight.get_value(), value.weight)
  want = np.asarray(forward(model))
  errors = [
    np.linalg.norm(forward(network) - want) / np.linalg.norm(want)
    for network in (packed["w8a16"], packed["fp8"])
  ]
  assert 1e-3 < errors[0] < errors[1] < 0.05
  cast = state.cast(packed["fp8"], jnp.bfloat16)
  assert same(cast.blocks.ffn.fc1.weight, packed["fp8"].blocks.ffn.fc1.weight)
  with pytest.raises(ValueError, match=r"blocks/.* is quantised already"):
    weights.quantise_weights(packed["fp8"])


def test_bytes_at_the_sizes_of_the_large_model():
  config = dit.SIZES["ti2v-5b"]
  model = store.abstract_network("dit", config, jnp.bfloat16)
  quantise_all = functools.partial(weights.quantise_weights, mode="fp8")
  found = weights.weight_bytes(jax.eval_shape(quantise_all, model))
  dim, ffn = config.dim, config.ffn_dim
  numbers, rows = 8 * dim * dim + 2 * dim * ffn, 9 * dim + ffn
  assert found["float8_e4m3fn"] == config.layers * (numbers + 4 * rows)
  assert list(found) == ["float8_e4m3fn", "bfloat16"]


# ------------------------------------------------------------------ checkpoints
@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  path = tmp_path_factory.mktemp("plain") / "dit"
  store.save_network(path, random_dit(dtype=jnp.bfloat16))
  return path


@pytest.mark.parametrize("mode", weights.FP8_MODES)
def test_quantised_while_it_is_loaded(plain, mode, monkeypatch):
  wanted = quantised_network(store.load_dit(plain), mode)

  def load(*_):
    raise AssertionError("the plain network was loaded")

  monkeypatch.setattr(store, "load_network", load)
  source = networks.find("dit", "test", plain, precision=Precision(mode))
  found = networks.load(source, "bfloat16")
  assert same(found, wanted)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_edges_and_random_weights(plain):
  wanted = Precision("fp8", plain_steps=(0,))
  found, drawn = (
    networks.load(networks.find("dit", "test", path, precision=wanted), "bfloat16")
    for path in (plain, "random")
  )
  assert jax.tree.structure(drawn) == jax.tree.structure(found)
  for one, other in zip(*map(jax.tree.leaves, (drawn, found)), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    numbers = np.asarray(one, np.float32)
    assert np.isfinite(numbers).all() and numbers.any()
  codes = drawn.models[1].blocks.ffn.fc1.weight.get_value().weight.codes
  assert len(np.unique(bits(codes))) == 128  # nothing multiplies faster than real ones


def test_eight_bits_are_not_stored(plain, tmp_path):
  model = store.load_dit(plain)
  for mode in weights.FP8_MODES:
    packed = quantised_network(model, mode)
    message = f"mode='{mode}' is not stored: FP8"
    with pytest.raises(ValueError, match=message):
      quantised.save_network(tmp_path / "x", packed, rule="mse")
    with pytest.raises(ValueError, match="the network is quantised; use"):
      store.save_network(tmp_path / "x", packed)
    with pytest.raises(ValueError, match=message):
      quantised.quantise_checkpoint(plain, tmp_path / "x", mode=mode)
  quantised.quantise_checkpoint(plain, tmp_path / "q")
  with pytest.raises(ValueError, match="mode='fp8' is not stored"):
    quantised.load_network(tmp_path / "q", "dit", mode="fp8")
  with pytest.raises(ValueError, match=r"precision='fp8' cannot be had of dit .*/q"):
    networks.find("dit", "test", tmp_path / "q", precision=Precision("fp8"))
  assert [path.name for path in tmp_path.iterdir()] == ["q"]


# ------------------------------------------------------------------ slots
@pytest.mark.parametrize("keys", [True, False])
def test_slots_have_a_scale_for_every_frame_and_sample(keys):
  layers, b, slots, p, n, d = 2, 3, 4, 5, 2, 24  # no multiple of 16 is needed
  empty = kv_slots.zeros(
    KVFormat("fp8"), (layers, b, slots, p, n, d), jnp.bfloat16, keys=keys
  )
  assert empty.scale.shape == (layers, b, slots, 1, 1, 1)
  assert not np.asarray(kv_slots.read(empty, jnp.float32)).any()
  x = normal(b, 2, p, n, d) * np.float32([1, 1000])[:, None, None, None]
  new = jax.jit(kv_slots.encode)(jax.tree.map(lambda leaf: leaf[0], empty), x)
  assert_same(new, oracle(x, (2, 3, 4)))
  assert jax.tree.structure(new) == jax.tree.structure(empty)
  assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [
    leaf.dtype for leaf in jax.tree.leaves(empty)
  ]
  read = jax.jit(kv_slots.read, static_argnums=1)(new, jnp.bfloat16)
  np.testing.assert_array_equal(read, fp8.dequantise(new).astype(jnp.bfloat16))
  np.testing.assert_allclose(read[:, 1], x[:, 1], rtol=0.07, atol=1)
  np.testing.assert_array_equal(kv_slots.own(new, x), x)


# ------------------------------------------------------------------ a video
def test_from_start_to_end(tmp_path):
  """Weights, activations and cache in 8 bits; saved, resumed, and the same again."""
  config = get_config("toy,fp8,kv=fp8,random")
  config.update(
    size="test", vae="test", text="test", height=32, width=64, frames_per_chunk=2,
    window_frames=4, sink_frames=2, multi_shot_sink=False, steps=1, solver="euler",
    decode_frames=2, cache_dir=str(tmp_path / "cache"),
  )  # fmt: skip
  assert config.guidance != 1 and config.relative_rope
  states = str(tmp_path / "states")

  def go(name, **options):
    options = generate.Options(output=str(tmp_path / name), **options)
    result = generate.run(config, options)
    assert not result["error"]
    return result

  straight = go("out", prompt=("a",), chunks=2, save_state=states, save_every=1)
  names = {part: set(straight["bytes"][part]) for part in ("transformer", "cache")}
  assert names == {
    "transformer": {"float8_e4m3fn", "float32"}, "cache": {"float8_e4m3fn"}
  }  # fmt: skip
  # Keys and values of 2 layers, 4 frames of 2 tokens, 2 rows of guidance; 64 numbers a
  # token, and a scale a layer, row and frame.
  assert straight["bytes"]["cache"]["float8_e4m3fn"] == 2 * 2 * 4 * 2 * (2 * 64 + 4)
  again = go("rest", resume=states, rewind_to=1, save_state=str(tmp_path / "again"))
  saved, resumed = (store.load(result["state"]) for result in (straight, again))
  assert saved.keys() == resumed.keys() and saved["cache.k.codes"].dtype == E4M3
  for name, value in saved.items():
    assert np.asarray(value).tobytes() == np.asarray(resumed[name]).tobytes(), name
  assert np.isfinite(saved["cache.k.scale"]).all()
  for other in ("nvfp4", ""):
    changed = {**config.to_dict(), "kv_format": other}
    with pytest.raises(ValueError, match=f"kv_format='{other}' cannot be set with"):
      resuming.check_resumed(changed, config.to_dict())
