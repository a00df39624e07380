"""Checkpoints: any pytree of arrays in an Orbax folder, and networks by their kind.

On disk a checkpoint is one flat mapping from parameter path ("blocks.ffn.fc1.weight")
to array, with a JSON record beside it. It knows nothing of Python classes, so that
code may move and a checkpoint stays readable. Orbax writes to a temporary folder and
renames it: what bears the final name is whole. File sizes are listed in it, so that a
copy that was cut short is noticed at once, not when its last array is read.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import longlive_jax
from longlive_jax.checkpoint import file_sizes
from longlive_jax.models import dit, umt5, vae

PathLike = str | os.PathLike
Record = Mapping[str, Any] | None  # anything JSON can hold

# kind -> (module, its configuration, the table of sizes)
NETWORKS: dict[str, tuple[type, type, Mapping[str, Any]]] = {
  "dit": (dit.CausalDiT, dit.WanConfig, dit.SIZES),
  "vae": (vae.VideoVAE, vae.VAEConfig, vae.VAE_SIZES),
  "umt5": (umt5.UMT5Encoder, umt5.UMT5Config, umt5.UMT5_SIZES),
}
_GROUP_BYTES = 2**29  # arrays written at a time when a checkpoint comes as a stream
# Arrays read at a time, so that host memory never holds a whole network: room for the
# two largest of the 5B model together, 2.6 GB each.
_READ_BYTES = 6 * 10**9
# One thread reads a part: of whole arrays most threads would wait for the two largest.
# A layer of the 5B model is one. (Checkpoints of before are read as well.)
_PART_BYTES = 2**27


# ---------------------------------------------------------------------- names
def path_name(path: tuple[Any, ...]) -> str:
  """Parameter path of a pytree leaf: "blocks.self_attn.q.weight", "history.0".

  The step `.value` is nnx's wrapping of a parameter, and no part of the name.
  """
  steps = (jax.tree_util.keystr((key,), simple=True) for key in path)
  return ".".join(step for step in steps if step != "value")


def named_leaves(tree: Any) -> dict[str, Any]:
  """All leaves of a pytree by parameter path.

  Raises:
    ValueError: two leaves have the same path (a dict key with a dot in it).
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    if name in leaves:
      raise ValueError(f"two leaves of the tree are called {name!r}; rename one")
    leaves[name] = leaf
  return leaves


def abstract_network(kind: str, config: Any, dtype: jnp.dtype = jnp.float32) -> Any:
  """The network's tree with shapes and dtypes for arrays; builds nothing."""
  module = NETWORKS[kind][0]
  return jax.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0)))


# ---------------------------------------------------------------------- trees
def save(
  path: PathLike, tree: Any, metadata: Record = None, *, overwrite: bool = False
) -> None:
  """Writes a pytree of arrays; see `start_save`."""
  start_save(path, tree, metadata, overwrite=overwrite)()


def start_save(
  path: PathLike, tree: Any, metadata: Record = None, *, overwrite: bool = False
) -> Callable[[], None]:
  """Copies a pytree of arrays, and writes it in the background.

  Args:
    path: folder to make.
    tree: leaves are jax or numpy arrays of any dtype and sharding, typed PRNG keys, or
      Python numbers.
    metadata: read again by `load_metadata`.
    overwrite: replaces an existing checkpoint, once the new one is whole.

  Returns:
    finish(): waits until the checkpoint is whole. It raises OSError if that cannot be
    written; what was there before still is.

  Raises:
    FileExistsError: something is at `path` and overwrite is False.

  In a run of several processes all have to call both, and see one file system.
  """
  target = Path(path).absolute()
  if target.exists() and not overwrite:
    raise FileExistsError(f"path={target} exists; remove it or choose another")
  leaves = {name: _storable(leaf) for name, leaf in named_leaves(tree).items()}
  # Orbax refuses empty arrays, but only after a wait of ten minutes.
  leaves = {name: leaf for name, leaf in leaves.items() if leaf.size}
  if not leaves:
    raise ValueError(f"path={target}: the tree has no arrays to save")
  new = target.with_name(f".{target.name}.new") if target.exists() else target
  record = _checked_json(metadata)
  with _in_parts():
    response = ocp.save_async(new, leaves, custom_metadata=record, overwrite=True)

  def finish() -> None:
    try:
      response.result()
    except Exception as error:  # a full disk comes as a ValueError
      for part in target.parent.glob(f"{new.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)
      raise OSError(f"cannot save checkpoint {target}: {_brief(error)}") from error
    if jax.process_index() == 0:
      file_sizes.write(new)
      if new != target:
        _replace(target, new)
    multihost_utils.sync_global_devices(f"saved {target}")

  return finish


def save_stream(
  path: PathLike, leaves: Iterable[tuple[str, np.ndarray]], metadata: Record = None
) -> None:
  """Writes arrays as they come, so that memory holds only a few of them at a time.

  Args:
    path: folder to make.
    leaves: (parameter path, array). Each array is written soon after it was drawn.
    metadata: as in `save`.

  Raises:
    FileExistsError: something is at `path`.
  """
  target = Path(path).absolute()
  if target.exists():
    raise FileExistsError(f"path={target} exists; remove it or choose another")
  unfinished = target.with_name(target.name + ".partial_save")
  shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
  record = _checked_json(metadata)
  try:
    with _in_parts():
      for group in _groups(leaves):
        ocp.partial.save(target, group, custom_metadata=record)
      ocp.partial.finalize(target)
    file_sizes.write(target)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise


def load(path: PathLike, abstract: Any = None, dtype: Any = None) -> Any:
  """Reads a checkpoint.

  Args:
    path: folder that `save` or `save_stream` made.
    abstract: the tree to fill; its leaves give shapes, dtypes and shardings
      (ShapeDtypeStruct or arrays; without a sharding: the default device). numpy and
      Python leaves come back as such.
    dtype: overrides the dtype of all floating-point leaves.

  Returns:
    A tree like `abstract`; without it a flat dict of numpy arrays by parameter path.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: it is damaged, or names or shapes differ (all are reported together).
  """
  stored = describe(path)
  if abstract is None:
    return dict(load_leaves(path, stored, dtype))
  wanted = named_leaves(abstract)
  check_shapes(path, stored, {name: _shape(leaf) for name, leaf in wanted.items()})
  requests = {
    name: _request(leaf, dtype) for name, leaf in wanted.items() if name in stored
  }
  arrays = _read(path, stored, requests)

  def restore(path, leaf):
    name = path_name(path)
    value = arrays.get(name)
    if value is None:  # empty: `save` leaves those out
      value = np.zeros(_shape(leaf), leaf.dtype)
    return _as_like(value, leaf)

  return jax.tree_util.tree_map_with_path(restore, abstract)


def load_leaves(
  path: PathLike, names: Iterable[str], dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads single arrays as numpy, one after the other: memory holds one at a time."""
  stored = describe(path)
  for name in names:
    leaf = stored[name]
    like = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    yield name, _read(path, stored, {name: _request(like, dtype)})[name]


def describe(path: PathLike) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a checkpoint by parameter path; reads no array."""
  arrays = _metadata(path).metadata.items()
  return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays}


def check_shapes(
  path: PathLike,
  stored: dict[str, jax.ShapeDtypeStruct],
  wanted: dict[str, tuple[int, ...]],
) -> None:
  """Raises ValueError that names every array missing, too many or misshapen."""
  problems = []
  for name, shape in wanted.items():
    if name not in stored:
      if np.prod(shape, dtype=np.int64):
        problems.append(f"{name} {shape} is missing")
    elif stored[name].shape != shape:
      problems.append(f"{name} has shape {stored[name].shape} instead of {shape}")
  surplus = [name for name in stored if name not in wanted]
  problems += [f"{name} {stored[name].shape} has no place" for name in surplus]
  if not problems:
    return
  advice = "load it with the config it was saved with"
  if stored.keys() == wanted.keys() and all(
    sorted(stored[name].shape) == sorted(shape) for name, shape in wanted.items()
  ):
    advice = "it was made by an older version, with axes in another order: convert it "
    advice += "again with tools/convert_checkpoint.py, or train it again"
  raise ValueError(
    f"checkpoint {path} does not fit, in {len(problems)} arrays; {advice}:\n  "
    + "\n  ".join(problems)
  )


def load_metadata(path: PathLike) -> dict[str, Any]:
  """The JSON record of a checkpoint.

  Raises:
    FileNotFoundError: there is no checkpoint at `path`.
    ValueError: it is damaged.
  """
  return dict(_metadata(path).custom_metadata or {})


# ---------------------------------------------------------------------- networks
def network_metadata(
  kind: str, config: Any, dtype: Any, source: str = ""
) -> dict[str, Any]:
  """The record of a network: what `load_network` needs to build it again."""
  sizes = NETWORKS[kind][2]
  return {
    "kind": kind,
    "size": next((name for name, size in sizes.items() if size == config), "custom"),
    "config": dataclasses.asdict(config),
    "dtype": jnp.dtype(dtype).name,
    "source": source,
    "longlive_jax": longlive_jax.__version__,
  }


def save_network(
  path: PathLike, network: Any, *, source: str = "", overwrite: bool = False
) -> None:
  """Writes a CausalDiT, VideoVAE or UMT5Encoder with its configuration.

  Args:
    source: where the weights are from, for the record.

  Raises:
    FileExistsError, ValueError: as `save`; also for quantised weights.
  """
  kinds = {module: kind for kind, (module, _, _) in NETWORKS.items()}
  leaves = named_leaves(network)
  if any(name.endswith(".codes") for name in leaves):
    raise ValueError(
      f"path={path}: the network is quantised; use checkpoint.quantised.save_network"
    )
  dtype = _main_dtype(leaves)
  record = network_metadata(kinds[type(network)], network.config, dtype, source)
  save(path, network, record, overwrite=overwrite)


def load_network(path: PathLike, kind: str, dtype: Any = None) -> Any:
  """Builds and fills a network as its checkpoint describes it.

  Args:
    path: checkpoint folder.
    kind: "dit", "vae" or "umt5"; what the caller expects.
    dtype: of the parameters; the stored one if not given.

  Raises:
    FileNotFoundError, ValueError: as `load`; also for another kind of network, or one
      with quantised weights (checkpoint/quantised.py).
  """
  record = load_record(path, kind)
  if is_packed(record):
    raise ValueError(
      f"{kind}={path} holds weights packed in NVFP4, no plain ones; load it with "
      "checkpoint.quantised.load_network, or give the checkpoint it was made from"
    )
  config = network_config(kind, record["config"])
  dtype = jnp.dtype(dtype or record["dtype"])
  return load(path, abstract_network(kind, config, dtype))


def load_record(path: PathLike, kind: str) -> dict[str, Any]:
  """The record of a network's checkpoint.

  Raises:
    FileNotFoundError, ValueError: as `load_metadata`; also for another kind of network.
  """
  record = load_metadata(path)
  if record.get("kind") != kind:
    raise ValueError(
      f"{kind}={path} holds a {record.get('kind', 'training state or stream')!r}; "
      f"give the folder of a {kind!r} checkpoint"
    )
  return record


def is_packed(record: Mapping[str, Any]) -> bool:
  """Whether a checkpoint's record lists quantised weights (checkpoint/quantised.py)."""
  return any(e["format"] == "nvfp4" for e in record.get("weights", {}).values())


def load_dit(path: PathLike, dtype: Any = None) -> dit.CausalDiT:
  """The transformer of a checkpoint; see `load_network`."""
  return load_network(path, "dit", dtype)


def load_vae(path: PathLike, dtype: Any = None) -> vae.VideoVAE:
  """The video VAE of a checkpoint; see `load_network`."""
  return load_network(path, "vae", dtype)


def load_umt5(path: PathLike, dtype: Any = None) -> umt5.UMT5Encoder:
  """The text encoder of a checkpoint; see `load_network`."""
  return load_network(path, "umt5", dtype)


def network_config(kind: str, fields: Mapping[str, Any]) -> Any:
  """A network's frozen configuration from JSON fields (lists become tuples)."""
  config = NETWORKS[kind][1]
  known = {field.name for field in dataclasses.fields(config)}
  if unknown := sorted(set(fields) - known):
    raise ValueError(
      f"config of a {kind!r} checkpoint has unknown fields {unknown}; it was written "
      "by a newer longlive_jax: upgrade"
    )
  return config(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  )


# ---------------------------------------------------------------------- details
def _storable(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
  return np.asarray(leaf)


def _shape(leaf: Any) -> tuple[int, ...]:
  """Stored shape of a leaf: that of a PRNG key has the words of the key, too."""
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf).shape
  return np.shape(leaf) if _on_host(leaf) else leaf.shape


def _is_key(leaf: Any) -> bool:
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _on_host(leaf: Any) -> bool:
  return isinstance(leaf, np.ndarray | np.generic | int | float)


def _request(leaf: Any, dtype: Any) -> Any:
  """What Orbax is asked for: a numpy array, or one on devices."""
  of = (
    jnp.dtype(jnp.uint32)
    if _is_key(leaf)
    else np.dtype(getattr(leaf, "dtype", None) or type(leaf))
  )
  if dtype is not None and jnp.issubdtype(of, jnp.floating):
    of = jnp.dtype(dtype)
  if _on_host(leaf):
    # Of stride 0: a request needs a shape and a dtype, not memory.
    return np.broadcast_to(np.zeros((), of), np.shape(leaf))
  # Never the stored sharding: it names devices of the machine that saved.
  sharding = getattr(leaf, "sharding", None)
  if sharding is None or _is_key(leaf):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(_shape(leaf), of, sharding=sharding)


def _as_like(value: Any, leaf: Any) -> Any:
  if _is_key(leaf):
    return jax.random.wrap_key_data(value, impl=_key_impl(leaf))
  if isinstance(leaf, int | float):
    return type(leaf)(value)
  return value if _on_host(leaf) else jnp.asarray(value)


def _in_parts() -> ocp.Context:
  """In which large arrays are written in parts: of stacked layers each by itself."""
  options = ocp.options.ArrayOptions.Saving.StorageOptions

  def parts(_, leaf: Any) -> Any:
    size = getattr(leaf, "nbytes", 0)
    # Orbax cuts an axis that it is told to cut into single indices, which of a table of
    # words would be hundreds of thousands.
    stacked = size > _PART_BYTES and size // leaf.shape[0] >= _PART_BYTES // 64
    return options(chunk_byte_size=_PART_BYTES, shard_axes=(0,) if stacked else ())

  context = ocp.Context()
  context.array.saving.scoped_storage_options_creator = parts
  return context


def _key_impl(leaf: Any) -> Any:
  """Generator of a key, also of an abstract one (which key_impl itself refuses)."""
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def _read(
  path: PathLike, stored: Mapping[str, jax.ShapeDtypeStruct], requests: dict[str, Any]
) -> dict[str, Any]:
  if not requests:
    return {}
  largest = max(stored[name].size * stored[name].dtype.itemsize for name in requests)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  # Orbax refuses an array that takes all of its room.
  context.memory.read_concurrent_bytes = max(_READ_BYTES, largest + 1)
  try:
    with context:
      return ocp.load(Path(path).absolute(), requests)
  except Exception as error:
    raise ValueError(
      f"checkpoint {path} is damaged: {_brief(error)}; copy or convert it again"
    ) from error


def _metadata(path: PathLike) -> Any:
  folder = Path(path).absolute()
  if not folder.exists():
    raise FileNotFoundError(
      f"no checkpoint at {folder}; check the path, or make one with "
      "tools/convert_checkpoint.py"
    )
  if not (folder / "_CHECKPOINT_METADATA").exists():
    raise ValueError(
      f"{folder} is not a checkpoint of this project; convert PyTorch files with "
      "tools/convert_checkpoint.py"
    )
  file_sizes.check(folder)
  try:
    metadata = ocp.metadata(folder)
    if not isinstance(metadata.metadata, dict):
      raise ValueError("it has no list of arrays")
    return metadata
  except Exception as error:
    raise ValueError(
      f"checkpoint {folder} is damaged: {_brief(error)}; copy or convert it again"
    ) from error


def _replace(target: Path, new: Path) -> None:
  """Puts a finished checkpoint in the place of another."""
  old = target.with_name(f".{target.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  target.rename(old)
  new.rename(target)
  shutil.rmtree(old)


def _groups(
  leaves: Iterable[tuple[str, np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
  group: dict[str, np.ndarray] = {}
  for name, array in leaves:
    group[name] = array
    del array  # or it would stay alive while its successor is read
    if sum(a.nbytes for a in group.values()) >= _GROUP_BYTES:
      yield group
      group = {}
  if group:
    yield group


def _main_dtype(leaves: dict[str, Any]) -> jnp.dtype:
  """The dtype of most numbers."""
  sizes: dict[Any, int] = {}
  for leaf in leaves.values():
    sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
  return max(sizes, key=sizes.__getitem__)


def _checked_json(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
  return json.loads(json.dumps(dict(metadata or {})))


def _brief(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
