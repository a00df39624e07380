"""Low-rank adapters: read, written, merged into weights or put beside them (SPEC 12).

Merged: W + weight * alpha / rank * B A, in float32, then rounded once to W's dtype.
Beside: layers/lora.py, over weights of any type. Adapters are kept like the parameters
they change: factors of all layers stacked, under the parameter's path
("blocks.self_attn.q.weight"). An adapter is a pytree, so it can be trained as it is.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import store, torch_files, torch_names
from longlive_jax.layers.lora import beside
from longlive_jax.models import dit
from longlive_jax.quant import weights

PEFT_FILES = "adapter_model.safetensors", "adapter_config.json"
# Fields of adapter_config.json that change what factors mean.
_OTHER_MEANINGS = "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """An adapter of the transformer.

  Attributes:
    factors: parameter path -> (A (l, rank, in), B (l, out, rank)), float32; no leading
      l for a parameter that is not stacked. Layers without an adapter are zero.
    rank: static, inner size of all factors.
    alpha: static, scale before division by the rank.
  """

  factors: Mapping[str, tuple[Any, Any]]
  rank: int = dataclasses.field(metadata={"static": True})
  alpha: float = dataclasses.field(metadata={"static": True})


def lora_from_torch(
  content: Mapping[str, Any],
  layers: int,
  alpha: float | None = None,
  *,
  abstract: bool = False,
) -> Lora:
  """Collects an adapter from a checkpoint's tensors.

  Args:
    content: what `torch_files.open_tensors` gave, or tensors or arrays by name: bare
      or under `generator_lora`.
    layers: blocks of the transformer.
    alpha: the rank if not given.
    abstract: shapes for factors; no number is read.

  Raises:
    ValueError: not an adapter, one of another model, or of factors that do not fit
      each other; all faults are reported together.
  """
  content = content.get("generator_lora", content)
  found: dict[str, dict[int | None, dict[str, torch_files.Tensor]]] = {}
  problems = []
  for name, value in content.items():
    match = _KEY.fullmatch(name)
    place = match and torch_names.parameter_path("dit", f"{match[1]}.weight")
    if not place or (place[1] is not None and place[1] >= layers):
      problems.append(f"{name} belongs to no layer of a transformer of {layers} blocks")
      continue
    path, layer = place
    factor = torch_names.as_tensor(value)
    found.setdefault(path, {}).setdefault(layer, {})[match[2]] = factor
  ranks = set()
  for path, by_layer in found.items():
    for layer, pair in by_layer.items():
      where = path if layer is None else f"{path} of block {layer}"
      if set(pair) != {"A", "B"}:
        problems.append(f"{where} has lora_{''.join(pair)} only")
      elif pair["A"].shape[0] != pair["B"].shape[1]:
        shapes = pair["A"].shape, pair["B"].shape
        problems.append(f"{where} has factors of unequal rank: A, B = {shapes}")
      else:
        ranks.add(pair["A"].shape[0])
    for letter, axis in (("A", 1), ("B", 0)):
      sizes = {p[letter].shape[axis] for p in by_layer.values() if letter in p}
      if len(sizes) > 1:
        problems.append(f"{path} has lora_{letter} of sizes {sorted(sizes)} in blocks")
  if len(ranks) > 1:
    problems.append(f"layers have different ranks {sorted(ranks)}")
  if problems or not found:
    raise ValueError(
      "source is not a LoRA of this transformer; give the adapter file that belongs to "
      "it:\n  " + "\n  ".join(problems or ["it holds no lora_A and lora_B"])
    )
  (rank,) = ranks
  stack = _stacked_shape if abstract else _stacked
  factors = {
    path: tuple(
      stack({i: pair[letter] for i, pair in by_layer.items()}, layers)
      for letter in "AB"
    )
    for path, by_layer in found.items()
  }
  return Lora(factors, rank, float(rank if alpha is None else alpha))


def _stacked_shape(
  by_layer: Mapping[int | None, torch_files.Tensor], layers: int
) -> jax.ShapeDtypeStruct:
  shape = next(iter(by_layer.values())).shape
  lead = () if None in by_layer else (layers,)
  return jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)


def _stacked(
  by_layer: Mapping[int | None, torch_files.Tensor], layers: int
) -> np.ndarray:
  out = np.zeros(_stacked_shape(by_layer, layers).shape, np.float32)
  for layer, tensor in by_layer.items():
    out[... if layer is None else layer] = tensor.read().astype(np.float32)
  return out


def check_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError that lists every factor without a fitting parameter.

  A quantised parameter fits none: merged into rounded weights and rounded again, the
  small change that an adapter is would be lost.

  Args:
    shapes: parameter path -> shape of the transformer's parameters.
  """
  problems = []
  packed = [p for p in lora.factors if any(s.startswith(f"{p}.") for s in shapes)]
  if packed:
    raise ValueError(
      f"the base is quantised in {len(packed)} weights that the LoRA changes, such as "
      f"{packed[0]}; merge it into the checkpoint that the base was made from: "
      "tools/quantize_checkpoint.py --lora, or put it beside the base when generating: "
      "--config.loras"
    )
  for path, (a, b) in lora.factors.items():
    delta = (*b.shape[:-1], a.shape[-1])
    if path not in shapes:
      problems.append(f"{path} {delta} is no parameter")
    elif tuple(shapes[path]) != delta:
      problems.append(f"{path} has shape {tuple(shapes[path])}, the LoRA gives {delta}")
  if problems:
    raise ValueError(
      "the LoRA belongs to another transformer; give one of its size:\n  "
      + "\n  ".join(problems)
    )


def merge_leaves(
  leaves: Iterable[tuple[str, np.ndarray]], loras: Sequence[tuple[Lora, float]]
) -> Iterator[tuple[str, np.ndarray]]:
  """Merges adapters into parameters as they pass by.

  Args:
    leaves: (parameter path, array); arrays that have an adapter are changed in place
      where they are writable.
    loras: (adapter, weight); several add up before the one rounding.
  """
  for path, array in leaves:
    chosen = [(lora, weight) for lora, weight in loras if path in lora.factors]
    if chosen:
      array = array if array.flags.writeable else array.copy()
      parts = array.reshape(-1, *array.shape[-2:])
      for i, part in enumerate(parts):
        part[...] = _merged(part, path, i, chosen).astype(part.dtype)
    yield path, array


def _merged(
  part: np.ndarray, path: str, i: int, loras: Sequence[tuple[Lora, float]]
) -> np.ndarray:
  total = part.astype(np.float32)
  for lora, weight in loras:
    a, b = (f.reshape(-1, *f.shape[-2:])[i] for f in lora.factors[path])
    total += np.float32(weight * lora.alpha / lora.rank) * (b @ a)
  return total


def merge_lora(params: Any, lora: Lora, weight: float = 1.0) -> Any:
  """A network (or any pytree with its parameter paths) with an adapter merged in.

  Raises:
    ValueError: the adapter belongs to another network.
  """
  named = store.named_leaves(params)
  check_lora(lora, {path: leaf.shape for path, leaf in named.items()})
  changed = ((path, np.array(named[path])) for path in lora.factors)
  merged = dict(merge_leaves(changed, [(lora, weight)]))

  def pick(path, leaf):
    new = merged.get(store.path_name(path))
    return leaf if new is None else jax.device_put(jnp.asarray(new), leaf.sharding)

  return jax.tree_util.tree_map_with_path(pick, params)


# ---------------------------------------------------------------------- beside
def parameter_shapes(network: dit.CausalDiT) -> dict[str, tuple[int, ...]]:
  """Shapes of the weights of linear layers, of any type, by parameter path.

  Runs of blocks count as the one stack that they were.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  for layer, weight in weights.matrices(network).items():
    name, in_run = _parameter(layer)
    before = shapes[name][0] if name in shapes else 0
    whole = (before + weight.shape[0], *weight.shape[1:])
    shapes[name] = whole if in_run else weight.shape
  return shapes


def attach_lora(network: dit.CausalDiT, lora: Lora, weight: float = 1.0) -> Any:
  """A network that applies an adapter without merging it; several add up.

  Factors may be tracers: gradients go to them, and not to the network.

  Args:
    network: its weights may be of any type, quantised ones too.

  Raises:
    ValueError: the adapter belongs to another network.
  """
  check_lora(lora, parameter_shapes(network))
  scale = weight * lora.alpha / lora.rank
  done = Counter[str]()  # layers of the runs so far

  def attach(path: tuple[Any, ...], node: Any) -> Any:
    name, in_run = _parameter(weights.layer_path(path))
    if not weights.is_matrix(node) or name not in lora.factors:
      return node
    a, b = (jnp.asarray(factor, jnp.float32) for factor in lora.factors[name])
    base = node.get_value()
    if in_run:
      first, done[name] = done[name], done[name] + base.shape[0]
      a, b = a[first : done[name]], b[first : done[name]]
    b = scale * b  # in float32: rounded once
    return node.replace(
      beside(base, a.astype(network.dtype), b.astype(network.dtype))
    )

  return jax.tree_util.tree_map_with_path(attach, network, is_leaf=weights.is_matrix)


def _parameter(layer: str) -> tuple[str, bool]:
  """Parameter path of a layer "blocks/1/ffn/fc1", and whether it is in a run."""
  name, in_run = re.subn(r"^blocks/\d+/", "blocks/", layer)
  return name.replace("/", ".") + ".weight", bool(in_run)


# ---------------------------------------------------------------------- files
def save_lora(
  path: store.PathLike,
  lora: Lora,
  source: str = "",
  *,
  base: str = "",
  overwrite: bool = False,
) -> None:
  """Writes an adapter as a checkpoint of kind "lora".

  Args:
    base: the checkpoint that it was trained on, for the record.
    overwrite: replaces an existing one.
  """
  tree = {
    f"{name}.lora_{letter}": factor
    for name, pair in lora.factors.items()
    for letter, factor in zip("AB", pair, strict=True)
  }
  record = {
    "kind": "lora",
    "rank": lora.rank,
    "alpha": lora.alpha,
    "source": source,
    "base": base,
  }
  store.save(path, tree, record, overwrite=overwrite)


def save_peft(folder: store.PathLike, lora: Lora, base: str = "") -> None:
  """Writes an adapter as PEFT does: a folder of PEFT_FILES, over what is there.

  Args:
    base: the checkpoint that it was trained on, for the record.
  """
  arrays = {}
  for path, pair in lora.factors.items():
    for letter, factor in zip("AB", map(np.asarray, pair), strict=True):
      parts = factor if factor.ndim == 3 else [factor]
      modules = torch_names.module_names("dit", path, len(parts))
      for module, part in zip(modules, parts, strict=True):
        arrays[f"base_model.model.{module}.lora_{letter}.weight"] = part
  modules = sorted({_KEY.fullmatch(name)[1] for name in arrays})
  config = {
    "peft_type": "LORA",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": modules,
    "inference_mode": True,
  }
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors, record = (folder / name for name in PEFT_FILES)
  specs = {name: (part.shape, part.dtype) for name, part in arrays.items()}
  torch_files.write_safetensors(tensors, specs, arrays.items(), {"format": "pt"})
  record.write_text(json.dumps(config, indent=2) + "\n")


def load_lora(
  path: store.PathLike,
  layers: int,
  alpha: float | None = None,
  *,
  abstract: bool = False,
) -> Lora:
  """Reads an adapter: a checkpoint of kind "lora", a folder of PEFT, or a PyTorch file.

  Args:
    layers: blocks of the transformer.
    alpha: that of the checkpoint or of PEFT's adapter_config.json if not given; the
      rank where neither is.
    abstract: shapes for factors; no number is read.

  Raises:
    FileNotFoundError, ValueError: as `store.load` and `lora_from_torch`; also for a
      PEFT adapter of another kind.
  """
  if not (Path(path) / "_CHECKPOINT_METADATA").exists():
    alpha = _peft_alpha(Path(path)) if alpha is None else alpha
    content = torch_files.open_tensors(path)
    return lora_from_torch(content, layers, alpha, abstract=abstract)
  record = store.load_metadata(path)
  if record.get("kind") != "lora":
    raise ValueError(f"lora={path} holds a {record.get('kind')!r}; give an adapter")
  tree = store.describe(path) if abstract else store.load(path)
  names = sorted({name.rpartition(".lora_")[0] for name in tree})
  factors = {n: (tree[f"{n}.lora_A"], tree[f"{n}.lora_B"]) for n in names}
  alpha = record["alpha"] if alpha is None else alpha
  return Lora(factors, record["rank"], float(alpha))


def _peft_alpha(path: Path) -> float | None:
  """What adapter_config.json says, in the folder or beside the file of this name."""
  tensors, record = PEFT_FILES
  file = (path.parent if path.name == tensors else path) / record
  if not file.exists():
    return None
  config = json.loads(file.read_text())
  if odd := [name for name in _OTHER_MEANINGS if config.get(name)]:
    raise ValueError(
      f"lora={path} has {odd[0]}={config[odd[0]]} in {record}, which is not known "
      "here; give an adapter with one rank and one alpha"
    )
  return config.get("lora_alpha")
