"""The blocks of a network one after the other: run by run, a scan over each."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
# step(x, (block, other inputs, index of the layer)) -> (x, what to hand out)
Step = Callable[[Array, tuple[Any, Any, Array]], tuple[Array, Any]]


def through(
  step: Step, x: Array, runs: Sequence[Any], others: Any = None, *, end: bool = True
) -> tuple[Array | None, Any]:
  """x through all layers.

  Args:
    runs: of consecutive layers of one structure, each with a leading layer axis.
    others: a pytree with a leading axis of all layers.
    end: whether x is wanted in the end. If not, what of the last layer only serves it
      is left out.

  Returns:
    x or None, and what the layers handed out, stacked.
  """
  pieces, first = [], 0
  for run in runs:
    count = len(jax.tree.leaves(run)[0])
    part = jax.tree.map(lambda a, i=first, j=first + count: a[i:j], others)
    inputs = run, part, first + jnp.arange(count)
    first += count
    if end or len(pieces) < len(runs) - 1:
      x, piece = lax.scan(step, x, inputs)
    else:
      x, piece = None, _handed_out(step, x, inputs, count)
    pieces.append(piece)
  return x, join(pieces)


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
  return jax.tree.map(lambda *a: jnp.concatenate(a), *pieces)
