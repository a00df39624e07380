"""FourOverSix checkpoints: read, written, and every way in which one can be faulty."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from packed_weights import quantise, same
from random_weights import random_dit

from longlive_jax.checkpoint import (
  convert,
  four_over_six,
  quantised,
  store,
  torch_files,
  torch_names,
)
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import nvfp4, weights

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
MODULE = "blocks.1.self_attn.v."


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit(dtype=jnp.bfloat16)


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


def test_an_export_of_ours_is_what_the_reference_writes(tmp_path, model, state_dict):
  quantised.save_network(tmp_path / "q", quantise(model), rule="mse")
  four_over_six.export_checkpoint(tmp_path / "q", tmp_path / "b.safetensors")
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


def test_sources_of_another_kind(tmp_path, model, state_dict):
  source = write(tmp_path / "a.safetensors", state_dict)
  plain = tmp_path / "plain"
  store.save_network(plain, model)

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
  split = block_scan.split_blocks(model, [1])
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
