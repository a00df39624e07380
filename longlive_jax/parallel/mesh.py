"""Devices: a mesh, where arrays live on it, and how several processes find together.

Generation has three axes: DATA, videos of a batch; BRANCH, the rows of the network's
batch with and without prompt (guidance); SEQUENCE, tokens and heads of one video.
Training has DATA and SEQUENCE; its state is split over both.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
BRANCH = "branch"
SEQUENCE = "seq"
# Of training's arrays (b, f, ...), f frames or chunks.
CLIPS = P(DATA, SEQUENCE)


def initialize(spec: str) -> None:
  """Joins the processes of a run over several hosts; every one of them calls it first.

  Args:
    spec: 'auto' where Slurm, MPI or a cloud says who is who, or
      'HOST:PORT,PROCESS,PROCESSES' with the address of process 0; '' does nothing.

  Raises:
    ValueError: anything else.
  """
  if not spec:
    return
  if spec == "auto":
    jax.distributed.initialize()
    return
  try:
    address, process, processes = spec.split(",")
    numbers = int(process), int(processes)
  except ValueError as error:
    raise ValueError(
      f"distributed={spec!r} must be 'auto' or HOST:PORT,PROCESS,PROCESSES; use "
      "10.0.0.1:1234,0,2 for the first of two"
    ) from error
  jax.distributed.initialize(address, numbers[1], numbers[0])


def generation_mesh(data: int = 1, branch: int = 1, sequence: int = 1) -> Mesh | None:
  """The mesh of generation; devices that share a video are neighbours.

  Returns:
    None for a single device: nothing is spread.

  Raises:
    ValueError: when fewer devices exist than asked for.
  """
  have, count = jax.device_count(), data * branch * sequence
  if not 1 <= count <= have:
    raise ValueError(
      f"devices={data} x guidance_devices={branch} x sequence_devices={sequence} are "
      f"{count}; must be between 1 and the {have} that exist"
    )
  if count == 1:
    return None
  return jax.make_mesh(
    (data, branch, sequence),
    (DATA, BRANCH, SEQUENCE),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def training_mesh(data: int = 1, sequence: int = 1) -> Mesh | None:
  """The mesh of training; devices that share a video are neighbours.

  Returns:
    None for a single device: nothing is spread.

  Raises:
    ValueError: when fewer devices exist than asked for, or some would have no work in a
      run of several processes.
  """
  have, count = jax.device_count(), data * sequence
  if data < 1 or sequence < 1 or count > have:
    raise ValueError(
      f"devices={data} x sequence_devices={sequence} are {count}; must be between 1 "
      f"and the {have} that exist"
    )
  if jax.process_count() > 1 and count != have:
    raise ValueError(
      f"devices={data} x sequence_devices={sequence} are {count}; must be the {have} "
      f"of all {jax.process_count()} processes"
    )
  if count == 1:
    return None
  return jax.make_mesh(
    (data, sequence), (DATA, SEQUENCE), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def any_process(flag: bool, *, ask: bool = True) -> bool:
  """Whether the flag is set in any process of the run.

  Args:
    ask: the same in all processes. Asking waits for what the devices have to do: a loop
      should not do it in every round. Without it only a process that is alone answers.
  """
  if jax.process_count() == 1:
    return flag
  return ask and bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
  """What is inside, the other processes do after process 0, and find its files."""
  first = jax.process_index() == 0
  if not first:
    multihost_utils.sync_global_devices("process 0 is done")
  yield
  if first:
    multihost_utils.sync_global_devices("process 0 is done")


def to_host(tree: Any) -> Any:
  """NumPy copies of whole arrays, in every process; all have to ask."""

  def whole(leaf: Any) -> Any:
    if getattr(leaf, "is_fully_addressable", True):
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))


def on_first_device(tree: Any) -> Any:
  """Whole arrays, committed to each process's first device; all have to ask."""

  def whole(leaf: Any) -> Any:
    if leaf.is_fully_addressable:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.device_put(jax.tree.map(whole, tree), jax.local_devices()[0])


def place(tree: Any, where: jax.Device | jax.sharding.Sharding) -> Any:
  """`jax.device_put`; of an abstract array it is noted where the real one will be.

  In a run of several processes each of them has to have the same arrays.
  """
  if isinstance(where, jax.Device):
    where = jax.sharding.SingleDeviceSharding(where)

  def put(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    if where.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
      return jax.device_put(leaf, where)
    # device_put would send every array around to see whether processes agree on it.
    return jax.make_array_from_callback(leaf.shape, where, lambda at: leaf[at])

  return jax.tree.map(put, tree)


def spread(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
  """Every array to its place on a mesh; None leaves all where it is.

  Args:
    specs: PartitionSpecs, a tree of which `tree` is a continuation.
  """
  if mesh is None:
    return tree
  return jax.tree.map(
    lambda spec, part: place(part, sharding(mesh, spec)), specs, tree
  )


def sharding(mesh: Mesh, spec: P) -> NamedSharding:
  """The sharding of a spec, without mesh axes of size 1.

  Compiled programs return their outputs so: a chunk's would not be what the first chunk
  was given, and the second chunk would compile again.
  """
  parts: list[Any] = []
  for names in spec:
    names = names if isinstance(names, tuple) else (names,)
    names = tuple(name for name in names if name and mesh.shape[name] > 1)
    parts.append(names[0] if len(names) == 1 else names or None)
  while parts and parts[-1] is None:
    parts.pop()
  return NamedSharding(mesh, P(*parts))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """A copy of every array on every device."""
  return spread(tree, P(), mesh)


def last_axis_specs(tree: Any, mesh: Mesh | None) -> Any:
  """PartitionSpecs that split arrays over all devices, along their last axis.

  So a training state takes its share of memory on each device. Whole are integers and
  what does not divide: small arrays.
  """
  if mesh is None:
    return jax.tree.map(lambda leaf: P(), tree)

  def spec(leaf: Any) -> P:
    fits = leaf.ndim and leaf.shape[-1] % mesh.size == 0
    if not fits or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return P()
    return P(*(None,) * (leaf.ndim - 1), (DATA, SEQUENCE))

  return jax.tree.map(spec, tree)


def own_parts(count: int, mesh: Mesh | None, axis: str = DATA) -> list[int]:
  """Samples of a batch, or what else is spread over an axis, of this process's devices.

  Args:
    count: of all of them.
  """
  if mesh is None:
    return list(range(count))
  held = sharding(mesh, P(axis)).addressable_devices_indices_map((count,))
  return sorted({row for (at,) in held.values() for row in range(count)[at]})


def spread_rows(tree: Any, batch: int, mesh: Mesh | None, spec: P = CLIPS) -> Any:
  """Arrays (own rows, f, ...) of each process as global ones (batch, f, ...).

  Args:
    tree: NumPy arrays with the samples of `own_parts`.
  """
  if mesh is None:
    return tree
  place_of = {row: place for place, row in enumerate(own_parts(batch, mesh))}

  def put(own: np.ndarray) -> jax.Array:
    def part(at: tuple[slice, ...]) -> np.ndarray:
      rows = [place_of[row] for row in range(batch)[at[0]]]
      return own[rows][:, *at[1:]]

    shape = (batch, *own.shape[1:])
    return jax.make_array_from_callback(shape, sharding(mesh, spec), part)

  return jax.tree.map(put, tree)


def constrain(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
  """Inside jit: says where arrays are to be; None says nothing."""
  if mesh is None:
    return tree
  return jax.tree.map(
    lambda spec, part: jax.lax.with_sharding_constraint(part, sharding(mesh, spec)),
    specs,
    tree,
  )


def shard_batch(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
  """Splits axis `axis` of every array over the mesh's DATA axis.

  Raises:
    ValueError: when the batch is not a multiple of the number of devices.
  """
  devices = 1 if mesh is None else mesh.shape[DATA]
  for leaf in jax.tree.leaves(tree):
    if leaf.shape[axis] % devices:
      raise ValueError(
        f"batch={leaf.shape[axis]} must be a multiple of devices={devices}"
      )
  return spread(tree, P(*(None,) * axis, DATA), mesh)
