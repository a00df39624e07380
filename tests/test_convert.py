"""PyTorch checkpoints in and out: every name, every byte, every fault reported."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.checkpoint import convert, lora, store, torch_files, torch_names
from longlive_jax.models import dit

GOLDEN = Path(__file__).parent / "golden"
REAL = {
  "transformer": ("dit", "ti2v-5b", 825),
  "vae": ("vae", "wan2.2", 196),
  "light_vae_pruning_0_75": ("vae", "wan2.2-light", 196),
  "umt5_xxl_encoder": ("umt5", "umt5-xxl", 242),
}
FLAG = {"dit": "generator", "vae": "vae", "umt5": "umt5"}


def real_shapes(key: str) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the published checkpoints."""
  listing = json.loads((GOLDEN / "key_map.json").read_text())[key]
  return {
    name.format(layer=layer): tuple(shape)
    for name, shape in listing["tensors"].items()
    for layer in (range(listing["layers"]) if "{layer}" in name else [0])
  }


def random_tensors(kind: str, size: str = "test", dtype=ml_dtypes.bfloat16):
  rng = np.random.default_rng(0)
  shapes = torch_names.torch_shapes(kind, store.NETWORKS[kind][2][size])
  return {n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray], metadata=None) -> Path:
  specs = {name: (array.shape, array.dtype) for name, array in tensors.items()}
  torch_files.write_safetensors(path, specs, tensors.items(), metadata)
  return path


def read(path: Path) -> dict[str, np.ndarray]:
  return {n: t.read() for n, t in torch_files.open_safetensors(path)[0].items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  return set(a) == set(b) and all(
    a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
  )


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("key", REAL)
def test_full_size_trees_match_the_published_checkpoints(key):
  kind, size, count = REAL[key]
  config = store.NETWORKS[kind][2][size]
  published = real_shapes(key)
  assert torch_names.torch_shapes(kind, config) == published
  assert len(published) == count
  assert torch_names.infer_config(kind, published) == config
  paths = {torch_names.parameter_path(kind, name)[0] for name in published}
  tree = store.named_leaves(store.abstract_network(kind, config))
  assert paths == set(tree) - {"latent_mean", "latent_std"}


def test_the_5b_transformer_has_its_published_number_of_parameters():
  tree = store.abstract_network("dit", dit.SIZES["ti2v-5b"])
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == 4_999_787_712


@pytest.mark.parametrize(
  ("light", "published"),
  [
    ("decoder.conv_in.weight", "decoder.conv1.weight"),
    ("decoder.mid_block.resnets.0.norm1.gamma", "decoder.middle.0.residual.0.gamma"),
    ("encoder.mid_block.attentions.0.proj.bias", "encoder.middle.1.proj.bias"),
    ("decoder.mid_block.resnets.1.conv2.bias", "decoder.middle.2.residual.6.bias"),
    (
      "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
      "decoder.upsamples.2.upsamples.0.shortcut.weight",
    ),
    (
      "decoder.up_blocks.2.upsampler.resample.1.weight",
      "decoder.upsamples.2.upsamples.3.resample.1.weight",
    ),
    (
      "encoder.down_blocks.2.downsampler.time_conv.bias",
      "encoder.downsamples.2.downsamples.2.time_conv.bias",
    ),
    ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
    ("encoder.conv_out.bias", "encoder.head.2.bias"),
    ("quant_conv.weight", "conv1.weight"),
    ("post_quant_conv.bias", "conv2.bias"),
    ("dynamic_feature_projection_heads.0.weight", None),
    ("decoder.middle.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma"),
  ],
)
def test_light_vae_names(light, published):
  assert torch_names.light_vae_name(light) == published


# ---------------------------------------------------------------------- round trips
@pytest.mark.parametrize("kind", FLAG)
def test_conversion_and_export_keep_every_byte(tmp_path, kind):
  tensors = random_tensors(kind)
  if kind == "dit":  # dtypes may be mixed, as long as layers agree
    tensors["head.modulation"] = tensors["head.modulation"].astype(np.float32)
  statistics = {"latent_mean": "[1,2,3,4,5,6,7,8.5]"} if kind == "vae" else None
  source = write(tmp_path / "a.safetensors", tensors, statistics)
  convert.convert(FLAG[kind], str(source), str(tmp_path / "c"))
  record = store.load_metadata(tmp_path / "c")
  assert (record["size"], record["dtype"]) == ("test", "bfloat16")
  convert.export(str(tmp_path / "c"), str(tmp_path / "b.safetensors"))
  assert same(tensors, read(tmp_path / "b.safetensors"))
  network = store.load_network(tmp_path / "c", kind)
  if kind == "vae":
    assert network.latent_mean[...].tolist() == [1, 2, 3, 4, 5, 6, 7, 8.5]
  direct = torch_names.network_from_torch(kind, network.config, tensors, jnp.float32)
  assert jax.tree.structure(direct) == jax.tree.structure(network)


@pytest.mark.parametrize("shape", [(4, 3, 2, 6, 5), (4, 3, 2, 5)])
def test_kernels_are_permuted(shape):
  """(out, ky, kx[, kt], in) here, (out, in[, kt], ky, kx) in PyTorch."""
  ours = np.arange(math.prod(shape)).reshape(shape)
  path = "decoder.conv1.weight"
  [(name, theirs)] = torch_names.torch_views("vae", None, path, ours)
  assert name == path
  o, ky, kx, *kt, i = shape
  assert torch_names.torch_tensors("vae", None, path, shape) == [
    (path, (o, i, *kt, ky, kx))
  ]
  for o, ky, kx, *kt, i in np.ndindex(*shape):
    assert theirs[o, i, *kt, ky, kx] == ours[o, ky, kx, *kt, i]


def test_kernels_of_another_layout_are_refused(tmp_path):
  config = store.NETWORKS["vae"][2]["test"]
  leaves = dict(torch_names.own_leaves("vae", config))
  for name, array in random_tensors("vae").items():
    path, _ = torch_names.parameter_path("vae", name)
    leaves[path] = array.squeeze() if path.endswith("gamma") else array
  record = store.network_metadata("vae", config, jnp.bfloat16)
  store.save(tmp_path / "c", leaves, record)
  message = r"made by an older version, .*: convert it again with tools[\s\S]*"
  message += r"encoder.conv1.weight has shape \(8, 12, 3, 3, 3\) instead of \(8, 3, 3"
  with pytest.raises(ValueError, match=message):
    store.load_vae(tmp_path / "c")
  with pytest.raises(ValueError, match=message):
    convert.export(str(tmp_path / "c"), str(tmp_path / "b.safetensors"))


def test_light_vae_converts_from_either_naming(tmp_path):
  tensors = random_tensors("vae")
  renamed = {"dynamic_feature_projection_heads.0.weight": np.zeros(3, np.float32)}
  back = {".conv_in.": ".conv1.", ".norm_out.": ".head.0.", ".conv_out.": ".head.2."}
  for name, array in tensors.items():
    if name.startswith("conv"):
      name = ("quant_" if name[4] == "1" else "post_quant_") + name.replace(
        name[4], "", 1
      )
    for light, published in back.items():
      name = name.replace(published, light)
    renamed[name] = array
  source = write(tmp_path / "a.safetensors", renamed)
  convert.convert("light_vae", str(source), str(tmp_path / "c"))
  convert.export(str(tmp_path / "c"), str(tmp_path / "b.safetensors"))
  assert same(tensors, read(tmp_path / "b.safetensors"))


def test_sharded_folder_with_its_index(tmp_path):
  tensors = random_tensors("dit")
  folder = tmp_path / "model"
  folder.mkdir()
  names = sorted(tensors)
  parts = {"d-1.safetensors": names[::2], "d-2.safetensors": names[1::2]}
  for file, part in parts.items():
    write(folder / file, {n: tensors[n] for n in part})
  index = {"weight_map": {n: f for f, part in parts.items() for n in part}}
  (folder / "d.safetensors.index.json").write_text(json.dumps(index))
  convert.convert("generator", str(folder), str(tmp_path / "c"))
  convert.export(str(tmp_path / "c"), str(tmp_path / "b.safetensors"))
  assert same(tensors, read(tmp_path / "b.safetensors"))
  (folder / "d-2.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"lacks \['d-2.safetensors'\]"):
    torch_files.open_tensors(folder)


# ---------------------------------------------------------------------- containers
def wrap(tensors: dict, prefix: str) -> dict:
  return {prefix + name: value for name, value in tensors.items()}


def containers(weights: dict, other: dict) -> dict[str, tuple[dict, bool]]:
  """Every wrapping of a generator, and whether the averaged weights are wanted."""
  marked = {
    name.replace("blocks.0.", "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module."): v
    for name, v in wrap(weights, "model.").items()
  }
  inner = wrap(weights, "model.")
  return {
    "raw": (weights, False),
    "raw, prefixed": (inner, False),
    "model": ({"model": inner, "step": 3}, False),
    "generator": ({"generator": inner, "critic": other}, False),
    "generator beside ema": ({"generator": inner, "generator_ema": other}, False),
    "ema": ({"generator": other, "generator_ema": marked}, True),
    "ema wanted, none there": ({"generator": inner}, True),
    "merged": ({"generator": inner, "checkpoint_format": "x", "dtype": "bf16"}, False),
  }


@pytest.mark.parametrize("name", containers({}, {}))
def test_every_wrapping_of_a_generator(name):
  arrays = random_tensors("dit")
  weights = {n: torch_names.as_tensor(a) for n, a in arrays.items()}
  other = {"x": torch_names.as_tensor(np.zeros(1))}
  content, ema = containers(weights, other)[name]
  found = torch_files.state_dict(content, ema)
  assert same(arrays, {n: tensor.read() for n, tensor in found.items()})


def test_torch_files_need_no_memory_map_to_stay_open(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(torch_files, "_REOPEN_BYTES", 1000)
  arrays = random_tensors("dit")
  weights = {
    name: torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    for name, array in wrap(arrays, "model.").items()
  }
  source = tmp_path / "a.pt"
  torch.save({"generator": weights, "step": 5}, source)
  convert.convert("generator", str(source), str(tmp_path / "c"))
  convert.export(str(tmp_path / "c"), str(tmp_path / "b.safetensors"))
  assert same(arrays, read(tmp_path / "b.safetensors"))
  source.write_bytes(source.read_bytes()[:-1000])
  with pytest.raises(ValueError, match="truncated or not a checkpoint"):
    torch_files.open_tensors(source)


def test_a_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "a.pt").write_bytes(b"x")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match="pip install torch"):
    torch_files.open_tensors(tmp_path / "a.pt")


# ---------------------------------------------------------------------- faults
def test_all_mismatches_are_reported_together(tmp_path):
  tensors = random_tensors("dit")
  del tensors["blocks.1.ffn.0.bias"]
  tensors["blocks.0.norm3.bias"] = np.zeros(3, ml_dtypes.bfloat16)
  tensors["blocks.0.norm9.bias"] = np.zeros(3, ml_dtypes.bfloat16)
  source = write(tmp_path / "a.safetensors", tensors)
  with pytest.raises(ValueError) as error:
    convert.convert("generator", str(source), str(tmp_path / "c"), "test")
  for part in (
    "in 3 tensors",
    "blocks.1.ffn.0.bias (96,) is missing",
    "blocks.0.norm9.bias (3,) is unknown",
    "blocks.0.norm3.bias has shape (3,) instead of (64,)",
  ):
    assert part in str(error.value)
  assert not (tmp_path / "c").exists()


def test_sources_that_cannot_be_converted(tmp_path):
  def attempt(source, kind="generator", **options):
    convert.convert(kind, str(source), str(tmp_path / "c"), **options)

  source = write(tmp_path / "a.safetensors", random_tensors("dit"))
  with pytest.raises(ValueError, match="size='6b' is unknown; use one of"):
    attempt(source, size="6b")
  with pytest.raises(ValueError, match="no 'umt5' checkpoint"):
    attempt(source, "umt5")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    attempt(tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match="of no known type"):
    attempt(write(tmp_path / "a.bin2", {"x": np.zeros(1)}))
  packed = {"blocks.0.self_attn.q.quantized_weight_values": np.zeros(1, np.uint8)}
  message = r"in 1 layers; import it with tools/quantize_checkpoint.py --source FILE"
  with pytest.raises(ValueError, match=message):
    attempt(write(tmp_path / "q.safetensors", packed))
  source.write_bytes(source.read_bytes()[:-1])
  with pytest.raises(ValueError, match="truncated"):
    attempt(source)
  source.write_bytes(b"\x00" * 3)
  with pytest.raises(ValueError, match="truncated"):
    attempt(source)
  (tmp_path / "c").mkdir()
  with pytest.raises(FileExistsError, match="remove it or choose another"):
    attempt(source)


def test_layers_of_different_dtypes_need_a_decision(tmp_path):
  tensors = random_tensors("dit")
  tensors["blocks.1.norm3.bias"] = tensors["blocks.1.norm3.bias"].astype(np.float32)
  source = write(tmp_path / "a.safetensors", tensors)
  with pytest.raises(ValueError, match="give --dtype"):
    convert.convert("generator", str(source), str(tmp_path / "c"))
  assert not (tmp_path / "c").exists()
  convert.convert("generator", str(source), str(tmp_path / "c"), dtype="float32")
  stored = store.describe(tmp_path / "c")
  assert {leaf.dtype.name for leaf in stored.values()} == {"float32"}


# ---------------------------------------------------------------------- LoRA
def random_lora(modules: list[str], rank: int = 3, suffix: str = "") -> dict:
  rng = np.random.default_rng(1)
  shapes = torch_names.torch_shapes("dit", dit.SIZES["test"])
  tensors = {}
  for module in modules:
    out, inner = shapes[f"{module}.weight"]
    for letter, shape in (("A", (rank, inner)), ("B", (out, rank))):
      name = f"base_model.model.{module}.lora_{letter}{suffix}.weight"
      tensors[name] = rng.normal(size=shape).astype(np.float32)
  return tensors


MODULES = ["blocks.0.self_attn.q", "blocks.1.ffn.0", "head.head"]


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_merged_weights_are_rounded_once(tmp_path, as_checkpoint):
  base = random_tensors("dit")
  source = write(tmp_path / "a.safetensors", base)
  convert.convert("generator", str(source), str(tmp_path / "base"))
  one, two = random_lora(MODULES), random_lora(MODULES[:1], 2, ".default")
  paths = [
    write(tmp_path / "1.safetensors", one),
    write(tmp_path / "2.safetensors", two),
  ]
  if as_checkpoint:
    adapter = lora.load_lora(paths[0], 2, 6.0)
    paths[0] = tmp_path / "lora"
    lora.save_lora(paths[0], adapter)
  convert.merge(
    str(tmp_path / "base"),
    [str(p) for p in paths],
    str(tmp_path / "out"),
    [1.0, 0.5],
    None if as_checkpoint else 6.0,
  )
  convert.export(str(tmp_path / "out"), str(tmp_path / "b.safetensors"))
  merged = read(tmp_path / "b.safetensors")
  second_alpha = 2.0 if as_checkpoint else 6.0
  for name, weight in base.items():
    total = weight.astype(np.float64)
    for tensors, scale, suffix in (
      (one, 6.0 / 3, ""),
      (two, 0.5 * second_alpha / 2, ".default"),
    ):
      prefix = f"base_model.model.{name.removesuffix('.weight')}"
      if f"{prefix}.lora_A{suffix}.weight" in tensors:
        a, b = (tensors[f"{prefix}.lora_{c}{suffix}.weight"] for c in "AB")
        total = total + scale * b.astype(np.float64) @ a
    error = np.abs(merged[name].astype(np.float64) - total)
    assert (error <= np.abs(total) * 2**-8 + 1e-6).all()
  unchanged = set(base) - {f"{m}.weight" for m in MODULES}
  assert all(merged[n].tobytes() == base[n].tobytes() for n in unchanged)
  assert len(store.load_metadata(tmp_path / "out")["merged_lora"]) == 2


def test_merging_into_a_network_in_memory():
  tensors = random_tensors("dit", dtype=np.float32)
  network = torch_names.network_from_torch("dit", dit.SIZES["test"], tensors)
  adapter = lora.lora_from_torch({"generator_lora": random_lora(MODULES)}, layers=2)
  merged = lora.merge_lora(network, adapter, 0.0)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), network, merged))
  a, b = adapter.factors["head.linear.weight"]
  change = lora.merge_lora(network, adapter).head.linear.weight[...]
  np.testing.assert_allclose(
    change - network.head.linear.weight[...], b @ a, rtol=1e-4, atol=1e-5
  )
  beside = lora.attach_lora(network, adapter)
  x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 64)), jnp.float32)
  np.testing.assert_allclose(
    beside.head.linear(x),
    lora.merge_lora(network, adapter).head.linear(x),
    rtol=1e-4,
    atol=1e-3,
  )


def test_faulty_adapters_are_explained_at_once():
  tensors = random_lora(MODULES)
  tensors["base_model.model.blocks.7.self_attn.q.lora_A.weight"] = np.zeros((3, 4))
  del tensors["base_model.model.head.head.lora_B.weight"]
  name = "base_model.model.blocks.1.ffn.0.lora_A.weight"
  tensors[name] = np.zeros((5, 64), np.float32)
  with pytest.raises(ValueError) as error:
    lora.lora_from_torch(tensors, layers=2)
  for part in (
    "blocks.7.self_attn.q.lora_A.weight belongs to no layer of a transformer of 2",
    "head.linear.weight has lora_A only",
    "blocks.ffn.fc1.weight of block 1 has factors of unequal rank",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match="no lora_A and lora_B"):
    lora.lora_from_torch({}, layers=2)


def test_an_adapter_of_another_size_names_what_does_not_fit():
  adapter = lora.lora_from_torch(random_lora(MODULES), layers=2)
  shapes = {"blocks.self_attn.q.weight": (2, 8, 8), "head.linear.weight": (32, 64)}
  with pytest.raises(ValueError) as error:
    lora.check_lora(adapter, shapes)
  assert "blocks.self_attn.q.weight has shape (2, 8, 8)" in str(error.value)
  assert "blocks.ffn.fc1.weight (2, 96, 64) is no parameter" in str(error.value)
