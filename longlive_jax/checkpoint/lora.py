"""Low-rank adapters: merged into the weights they belong to (SPEC 12).

W + weight * alpha / rank * B A, in float32, then rounded once to W's dtype. Adapters
are kept like the parameters they change: factors of all layers stacked, under the
parameter's path ("blocks.self_attn.q.weight").
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import store, torch_files, torch_names
from longlive_jax.layers import linear

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclasses.dataclass(frozen=True)
class Lora:
  """An adapter of the transformer.

  Attributes:
    factors: parameter path -> (A (l, rank, in), B (l, out, rank)); no leading l for a
      parameter that is not stacked. Layers without an adapter are zero.
    rank: inner size of all factors.
    alpha: scale before division by the rank.
  """

  factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
  rank: int
  alpha: float


def lora_from_torch(
  content: Mapping[str, Any], layers: int, alpha: float | None = None
) -> Lora:
  """Collects an adapter from a checkpoint's tensors.

  Args:
    content: what `torch_files.open_tensors` gave, or tensors or arrays by name: bare
      or under `generator_lora`.
    layers: blocks of the transformer.
    alpha: the rank if not given.

  Raises:
    ValueError: not an adapter, one of another model, or of factors that do not fit
      each other; all faults are reported together.
  """
  content = content.get("generator_lora", content)
  found: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
  problems = []
  for name, value in content.items():
    match = _KEY.fullmatch(name)
    place = match and torch_names.parameter_path("dit", f"{match[1]}.weight")
    if not place or (place[1] is not None and place[1] >= layers):
      problems.append(f"{name} belongs to no layer of a transformer of {layers} blocks")
      continue
    path, layer = place
    factor = torch_names.as_tensor(value).read().astype(np.float32)
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
  if len(ranks) > 1:
    problems.append(f"layers have different ranks {sorted(ranks)}")
  if problems or not found:
    raise ValueError(
      "source is not a LoRA of this transformer; give the adapter file that belongs to "
      "it:\n  " + "\n  ".join(problems or ["it holds no lora_A and lora_B"])
    )
  (rank,) = ranks
  factors = {path: _stack(by_layer, layers) for path, by_layer in found.items()}
  return Lora(factors, rank, float(rank if alpha is None else alpha))


def _stack(
  by_layer: Mapping[int | None, Mapping[str, np.ndarray]], layers: int
) -> tuple[np.ndarray, np.ndarray]:
  if None in by_layer:
    return by_layer[None]["A"], by_layer[None]["B"]
  some = next(iter(by_layer.values()))
  a = np.zeros((layers, *some["A"].shape), np.float32)
  b = np.zeros((layers, *some["B"].shape), np.float32)
  for layer, pair in by_layer.items():
    a[layer], b[layer] = pair["A"], pair["B"]
  return a, b


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
      "tools/quantize_checkpoint.py --lora"
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
  """A weight with its adapter beside it, in the place of a plain weight.

  Attributes:
    base: (..., out, in).
    a, b: factors (..., rank, in) and (..., out, rank).
    scale: weight * alpha / rank, static.
  """

  base: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})


@linear.matmul_rule.register(LoraWeight)
def _matmul_lora(weight: LoraWeight, x: jax.Array) -> jax.Array:
  low = linear.matmul(linear.matmul(x, weight.a), weight.b)
  return linear.matmul(x, weight.base) + weight.scale * low


def attach_lora(network: Any, lora: Lora, weight: float = 1.0) -> Any:
  """A network that applies an adapter without merging it: to train or to switch it.

  Raises:
    ValueError: the adapter belongs to another network.
  """
  check_lora(lora, {p: leaf.shape for p, leaf in store.named_leaves(network).items()})
  scale = float(weight * lora.alpha / lora.rank)

  def attach(path, leaf):
    factors = lora.factors.get(store.path_name(path))
    if factors is None:
      return leaf
    return LoraWeight(leaf, *(jnp.asarray(f, leaf.dtype) for f in factors), scale)

  return jax.tree_util.tree_map_with_path(attach, network)


def save_lora(path: store.PathLike, lora: Lora, source: str = "") -> None:
  """Writes an adapter as a checkpoint of kind "lora"."""
  tree = {
    f"{name}.lora_{letter}": factor
    for name, pair in lora.factors.items()
    for letter, factor in zip("AB", pair, strict=True)
  }
  record = {"kind": "lora", "rank": lora.rank, "alpha": lora.alpha, "source": source}
  store.save(path, tree, record)


def load_lora(path: store.PathLike, layers: int, alpha: float | None = None) -> Lora:
  """Reads an adapter: a checkpoint of kind "lora", or a PyTorch file.

  Raises:
    FileNotFoundError, ValueError: as `store.load` and `lora_from_torch`.
  """
  if not (Path(path) / "_CHECKPOINT_METADATA").exists():
    return lora_from_torch(torch_files.open_tensors(path), layers, alpha)
  record = store.load_metadata(path)
  if record.get("kind") != "lora":
    raise ValueError(f"lora={path} holds a {record.get('kind')!r}; give an adapter")
  tree = store.load(path)
  names = sorted({name.rpartition(".lora_")[0] for name in tree})
  factors = {n: (tree[f"{n}.lora_A"], tree[f"{n}.lora_B"]) for n in names}
  alpha = record["alpha"] if alpha is None else alpha
  return Lora(factors, record["rank"], float(alpha))
