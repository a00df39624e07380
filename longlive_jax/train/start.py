"""The networks that a training starts from, each where it will be used on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.checkpoint import store
from longlive_jax.generate import networks
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel import sharded_weights


def load(
  source: networks.Source, mesh: Mesh | None, key: jax.Array, dtype: str | None = None
) -> Any:
  """A network, split over a mesh as `mesh.last_axis_specs` says.

  Plain weights are whole on no device: one may not have the room.

  Args:
    source: a checkpoint, or none: then it is random. Of quantised weights, or to be
      quantised, it is as `networks.load` gives it.
    key: of random weights.
    dtype: that of the checkpoint if not given, of random weights float32.

  Raises:
    FileNotFoundError, ValueError: as `store.load`.
  """
  if source.precision.mode or is_packed(source):
    return sharded_weights.place(networks.load(source, dtype), mesh)
  module = store.NETWORKS[source.kind][0]
  if source.path is not None:
    dtype = dtype or store.load_metadata(source.path)["dtype"]
  dtype = jnp.dtype(dtype or "float32")

  def build(key: jax.Array) -> Any:
    return module(source.config, dtype=dtype, rngs=nnx.Rngs(key))

  abstract = jax.eval_shape(build, key)
  specs = meshes.last_axis_specs(abstract, mesh)
  if source.path is not None:
    return store.load(source.path, meshes.spread(abstract, specs, mesh))
  places = None
  if mesh is not None:
    places = jax.tree.map(lambda spec: meshes.sharding(mesh, spec), specs)
  # One program instead of one for every shape.
  return jax.jit(build, out_shardings=places)(key)


def is_packed(source: networks.Source) -> bool:
  """Whether a checkpoint has quantised weights."""
  return source.path is not None and store.is_packed(store.load_metadata(source.path))


def check_trainable(source: networks.Source) -> None:
  """Raises ValueError for a checkpoint of quantised weights, which no step can move."""
  if is_packed(source):
    raise ValueError(
      f"{source.kind} weights={source.path} are quantised and cannot be trained whole; "
      "set lora.rank to train an adapter on them, or give those they were made from"
    )
