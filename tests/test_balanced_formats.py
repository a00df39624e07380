"""Adapters and quantised products over a mesh: the numbers of one device."""

import pytest
from test_balanced import result, start

# A frame has 16 tokens, and so has a prompt: blocks and means along tokens are the same
# on any number of devices.
SCRIPT = """
jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from random_weights import normal, random_dit

from longlive_jax.layers import linear
from longlive_jax.parallel import mesh as meshes, sharded_weights
from longlive_jax.quant import training, weights
from longlive_jax.quant.training import TrainingSettings
from longlive_jax.checkpoint import lora
from longlive_jax.train import evaluation, flow, step
from longlive_jax.train import lora as train_lora

dit.SIZES["text16"] = dataclasses.replace(dit.SIZES["test"], text_len=16)
model = random_dit("text16")
config = model.config
batch = {
  "latents": normal(2, 4, 8, 8, 8), "mask": np.ones((2, 4), np.float32),
  "text": normal(2, 2, 16, config.text_dim, seed=1),
}
mesh = meshes.training_mesh(2, 2)


def run(params, base, mesh, **changes):
  settings = step.LossSettings(flow.FlowSettings(2), "float32", **changes)
  loss_fn = step.make_loss(config, settings, mesh)
  base = sharded_weights.place(base, mesh)
  params = meshes.spread(params, meshes.last_axis_specs(params, mesh), mesh)
  inputs = meshes.spread(batch, meshes.CLIPS, mesh)

  @jax.jit
  def gradient(params, batch, base):
    key = jax.random.key(0)
    grad = jax.value_and_grad(lambda p: loss_fn(p, batch, key, None, base)[0])
    return grad(params)

  loss, gradients = gradient(params, inputs, base)
  return float(loss), [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]


def compared(params, base, **changes):
  (loss, want), (other, found) = (run(params, base, m, **changes) for m in (None, mesh))
  pairs = zip(want, found, strict=True)
  apart = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs]
  return {"loss": abs(other / loss - 1), "gradients": max(apart)}


# Every format that a base may have, and plain weights.
base = model
for patterns, mode in (
  (["blocks/cross_attn/[qkvo]"], "w4a16"), (["blocks/ffn/fc1"], "w4a4"),
  (["blocks/ffn/fc2"], "fp8"),
):
  base = weights.quantise_weights(base, patterns, mode=mode, rule="static_6")
adapter = train_lora.init_lora(
  base, train_lora.LoraSettings(rank=4), jax.random.key(1)
)
adapter = jax.tree.map(lambda a: jnp.asarray(normal(*a.shape) / 8), adapter)
found = {"lora": compared({"lora": adapter}, {"dit": base})}

# What an evaluation generates with.
placed = sharded_weights.place({"dit": base, "text": model}, mesh)
split = {"lora": meshes.spread(adapter, meshes.last_axis_specs(adapter, mesh), mesh)}
whole, _ = evaluation.generating(split, placed, "float32")
want = lora.attach_lora(base, adapter)
same = jax.tree.map(lambda a, b: bool((a == b).all()), whole, want)
devices = {device for leaf in jax.tree.leaves(whole) for device in leaf.devices()}
found["whole"] = all(jax.tree.leaves(same)) and devices == {jax.devices()[0]}

# One layer that reads tokens and one that reads prompts: they compile for long.
nearest = TrainingSettings(
  "static_6", "static_6", "static_6", stochastic=False, centre=16
)
layers = ("blocks/self_attn/o", "blocks/cross_attn/k")
found["nvfp4"] = compared(
  {"dit": model}, {}, quantise=nearest, quantised_layers=layers
)

# Two devices with the same tokens.
spread = dataclasses.replace(nearest, stochastic=True, mesh_axes=mesh.axis_names)
x, weight = np.tile(normal(16, 32), (4, 1)), normal(32, 32, seed=1)


def product(x, weight):
  return training.training_product(x, weight, jax.random.key(0), spread)


def outer(x, weight):
  tokens = P(mesh.axis_names)
  each = jax.shard_map(
    product, mesh=mesh, in_specs=(tokens, P()), out_specs=tokens, check_vma=False
  )
  return jnp.sum(jnp.sin(each(x, weight)))


# FP8 has no scale that tokens share; its weights are gathered as others are.
layer = {"fp8": linear.Linear(32, 32, rngs=nnx.Rngs(0))}
tokens = normal(2, 2, 16, 32)


def squares(layer, mesh):
  prepared = training.prepare_training(
    layer, ["fp8"], training.FP8TrainingSettings(), jax.random.key(0)
  )
  apply = sharded_weights.over(mesh, lambda layer, x: layer["fp8"](x))
  return jnp.sum(apply(prepared, tokens) ** 2)


gradient = jax.jit(jax.grad(squares), static_argnums=1)
want, split = (jax.tree.leaves(gradient(layer, m)) for m in (None, mesh))
found["fp8"] = max(
  float(np.linalg.norm(a - b) / np.linalg.norm(a))
  for a, b in zip(map(np.asarray, want), map(np.asarray, split), strict=True)
)

rows = np.split(np.asarray(jax.jit(jax.grad(outer))(x, weight)), 4)
found["same draws"] = max(float((rows[0] == other).mean()) for other in rows[1:])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
  return result(start(SCRIPT))


def test_an_adapter_over_weights_of_all_formats(found):
  assert found["lora"]["loss"] < 1e-5 and found["lora"]["gradients"] < 1e-5


def test_nvfp4_products_share_the_scales_of_all_tokens(found):
  """Codes next to the middle of two may flip; scales of their own are 0.1 apart."""
  assert found["nvfp4"]["loss"] < 1e-5 and found["nvfp4"]["gradients"] < 0.01


def test_an_evaluation_has_whole_networks_on_one_device(found):
  assert found["whole"]


def test_fp8_products(found):
  assert found["fp8"] < 1e-5


def test_devices_round_stochastically_on_their_own(found):
  assert found["same draws"] < 0.1
