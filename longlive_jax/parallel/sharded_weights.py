"""Weights of which each device has a part (ZeRO-3): another type of weight.

Inside `shard_map` a linear layer gathers its weight right where it multiplies, and
forgets it again: in a scan over blocks a device never holds more than a few matrices
whole. The gradient of a gather is a reduce-scatter, so it, too, is whole nowhere.

Weights in 4 or 8 bits, which no step changes, are whole on every device: those of the
5B model take 2.8 GB in 4 bits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.layers.linear import matmul, matmul_rule
from longlive_jax.layers.lora import LoraWeight
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import CLIPS, DATA, SEQUENCE
from longlive_jax.quant import weights
from longlive_jax.quant.training import FP8TrainingWeight, TrainingWeight
from longlive_jax.quant.weights import Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedWeight:
  """A weight that is split by columns over the mesh axes DATA and SEQUENCE.

  Attributes:
    columns: an array, or one whose products are quantised in training;
      (..., out, in / devices) inside of shard_map, (..., out, in) outside.
  """

  columns: Any


@matmul_rule.register
def _(weight: ShardedWeight, x: Array) -> Array:
  def gather(leaf: Array) -> Array:
    if not _is_split(leaf):
      return leaf
    return lax.all_gather(leaf, (DATA, SEQUENCE), axis=leaf.ndim - 1, tiled=True)

  def whole(columns: Any, x: Array) -> Array:
    return matmul(x, jax.tree.map(gather, columns))

  # The backward pass gathers again: kept, the weights of all blocks would be whole.
  return jax.checkpoint(whole)(weight.columns, x)


def _is_split(leaf: Array) -> bool:
  """Of the leaves of `columns`: the key of a quantised product is whole."""
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def place(network: Any, mesh: Mesh | None) -> Any:
  """A network that is not trained, every part of it where `over` will use it."""

  def spec(leaf: Any) -> P:
    return P() if weights.is_packed(leaf) else meshes.last_axis_specs(leaf, mesh)

  specs = jax.tree.map(spec, network, is_leaf=weights.is_packed)
  return meshes.spread(network, specs, mesh)


def over(
  mesh: Mesh | None, fn: Callable[..., Any], in_specs: tuple[P, ...] | None = None
) -> Callable[..., Any]:
  """fn(network, *arrays) as a function of global arrays, each device with its part.

  Args:
    mesh: of `mesh.training_mesh`; None is fn itself.
    fn: makes arrays (b, f, ...), f frames or chunks, of a network and arrays.
    in_specs: of each of the arrays; None: all are CLIPS.
  """
  if mesh is None:
    return fn

  def run(network: Any, *arrays: Any) -> Any:
    network = _split(weights.spread(network, (SEQUENCE,), (DATA,)), mesh)
    each = in_specs or (CLIPS,) * len(arrays)
    # check_vma: JAX cannot know that a kernel's outputs differ between devices.
    return jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(_specs(network), *each),
      out_specs=CLIPS,
      check_vma=False,
    )(network, *arrays)

  return run


def _split(network: Any, mesh: Mesh) -> Any:
  """The network with sharded weights, where they are numbers whose inputs divide."""

  def split(weight: Any) -> Any:
    if isinstance(weight, LoraWeight):
      return LoraWeight(*map(split, (weight.base, weight.a, weight.b)))
    trained = isinstance(weight, TrainingWeight | FP8TrainingWeight)
    numbers = weight.weight if trained else weight
    if not isinstance(numbers, Array) or meshes.last_axis_specs(numbers, mesh) == P():
      return weight
    return ShardedWeight(weight)

  def visit(node: Any) -> Any:
    is_matrix = isinstance(node, Matrix)
    return node.replace(split(node.get_value())) if is_matrix else node

  return jax.tree.map(visit, network, is_leaf=lambda node: isinstance(node, Matrix))


def _specs(network: Any) -> Any:
  """PartitionSpecs of a network that `_split` made: other parameters are whole."""

  def columns(leaf: Array) -> P:
    return P(*(None,) * (leaf.ndim - 1), (DATA, SEQUENCE)) if _is_split(leaf) else P()

  def spec(node: Any) -> Any:
    is_sharded = isinstance(node, ShardedWeight)
    return jax.tree.map(columns, node) if is_sharded else P()

  return jax.tree.map(spec, network, is_leaf=lambda n: isinstance(n, ShardedWeight))
