"""Networks that train with quantised products: their layers, keys, and the script."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import fill, normal, random_dit, random_vae

from longlive_jax.checkpoint import store
from longlive_jax.layers import linear
from longlive_jax.models import dit, umt5
from longlive_jax.quant import training, weights
from longlive_jax.quant.training import FP8TrainingSettings, TrainingSettings
from longlive_jax.train import step

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROOT = Path(__file__).parents[1]
STATIC = TrainingSettings("static_6", "static_6", "static_6")  # the soonest compiled


def load_script(path: Path):
  spec = importlib.util.spec_from_file_location(path.stem + "_script", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


script = load_script(ROOT / "launch" / "train.py")
get_config = load_script(ROOT / "configs" / "train.py").get_config


# ------------------------------------------------------------------ layers
def test_stacked_layers_scanned_and_recomputed():
  """Gradients are those of plain float leaves, with noise of their own a layer."""

  def layer(key):
    return linear.Linear(32, 32, rngs=nnx.Rngs(key))

  blocks = fill(jax.eval_shape(jax.vmap(layer), jax.random.split(jax.random.key(0), 3)))
  x = jnp.asarray(normal(20, 32))

  def plain(blocks):
    step = lambda x, block: (jnp.tanh(block(x)), None)  # noqa: E731
    return jnp.sum(jax.lax.scan(step, x, blocks)[0] ** 2)

  def loss(blocks, key, settings):
    network = training.prepare_training({"blocks": blocks}, ["blocks"], settings, key)
    step = jax.checkpoint(lambda x, block: (jnp.tanh(block(x)), None))
    return jnp.sum(jax.lax.scan(step, x, network["blocks"])[0] ** 2)

  gradient = jax.jit(jax.grad(loss), static_argnums=2)
  float_loss = jax.jit(jax.value_and_grad(plain))
  first, exact = float_loss(blocks)
  found, other = (gradient(blocks, jax.random.key(i), STATIC) for i in (1, 2))
  assert jax.tree.structure(found) == jax.tree.structure(blocks)
  for leaf, like in zip(*map(jax.tree.leaves, (found, blocks)), strict=True):
    assert leaf.dtype == like.dtype and leaf.shape == like.shape
  changed = found.weight.get_value() != other.weight.get_value()
  assert changed.mean((1, 2)).min() > 0.9  # in every layer

  found, exact = (tree.weight.get_value() for tree in (found, exact))
  error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
  assert 0.1 < error < 0.5
  # Noise around the true gradient: so it leads down.
  for i in range(20):
    slope = gradient(blocks, jax.random.key(i), STATIC)
    blocks = jax.tree.map(lambda p, g: p - 0.003 * g, blocks, slope)
  assert float_loss(blocks)[0] < 0.2 * first


def test_every_layer_has_a_key_of_its_own():
  model = random_dit()

  def keys(patterns):
    prepared = training.prepare_training(
      model, patterns, TrainingSettings(), jax.random.key(0)
    )
    return {
      name: np.asarray(jax.random.key_data(leaf))
      for name, leaf in store.named_leaves(prepared).items()
      if name.endswith(".key")
    }

  every, some = keys(weights.BLOCK_LINEARS), keys(["blocks/ffn/fc2"])
  assert len(every) == 10 and all(k.shape[0] == 2 for k in every.values())
  assert len({tuple(row) for k in every.values() for row in k}) == 20
  for name, key in some.items():
    np.testing.assert_array_equal(key, every[name])


# ------------------------------------------------------------------ the script
def quantised_config(**changes):
  config = get_config("test")
  config.quantise.mode = "nvfp4"
  for name, value in changes.items():
    config.quantise[name] = value
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mode": "int8"}, "quantise.mode='int8' is unknown; use '', 'nvfp4', 'fp8'"),
    ({"gradient": "best"}, "rule='best' is unknown; use static_6"),
    ({"layers": ("blocks/*", "heads")}, r"\['heads'\] matches no linear layer"),
    ({"layers": ("text_embedding/fc1",)}, "text_embedding/fc1 has 24 inputs"),
    ({"plain_edges": 1}, "quantise.plain_edges=1 must leave some of 2 layers"),
  ],
)
def test_the_script_refuses_settings_before_anything_is_built(
  changes, message, tmp_path
):
  store.save_network(tmp_path / "vae", random_vae())
  config = quantised_config(**changes)
  config.vae_weights = str(tmp_path / "vae")
  with pytest.raises(ValueError, match=message):
    script.check(config)


def test_the_script_quantises_nothing_unless_told():
  config = get_config("toy")
  assert script.training_settings(config) is None
  assert tuple(config.quantise.layers) == weights.BLOCK_LINEARS
  config.quantise.mode = "nvfp4"
  assert script.training_settings(config) == TrainingSettings()
  config.quantise.mode = "fp8"
  assert script.training_settings(config) == FP8TrainingSettings()


@pytest.mark.parametrize("mode", ["", "nvfp4", "fp8"])
def test_the_script_trains_in_the_precision_it_is_told(mode):
  """Traced only: compiling it takes longer than all other tests here."""
  config = quantised_config(mode=mode)
  config.dtype = "bfloat16"
  dit_config = dit.SIZES["test"]
  loss_fn = step.make_loss(dit_config, script.loss_settings(config))
  params = {
    "dit": store.abstract_network("dit", dit_config),
    "text": store.abstract_network("umt5", umt5.UMT5_SIZES["test"]),
  }
  batch = {
    "latents": jnp.zeros((2, 8, 2, 2, 8)),
    "mask": jnp.ones((2, 8)),
    "ids": jnp.ones((2, 4, 8), jnp.int32),
    "text_mask": jnp.ones((2, 4, 8), jnp.int32),
  }
  gradient = jax.grad(loss_fn, has_aux=True)
  program = jax.make_jaxpr(gradient, return_shape=True)
  jaxpr, (gradients, _) = program(params, batch, jax.random.key(0))
  assert ("f8_e4m3fn" in str(jaxpr)) == bool(mode)
  assert jax.tree.structure(gradients) == jax.tree.structure(params)
  for leaf, like in zip(*map(jax.tree.leaves, (gradients, params)), strict=True):
    assert (leaf.shape, leaf.dtype) == (like.shape, jnp.float32)


def test_plain_edges_are_not_quantised():
  """Of three blocks the one between multiplies by zero, in any precision."""
  dit_config = dataclasses.replace(dit.SIZES["test"], layers=3)
  model = fill(jax.eval_shape(lambda: dit.CausalDiT(dit_config, rngs=nnx.Rngs(0))))
  network = weights.map_matrices(
    model, weights.BLOCK_LINEARS, lambda path, weight: weight.at[1].set(0)
  )
  batch = {
    "latents": jnp.asarray(normal(1, 8, 2, 2, 8)),
    "mask": jnp.ones((1, 8)),
    "text": jnp.asarray(normal(1, 4, 8, dit_config.text_dim)),
  }

  def loss(mode, edges):
    settings = script.loss_settings(quantised_config(mode=mode, plain_edges=edges))
    loss_fn = jax.jit(step.make_loss(dit_config, settings))
    return float(loss_fn({"dit": network}, batch, jax.random.key(0))[0])

  plain = loss("", 0)
  assert loss("fp8", 1) == pytest.approx(plain, rel=1e-5)
  assert loss("fp8", 0) != pytest.approx(plain, rel=1e-4)
