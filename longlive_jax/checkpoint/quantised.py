"""Checkpoints of networks with 4-bit weights: written, read, made from plain ones.

On disk a quantised weight is three arrays under its parameter path, whatever it is
multiplied with:

  blocks.ffn.fc1.weight.codes    uint8 (l, out, in / 2)
  blocks.ffn.fc1.weight.scales   float8_e4m3fn (l, out, in / 16)
  blocks.ffn.fc1.weight.amax     float32 (l,)

and the record of the checkpoint lists every parameter under "weights":

  {"format": "bfloat16"}                                                   plain
  {"format": "nvfp4", "mode": "w4a16", "rule": "mse", "span": 1536.0}      quantised

`mode` says what a weight is used for (quant/weights.py); those with quantised
activations also have "activation_rule" and "per_sample". Reading never makes float
weights, quantising holds those of one parameter.

FP8 weights are not stored: they are quantised from a plain checkpoint whenever it is
loaded, which rounds in the same way every time.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.checkpoint import lora, store
from longlive_jax.models import block_scan, dit
from longlive_jax.quant import fp8, nvfp4, weights
from longlive_jax.quant.fp8 import FP8Array
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array
from longlive_jax.quant.weights import W4A4, W8A8

Entry = Mapping[str, Any]
Leaves = Iterable[tuple[str, np.ndarray]]
PARTS = ("codes", "scales", "amax")


# ---------------------------------------------------------------------- what is what
def packed_rule(record: Mapping[str, Any]) -> str:
  """The rule by which a packed checkpoint's weights were quantised."""
  return next(e["rule"] for e in record["weights"].values() if "rule" in e)


def describe_weights(network: Any, rule: str) -> dict[str, Entry]:
  """The precision of every parameter of a network, which may be abstract.

  Args:
    rule: by which its weights were quantised; codes and scales do not tell.

  Returns:
    parameter path -> entry, as it stands in the record.

  Raises:
    ValueError: the weights are not of that rule.
  """
  return {path: _entry(path, leaf, rule) for path, leaf in _parameters(network).items()}


def packed_entry(
  mode: str, rule: str, activation_rule: str = "", per_sample: bool = True
) -> Entry:
  """The entry of a quantised weight.

  Args:
    mode: of `weights.MODES`.
    rule: of the weight.
    activation_rule, per_sample: of `W4A4`; the rule of the weight if not given.

  Raises:
    ValueError: an unknown rule, or a mode in FP8.
  """
  check_stored(mode)
  span = nvfp4.rule_of(rule).span
  entry = {"format": "nvfp4", "mode": mode, "rule": rule, "span": span}
  if mode == "w4a16":
    return entry
  return {
    **entry, "activation_rule": activation_rule or rule, "per_sample": per_sample
  }


def check_stored(mode: str) -> None:
  """Raises ValueError for a mode whose weights no checkpoint holds."""
  if mode in weights.FP8_MODES:
    raise ValueError(
      f"mode={mode!r} is not stored: FP8 weights are quantised when they are loaded; "
      f"keep the plain checkpoint, and generate from it with precision={mode!r}"
    )


def record_of(
  kind: str, config: Any, dtype: Any, listed: Mapping[str, Entry], source: str = ""
) -> dict[str, Any]:
  """The record of a checkpoint with quantised weights."""
  return {**store.network_metadata(kind, config, dtype, source), "weights": listed}


def checkpoint_bytes(path: store.PathLike) -> dict[str, int]:
  """Bytes of a network's checkpoint by precision, as `weights.weight_bytes`.

  Raises:
    FileNotFoundError, ValueError: there is none, or it is damaged.
  """
  listed = store.load_metadata(path).get("weights", {})
  packed = {name for name, entry in listed.items() if entry["format"] == "nvfp4"}
  found: dict[str, int] = {}
  for name, leaf in store.describe(path).items():
    kind = "nvfp4" if name.rpartition(".")[0] in packed else leaf.dtype.name
    found[kind] = found.get(kind, 0) + leaf.size * leaf.dtype.itemsize
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def stored_leaves(network: Any) -> dict[str, Any]:
  """The arrays of a network, which may be abstract, by their names in a checkpoint."""
  leaves: dict[str, Any] = {}
  for path, leaf in _parameters(network).items():
    leaves |= parts(path, _packed(leaf)) if _is_weight(leaf) else {path: leaf}
  return leaves


def parts(path: str, packed: NVFP4Array | FP8Array) -> dict[str, Any]:
  """The arrays of a quantised weight by their names in a checkpoint."""
  return {f"{path}.{name}": leaf for name, leaf in store.named_leaves(packed).items()}


# ---------------------------------------------------------------------- write and read
def save_network(
  path: store.PathLike,
  network: Any,
  *,
  rule: str,
  source: str = "",
  overwrite: bool = False,
) -> None:
  """Writes a network with quantised weights; `store.save_network` is for plain ones.

  Args:
    rule: as for `describe_weights`.
    source: where the weights are from, for the record.

  Raises:
    FileExistsError: as `store.save`.
    ValueError: no weight is quantised, one is in FP8, another rule, or an adapter is
      attached.
  """
  kinds = {module: kind for kind, (module, _, _) in store.NETWORKS.items()}
  kind = kinds[type(network)]
  listed = describe_weights(network, rule)
  for mode in {entry.get("mode", "") for entry in listed.values()}:
    check_stored(mode)
  record = record_of(kind, network.config, _plain_dtype(network), listed, source)
  if not store.is_packed(record):
    raise ValueError(
      f"path={path}: no weight of the network is quantised; use store.save_network"
    )
  starts = _run_starts(network)
  known = _parameters(_abstract(kind, network.config, jnp.float32, {}, starts))
  if odd := sorted(set(known) ^ set(listed)):
    raise ValueError(
      f"path={path}: parameters {odd[:4]} are not those of a {kind!r} network; merge "
      "adapters before quantising"
    )
  record["run_starts"] = starts
  store.save(path, stored_leaves(network), record, overwrite=overwrite)


def load_network(
  path: store.PathLike, kind: str, dtype: Any = None, *, mode: str = ""
) -> Any:
  """Builds and fills a network with quantised weights as its checkpoint describes it.

  Args:
    path: checkpoint folder.
    kind: "dit", "vae" or "umt5"; what the caller expects.
    dtype: of the parameters that are not quantised; the stored one if not given.
    mode: of `weights.MODES` in NVFP4, to use the stored codes in another way than they
      were saved for; activations then have the rule that was stored for them, or else
      that of the weights.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: it is damaged, of another kind, has no quantised weights, or asks for
      arithmetic that this machine lacks.
  """
  tree = abstract_network(path, kind, dtype, mode=mode)
  return _filled(tree, store.load(path, stored_leaves(tree)))


def abstract_network(
  path: store.PathLike, kind: str, dtype: Any = None, *, mode: str = ""
) -> Any:
  """What `load_network` would give, with shapes for arrays; reads the record only."""
  record = store.load_record(path, kind)
  if not store.is_packed(record):
    raise ValueError(
      f"{kind}={path} holds weights in {record['dtype']} and none in NVFP4; load it "
      "with store.load_network, or quantise it with tools/quantize_checkpoint.py"
    )
  listed = {name: _used(entry, mode) for name, entry in record["weights"].items()}
  for used in {entry["mode"] for entry in listed.values() if "mode" in entry}:
    weights.check_mode(used)
  config = store.network_config(kind, record["config"])
  dtype = jnp.dtype(dtype or record["dtype"])
  return _abstract(kind, config, dtype, listed, record.get("run_starts", ()))


# ---------------------------------------------------------------------- quantise
def quantise_network(
  path: store.PathLike,
  kind: str,
  dtype: Any = None,
  *,
  mode: str = "w4a16",
  rule: str = "mse",
  layers: Sequence[str] = weights.BLOCK_LINEARS,
) -> Any:
  """Reads a plain checkpoint and quantises it on the way.

  The original is never on a device, but for one matrix at a time.

  Args:
    dtype: of the network before it is quantised; the stored one if not given.
    mode, rule, layers: as `weights.quantise_weights`; activations have the same rule.

  Raises:
    FileNotFoundError, ValueError: as `quantise_checkpoint`.
  """
  tree, record = _planned(path, kind, dtype, mode, rule, layers)
  packed = pack_leaves(store.load_leaves(path, store.describe(path)), record)
  device = jax.local_devices()[0]  # committed to it, as what `store.load` gives
  return _filled(tree, {name: jax.device_put(array, device) for name, array in packed})


def quantise_checkpoint(
  source: store.PathLike,
  out: store.PathLike,
  *,
  mode: str = "w4a16",
  rule: str = "mse",
  layers: Sequence[str] = weights.BLOCK_LINEARS,
  adapters: Sequence[store.PathLike] = (),
  dtype: Any = None,
) -> dict[str, Any]:
  """Makes a packed checkpoint of a plain transformer's, one parameter at a time.

  Args:
    source, out: checkpoint folders.
    mode, rule, layers: as `weights.quantise_weights`; activations have the same rule.
      No mode in FP8.
    adapters: LoRA files or checkpoints, merged before the weights are quantised.
    dtype: of the network before it is quantised, and of what stays plain; as stored
      if not given. The reference has bfloat16.

  Returns:
    The record of the new checkpoint.

  Raises:
    FileNotFoundError, FileExistsError: no checkpoint at source, something at out.
    ValueError: damaged, no transformer, quantised already, an adapter that does not
      fit, or as `weights.quantise_weights`; all before anything is written.
  """
  if Path(out).exists():
    raise FileExistsError(f"out={out} exists; remove it or choose another")
  check_stored(mode)
  _, record = _planned(source, "dit", dtype, mode, rule, layers)
  stored = store.describe(source)
  loras = [lora.load_lora(path, record["config"]["layers"]) for path in adapters]
  for adapter in loras:
    lora.check_lora(adapter, {name: leaf.shape for name, leaf in stored.items()})
  if loras:
    record["merged_lora"] = [
      {"source": str(path), "weight": 1.0, "alpha": adapter.alpha}
      for path, adapter in zip(adapters, loras, strict=True)
    ]
  merged = lora.merge_leaves(
    store.load_leaves(source, stored), [(adapter, 1.0) for adapter in loras]
  )
  store.save_stream(out, pack_leaves(merged, record), record)
  return record


def pack_leaves(
  leaves: Leaves, record: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  """Quantises plain parameters as they pass by.

  Args:
    leaves: (parameter path, array).
    record: of the checkpoint that is to come.

  Yields:
    (name in the checkpoint, array).
  """
  for path, array in leaves:
    entry = record["weights"][path]
    if "mode" in entry:
      array = array.astype(jnp.dtype(record["dtype"]), copy=False)
      yield from parts(path, _quantise_layers(array, _quantiser(entry))).items()
    else:
      yield path, array.astype(jnp.dtype(entry["format"]), copy=False)


_to_nvfp4 = jax.jit(nvfp4.quantise, static_argnames="rule")
_to_fp8 = jax.jit(fp8.quantise)


def _quantiser(entry: Entry) -> Callable[[np.ndarray], NVFP4Array | FP8Array]:
  """What makes quantised weights of a matrix (out, in)."""
  if entry["format"] == "fp8":
    return _to_fp8
  return functools.partial(_to_nvfp4, rule=entry["rule"])


def _quantise_layers(
  array: np.ndarray, quantise: Callable[[np.ndarray], NVFP4Array | FP8Array]
) -> NVFP4Array | FP8Array:
  """(..., out, in) in NumPy, one matrix at a time on the device."""
  *lead, rows, columns = array.shape
  one = jax.eval_shape(quantise, jax.ShapeDtypeStruct((rows, columns), array.dtype))
  packed = jax.tree.map(lambda leaf: np.empty((*lead, *leaf.shape), leaf.dtype), one)
  for i in np.ndindex(*lead):
    one = quantise(array[i])
    for whole, part in zip(jax.tree.leaves(packed), jax.tree.leaves(one), strict=True):
      whole[i] = part
  return packed


def _planned(
  path: store.PathLike,
  kind: str,
  dtype: Any,
  mode: str,
  rule: str,
  layers: Sequence[str],
) -> tuple[Any, dict[str, Any]]:
  """The abstract quantised network of a plain checkpoint, and its record."""
  record = store.load_record(path, kind)
  if store.is_packed(record):
    raise ValueError(
      f"{kind}={path} is quantised already, by rule={packed_rule(record)!r}; start "
      "from the checkpoint that it was made from, and merge adapters into that one"
    )
  config = store.network_config(kind, record["config"])
  dtype = jnp.dtype(dtype or record["dtype"])

  def convert(network: Any) -> Any:
    return weights.quantise_weights(
      network, layers, mode=mode, rule=rule, activation_rule=rule
    )

  tree = jax.eval_shape(convert, store.abstract_network(kind, config, dtype))
  listed = describe_weights(tree, rule)
  return tree, {**record, **record_of(kind, config, dtype, listed, str(path))}


# ---------------------------------------------------------------------- trees
def _is_weight(node: Any) -> bool:
  return isinstance(node, weights.QUANTISED)


def _parameters(tree: Any) -> dict[str, Any]:
  """Leaves by parameter path, a quantised weight being one of them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_weight)
  return {store.path_name(path): leaf for path, leaf in leaves}


def _packed(leaf: Any) -> Any:
  return leaf.weight if isinstance(leaf, W4A4 | W8A8) else leaf


def _filled(tree: Any, arrays: Mapping[str, Any]) -> Any:
  """An abstract tree with arrays by their names in a checkpoint."""

  def fill(path, leaf):
    name = store.path_name(path)
    if not _is_weight(leaf):
      return arrays[name]
    found = (arrays[part] for part in parts(name, _packed(leaf)))
    return jax.tree.unflatten(jax.tree.structure(leaf), found)

  return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=_is_weight)


def _abstract(
  kind: str,
  config: Any,
  dtype: Any,
  listed: Mapping[str, Entry],
  starts: Sequence[int],
) -> Any:
  """A network's tree with shapes for arrays and packed weights where they are listed.

  Args:
    starts: first layers of the runs of blocks after the first; empty for one run.
  """

  def build() -> Any:
    network = store.NETWORKS[kind][0](config, dtype=dtype, rngs=nnx.Rngs(0))
    return block_scan.split_blocks(network, starts) if starts else network

  def pack(path, leaf):
    entry = listed.get(store.path_name(path), {})
    return _like(leaf, entry) if entry.get("format") == "nvfp4" else leaf

  return jax.tree_util.tree_map_with_path(pack, jax.eval_shape(build))


def _like(leaf: jax.ShapeDtypeStruct, entry: Entry) -> NVFP4Array | W4A4:
  *lead, rows, columns = leaf.shape
  packed = NVFP4Array(
    jax.ShapeDtypeStruct((*lead, rows, columns // 2), jnp.uint8),
    jax.ShapeDtypeStruct((*lead, rows, columns // BLOCK), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct(tuple(lead), jnp.float32),
    nvfp4.rule_of(entry["rule"]).span,
  )
  if entry["mode"] == "w4a16":
    return packed
  native = entry["mode"] == "w4a4_native"
  return W4A4(packed, entry["activation_rule"], entry["per_sample"], native)


def _entry(path: str, leaf: Any, rule: str) -> Entry:
  if not _is_weight(leaf):
    return {"format": leaf.dtype.name}
  if isinstance(_packed(leaf), FP8Array):
    return {"format": "fp8", "mode": "fp8" if isinstance(leaf, W8A8) else "w8a16"}
  span = _packed(leaf).span
  if span != nvfp4.rule_of(rule).span:
    raise ValueError(
      f"rule={rule!r} is not that of {path}, whose span is {span}; give the rule it "
      "was quantised by"
    )
  if not isinstance(leaf, W4A4):
    return packed_entry("w4a16", rule)
  mode = "w4a4_native" if leaf.native else "w4a4"
  return packed_entry(mode, rule, leaf.rule, leaf.per_sample)


def _used(entry: Entry, mode: str) -> Entry:
  """An entry with another mode, if one is given."""
  if not mode or "mode" not in entry:
    return entry
  return {**packed_entry(mode, entry["rule"]), **entry, "mode": mode}


def _plain_dtype(network: Any) -> jnp.dtype:
  """The dtype of what is not quantised."""
  plain = [leaf for leaf in _parameters(network).values() if not _is_weight(leaf)]
  return max(plain, key=lambda leaf: leaf.size).dtype


def _run_starts(network: Any) -> list[int]:
  if not isinstance(network, dit.CausalDiT):
    return []
  lengths = [len(run.modulation[...]) for run in block_scan.block_runs(network)]
  return np.cumsum(lengths)[:-1].tolist()
