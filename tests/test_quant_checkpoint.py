"""Checkpoints with 4-bit weights: ours, FourOverSix's, and every way to mix them up."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_weights import random_dit

from longlive_jax.checkpoint import (
  convert,
  four_over_six,
  lora,
  quantised,
  store,
  torch_files,
  torch_names,
)
from longlive_jax.generate import networks
from longlive_jax.models import dit
from longlive_jax.quant import nvfp4, weights

ROOT = Path(__file__).parents[1]
BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn


def same(a, b) -> bool:
  """Trees of one structure, every leaf the same bytes."""

  def equal(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(equal, a, b)
  )


def quantise(model, mode="w4a16", rule="mse"):
  return weights.quantise_weights(model, mode=mode, rule=rule, activation_rule=rule)


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
    split = dit.split_blocks(model, [1])
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


def test_adapters_are_refused_after(tmp_path, model, packed):
  message = r"the base is quantised in 2 weights .* merge it into the checkpoint that"
  for network in (quantise(model), quantise(model, "w4a4")):
    for change in (lora.merge_lora, lora.attach_lora):
      with pytest.raises(ValueError, match=message):
        change(network, adapter())
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
    networks.find("dit", "test", packed, precision="w4a4", rule="static_6")
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

  def load(path, precision=""):
    source = networks.find("dit", "test", path, precision=precision)
    return networks.load(source, "bfloat16")

  assert same(load(packed), quantise(model))
  assert same(load(plain, "w4a16"), quantise(model))
  assert same(load(packed, "w4a4"), load(plain, "w4a4"))
  assert same(load(plain), model)
  with pytest.raises(ValueError, match="precision='fp8' is unknown"):
    load(plain, "fp8")


def test_random_weights_are_drawn_in_four_bits(model):
  """Never quantised: that would need room for the plain ones first."""
  source = networks.find("dit", "test", "random", precision="w4a4", rule="static_6")
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


# ---------------------------------------------------------------------- FourOverSix
def published(model, rule: str, amax_shape=(1,)) -> dict[str, np.ndarray]:
  """A quantised state dict, laid out number by number as SPEC 9 says."""
  tensors, codec = {}, jax.jit(functools.partial(nvfp4.quantise, rule=rule))
  for path, leaf in store.named_leaves(model).items():
    views = torch_names.torch_views("dit", model.config, path, np.asarray(leaf))
    tensors |= {name: np.array(view) for name, view in views}
  for name in list(tensors):
    if not re.fullmatch(r"blocks\.\d+\.(\w+_attn\.[qkvo]|ffn\.\d)\.weight", name):
      continue
    weight = tensors.pop(name)
    (out, inner), module = weight.shape, name.removesuffix(".weight")
    one = codec(weight)
    rows, columns = -(-out // 128) * 128, -(-inner // 64) * 64
    codes = np.zeros((rows, columns // 2), np.uint8)
    codes[:out, : inner // 2] = one.codes
    scales = np.zeros(rows * columns // 16, np.uint8)
    r, c = np.indices(one.scales.shape)
    tile = (r // 128) * (columns // 64) + c // 4
    place = tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
    scales[place] = np.asarray(one.scales).view(np.uint8)
    tensors |= {
      f"{module}.quantized_weight_values": codes,
      f"{module}.quantized_weight_scale_factors": scales.view(E4M3),
      f"{module}.quantized_weight_amax": np.asarray(one.amax).reshape(amax_shape),
      f"{module}.quantized_weight_metadata": np.array(
        [out, inner, rows, columns], np.int32
      ),
    }
  return tensors


def write(path: Path, tensors: dict[str, np.ndarray], prefix="", metadata=None) -> Path:
  tensors = {prefix + name: array for name, array in tensors.items()}
  specs = {name: (array.shape, array.dtype) for name, array in tensors.items()}
  torch_files.write_safetensors(path, specs, tensors.items(), metadata)
  return path


def read(path: Path) -> dict[str, np.ndarray]:
  return {n: t.read() for n, t in torch_files.open_safetensors(path)[0].items()}


@pytest.fixture(scope="module")
def state_dict(model) -> dict[str, np.ndarray]:
  return published(model, "mse")


def test_published_weights_go_in_and_out(tmp_path, model, state_dict):
  """64 x 64, 96 x 64 and 64 x 96, all of which the format pads."""
  about = json.dumps({"weight_scale_rule": "mse", "activation_scale_rule": "static_6"})
  source = write(
    tmp_path / "a.safetensors", state_dict, "model.", {"quantization": about}
  )
  four_over_six.import_checkpoint(source, tmp_path / "q")
  assert same(quantised.load_network(tmp_path / "q", "dit"), quantise(model))
  four_over_six.export_checkpoint(tmp_path / "q", tmp_path / "b", "model.")
  assert same(read(tmp_path / "b"), read(source))
  header = torch_files.open_safetensors(tmp_path / "b")[1]
  assert header["checkpoint_format"] == "longlive_generator_nvfp4"
  # What was written says its rule, and what activations are for.
  four_over_six.import_checkpoint(source, tmp_path / "w", mode="w4a4")
  found = quantised.load_network(tmp_path / "w", "dit")
  assert found.blocks.ffn.fc1.weight.get_value().rule == "static_6"
  assert json.loads(header["quantization"])["weight_scale_rule"] == "mse"


def test_an_export_of_ours_is_what_the_reference_writes(tmp_path, packed, state_dict):
  four_over_six.export_checkpoint(packed, tmp_path / "b.safetensors")
  assert same(read(tmp_path / "b.safetensors"), state_dict)


def test_a_torch_container_and_a_scalar_amax(tmp_path, model):
  torch = pytest.importorskip("torch")

  def tensor(array: np.ndarray):
    kinds = {np.dtype(BF16): (np.int16, torch.bfloat16),
             np.dtype(E4M3): (np.uint8, torch.float8_e4m3fn)}  # fmt: skip
    if array.dtype not in kinds:
      return torch.from_numpy(array.copy())
    raw, dtype = kinds[array.dtype]
    return torch.from_numpy(array.view(raw).copy()).view(dtype)

  arrays = published(model, "static_6", amax_shape=())
  state = {f"model.{name}": tensor(array) for name, array in arrays.items()}
  content = {"generator": state, "quantization": {"scale_rule": "static_6"}}
  torch.save(content, tmp_path / "a.pt")
  four_over_six.import_checkpoint(tmp_path / "a.pt", tmp_path / "q")
  wanted = quantise(model, rule="static_6")
  assert same(quantised.load_network(tmp_path / "q", "dit"), wanted)


MODULE = "blocks.1.self_attn.v."


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"quantized_weight_amax": None}, r"amax has shape None instead of \(1,\)"),
    ({"quantized_weight_metadata": None}, r"metadata int32 \(4,\) is missing"),
    (
      {"quantized_weight_metadata": np.array([64, 64, 64, 64], np.int32)},
      "is not padded to 128 and 64",
    ),
    (
      {"quantized_weight_values": np.zeros((64, 32), np.uint8)},
      r"values has shape \(64, 32\) instead of \(128, 32\)",
    ),
    (
      {"quantized_weight_values": np.full((128, 32), 17, np.uint8)},
      "blocks.1.self_attn.v has numbers in its padding to 128 x 64",
    ),
    (
      {"quantized_weight_scale_factors": np.full(512, 120, np.uint8).view(E4M3)},
      "numbers in its padding",
    ),
    (
      {"quantized_weight_values": np.zeros((128, 32), np.int32)},
      "values is int32 instead of uint8",
    ),
    (
      {"quantized_weight_scale_factors": np.ones(512, np.float32)},
      "scale_factors is float32 instead of float8_e4m3fn",
    ),
    ({"quantized_weight_amax": np.ones(1, BF16)}, "amax is bfloat16 instead of float"),
    ({"quantized_weight_amax": np.full(1, np.nan, np.float32)}, "v has scales that"),
    (
      {"quantized_weight_metadata": np.array([64, 64, 128, 64], np.float32)},
      r"metadata int32 \(4,\) is missing",
    ),
    (
      {"quantized_weight_scale_factors": np.full(512, 127, np.uint8)},
      "v has scales that are not finite: its weight had such numbers",
    ),
    ({"bias": None}, r"v.bias \(64,\) is missing"),
    ({"extra": np.zeros(3, BF16)}, r"v.extra \(3,\) is unknown"),
  ],
)
def test_faulty_sources_are_explained(
  tmp_path, state_dict, change, message, monkeypatch
):
  """Before anything is written, but for padding, which is as large as the weights."""

  def save(*_):
    raise AssertionError("a checkpoint was begun")

  if "padding" not in message:
    monkeypatch.setattr(store, "save_stream", save)
  changed = {MODULE + end: array for end, array in change.items()}
  tensors = {n: a for n, a in {**state_dict, **changed}.items() if a is not None}
  source = write(tmp_path / "a.safetensors", tensors)
  with pytest.raises(ValueError, match=message):
    four_over_six.import_checkpoint(source, tmp_path / "q", rule="mse")
  assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_raw_bits_as_scales_and_a_folder(tmp_path, model, state_dict):
  """A diffusers-style folder, whose rules are in the headers of its files."""
  (tmp_path / "a").mkdir()
  end = "quantized_weight_scale_factors"
  raw = {n: a.view(np.uint8) if n.endswith(end) else a for n, a in state_dict.items()}
  names, half = sorted(raw), len(raw) // 2
  about = {"quantization": json.dumps({"scale_rule": "mse"})}
  write(tmp_path / "a/1.safetensors", {n: raw[n] for n in names[:half]}, "", about)
  write(tmp_path / "a/2.safetensors", {n: raw[n] for n in names[half:]})
  four_over_six.import_checkpoint(tmp_path / "a", tmp_path / "q")
  assert same(quantised.load_network(tmp_path / "q", "dit"), quantise(model))
  other = {"quantization": json.dumps({"scale_rule": "mae"})}
  write(tmp_path / "a/2.safetensors", {n: raw[n] for n in names[half:]}, "", other)
  with pytest.raises(ValueError, match='holds files that differ in "quantization"'):
    four_over_six.import_checkpoint(tmp_path / "a", tmp_path / "r")


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ("mse", 'has a "quantization" record that cannot be read: Expecting value'),
    ('"mse"', "cannot be read: it is a str; it must be an object such as"),
    ('{"scale_rule": "best"}', "rule='best' is unknown; use .* with --rule or"),
    ('{"scale_rule": ["mse"]}', r"rule=\['mse'\] is unknown"),
    (
      '{"scale_rule": "mse", "activation_scale_rule": "best"}',
      "activation_scale_rule='best' is unknown",
    ),
  ],
)
def test_a_header_that_makes_no_sense(tmp_path, state_dict, record, message):
  about = {"quantization": record}
  source = write(tmp_path / "a.safetensors", state_dict, "", about)
  with pytest.raises(ValueError, match=message):
    four_over_six.import_checkpoint(source, tmp_path / "q")
  assert not (tmp_path / "q").exists()


def test_sources_of_another_kind(tmp_path, model, plain, state_dict):
  source = write(tmp_path / "a.safetensors", state_dict)

  def attempt(source=source, **options):
    four_over_six.import_checkpoint(source, tmp_path / "q", **options)

  with pytest.raises(ValueError, match="does not say by which rule"):
    attempt()
  with pytest.raises(ValueError, match=r"rule='static_6' cannot have made the scales"):
    attempt(rule="static_6")
  with pytest.raises(ValueError, match="rule='best' is unknown"):
    attempt(rule="best")
  with pytest.raises(ValueError, match="size='6b' is unknown"):
    attempt(rule="mse", size="6b")
  convert.export(str(plain), str(tmp_path / "p.safetensors"))
  with pytest.raises(ValueError, match="no weights quantised by FourOverSix; convert"):
    attempt(tmp_path / "p.safetensors", rule="mse")
  bits = published(random_dit(dtype=jnp.bfloat16), "static_6")
  with pytest.raises(ValueError, match=r"rule='mse' cannot .* 448; use a static rule"):
    attempt(write(tmp_path / "s.safetensors", bits), rule="mse")
  ends = ("values", "scale_factors", "amax", "metadata")
  mixed = dict(state_dict)
  for end in ends:
    del mixed[f"{MODULE}quantized_weight_{end}"]
  mixed[f"{MODULE}weight"] = np.zeros((64, 64), BF16)
  with pytest.raises(ValueError, match=r"attn\.v\.weight in NVFP4 and bfloat16"):
    attempt(write(tmp_path / "m.safetensors", mixed), rule="mse")
  source.write_bytes(source.read_bytes()[:-1])
  with pytest.raises(ValueError, match="truncated"):
    attempt(rule="mse")
  with pytest.raises(ValueError, match="has no quantised weights"):
    four_over_six.export_checkpoint(plain, tmp_path / "x")
  split = dit.split_blocks(model, [1])
  runs = weights.quantise_weights(split, ["blocks/1/*"])
  quantised.save_network(tmp_path / "runs", runs, rule="mse")
  with pytest.raises(ValueError, match="layers of different precision"):
    four_over_six.export_checkpoint(tmp_path / "runs", tmp_path / "x")
  assert not (tmp_path / "q").exists() and not (tmp_path / "x").exists()


def test_full_size_is_within_its_budget():
  """Weights of the quantised layers take 0.28 of BF16; nothing is built."""
  network = store.abstract_network("dit", dit.SIZES["ti2v-5b"], jnp.bfloat16)
  packed = jax.eval_shape(weights.quantise_weights, network)
  before, after = weights.weight_bytes(network), weights.weight_bytes(packed)
  changed = before["bfloat16"] - after["bfloat16"]
  assert after["nvfp4"] / changed < 0.2813
  stored = quantised.stored_leaves(packed)
  specs = four_over_six.tensor_specs(network.config, stored)
  assert len(specs) == 825 + 300 * 3


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
