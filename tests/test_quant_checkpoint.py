"""Checkpoints with 4-bit weights, and every way to mix them up with plain ones."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import quantise, same
from random_weights import random_dit

from longlive_jax.checkpoint import convert, lora, quantised, store
from longlive_jax.generate import networks
from longlive_jax.generate.precision import Precision
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import weights

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit(dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("plain") / "dit"
  store.save_network(path, model)
  return path


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("packed") / "dit"
  quantised.save_network(path, quantise(model), rule="mse")
  return path


# ---------------------------------------------------------------------- our own
@pytest.mark.parametrize("mode", ["w4a16", "w4a4", "per layer"])
def test_a_quantised_network_comes_back(tmp_path, model, mode):
  if mode == "per layer":
    split = block_scan.split_blocks(model, [1])
    network = weights.quantise_weights(split, ["blocks/1/*"], rule="static_6")
  else:
    network = quantise(model, mode, "static_6")
  quantised.save_network(tmp_path / "q", network, rule="static_6", source="here")
  assert same(quantised.load_network(tmp_path / "q", "dit"), network)
  assert quantised.checkpoint_bytes(tmp_path / "q") == weights.weight_bytes(network)
  listed = store.load_metadata(tmp_path / "q")["weights"]
  where = "blocks.1.ffn.fc1" if mode == "per layer" else "blocks.ffn.fc1"
  wanted = {"format": "nvfp4", "mode": "w4a16", "rule": "static_6", "span": 6 * 448}
  if mode == "w4a4":
    wanted |= {"mode": mode, "activation_rule": "static_6", "per_sample": True}
  assert listed[f"{where}.weight"] == wanted
  assert listed[f"{where}.bias"] == {"format": "bfloat16"}
  assert sum(e["format"] == "nvfp4" for e in listed.values()) == 10
  wide = quantised.load_network(tmp_path / "q", "dit", jnp.float32)
  assert weights.weight_bytes(wide).keys() == {"nvfp4", "float32"}


def test_stored_codes_can_be_used_in_another_way(model, packed):
  found = quantised.load_network(packed, "dit", mode="w4a4")
  assert same(found, quantise(model, "w4a4"))


def test_reading_asks_for_packed_arrays_only(packed, monkeypatch):
  asked = []
  read = store.ocp.load

  def load(path, requests):
    asked.extend(leaf.size * leaf.dtype.itemsize for leaf in requests.values())
    return read(path, requests)

  monkeypatch.setattr(store.ocp, "load", load)
  network = quantised.load_network(packed, "dit")
  assert sum(asked) == sum(weights.weight_bytes(network).values())


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_quantising_a_file_is_quantising_the_network(tmp_path, model, plain, mode):
  record = quantised.quantise_checkpoint(
    plain, tmp_path / "q", mode=mode, rule="static_4"
  )
  assert record == store.load_metadata(tmp_path / "q")
  wanted = quantise(model, mode, "static_4")
  assert same(quantised.load_network(tmp_path / "q", "dit"), wanted)
  found = quantised.quantise_network(plain, "dit", mode=mode, rule="static_4")
  assert same(found, wanted)


def test_chosen_layers_of_a_network_in_another_dtype(tmp_path, plain):
  layers = ["blocks/self_attn/[qk]", "head/linear"]
  quantised.quantise_checkpoint(
    plain, tmp_path / "q", layers=layers, dtype=jnp.float32
  )
  wide = store.load_dit(plain, jnp.float32)
  wanted = weights.quantise_weights(wide, layers)
  assert same(quantised.load_network(tmp_path / "q", "dit"), wanted)
  listed = store.load_metadata(tmp_path / "q")["weights"]
  assert {p for p, e in listed.items() if e["format"] == "nvfp4"} == {
    "blocks.self_attn.q.weight",
    "blocks.self_attn.k.weight",
    "head.linear.weight",
  }


def adapter() -> lora.Lora:
  rng = np.random.default_rng(1)
  factors = {
    "blocks.self_attn.q.weight": rng.normal(size=(2, 3, 64)),
    "blocks.ffn.fc2.weight": rng.normal(size=(2, 3, 96)),
  }
  pairs = {
    path: (a.astype(np.float32), rng.normal(size=(2, 64, 3)).astype(np.float32))
    for path, a in factors.items()
  }
  return lora.Lora(pairs, 3, 6.0)


def test_adapters_are_merged_before(tmp_path, model, plain):
  lora.save_lora(tmp_path / "lora", adapter())
  record = quantised.quantise_checkpoint(
    plain, tmp_path / "q", adapters=[tmp_path / "lora"]
  )
  assert [entry["alpha"] for entry in record["merged_lora"]] == [6.0]
  merged = lora.merge_lora(model, adapter())
  assert same(quantised.load_network(tmp_path / "q", "dit"), quantise(merged))


def test_adapters_are_not_merged_after(tmp_path, model, packed):
  message = r"the base is quantised in 2 weights .* merge it into the checkpoint that"
  for network in (quantise(model), quantise(model, "w4a4")):
    with pytest.raises(ValueError, match=message):
      lora.merge_lora(network, adapter())
  lora.save_lora(tmp_path / "lora", adapter())
  with pytest.raises(ValueError, match=message):
    convert.merge(str(packed), [str(tmp_path / "lora")], str(tmp_path / "out"))
  with pytest.raises(ValueError, match=r"quantised already.* merge adapters into"):
    quantised.quantise_checkpoint(packed, tmp_path / "out", adapters=["lora"])
  assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- mixed up
def test_plain_as_packed_and_packed_as_plain(tmp_path, model, plain, packed):
  with pytest.raises(ValueError, match=r"dit=.* weights packed in NVFP4, no plain"):
    store.load_dit(packed)
  with pytest.raises(ValueError, match="in bfloat16 and none in NVFP4; load it with"):
    quantised.load_network(plain, "dit")
  with pytest.raises(ValueError, match="holds a 'dit'; give the folder of a 'vae'"):
    quantised.load_network(packed, "vae")
  with pytest.raises(ValueError, match="the network is quantised; use checkpoint"):
    store.save_network(tmp_path / "x", quantise(model))
  with pytest.raises(ValueError, match="no weight of the network is quantised; use"):
    quantised.save_network(tmp_path / "x", model, rule="mse")
  with pytest.raises(ValueError, match=r"rule='static_4' is not that of blocks"):
    quantised.save_network(tmp_path / "x", quantise(model), rule="static_4")
  beside = lora.attach_lora(model, adapter())
  beside = weights.quantise_weights(beside, ["blocks/cross_attn/q"])
  with pytest.raises(ValueError, match="are not those of a 'dit' network; merge"):
    quantised.save_network(tmp_path / "x", beside, rule="mse")
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(rule="mean"), "rule='mean' is unknown; use"),
    (dict(mode="w8a8"), "mode='w8a8' is unknown; use"),
    (dict(mode="w4a4_native"), "mode='w4a4_native'"),
    (dict(layers=["blocks/mlp/*"]), "matches no linear layer; there are"),
    (dict(layers=["text_embedding/fc1"]), "has 24 inputs, which must be a multiple"),
  ],
)
def test_what_cannot_be_quantised_is_said_first(tmp_path, plain, options, message):
  with pytest.raises(ValueError, match=message):
    quantised.quantise_checkpoint(plain, tmp_path / "q", **options)
  assert not list(tmp_path.iterdir())


def test_nothing_is_quantised_twice(tmp_path, packed):
  for act in (
    lambda: quantised.quantise_checkpoint(packed, tmp_path / "q"),
    lambda: quantised.quantise_network(packed, "dit"),
  ):
    with pytest.raises(ValueError, match="quantised already, by rule='mse'; start"):
      act()
  message = "again by 'static_6'; use precision_rule='mse' for precision='w4a4'"
  with pytest.raises(ValueError, match=message):
    networks.find("dit", "test", packed, precision=Precision("w4a4", "static_6"))
  assert not list(tmp_path.iterdir())


def test_a_truncated_copy_is_noticed_before_anything_is_built(
  tmp_path, packed, monkeypatch
):
  for file in packed.rglob("*"):
    copy = tmp_path / "q" / file.relative_to(packed)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
      copy.write_bytes(file.read_bytes())
  largest = max((f for f in (tmp_path / "q").rglob("*") if f.is_file()),
                key=lambda f: f.stat().st_size)  # fmt: skip
  largest.write_bytes(largest.read_bytes()[:-1])

  def build(*_, **__):
    raise AssertionError("a network was built")

  monkeypatch.setattr(dit, "CausalDiT", build)
  monkeypatch.setitem(store.NETWORKS, "dit", (build, *store.NETWORKS["dit"][1:]))
  with pytest.raises(ValueError, match=r"is damaged: .* bytes instead of"):
    quantised.load_network(tmp_path / "q", "dit")


def test_loading_for_a_run(model, plain, packed):
  """Either quantised on the way, or as the checkpoint is; the same network."""

  def load(path, mode=""):
    source = networks.find("dit", "test", path, precision=Precision(mode))
    found = networks.load(source, "bfloat16")
    abstract = networks.abstract(source, "bfloat16")
    assert jax.tree.structure(abstract) == jax.tree.structure(found)
    assert all(leaf.committed for leaf in jax.tree.leaves(found))
    return found

  assert same(load(packed), quantise(model))
  assert same(load(plain, "w4a16"), quantise(model))
  assert same(load(packed, "w4a4"), load(plain, "w4a4"))
  assert same(load(plain), model)


def test_random_weights_are_drawn_in_four_bits(model):
  """Never quantised: that would need room for the plain ones first."""
  wanted = Precision("w4a4", "static_6", "static_6")
  source = networks.find("dit", "test", "random", precision=wanted)
  drawn = networks.load(source, "bfloat16")
  wanted = jax.eval_shape(lambda: quantise(model, "w4a4", "static_6"))
  assert jax.tree.structure(drawn) == jax.tree.structure(wanted)
  for found, leaf in zip(jax.tree.leaves(drawn), jax.tree.leaves(wanted), strict=True):
    assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    numbers = np.asarray(found).astype(np.float32)
    assert np.isfinite(numbers).all() and numbers.any()
  weight = drawn.blocks.ffn.fc1.weight.get_value().weight
  assert (np.asarray(weight.scales).astype(np.float32) == 1).all()
  assert len(np.unique(weight.codes)) == 256


# ---------------------------------------------------------------------- tools
def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, ROOT / "tools" / name, *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_tools(tmp_path, model, plain):
  lora.save_lora(tmp_path / "lora", adapter())
  out = tmp_path / "q"
  done = tool("quantize_checkpoint.py", f"--source={plain}", f"--out={out}",
              f"--lora={tmp_path / 'lora'}", "--rule=static_6")  # fmt: skip
  assert done.returncode == 0, done.stderr
  wanted = quantise(lora.merge_lora(model, adapter()), rule="static_6")
  assert same(quantised.load_network(out, "dit"), wanted)
  sizes = weights.weight_bytes(wanted)
  assert f"nvfp4 {sizes['nvfp4']:,} bytes" in done.stdout
  assert f"bfloat16 {sizes['bfloat16']:,} bytes" in done.stdout

  file = tmp_path / "x.safetensors"
  done = tool("export_checkpoint.py", f"--source={out}", f"--out={file}")
  assert done.returncode == 0, done.stderr
  again = tmp_path / "again"
  done = tool("quantize_checkpoint.py", f"--source={file}", f"--out={again}")
  assert done.returncode == 0, done.stderr
  assert same(store.load(again), store.load(out))
  done = tool("quantize_checkpoint.py", f"--source={out}", f"--out={tmp_path / 'r'}")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "is quantised already, by rule='static_6'" in done.stderr


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("quantize", ["--source=DIT", "--size=test"], "size='test' is for published files"),
    ("quantize", ["--source=x.pt", "--layers=a"], r"layers=['a'] cannot be chosen for"),
    ("quantize", ["--source=x.pt", "--dtype=float32"], "dtype=float32 cannot be"),
    ("export", ["--source=nowhere"], "no checkpoint at"),
  ],
)
def test_what_the_tools_refuse(tmp_path, plain, name, options, message):
  options = [option.replace("DIT", str(plain)) for option in options]
  done = tool(f"{name}_checkpoint.py", *options, f"--out={tmp_path / 'q'}")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert f"error: {message}" in done.stderr
  assert not (tmp_path / "q").exists()
