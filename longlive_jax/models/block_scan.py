"""The blocks of a network one after the other: run by run, a scan over each.

A scan copies the weights of a layer out of those of its run before it multiplies. A run
of one layer needs no scan: where all are (`unrolled`) nothing is copied, and the
program is that much longer.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Array = jax.Array
# step(x, (block, other inputs, state of the layer)) -> (x, what to hand out)
Step = Callable[[Array, tuple[Any, Any, Any]], tuple[Array, Any]]


def through(
  step: Step,
  x: Array,
  runs: Sequence[Any],
  others: Any = None,
  layers: Any = None,
  *,
  end: bool = True,
) -> tuple[Array | None, list[Any]]:
  """x through all layers.

  Args:
    runs: of consecutive layers of one structure, each with a leading layer axis.
    others: a pytree with a leading axis of all layers.
    layers: state of the layers: a pytree as others, which is read where it lies, or, if
      every run has one layer, a list of one for each.
    end: whether x is wanted in the end. If not, what of the last layer only serves it
      is left out.

  Returns:
    x or None, and what the layers handed out, stacked, run by run; see `join`.

  Raises:
    ValueError: a list of states for runs of several layers.
  """
  if isinstance(layers, list) and len(layers) != len(runs):
    raise ValueError(f"{len(layers)} states of layers need as many runs: {len(runs)}")
  pieces, first = [], 0
  one = jax.jit(step)  # traced once for all runs of one layer

  def scanned(x: Array, inputs: tuple[Any, Any, Array]) -> tuple[Array, Any]:
    # The state is not scanned over: a run would have to copy its part of it first.
    block, other, index = inputs
    return step(x, (block, other, jax.tree.map(lambda a: a[index], layers)))

  for run in runs:
    count = _layers(run)
    part = jax.tree.map(lambda a, i=first, j=first + count: a[i:j], others)
    inputs = run, part, first + jnp.arange(count)
    if count == 1:
      block, other = jax.tree.map(lambda a: a[0], (run, part))
      x, piece = one(x, (block, other, _state(layers, first)))
      piece = jax.tree.map(lambda a: a[None], piece)
    elif end or len(pieces) < len(runs) - 1:
      x, piece = lax.scan(scanned, x, inputs)
    else:
      piece = _handed_out(scanned, x, inputs, count)
    pieces.append(piece)
    first += count
  return x if end else None, pieces


def _state(layers: Any, i: int) -> Any:
  if isinstance(layers, list):
    return layers[i]
  return jax.tree.map(lambda a: a[i], layers)


def _handed_out(step: Step, x: Array, inputs: Any, count: int) -> Any:
  """What a scan hands out, the last step apart from it, so that XLA leaves out of it
  what leads nowhere."""

  # By index: a scan over all but the last would copy their weights first.
  def layer(i: int | Array) -> Any:
    return jax.tree.map(lambda a: a[i], inputs)

  def place(all_layers: Any, new: Any, i: int | Array) -> Any:
    set_layer = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
    return jax.tree.map(set_layer, all_layers, new)

  def body(i: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
    x, new = step(state[0], layer(i))
    return x, place(state[1], new, i)

  like = jax.eval_shape(step, x, layer(0))[1]
  empty = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), like)
  x, handed_out = lax.fori_loop(0, count - 1, body, (x, empty))
  return place(handed_out, step(x, layer(count - 1))[1], count - 1)


def join(pieces: Sequence[Any]) -> Any:
  """What several runs handed out, as of one."""
  if len(pieces) == 1:
    return pieces[0]

  def joined(*parts: Array) -> Array:
    # Not concatenated: 30 parts of 22 MB took 3 ms on an H200, ten times what moving
    # the bytes takes.
    whole = jnp.zeros((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    first = 0
    for part in parts:
      whole = lax.dynamic_update_slice_in_dim(whole, part, first, 0)
      first += len(part)
    return whole

  return jax.tree.map(joined, *pieces)


# ------------------------------------------------------------------ runs of a network


def block_runs(model: Any) -> list[Any]:
  """The runs of consecutive layers of a network, each with a leading layer axis."""
  return list(model.blocks) if isinstance(model.blocks, nnx.List) else [model.blocks]


def split_blocks(model: Any, starts: Sequence[int]) -> Any:
  """The same model with its layers in several runs, so that formats can differ.

  Args:
    model: with one run.
    starts: first layer of every run but the first, ascending.

  Raises:
    ValueError: starts that are not ascending layers of the model, or a model that is
      split already.
  """
  if len(block_runs(model)) > 1:
    raise ValueError(f"the model has {len(model.blocks)} runs already; split it once")
  edges = [0, *starts, model.config.layers]
  if any(a >= b for a, b in itertools.pairwise(edges)):
    raise ValueError(
      f"starts={tuple(starts)} must ascend between 1 and {model.config.layers - 1}"
    )
  return _of_runs(
    model,
    [
      jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], model.blocks)
      for a, b in itertools.pairwise(edges)
    ],
  )


def unrolled(model: Any) -> Any:
  """The same model, every layer a run of its own, see the top of this file."""
  runs = []
  for run in block_runs(model):
    count = _layers(run)
    runs += [_layer(run, i) for i in range(count)] if count > 1 else [run]
  return _of_runs(model, runs)


@jax.jit  # with i as an argument: compiled once for all layers
def _layer(run: Any, i: int) -> Any:
  return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i, 1), run)


def _layers(run: Any) -> int:
  return len(jax.tree.leaves(run)[0])


def _of_runs(model: Any, runs: Sequence[Any]) -> Any:
  leaves, structure = jax.tree.flatten(model)
  copy = jax.tree.unflatten(structure, leaves)  # modules are not changed
  copy.blocks = nnx.List(runs)
  return copy
