"""Devices: a mesh and where arrays live on it."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"


def data_mesh(devices: int | None = None) -> Mesh:
  """A one-axis mesh over the batch.

  Raises:
    ValueError: when fewer devices exist than asked for.
  """
  have = jax.device_count()
  count = have if devices is None else devices
  if not 1 <= count <= have:
    raise ValueError(f"devices={count} must be between 1 and the {have} that exist")
  return jax.make_mesh((count,), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def place(tree: Any, where: jax.Device | jax.sharding.Sharding) -> Any:
  """`jax.device_put`; of an abstract array it is noted where the real one will be."""
  if isinstance(where, jax.Device):
    where = jax.sharding.SingleDeviceSharding(where)

  def put(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)

  return jax.tree.map(put, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """A copy of every array on every device."""
  return place(tree, NamedSharding(mesh, P()))


def shard_batch(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
  """Splits axis `axis` of every array over the mesh.

  Raises:
    ValueError: when the batch is not a multiple of the number of devices.
  """
  sharding = NamedSharding(mesh, P(*(None,) * axis, DATA))
  for leaf in jax.tree.leaves(tree):
    if leaf.shape[axis] % mesh.size:
      raise ValueError(
        f"batch={leaf.shape[axis]} must be a multiple of devices={mesh.size}"
      )
  return place(tree, sharding)
