"""Quantised weights: products, conversion of networks, bytes, refusals."""

import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import normal, random_dit

from longlive_jax.checkpoint import lora, store
from longlive_jax.layers import linear
from longlive_jax.layers.lora import LoraWeight
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import nvfp4, training, weights
from longlive_jax.quant.nvfp4 import NVFP4Array
from longlive_jax.quant.product import product
from longlive_jax.quant.weights import W4A4, native_product
from longlive_jax.train import state

GOLDEN = Path(__file__).parent / "golden" / "nvfp4"
IN_BLOCKS = {
  *(f"blocks/{a}_attn/{name}" for a in ("self", "cross") for name in "qkvo"),
  "blocks/ffn/fc1",
  "blocks/ffn/fc2",
}
quantise = jax.jit(
  nvfp4.quantise, static_argnames=("rule", "tiles", "batch_axes", "reference")
)
dequantise = jax.jit(nvfp4.dequantise)
multiply = jax.jit(product)
matmul = jax.jit(linear.matmul)


def float64(array: NVFP4Array) -> np.ndarray:
  return np.asarray(dequantise(array), np.float64)


# ------------------------------------------------------------------ products
@pytest.mark.parametrize(
  ("shape", "gpu", "way"),
  [
    ((2, 32, 16), True, "packed"),  # 64 rows
    ((65, 16), True, "dequantised"),
    ((64, 16), False, "dequantised"),
  ],
)
def test_few_rows_on_a_gpu_read_packed_weights(monkeypatch, shape, gpu, way):
  taken = []

  def packed(x, weight):
    taken.append("packed")
    return jnp.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)

  def dequantised(weight, dtype):
    taken.append("dequantised")
    return jnp.zeros(weight.shape, dtype)

  weight = jax.eval_shape(quantise, jax.ShapeDtypeStruct((48, 16), jnp.float32))
  monkeypatch.setattr(linear.launch, "on_triton", lambda implementation: gpu)
  monkeypatch.setattr(linear.weights, "packed_product", packed)
  monkeypatch.setattr(linear, "dequantise", dequantised)
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  found = jax.eval_shape(linear.matmul, x, weight)
  assert (found.shape, found.dtype) == ((*shape[:-1], 48), jnp.bfloat16)
  assert taken == [way]


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_the_product_is_that_of_the_dequantised_numbers(rule, magnitude):
  a = quantise(normal(2, 5, 96) * np.float32(magnitude), rule=rule, batch_axes=1)
  b = quantise(normal(7, 96, seed=1), rule="static_4")
  found = multiply(a, b)
  assert found.shape == (2, 5, 7) and found.dtype == jnp.float32
  exact = float64(a) @ float64(b).T
  error = np.abs(found - exact).max() / np.abs(exact).max()
  assert error < 4e-7  # float32 operands would give the same, a bfloat16 sum 1e-3
  np.testing.assert_array_equal(found, product(a, b))


def test_the_native_product_takes_tensor_scales_in_and_out_alike():
  """On a CPU the kernel's reference stands in; a tensor scale a video all the same."""
  a = quantise(normal(2, 5, 96), batch_axes=1)
  b = quantise(normal(7, 96, seed=1))
  want = product(a, b)
  np.testing.assert_allclose(native_product(a, b), want, rtol=1e-5, atol=1e-5)
  x = jnp.asarray(normal(3, 5, 96))
  plain, native = (matmul(x, W4A4(b, "mse", native=flag)) for flag in (False, True))
  np.testing.assert_allclose(native, plain, rtol=1e-5, atol=1e-5)


def test_tiny_tensor_scales_do_not_vanish_before_their_sum():
  a, b = (quantise(normal(3, 32, seed=i) * np.float32(1e-18)) for i in (0, 1))
  exact = float64(a) @ float64(b).T
  np.testing.assert_allclose(product(a, b), exact, rtol=1e-5, atol=1e-38)


def test_the_product_of_numbers_out_of_range_is_nan():
  a, b = normal(3, 32), normal(4, 32, seed=1)
  a[1, 20] = np.inf
  found = np.isnan(multiply(quantise(a), quantise(b)))
  np.testing.assert_array_equal(found, np.arange(3)[:, None].repeat(4, 1) == 1)


def test_w4a4_as_the_reference_computes_it():
  golden = {
    n: jnp.asarray(a) for n, a in np.load(GOLDEN / "w4a4_linear_mse.npz").items()
  }
  x, weight, bias = (golden[n].astype(jnp.bfloat16) for n in ("x", "weight", "bias"))
  packed = quantise(weight, reference=True)
  rows = multiply(quantise(x.reshape(-1, x.shape[-1]), reference=True), packed)
  np.testing.assert_allclose(rows, golden["y_nobias_float32"], rtol=1e-5, atol=1e-6)
  y = linear.add_bias(matmul(x, W4A4(packed, "mse", per_sample=False)), bias)
  assert y.dtype == jnp.bfloat16
  # One unit in the last place of bfloat16 where the float32 sum is near a tie.
  np.testing.assert_allclose(y.astype(jnp.float32), golden["y"], rtol=2**-7)
  assert (y.astype(jnp.float32) == golden["y"]).mean() > 0.99


@pytest.mark.parametrize(
  ("dtype", "rule", "tiles"),
  [(jnp.float32, "static_4", True), (jnp.bfloat16, "mse", False)],
)
def test_packed_and_fake_weights_agree_bit_for_bit(dtype, rule, tiles):
  x = jnp.asarray(normal(2, 33, 64), dtype)  # more than linear.FEW_ROWS
  weight = jnp.asarray(normal(48, 64, seed=1), dtype)
  packed = quantise(weight, rule=rule, tiles=tiles)
  fake = jax.jit(functools.partial(nvfp4.fake_quantise, rule=rule, tiles=tiles))(weight)
  np.testing.assert_array_equal(matmul(x, packed), matmul(x, fake))
  # Quantised activations: what training does is what inference does.
  settings = training.TrainingSettings("abs_max", rule, tiles=tiles)
  trained = training.TrainingWeight(weight, jax.random.key(0), settings)
  packed = W4A4(packed, "abs_max", per_sample=False)
  np.testing.assert_array_equal(matmul(x, packed), matmul(x, trained))


def test_a_video_of_a_batch_does_not_change_another():
  x = normal(3, 4, 5, 32)  # (b, f, p, in)
  packed = quantise(normal(16, 32, seed=1))
  other = x * np.float32([1, 7, 0.3])[:, None, None, None]
  alone, together = (W4A4(packed, "mse", per_sample=s) for s in (True, False))
  np.testing.assert_array_equal(matmul(x, alone)[0], matmul(other, alone)[0])
  np.testing.assert_array_equal(matmul(x, alone)[:1], matmul(x[:1], alone))
  assert (matmul(x, together)[0] != matmul(other, together)[0]).any()
  assert matmul(x[0, 0, 0], alone).shape == (16,)  # no axis of samples


@pytest.mark.parametrize("kind", [lambda p: p, lambda p: W4A4(p, "mse")])
def test_the_gradient_of_activations_is_that_of_the_rounded_weights(kind):
  x, weight = jnp.asarray(normal(2, 3, 32)), quantise(normal(16, 32, seed=1))
  outer = normal(2, 3, 16, seed=2)
  gradient = jax.jit(jax.grad(lambda x: jnp.vdot(outer, matmul(x, kind(weight)))))(x)
  np.testing.assert_allclose(gradient, outer @ float64(weight), rtol=1e-5, atol=1e-5)


def test_few_rows_of_packed_weights_with_their_gradient():
  x, weight = jnp.asarray(normal(2, 3, 32)), quantise(normal(16, 32, seed=1))
  outer = normal(2, 3, 16, seed=2)

  def both(x):
    y, backward = jax.vjp(lambda x: weights.packed_product(x, weight), x)
    return y, *backward(jnp.asarray(outer))

  y, gradient = jax.jit(both)(x)
  np.testing.assert_allclose(y, x @ float64(weight).T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(gradient, outer @ float64(weight), rtol=1e-5, atol=1e-5)


def test_an_adapter_over_a_quantised_weight_learns():
  x, base = normal(5, 32), W4A4(quantise(normal(16, 32, seed=1)), "mse")
  a, b = jnp.asarray(normal(2, 32, seed=2)), jnp.asarray(normal(16, 2, seed=3))
  outer = normal(5, 16, seed=4)

  def loss(factors):
    a, b = factors
    return jnp.vdot(outer, linear.matmul(x, LoraWeight(base, a, 0.5 * b)))

  grad_a, grad_b = jax.jit(jax.grad(loss))((a, b))
  np.testing.assert_allclose(grad_a, 0.5 * (outer @ b).T @ x, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(grad_b, 0.5 * outer.T @ (x @ a.T), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ networks
@jax.jit
def forward(model: dit.CausalDiT) -> jax.Array:
  latents, text = normal(2, 4, 4, 4, 8), normal(2, 5, 24, seed=1)
  time = dit.time_features(np.full((2, 4), 500.0), 32)
  return dit.bidirectional_forward(model, latents, time, text)


def test_a_network_of_packed_weights_is_one_of_rounded_weights():
  model = random_dit()
  packed = weights.quantise_weights(model, rule="static_6")
  rounded = jax.tree.map(
    lambda leaf: dequantise(leaf) if isinstance(leaf, NVFP4Array) else leaf,
    packed,
    is_leaf=lambda node: isinstance(node, NVFP4Array),
  )
  np.testing.assert_array_equal(forward(packed), forward(rounded))
  difference = forward(rounded) - forward(model)
  assert 0.01 < jnp.abs(difference).max() / jnp.abs(forward(model)).max() < 0.3


@pytest.mark.parametrize("starts", [(), (1,)])
def test_what_is_quantised(starts):
  model = random_dit(dtype=jnp.bfloat16)
  if starts:  # layers of several formats come in runs
    model = block_scan.split_blocks(model, starts)
  packed = weights.quantise_weights(model, mode="w4a4", activation_rule="static_6")
  found, layers = set(), 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    packed, is_leaf=lambda node: isinstance(node, W4A4)
  ):
    if isinstance(leaf, W4A4):
      name = store.path_name(path).removesuffix(".weight").replace(".", "/")
      found.add(name.replace("blocks/0/", "blocks/").replace("blocks/1/", "blocks/"))
      layers += len(leaf.weight.amax)
      assert (leaf.rule, leaf.per_sample, leaf.native) == ("static_6", True, False)
      assert leaf.weight.amax.shape == leaf.weight.shape[:1]
    else:
      assert leaf.dtype == jnp.bfloat16
  assert found == IN_BLOCKS and layers == 2 * len(IN_BLOCKS)


def test_layers_are_quantised_on_their_own():
  model = random_dit()
  packed = weights.quantise_weights(model, ["blocks/ffn/fc1"], tiles=True)
  weight = model.blocks.ffn.fc1.weight.get_value()
  whole = packed.blocks.ffn.fc1.weight.get_value()
  expected = quantise(weight, tiles=True, batch_axes=1)
  assert isinstance(packed.blocks.ffn.fc1.weight, weights.Matrix)
  for found, wanted in zip(*map(jax.tree.leaves, (whole, expected)), strict=True):
    np.testing.assert_array_equal(found, wanted)
  # The network that was given is what it was.
  assert model.blocks.ffn.fc1.weight.get_value() is not whole
  assert isinstance(model.blocks.ffn.fc1.weight.get_value(), jax.Array)


def test_a_layer_that_is_not_stacked():
  layer = linear.Linear(32, 16, rngs=nnx.Rngs(0))
  packed = weights.quantise_weights({"first": layer}, ["first"])["first"]
  assert packed.weight.get_value().amax.shape == ()
  x = normal(3, 32)
  expected = x @ float64(quantise(layer.weight.get_value())).T
  np.testing.assert_allclose(packed(x), expected, atol=1e-5)


def test_bytes_at_the_sizes_of_the_large_model():
  config = dit.SIZES["ti2v-5b"]
  model = store.abstract_network("dit", config, jnp.bfloat16)
  packed = jax.eval_shape(weights.quantise_weights, model)
  before, after = weights.weight_bytes(model), weights.weight_bytes(packed)
  dim, ffn = config.dim, config.ffn_dim
  numbers = config.layers * (8 * dim * dim + 2 * dim * ffn)
  assert after["nvfp4"] == numbers * 9 // 16 + 4 * 10 * config.layers
  assert after["nvfp4"] / (2 * numbers) < 0.29
  assert before == {"bfloat16": after["bfloat16"] + 2 * numbers}
  assert list(after) == ["nvfp4", "bfloat16"]
  small = weights.quantise_weights(random_dit())
  assert weights.weight_bytes(small)["nvfp4"] == sum(
    leaf.nbytes
    for leaf in jax.tree.leaves(
      small, is_leaf=lambda node: isinstance(node, NVFP4Array)
    )
    if isinstance(leaf, NVFP4Array)
  )


def test_bytes_of_what_two_networks_share_count_once():
  plain = random_dit()
  both = (plain, weights.quantise_weights(plain))
  found, packed = weights.weight_bytes(both), weights.weight_bytes(both[1])
  assert found == {**weights.weight_bytes(plain), "nvfp4": packed["nvfp4"]}


def test_casting_leaves_quantised_weights_alone():
  packed = weights.quantise_weights(random_dit(), mode="w4a4")
  cast = state.cast(packed, jnp.bfloat16)
  bytes_of = weights.weight_bytes
  assert bytes_of(cast)["nvfp4"] == bytes_of(packed)["nvfp4"]
  assert bytes_of(cast)["bfloat16"] == bytes_of(packed)["float32"] // 2
  assert set(bytes_of(cast)) == {"nvfp4", "bfloat16"}
  one, two = (m.blocks.ffn.fc1.weight.get_value().weight for m in (packed, cast))
  assert two.scales.dtype == one.scales.dtype and two.amax.dtype == jnp.float32
  np.testing.assert_array_equal(nvfp4.dequantise(one), nvfp4.dequantise(two))


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"mode": "w8a8"}, "mode='w8a8' is unknown; use w4a16, w4a4, w4a4_native"),
    ({"rule": "best"}, "rule='best' is unknown; use static_6"),
    ({"mode": "w4a4", "activation_rule": "best"}, "rule='best' is unknown"),
    ({"patterns": ["blocks/*", "block/q"]}, r"\['block/q'\] matches no linear layer"),
    ({"patterns": []}, "an empty list matches no linear layer"),
    ({"patterns": ["blocks/norm3"]}, "matches no linear layer; there are blocks/cross"),
    ({"patterns": ["text_embedding/fc1"]}, "text_embedding/fc1 has 24 inputs, which"),
  ],
)
def test_refusals(options, message):
  model = store.abstract_network("dit", dit.SIZES["test"])
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(weights.quantise_weights, **options), model)


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_quantising_twice(mode):
  packed = weights.quantise_weights(random_dit(), ["blocks/ffn/*"], mode=mode)
  with pytest.raises(ValueError, match="blocks/ffn/fc1 is quantised already"):
    weights.quantise_weights(packed)


def test_an_attached_adapter():
  model = random_dit()
  factors = {"blocks.self_attn.q.weight": (normal(2, 2, 64), normal(2, 64, 2))}
  adapted = lora.attach_lora(model, lora.Lora(factors, 2, 2.0))
  with pytest.raises(ValueError, match=r"self_attn/q holds a LoraWeight.*merge a LoRA"):
    weights.quantise_weights(adapted)


@pytest.mark.parametrize(
  ("platform", "kind", "capability", "works"),
  [
    ("gpu", "NVIDIA B200", "10.0", True),
    ("gpu", "NVIDIA B300 SXM6 AC", "10.3", True),
    ("gpu", "NVIDIA GeForce RTX 5090", "12.0", False),  # its FP4 is not tcgen05's
    ("gpu", "NVIDIA H200", "9.0", False),
    ("gpu", "AMD Instinct MI355X", "gfx950", False),
    ("tpu", "TPU v6 lite", None, False),
    ("cpu", "cpu", None, False),
  ],
)
def test_native_arithmetic_needs_a_device_that_has_it(
  monkeypatch, platform, kind, capability, works
):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  if capability:
    device.compute_capability = capability
  monkeypatch.setattr(jax, "devices", lambda: [device])
  if works:
    weights.check_mode("w4a4_native")
  else:
    with pytest.raises(ValueError, match=f"data-centre GPU .*, not {kind}; use 'w4a4'"):
      weights.check_mode("w4a4_native")


def test_the_device_of_a_described_mesh_is_named():
  device = jax.sharding.AbstractDevice("NVIDIA H100 PCIe", 114, "gpu")
  axes = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axes, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(
    ValueError, match="not NVIDIA H100 PCIe; use 'w4a4'"
  ):
    weights.check_mode("w4a4_native")
