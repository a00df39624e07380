"""Adapters beside weights of any type: products, gradients, files, runs of the scripts.

Merging them and reading published ones: tests/test_convert.py.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import same
from random_weights import normal, random_dit

from longlive_jax.checkpoint import convert, lora, store, torch_files
from longlive_jax.generate import adapters, networks
from longlive_jax.generate.precision import Precision, apply
from longlive_jax.layers import operand
from longlive_jax.layers.linear import matmul
from longlive_jax.layers.lora import LoraWeight, beside
from longlive_jax.models import block_scan, dit
from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant import weights
from longlive_jax.quant.training import (
  TrainingSettings,
  TrainingWeight,
  prepare_training,
)
from longlive_jax.train import lora as train_lora
from longlive_jax.train import state as train_state
from longlive_jax.train.lora import LoraSettings

pytestmark = pytest.mark.usefixtures("quick_compiling")

FC1 = "blocks.ffn.fc1.weight"
Q = "blocks.self_attn.q.weight"


def random_lora(seed: int = 1, rank: int = 3, alpha: float = 6.0) -> lora.Lora:
  """One of the test transformer, in a stacked and in a single layer."""
  shapes = {Q: (2, 64, 64), FC1: (2, 96, 64), "head.linear.weight": (32, 64)}
  factors = {}
  for i, (path, (*lead, rows, columns)) in enumerate(shapes.items()):
    a = normal(*lead, rank, columns, seed=10 * seed + i) / 8
    factors[path] = a, normal(*lead, rows, rank, seed=100 * seed + i) / 8
  return lora.Lora(factors, rank, alpha)


@jax.jit
def forward(model: dit.CausalDiT) -> jax.Array:
  latents, text = normal(1, 2, 4, 4, 8), normal(1, 5, 24, seed=1)
  time = dit.time_features(np.full((1, 2), 500.0), 32)
  return dit.bidirectional_forward(model, latents, time, text)


# ------------------------------------------------------------------ the product
@pytest.mark.parametrize("mode", ["", "w4a16", "w4a4", "fp8"])
def test_the_product_is_that_of_the_base_and_the_change(mode):
  model = random_dit()
  if mode:
    model = weights.quantise_weights(model, ["blocks/ffn/fc1"], mode=mode)
  base = jax.tree.map(lambda leaf: leaf[0], model.blocks.ffn.fc1.weight.get_value())
  x, a, b = normal(5, 64), normal(3, 64, seed=1), normal(96, 3, seed=2)
  y = matmul(x, LoraWeight(base, *map(jnp.asarray, (a, b))))
  change = y - matmul(x, base)
  np.testing.assert_allclose(change, x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
  if not mode:
    np.testing.assert_allclose(y, x @ (base + b @ a).T, rtol=1e-4, atol=1e-4)


def test_several_adapters_are_one_product_and_equal_merged_ones():
  model, one, two = random_dit(), random_lora(1), random_lora(2, rank=2, alpha=1.0)
  both = lora.attach_lora(lora.attach_lora(model, one), two, 0.5)
  weight = both.blocks.self_attn.q.weight.get_value()
  assert isinstance(weight.base, jax.Array) and weight.a.shape == (2, 5, 64)
  merged = lora.merge_lora(lora.merge_lora(model, one), two, 0.5)
  wanted, base = forward(merged), forward(model)
  np.testing.assert_allclose(forward(both), wanted, rtol=1e-4, atol=1e-4)
  assert np.abs(wanted - base).max() > 0.1


def test_over_codes_a_layer_reads_numbers():
  """The adapter multiplies what was not rounded; the base rounds it on its own."""
  model = weights.quantise_weights(random_dit(), ["blocks/self_attn/o"], mode="fp8")
  x = jnp.asarray(normal(2, 64))
  layer = jax.tree.map(lambda leaf: leaf[0], model.blocks.self_attn.o)
  rows = operand.read_by(layer, x)
  adapted = jax.tree.map(lambda leaf: leaf, layer)
  a, b = jnp.asarray(normal(3, 64)), jnp.asarray(normal(64, 3))
  adapted.weight.set_value(beside(layer.weight.get_value(), a, b))
  assert operand.read_by(adapted, x) is x
  assert isinstance(operand.read_by(adapted, rows), jax.Array)  # behind FP8 attention
  change = adapted(x) - layer(x)
  np.testing.assert_allclose(change, x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_zeros_changes_no_more_than_rounding():
  model = weights.quantise_weights(random_dit(), mode="fp8")
  zero = train_lora.init_lora(model, LoraSettings(rank=2), jax.random.key(0))
  y, wanted = forward(lora.attach_lora(model, zero)), forward(model)
  # A layer that has one reads numbers, which are made and rounded in other steps.
  np.testing.assert_allclose(y, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


def test_layers_in_runs_and_models_by_step():
  model, adapter = random_dit(), random_lora()
  split = block_scan.split_blocks(lora.attach_lora(model, adapter), [1])
  assert same(lora.attach_lora(block_scan.split_blocks(model, [1]), adapter), split)
  precision = Precision("w4a16", layers=("blocks/self_attn/q",), plain_steps=(0,))
  given = [adapters.Adapter(Path("one"), 1.0, 3, 6.0, 0)]
  steps = adapters.attach(apply(model, precision, 2), given, [adapter])
  assert same(steps.models[0], lora.attach_lora(model, adapter))
  packed = steps.models[1].blocks.self_attn.q.weight.get_value()
  assert weights.is_packed(packed.base)


# ------------------------------------------------------------------ training
def test_it_starts_as_peft_does():
  settings = LoraSettings(rank=4, alpha=2.0, layers=("blocks/self_attn/*",))
  model = store.abstract_network("dit", dit.SIZES["test"])
  start = functools.partial(train_lora.init_lora, model, settings)
  adapter = start(jax.random.key(0))
  assert (adapter.rank, adapter.alpha) == (4, 2.0)
  assert set(adapter.factors) == {f"blocks.self_attn.{n}.weight" for n in "qkvo"}
  a, b = adapter.factors[Q]
  assert a.shape == (2, 4, 64) and b.shape == (2, 64, 4) and not b.any()
  assert 0.9 / 8 < np.abs(a).max() <= 1 / 8  # uniform up to 1 / sqrt(in)
  np.testing.assert_allclose(a.std(), 1 / 8 / 3**0.5, rtol=0.1)
  assert not np.array_equal(a, adapter.factors["blocks.self_attn.k.weight"][0])
  fewer = LoraSettings(rank=4, layers=("blocks/self_attn/q",))
  alone = train_lora.init_lora(model, fewer, jax.random.key(0))
  np.testing.assert_array_equal(alone.factors[Q][0], a)
  assert alone.alpha == 4


@pytest.mark.parametrize("mode", ["w4a16", "w8a16"])
def test_the_backward_pass_keeps_no_plain_copy_of_the_base(mode):
  quantise = functools.partial(weights.quantise_weights, mode=mode)
  model = jax.eval_shape(quantise, random_dit())

  def kept(adapter, model):
    return jax.vjp(lambda a: forward(lora.attach_lora(model, a)), adapter)[1]

  residuals = jax.tree.leaves(jax.eval_shape(kept, random_lora(), model))
  floats = {leaf.shape for leaf in residuals if leaf.dtype == jnp.float32}
  plain = {weight.shape for name, weight in weights.matrices(model).items()
           if name.startswith("blocks")}  # fmt: skip
  assert len(plain) == 3 and not plain & floats  # (l, out, in) of q, fc1 and fc2
  assert (2, 3, 64) in floats  # the adapter's are


def test_beside_products_that_are_quantised_for_training():
  settings, adapter = TrainingSettings(), random_lora()

  def loss_fn(adapter, model):
    key = jax.random.key(0)
    prepared = prepare_training(model, ["blocks/ffn/*"], settings, key)
    both = lora.attach_lora(prepared, adapter)
    assert isinstance(both.blocks.ffn.fc1.weight.get_value().base, TrainingWeight)
    return forward(both).sum()

  gradients = jax.eval_shape(jax.grad(loss_fn), adapter, random_dit())
  assert gradients == jax.eval_shape(lambda tree: tree, adapter)


def test_training_changes_the_adapter_alone():
  model = random_dit()
  target = forward(lora.merge_lora(model, random_lora()))
  base = weights.quantise_weights(model, ["blocks/self_attn/q"], mode="w4a16")
  before = jax.tree.map(np.array, base)
  settings = train_state.OptimizerSettings(steps=20, learning_rate=1e-2, beta1=0.9)
  optimizer = train_state.make_optimizer(settings)
  adapter = train_lora.init_lora(base, LoraSettings(rank=3), jax.random.key(0))
  train = train_state.init_state({"lora": adapter}, optimizer)

  def loss_fn(params, base):
    y = forward(lora.attach_lora(base, params["lora"]))
    return jnp.mean((y - target) ** 2)

  @jax.jit
  def step(train, base):
    loss, gradients = jax.value_and_grad(loss_fn)(train.params, base)
    return train_state.update(train, gradients, optimizer, ema_decay=0.9), loss

  losses = []
  for _ in range(20):
    train, loss = step(train, base)
    losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0]
  assert same(jax.tree.map(np.array, base), before)
  trained = train.params["lora"]
  assert all(np.abs(b).max() > 0 for _, b in trained.factors.values())
  # Parameters, average and both moments: nothing of the base's size.
  size = sum(a.size for a in jax.tree.leaves(adapter))
  held = sum(leaf.size for leaf in jax.tree.leaves(train) if leaf.ndim)
  assert held == 4 * size


# ------------------------------------------------------------------ files
def equal(a: lora.Lora, b: lora.Lora) -> bool:
  return same(jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def test_both_formats_come_back_as_they_were(tmp_path):
  adapter = random_lora()
  params = {"lora": jax.tree.map(jnp.asarray, adapter)}
  train_lora.export(params, tmp_path, "launch/train.py", "ckpt/base")
  for path in ("lora", "peft", "peft/adapter_model.safetensors"):
    assert equal(lora.load_lora(tmp_path / path, 2), adapter), path
    shapes = lora.load_lora(tmp_path / path, 2, abstract=True)
    wanted = jax.eval_shape(lambda tree: tree, adapter)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(wanted)
  assert lora.load_lora(tmp_path / "peft", 2, 1.5).alpha == 1.5
  assert store.load_metadata(tmp_path / "lora")["base"] == "ckpt/base"
  tensors, _ = torch_files.open_safetensors(tmp_path / "peft" / lora.PEFT_FILES[0])
  name = "base_model.model.blocks.1.ffn.0.lora_B.weight"
  np.testing.assert_array_equal(tensors[name].read(), adapter.factors[FC1][1][1])
  record = json.loads((tmp_path / "peft" / lora.PEFT_FILES[1]).read_text())
  assert (record["r"], record["lora_alpha"]) == (3, 6.0)
  assert record["base_model_name_or_path"] == "ckpt/base"
  assert "blocks.1.ffn.0" in record["target_modules"]
  convert.export(str(tmp_path / "lora"), str(tmp_path / "again"))
  assert equal(lora.load_lora(tmp_path / "again", 2), adapter)


def test_both_formats_merge_to_the_same_bytes(tmp_path):
  model, adapter = random_dit(), random_lora()
  store.save_network(tmp_path / "base", model)
  train_lora.export({"lora": adapter}, tmp_path, "", "")
  wanted = store.named_leaves(lora.merge_lora(model, adapter, 0.5))
  for name in ("lora", "peft"):
    out = tmp_path / f"merged_{name}"
    convert.merge(str(tmp_path / "base"), [str(tmp_path / name)], str(out), [0.5])
    assert same(store.load(out), {k: np.asarray(v) for k, v in wanted.items()})


# ------------------------------------------------------------------ in a run
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A transformer, two adapters, and others that do not fit."""
  root = tmp_path_factory.mktemp("lora")
  store.save_network(root / "dit", random_dit())
  lora.save_lora(root / "one", random_lora(1))
  lora.save_peft(root / "two", random_lora(2, rank=2))
  wide = {Q: (normal(2, 3, 32), normal(2, 32, 3))}
  lora.save_lora(root / "wide", lora.Lora(wide, 3, 3.0))
  norm = {"blocks.norm3.weight": (normal(2, 3, 64), normal(2, 64, 3))}
  lora.save_lora(root / "norm", lora.Lora(norm, 3, 3.0))
  mixed = {f"blocks.{i}.self_attn.q.lora_{c}.weight":
           normal(*((2 + i, 64) if c == "A" else (64, 2 + i)))
           for i in range(2) for c in "AB"}  # fmt: skip
  specs = {name: (value.shape, value.dtype) for name, value in mixed.items()}
  torch_files.write_safetensors(root / "mixed.safetensors", specs, mixed.items())
  lora.save_peft(root / "rslora", random_lora())
  record = root / "rslora" / lora.PEFT_FILES[1]
  record.write_text(json.dumps({**json.loads(record.read_text()), "use_rslora": True}))
  return root


@pytest.mark.parametrize("precision", ["", "w4a16", "fp8"])
def test_a_run_loads_what_it_compiled_for(folder, precision):
  choice = networks.Choice(
    size="test", vae="test", text="test", weights="random", precision=precision,
    precision_layers=("blocks/ffn/fc1",) if precision else weights.BLOCK_LINEARS,
    dit_weights=str(folder / "dit"), loras=(f"{folder}/one:0.5", f"{folder}/two"),
  )  # fmt: skip
  source = networks.find_all(choice).dit
  assert [a["weight"] for a in adapters.records(source.loras)] == [0.5, 1.0]
  # Inputs and outputs of two layers of q, two of fc1, and the head.
  width = 2 * (64 + 64) + 2 * (64 + 96) + 64 + 32
  assert [a.parameters for a in source.loras] == [3 * width, 2 * width]
  model, abstract = (f(source, "float32") for f in (networks.load, networks.abstract))
  assert jax.tree.structure(model) == jax.tree.structure(abstract)
  shapes = jax.eval_shape(lambda tree: tree, model)
  assert jax.tree.leaves(shapes) == jax.tree.leaves(abstract)
  assert all(leaf.committed for leaf in jax.tree.leaves(model))
  plain = networks.find("dit", "test", folder / "dit", precision=source.precision)
  wanted = networks.load(plain, "float32")
  wanted = lora.attach_lora(wanted, random_lora(1), 0.5)
  assert same(model, lora.attach_lora(wanted, random_lora(2, rank=2)))
  replicated = meshes.replicate(model, jax.make_mesh((1,), ("data",)))
  assert same(replicated, model)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("missing", r"loras='.*missing' cannot be used; give 'PATH' or .*does not exist"),
    ("one:half", "could not convert string to float: 'half'"),
    ("one:nan", "weight=nan is not finite"),
    ("dit", "holds a 'dit'; give an adapter"),
    ("wide", r"self_attn.q.weight has shape \(2, 64, 64\), the LoRA gives \(2, 32, 32"),
    ("norm", r"blocks.norm3.weight \(2, 64, 64\) is no parameter"),
    ("mixed.safetensors", r"different ranks \[2, 3\]"),
    ("rslora", "use_rslora=True in adapter_config.json, which is not known here"),
  ],
)
def test_adapters_that_cannot_be_used(folder, given, message):
  with pytest.raises(ValueError, match=message):
    adapters.find(f"{folder}/{given}", dit.SIZES["test"])
