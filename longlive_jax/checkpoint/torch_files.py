"""Reading and writing the files PyTorch projects publish, one tensor at a time.

A source is a mapping from tensor name to `Tensor`: shape and dtype are known at once,
numbers are read when asked for, straight into the array that is to hold them. Nothing
stays mapped into memory, so a conversion needs room for a few tensors, not the file.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

PathLike = str | os.PathLike

_SAFETENSORS_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
  "BOOL": np.bool_,
}  # fmt: skip
_REOPEN_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file.

  Attributes:
    shape, dtype: as stored.
    fill: copies the numbers into a contiguous array of that shape and dtype.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fill: Callable[[np.ndarray], None]

  def read(self) -> np.ndarray:
    out = np.empty(self.shape, self.dtype)
    self.fill(out)
    return out


def open_tensors(path: PathLike) -> dict[str, Any]:
  """Opens a checkpoint as it is: a nested dict with `Tensor`s for tensors.

  Args:
    path: a .safetensors, .pt, .pth or .bin file, or a diffusers-style folder of
      safetensors files, with or without their index.

  Raises:
    FileNotFoundError: no such file, or a file that the index lists is missing.
    ValueError: truncated, or not one of these formats.
    ImportError: a PyTorch file, and torch is not installed.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"source={path} does not exist; check the path")
  if path.is_dir():
    return _open_folder(path)
  if path.suffix == ".safetensors":
    return dict(open_safetensors(path)[0])
  if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
    return _TorchFile(path).tensors()
  raise ValueError(
    f"source={path} is of no known type; give .safetensors, .pt or .pth, or a folder "
    "of .safetensors files"
  )


def read_headers(path: PathLike) -> list[dict[str, str]]:
  """The metadata of every safetensors file of a source; none for a PyTorch file.

  Raises:
    FileNotFoundError, ValueError: as `open_tensors`.
  """
  path = Path(path)
  if path.is_dir():
    files = _folder_files(path)[0]
  else:
    files = [path] if path.suffix == ".safetensors" else []
  return [open_safetensors(file)[1] for file in files]


# ---------------------------------------------------------------------- safetensors
def open_safetensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Tensors and metadata of a safetensors file.

  Raises:
    ValueError: truncated, or not a safetensors file.
  """
  path = Path(path)
  size = path.stat().st_size
  damaged = f"source={path} is truncated or not a safetensors file"
  with path.open("rb") as file:
    header_size = int.from_bytes(file.read(8), "little")
    if size < 8 or header_size > size - 8:
      raise ValueError(f"{damaged}: its header does not fit; download it again")
    try:
      header = json.loads(file.read(header_size))
    except ValueError as error:
      raise ValueError(f"{damaged}: {error}; download it again") from error
  metadata = header.pop("__metadata__", {})
  start = 8 + header_size
  end = start + max((e["data_offsets"][1] for e in header.values()), default=0)
  if end > size:
    raise ValueError(f"{damaged}: {size} bytes instead of {end}; download it again")
  return {name: _entry(path, start, e) for name, e in header.items()}, metadata


def _entry(path: Path, start: int, entry: dict[str, Any]) -> Tensor:
  offset = start + entry["data_offsets"][0]

  def fill(out: np.ndarray) -> None:
    with path.open("rb") as file:
      file.seek(offset)
      if file.readinto(_bytes(out)) != out.nbytes:
        raise ValueError(f"source={path} became shorter while it was read")

  dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
  return Tensor(tuple(entry["shape"]), dtype, fill)


def write_safetensors(
  path: PathLike,
  tensors: Mapping[str, tuple[tuple[int, ...], Any]],
  arrays: Iterable[tuple[str, np.ndarray]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file from arrays that come in any order.

  Args:
    path: file to make; it is written beside and renamed.
    tensors: shape and dtype of every tensor that will come.
    arrays: (name, array).
    metadata: strings for the header.

  Raises:
    ValueError: `arrays` and `tensors` differ.
  """
  path = Path(path)
  names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
  # Wide dtypes first, so that every tensor stays aligned to its dtype.
  order = sorted(tensors, key=lambda n: (-np.dtype(tensors[n][1]).itemsize, n))
  header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  end = 0
  for name in order:
    shape, dtype = tensors[name]
    begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": names[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  left = set(tensors)
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    with unfinished.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name, array in arrays:
        shape, dtype = tensors[name]
        if array.shape != tuple(shape) or array.dtype != dtype:
          raise ValueError(f"{name} is {array.dtype}{array.shape}, not {dtype}{shape}")
        file.seek(8 + len(text) + header[name]["data_offsets"][0])
        file.write(_bytes(np.ascontiguousarray(array)))
        left.remove(name)
    if left:
      raise ValueError(f"{len(left)} tensors never came: {sorted(left)}")
    unfinished.rename(path)
  finally:
    unfinished.unlink(missing_ok=True)


def _bytes(array: np.ndarray) -> memoryview:
  return memoryview(array.reshape(-1).view(np.uint8))


def _folder_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
  """The safetensors files of a folder, and the index: file by tensor, if any."""
  indices = sorted(folder.glob("*.safetensors.index.json"))
  if len(indices) > 1:
    raise ValueError(
      f"source={folder} holds several checkpoints: {[i.name for i in indices]}; "
      "give one of them in a folder of its own"
    )
  listed = None
  if indices:
    listed = json.loads(indices[0].read_text())["weight_map"]
  files = sorted(set(listed.values())) if listed else None
  paths = [folder / f for f in files] if files else sorted(folder.glob("*.safetensors"))
  if missing := [p.name for p in paths if not p.exists()]:
    raise FileNotFoundError(f"source={folder} lacks {missing}; download them")
  if not paths:
    raise FileNotFoundError(f"source={folder} holds no .safetensors file")
  return paths, listed


def _open_folder(folder: Path) -> dict[str, Tensor]:
  paths, listed = _folder_files(folder)
  tensors: dict[str, Tensor] = {}
  for path in paths:
    for name, tensor in open_safetensors(path)[0].items():
      if name in tensors:
        raise ValueError(f"source={folder} holds {name!r} twice, again in {path.name}")
      tensors[name] = tensor
  if listed and (absent := sorted(set(listed) - set(tensors))):
    raise ValueError(f"source={folder} lacks tensors that its index lists: {absent}")
  return tensors


# ---------------------------------------------------------------------- torch
class _TorchFile:
  """A torch.save file. Its tensors are memory-mapped while they are read.

  Pages that were read would stay resident until the mapping goes, so the file is
  opened anew every gigabyte: otherwise converting takes the file's size on top.
  """

  def __init__(self, path: Path):
    self.path = path
    self._content: Any = None
    self._read_bytes = 0

  def tensors(self) -> dict[str, Any]:
    tree = self._describe(self._open(), ())
    if not isinstance(tree, dict):
      raise ValueError(f"source={self.path} holds no dict of tensors")
    return tree

  def _open(self) -> Any:
    torch = _import_torch(self.path)
    if self._content is None or self._read_bytes >= _REOPEN_BYTES:
      self._content, self._read_bytes = None, 0
      options = {"map_location": "cpu", "weights_only": True}
      try:
        zipped = zipfile.is_zipfile(self.path)  # else written by an old torch
        self._content = torch.load(self.path, mmap=zipped, **options)
      except Exception as error:
        raise ValueError(
          f"source={self.path} is truncated or not a checkpoint of plain tensors: "
          f"{(str(error).splitlines() or [type(error).__name__])[0]}; download it again"
        ) from error
    return self._content

  def _describe(self, node: Any, keys: tuple[Any, ...]) -> Any:
    if isinstance(node, dict):
      return {k: self._describe(v, (*keys, k)) for k, v in node.items()}
    if not hasattr(node, "untyped_storage"):
      return node
    dtype = _numpy_view(node[..., :0] if node.ndim else node.reshape(1)[:0]).dtype
    return Tensor(tuple(node.shape), dtype, lambda out: self._fill(keys, out))

  def _fill(self, keys: tuple[Any, ...], out: np.ndarray) -> None:
    node = self._open()
    for key in keys:
      node = node[key]
    out[...] = _numpy_view(node)
    self._read_bytes += out.nbytes


def _numpy_view(tensor: Any) -> np.ndarray:
  """A tensor as numpy, also in the dtypes that numpy itself lacks."""
  extra = {
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
  }
  tensor = tensor.detach()
  dtype = extra.get(str(tensor.dtype))
  if dtype is None:
    return tensor.numpy()
  import torch

  raw = torch.int16 if tensor.element_size() == 2 else torch.uint8
  return tensor.view(raw).numpy().view(dtype)


def _import_torch(path: Path) -> Any:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"source={path} is a PyTorch file and reading it needs torch; install it with: "
      "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    ) from error
  return torch


# ---------------------------------------------------------------------- wrappings
def state_dict(content: Mapping[str, Any], ema: bool = False) -> dict[str, Tensor]:
  """Takes the tensors of one network out of whatever a trainer wrapped around them.

  Unwraps `generator` or, on request, `generator_ema`; else `model`; else nothing.
  Strips the wrapper's prefix "model." and the marks of FSDP and torch.compile.

  Args:
    content: what `open_tensors` gave.
    ema: take the averaged weights where there are some.

  Raises:
    ValueError: an entry is no tensor, or names collide after stripping.
  """
  if "generator" in content or "generator_ema" in content:
    averaged = "generator_ema" in content and (ema or "generator" not in content)
    content = content["generator_ema" if averaged else "generator"]
  elif "model" in content:
    content = content["model"]
  others = [name for name, value in content.items() if not isinstance(value, Tensor)]
  if others:
    raise ValueError(
      f"source holds entries that are no tensors: {others}; give a file whose "
      "weights are under 'generator', 'generator_ema' or 'model', or bare"
    )
  names = {name: _plain_name(name) for name in content}
  if all(name.startswith("model.") for name in names.values()):
    names = {key: name.removeprefix("model.") for key, name in names.items()}
  plain = {names[key]: tensor for key, tensor in content.items()}
  if len(plain) < len(content):
    raise ValueError("source holds tensors twice, with and without FSDP's name marks")
  return plain


def _plain_name(name: str) -> str:
  marks = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."
  for mark in marks:
    name = name.replace(mark, "")
  return name


def refuse_quantised(tensors: Mapping[str, Tensor]) -> None:
  """Raises ValueError for an NVFP4 export, whose weights are packed codes."""
  packed = [name for name in tensors if name.endswith("quantized_weight_values")]
  if packed:
    raise ValueError(
      f"source is quantised to NVFP4 in {len(packed)} layers; import it with "
      "tools/quantize_checkpoint.py --source FILE, or convert the generator it was "
      "made from"
    )
