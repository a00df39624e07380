"""Checkpoints in and out of PyTorch's formats, and merging of adapters.

Everything streams: arrays are read, stacked and written one after the other, so that
memory holds a few parameters, never the model.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import lora, store, torch_files, torch_names

KINDS = {"generator": "dit", "vae": "vae", "light_vae": "vae", "umt5": "umt5"}
DTYPES = {"": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


def convert(
  kind: str, source: str, out: str, size: str = "", ema: bool = False, dtype: str = ""
) -> None:
  """Converts a published checkpoint; parameters are read and written one by one.

  Args:
    kind: one of KINDS.
    source: .safetensors, .pt or .pth file, or a folder of safetensors.
    out: checkpoint folder to make.
    size: of the network by name; read off the tensors' shapes if not given.
    ema: take the averaged generator where there is one.
    dtype: of all parameters, "bfloat16" or "float32"; as stored if not given.

  Raises:
    FileNotFoundError, FileExistsError, ValueError, ImportError: before anything is
      written, except for a file that changes while it is read.
  """
  network = KINDS[kind]
  sizes = store.NETWORKS[network][2]
  if size and size not in sizes:
    raise ValueError(f"size={size!r} is unknown; use one of {sorted(sizes)}")
  if Path(out).exists():
    raise FileExistsError(f"out={out} exists; remove it or choose another")
  tensors = torch_files.state_dict(torch_files.open_tensors(source), ema)
  torch_files.refuse_quantised(tensors)
  if network == "vae":
    tensors = torch_names.published_vae_names(tensors)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  if size:
    config = sizes[size]
  else:
    config = torch_names.infer_config(network, shapes, _folder_config(source))
  torch_names.check_names(network, config, shapes)
  target = DTYPES[dtype]

  def leaves():
    yield from torch_names.own_leaves(network, config, _header(source)).items()
    yield from torch_names.read_leaves(network, config, tensors, target)

  stored = torch_names.main_dtype(tensors)
  record = store.network_metadata(network, config, target or stored, str(source))
  store.save_stream(out, leaves(), record)


def export(source: str, out: str, prefix: str = "") -> None:
  """Writes a network as safetensors with PyTorch's names, one parameter at a time.

  Args:
    source: checkpoint folder.
    out: file to make; of an adapter, PEFT's folder.
    prefix: in front of every name, e.g. "model."; not of an adapter.

  Raises:
    FileNotFoundError, ValueError: no checkpoint, damaged, not of a network, or its
      arrays are not those of the network it names.
  """
  record = store.load_metadata(source)
  kind = record.get("kind")
  if kind == "lora":
    adapter = lora.load_lora(source, layers=0)  # a checkpoint knows its own
    lora.save_peft(out, adapter, record.get("base", ""))
    return
  if kind not in torch_names.TABLES:
    raise ValueError(
      f"source={source} holds a {kind!r}; give one of {sorted(torch_names.TABLES)}"
    )
  config = store.network_config(kind, record["config"])
  stored = store.describe(source)
  wanted = store.named_leaves(store.abstract_network(kind, config))
  store.check_shapes(source, stored, {name: w.shape for name, w in wanted.items()})
  specs = {
    prefix + name: (shape, leaf.dtype)
    for path, leaf in stored.items()
    for name, shape in torch_names.torch_tensors(kind, config, path, leaf.shape)
  }
  own = torch_names.own_leaves(kind, config)

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    paths = [path for path in stored if path not in own]
    for path, array in store.load_leaves(source, paths):
      for name, view in torch_names.torch_views(kind, config, path, array):
        yield prefix + name, view

  header = torch_names.own_metadata(kind, dict(store.load_leaves(source, own)))
  torch_files.write_safetensors(out, specs, tensors(), header)


def merge(
  base: str,
  adapters: Sequence[str],
  out: str,
  weights: Sequence[float] = (),
  alpha: float | None = None,
) -> None:
  """Merges LoRA adapters into a transformer, one parameter at a time.

  Args:
    base: checkpoint folder of the transformer.
    adapters: files or checkpoint folders.
    out: checkpoint folder to make.
    weights: of each adapter; 1 if not given.
    alpha: of the adapters; their own, or else their rank, if not given.

  Raises:
    FileNotFoundError, FileExistsError, ValueError: before anything is written.
  """
  if weights and len(weights) != len(adapters):
    raise ValueError(
      f"weight={list(weights)} has {len(weights)} entries for {len(adapters)} "
      "adapters; give one for each, or none"
    )
  record = store.load_metadata(base)
  if record.get("kind") != "dit":
    raise ValueError(f"base={base} holds a {record.get('kind')!r}; give a 'dit'")
  if Path(out).exists():
    raise FileExistsError(f"out={out} exists; remove it or choose another")
  stored = store.describe(base)
  layers = record["config"]["layers"]
  loaded = [lora.load_lora(path, layers, alpha) for path in adapters]
  for adapter in loaded:
    lora.check_lora(adapter, {name: leaf.shape for name, leaf in stored.items()})
  pairs = list(zip(loaded, weights or [1.0] * len(loaded), strict=True))
  merged = [
    {"source": str(path), "weight": weight, "alpha": adapter.alpha}
    for path, (adapter, weight) in zip(adapters, pairs, strict=True)
  ]
  leaves = lora.merge_leaves(store.load_leaves(base, stored), pairs)
  store.save_stream(out, leaves, {**record, "merged_lora": merged})


def _folder_config(source: str) -> dict | None:
  file = Path(source) / "config.json"
  return json.loads(file.read_text()) if file.exists() else None


def _header(source: str) -> dict[str, str]:
  if Path(source).suffix != ".safetensors":
    return {}
  return torch_files.open_safetensors(source)[1]
