"""Transformers quantised in PyTorch by FourOverSix, in and out, byte for byte (SPEC 9).

The published ("materialised") format has four tensors in the place of a weight
`<m>.weight` (out, in); everything else is as in a plain checkpoint:

  <m>.quantized_weight_values         uint8 (rows, columns / 2), even element low
  <m>.quantized_weight_scale_factors  float8_e4m3fn (rows * columns / 16,), swizzled
  <m>.quantized_weight_amax           float32 (1,)
  <m>.quantized_weight_metadata       int32 (4,): out, in, rows, columns

rows and columns are those of the matrix padded with zeros to multiples of 128 and 64.
The rule is that of the run, not of a tensor: it stands beside the tensors, in a
"quantization" record, or must be given.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import quantised, store, torch_files, torch_names
from longlive_jax.checkpoint.torch_files import Tensor
from longlive_jax.models import dit
from longlive_jax.quant import layout, nvfp4, weights
from longlive_jax.quant.nvfp4 import BLOCK, NVFP4Array

Shape = tuple[int, ...]

FORMAT = "longlive_generator_nvfp4"
PREFIX = "quantized_weight_"
ROWS, COLUMNS = layout.TILE_ROWS, layout.TILE_COLUMNS * BLOCK  # padded to multiples


# ---------------------------------------------------------------------- one matrix
def buffer_specs(out: int, inner: int) -> dict[str, tuple[Shape, np.dtype]]:
  """Shapes and dtypes of a weight's four tensors, by the ends of their names."""
  _, _, rows, columns = _sizes(out, inner)
  return {
    "values": ((rows, columns // 2), np.dtype(np.uint8)),
    "scale_factors": ((rows * columns // BLOCK,), np.dtype(jnp.float8_e4m3fn)),
    "amax": ((1,), np.dtype(np.float32)),
    "metadata": ((4,), np.dtype(np.int32)),
  }


def to_buffers(matrix: NVFP4Array) -> dict[str, np.ndarray]:
  """The four tensors of a quantised weight (out, in), by the ends of their names."""
  out, inner, rows, columns = sizes = _sizes(*matrix.shape)
  bits = np.asarray(matrix.scales).view(np.uint8)
  more, right = (0, rows - out), columns - inner
  bits = np.pad(bits, [more, (0, right // BLOCK)])
  return {
    "values": np.pad(np.asarray(matrix.codes), [more, (0, right // 2)]),
    "scale_factors": layout.swizzle_scales(bits).view(jnp.float8_e4m3fn),
    "amax": np.asarray(matrix.amax, np.float32).reshape(1),
    "metadata": np.array(sizes, np.int32),
  }


def from_buffers(
  name: str, buffers: Mapping[str, np.ndarray], rule: str
) -> NVFP4Array:
  """A quantised weight (out, in) in NumPy; the inverse of `to_buffers`.

  Args:
    name: of the layer, for errors.
    buffers: by the ends of their names. Scales may be raw uint8 bits, and the amax 0-d,
      as the software quantiser leaves it (SPEC 13.11).
    rule: by which it was quantised.

  Raises:
    ValueError: numbers in the padding.
  """
  out, inner, rows, columns = (int(n) for n in buffers["metadata"])
  codes, bits = buffers["values"], buffers["scale_factors"].view(np.uint8)
  bits = layout.unswizzle_scales(bits, rows, columns // BLOCK)
  kept = codes[:out, : inner // 2], bits[:out, : inner // BLOCK]
  for whole, part in zip((codes, bits), kept, strict=True):
    if np.count_nonzero(whole) > np.count_nonzero(part):
      raise ValueError(
        f"{name} has numbers in its padding to {rows} x {columns}, which must be zero; "
        "the source is damaged or of another layout"
      )
  scales = np.ascontiguousarray(kept[1]).view(jnp.float8_e4m3fn)
  amax = buffers["amax"].astype(np.float32).reshape(())
  return NVFP4Array(kept[0], scales, amax, nvfp4.rule_of(rule).span)


def _sizes(out: int, inner: int) -> tuple[int, int, int, int]:
  return out, inner, out + -out % ROWS, inner + -inner % COLUMNS


def _check_scales(module: str, scales: np.ndarray, amax: np.ndarray, rule: str) -> None:
  numbers = scales.view(jnp.float8_e4m3fn).astype(np.float32)
  if not (np.isfinite(numbers).all() and np.isfinite(amax).all()):
    raise ValueError(
      f"{module} has scales that are not finite: its weight had such numbers, or the "
      "source is damaged; quantise it again from finite weights"
    )
  # The block of the tensor's maximum has a scale of 448 with a static rule, and of 256
  # or 384 with four over six. A wrong rule would scale the weight by 1.75 or 1.17.
  largest = float(numbers.max())
  if largest and (largest == 448) != rule.startswith("static"):
    raise ValueError(
      f"rule={rule!r} cannot have made the scales of {module}, the largest of which is "
      f"{largest:g}; use {'a static rule' if largest == 448 else 'mse'}"
    )


# ---------------------------------------------------------------------- import
def import_checkpoint(
  source: store.PathLike,
  out: store.PathLike,
  *,
  rule: str = "",
  mode: str = "w4a16",
  size: str = "",
) -> dict[str, Any]:
  """Makes a packed checkpoint of a published one, without quantising anything again.

  Args:
    source: .safetensors, .pt or .pth file, or a folder of safetensors.
    out: checkpoint folder to make.
    rule: by which the weights were quantised; needed where the source does not say.
    mode: of `weights.MODES`.
    size: of the transformer by name; read off the tensors' shapes if not given.

  Returns:
    The record of the new checkpoint.

  Raises:
    FileNotFoundError, FileExistsError, ImportError: as `convert.convert`.
    ValueError: no quantised weights, tensors that are missing, too many, misshapen or
      of another dtype, scales that are not finite, a rule that is unknown or not that
      of the weights; all before anything is written. Numbers in the padding are found
      while it is written; nothing is left at `out`.
  """
  if Path(out).exists():
    raise FileExistsError(f"out={out} exists; remove it or choose another")
  if size and size not in dit.SIZES:
    raise ValueError(f"size={size!r} is unknown; use one of {sorted(dit.SIZES)}")
  weights.check_mode(mode)
  content = torch_files.open_tensors(source)
  rule, activation_rule = _rules(source, content, rule)
  tensors = torch_files.state_dict(content)
  modules = _modules(tensors)
  shapes = _plain_shapes(tensors, modules)
  config = dit.SIZES[size] if size else torch_names.infer_config("dit", shapes)
  torch_names.check_names("dit", config, shapes)
  for module in modules:
    scales, amax = (
      tensors[f"{module}.{PREFIX}{end}"].read() for end in ("scale_factors", "amax")
    )
    _check_scales(module, scales, amax, rule)
  entry = quantised.packed_entry(mode, rule, activation_rule)
  listed = {
    path: entry if dtype is None else {"format": dtype.name}
    for path, dtype in _dtypes(config, tensors, modules).items()
  }
  plain = {name: tensors[name] for name in shapes if name in tensors}
  dtype = torch_names.main_dtype(plain)
  record = quantised.record_of("dit", config, dtype, listed, str(source))
  store.save_stream(out, _leaves(config, tensors, listed), record)
  return record


def _leaves(
  config: dit.WanConfig,
  tensors: Mapping[str, Tensor],
  listed: Mapping[str, quantised.Entry],
) -> Iterator[tuple[str, np.ndarray]]:
  for path, leaf in _tree(config).items():
    entry = listed[path]
    if entry["format"] == "nvfp4":
      names = torch_names.torch_tensors("dit", config, path, leaf.shape)
      layers = [_read(tensors, name, entry["rule"]) for name, _ in names]
      yield from quantised.parts(path, _stacked(layers, leaf.shape[:-2])).items()
    else:
      array = np.empty(leaf.shape, jnp.dtype(entry["format"]))
      for name, view in torch_names.torch_views("dit", config, path, array):
        tensors[name].fill(view)
      yield path, array


def _tree(config: dit.WanConfig) -> dict[str, Any]:
  return store.named_leaves(store.abstract_network("dit", config))


def _rules(
  source: store.PathLike, content: Mapping[str, Any], rule: str
) -> tuple[str, str]:
  """The rules of weights and of activations.

  Raises:
    ValueError: neither given nor stated, or unknown.
  """
  about = _quantization(source, content)
  rule = rule or about.get("weight_scale_rule") or about.get("scale_rule") or ""
  if not rule:
    raise ValueError(
      f"source={source} does not say by which rule it was quantised; give --rule, "
      f"one of {', '.join(nvfp4.RULES)}"
    )
  activation_rule = about.get("activation_scale_rule") or rule
  for name, value in (("rule", rule), ("activation_scale_rule", activation_rule)):
    if value not in tuple(nvfp4.RULES):  # a header may hold anything, also a list
      raise ValueError(
        f"{name}={value!r} is unknown; use {', '.join(nvfp4.RULES)}, with --rule or "
        f'under "quantization" in source={source}'
      )
  return rule, activation_rule


def _quantization(source: store.PathLike, content: Mapping[str, Any]) -> dict[str, Any]:
  """What is written beside the tensors: in the container, or in the files' headers.

  Raises:
    ValueError: it is no JSON object, or files of a folder differ in it.
  """
  headers = torch_files.read_headers(source)
  texts = {h["quantization"] for h in headers if "quantization" in h}
  if len(texts) > 1:
    raise ValueError(
      f'source={source} holds files that differ in "quantization": {sorted(texts)}; '
      "give the files of one checkpoint"
    )
  try:
    found = json.loads(texts.pop()) if texts else content.get("quantization", {})
    if not isinstance(found, dict):
      raise ValueError(f"it is a {type(found).__name__}")
    return found
  except ValueError as error:
    raise ValueError(
      f'source={source} has a "quantization" record that cannot be read: {error}; '
      'it must be an object such as {"weight_scale_rule": "mse"}'
    ) from error


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
  end = f".{PREFIX}values"
  modules = [name.removesuffix(end) for name in tensors if name.endswith(end)]
  if not modules:
    raise ValueError(
      "source has no weights quantised by FourOverSix; convert plain ones with "
      "tools/convert_checkpoint.py and quantise the result"
    )
  return modules


def _plain_shapes(
  tensors: Mapping[str, Tensor], modules: list[str]
) -> dict[str, Shape]:
  """Shapes by name as if no weight were quantised.

  Raises:
    ValueError: tensors of quantised weights that are missing, misshapen or of another
      dtype.
  """
  shapes = {n: t.shape for n, t in tensors.items() if f".{PREFIX}" not in n}
  problems = []
  for module in modules:
    key = f"{module}.{PREFIX}metadata"
    stored = tensors.get(key)
    if stored is None or stored.shape != (4,) or stored.dtype != np.int32:
      problems.append(f"{key} int32 (4,) is missing")
      continue
    sizes = tuple(int(n) for n in stored.read())
    if sizes != _sizes(*sizes[:2]) or sizes[1] % BLOCK:
      problems.append(f"{key} = {sizes} is not padded to {ROWS} and {COLUMNS}")
      continue
    for end, (shape, dtype) in buffer_specs(*sizes[:2]).items():
      name = f"{module}.{PREFIX}{end}"
      found = tensors[name].shape if name in tensors else None
      allowed = (dtype, np.uint8) if end == "scale_factors" else (dtype,)
      if found != shape and (end, found) != ("amax", ()):
        problems.append(f"{name} has shape {found} instead of {shape}")
      elif tensors[name].dtype not in allowed:
        problems.append(f"{name} is {tensors[name].dtype} instead of {dtype}")
    shapes[f"{module}.weight"] = sizes[:2]
  if problems:
    raise ValueError(
      f"source is no FourOverSix checkpoint, in {len(problems)} tensors; export it "
      "again:\n  " + "\n  ".join(problems)
    )
  return shapes


def _dtypes(
  config: dit.WanConfig, tensors: Mapping[str, Tensor], modules: list[str]
) -> dict[str, np.dtype | None]:
  """Dtype by parameter path; None for a quantised weight.

  Raises:
    ValueError: the layers of one parameter have several.
  """
  found: dict[str, np.dtype | None] = {}
  packed = {f"{module}.weight" for module in modules}
  for path, leaf in _tree(config).items():
    names = [n for n, _ in torch_names.torch_tensors("dit", config, path, leaf.shape)]
    kinds = {None if name in packed else tensors[name].dtype for name in names}
    if len(kinds) > 1:
      words = sorted("NVFP4" if dtype is None else dtype.name for dtype in kinds)
      raise ValueError(
        f"source holds layers of {path} in {' and '.join(words)}; only layers of one "
        "precision can be imported"
      )
    found[path] = kinds.pop()
  return found


def _read(tensors: Mapping[str, Tensor], name: str, rule: str) -> NVFP4Array:
  module = name.removesuffix(".weight")
  ends = ("values", "scale_factors", "amax", "metadata")
  buffers = {end: tensors[f"{module}.{PREFIX}{end}"].read() for end in ends}
  return from_buffers(module, buffers, rule)


def _stacked(layers: list[NVFP4Array], lead: Shape) -> NVFP4Array:
  """Weights (out, in) of layers as one (*lead, out, in)."""
  parts = [np.stack([getattr(m, p) for m in layers]) for p in quantised.PARTS]
  parts = [part.reshape(*lead, *part.shape[1:]) for part in parts]
  return NVFP4Array(*parts, layers[0].span)


# ---------------------------------------------------------------------- export
def export_checkpoint(
  source: store.PathLike, out: store.PathLike, prefix: str = ""
) -> None:
  """Writes a packed checkpoint of a transformer as safetensors in this format.

  Args:
    source: checkpoint folder.
    out: file to make.
    prefix: in front of every name, e.g. "model.".

  Raises:
    FileNotFoundError: no checkpoint at source.
    ValueError: damaged, no transformer, not quantised, or of runs of layers.
  """
  record = store.load_record(source, "dit")
  if not store.is_packed(record):
    raise ValueError(f"source={source} has no quantised weights; use convert.export")
  if record.get("run_starts"):
    raise ValueError(
      f"source={source} has layers of different precision, which this export has not; "
      "quantise all layers alike"
    )
  config = store.network_config("dit", record["config"])
  stored = store.describe(source)
  specs = {prefix + n: spec for n, spec in tensor_specs(config, stored).items()}

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for path, entry in record["weights"].items():
      if entry["format"] != "nvfp4":
        (array,) = (array for _, array in store.load_leaves(source, [path]))
        views = torch_names.torch_views("dit", config, path, array)
        yield from ((prefix + name, view) for name, view in views)
        continue
      names = [f"{path}.{part}" for part in quantised.PARTS]
      arrays = (array for _, array in store.load_leaves(source, names))
      whole = NVFP4Array(*arrays, entry["span"])
      modules = torch_names.torch_tensors("dit", config, path, whole.shape)
      for (name, _), i in zip(modules, np.ndindex(whole.amax.shape), strict=True):
        one = jax.tree.map(lambda part, i=i: part[i], whole)
        for end, buffer in to_buffers(one).items():
          yield prefix + _buffer_name(name, end), buffer

  torch_files.write_safetensors(out, specs, tensors(), _header(record))


def tensor_specs(
  config: dit.WanConfig, stored: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, tuple[Shape, Any]]:
  """Shapes and dtypes of all tensors of an export, by name.

  Args:
    stored: the arrays of the checkpoint by their names.
  """
  specs: dict[str, tuple[Shape, Any]] = {}
  for stored_name, leaf in stored.items():
    path, _, part = stored_name.rpartition(".")
    if f"{path}.codes" not in stored:
      tensors = torch_names.torch_tensors("dit", config, stored_name, leaf.shape)
      specs |= {name: (shape, leaf.dtype) for name, shape in tensors}
    elif part == "codes":
      shape = (*leaf.shape[:-1], 2 * leaf.shape[-1])
      for name, one in torch_names.torch_tensors("dit", config, path, shape):
        buffers = buffer_specs(*one)
        specs |= {_buffer_name(name, end): spec for end, spec in buffers.items()}
  return specs


def _buffer_name(name: str, end: str) -> str:
  return f"{name.removesuffix('weight')}{PREFIX}{end}"


def _header(record: Mapping[str, Any]) -> dict[str, str]:
  entries = [e for e in record["weights"].values() if e["format"] == "nvfp4"]
  rule = quantised.packed_rule(record)
  about = {
    "format": "nvfp4",
    "backend": "fouroversix",
    "materialized": True,
    "dtype": record["dtype"],
    "scale_rule": rule,
    "weight_scale_rule": rule,
    "activation_scale_rule": entries[0].get("activation_rule", rule),
  }
  return {
    "checkpoint_format": FORMAT,
    "checkpoint_version": "1",
    "quantization": json.dumps(about),
  }
