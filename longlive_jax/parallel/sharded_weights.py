"""Weights of which each device has a part (ZeRO-3): another type of weight.

Inside `shard_map` a linear layer gathers its weight right where it multiplies, and
forgets it again: in a scan over blocks a device never holds more than a few matrices
whole. The gradient of a gather is a reduce-scatter, so it, too, is whole nowhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.layers.linear import matmul, matmul_rule
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel.mesh import CLIPS, DATA, SEQUENCE
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
    network = _split(network, mesh)
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
  """The network with sharded weights, where they are arrays whose inputs divide."""

  def visit(node: Any) -> Any:
    weight = node.get_value() if isinstance(node, Matrix) else None
    if not isinstance(weight, Array) or meshes.last_axis_specs(weight, mesh) == P():
      return node
    return node.replace(ShardedWeight(weight))

  return jax.tree.map(visit, network, is_leaf=lambda node: isinstance(node, Matrix))


def _specs(network: Any) -> Any:
  """PartitionSpecs of a network that `_split` made: other parameters are whole."""

  def spec(leaf: Any) -> P:
    if not isinstance(leaf, ShardedWeight):
      return P()
    return P(*(None,) * (leaf.columns.ndim - 1), (DATA, SEQUENCE))

  return jax.tree.map(spec, network, is_leaf=lambda n: isinstance(n, ShardedWeight))
