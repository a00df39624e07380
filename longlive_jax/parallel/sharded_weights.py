"""Weights of which each device has a part (ZeRO-3): another type of weight.

Inside `shard_map` a linear layer gathers its weight right where it multiplies, and
forgets it again: in a scan over blocks a device never holds more than a few matrices
whole. The gradient of a gather is a reduce-scatter, so it, too, is whole nowhere.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.layers.linear import matmul, matmul_rule
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import DATA, SEQUENCE
from longlive_jax.quant.weights import Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedWeight:
  """A weight that is split by columns over the mesh axes DATA and SEQUENCE.

  Attributes:
    columns: (..., out, in / devices) inside of shard_map, (..., out, in) outside.
  """

  columns: Array


@matmul_rule.register
def _(weight: ShardedWeight, x: Array) -> Array:
  def whole(columns: Array, x: Array) -> Array:
    axis = columns.ndim - 1
    gathered = lax.all_gather(columns, (DATA, SEQUENCE), axis=axis, tiled=True)
    return matmul(x, gathered)

  # The backward pass gathers again: kept, the weights of all blocks would be whole.
  return jax.checkpoint(whole)(weight.columns, x)


def split(model: Any, mesh: Mesh) -> Any:
  """The network with linear layers of sharded weights, where their inputs divide."""

  def visit(node: Any) -> Any:
    if not isinstance(node, Matrix) or not isinstance(node.get_value(), Array):
      return node
    weight = node.get_value()
    spread = meshes.last_axis_specs(weight, mesh) != P()
    return node.replace(ShardedWeight(weight)) if spread else node

  return jax.tree.map(visit, model, is_leaf=lambda node: isinstance(node, Matrix))


def specs(model: Any) -> Any:
  """PartitionSpecs of a network that `split` made: other parameters are whole."""

  def spec(leaf: Any) -> P:
    if not isinstance(leaf, ShardedWeight):
      return P()
    return P(*(None,) * (leaf.columns.ndim - 1), (DATA, SEQUENCE))

  return jax.tree.map(spec, model, is_leaf=lambda n: isinstance(n, ShardedWeight))
