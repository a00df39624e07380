"""Gradients of a batch that is too large for one pass: its parts, one after the other.

The result is the mean over all frames that count, whichever part they are in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def value_and_grad(loss_fn: Callable[..., Any], parts: int) -> Callable[..., Any]:
  """`jax.value_and_grad` of a loss, over `parts` equal parts of the batch.

  Args:
    loss_fn: (params, batch, key, errors, *fixed) -> (loss, (metrics, errors)), as
      `flow.ar_loss`: the loss is a mean over the frames of batch["mask"].
    parts: 1 is the whole batch at once. Otherwise part i, every `parts`-th sample from
      i on, has a key of its own, and the errors of the parts before it.

  Returns:
    (params, batch, key, errors, *fixed) -> ((loss, (metrics, errors)), gradients).
  """
  gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if parts == 1:
    return gradient_fn

  def accumulated(
    params: Any, batch: dict[str, Array], key: Array, errors: Any, *fixed: Any
  ) -> Any:
    # Neighbours in different parts: a device that has neighbours works on every part.
    split = jax.tree.map(
      lambda a: jnp.reshape(a, (-1, parts, *a.shape[1:])).swapaxes(0, 1), batch
    )
    counts = split["mask"].sum((1, 2))
    weights = counts / jnp.maximum(counts.sum(), 1)

    def step(carry: tuple[Any, Any], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
      total, errors = carry
      part, number, weight = inputs
      (loss, (metrics, errors)), gradients = gradient_fn(
        params, part, jax.random.fold_in(key, number), errors, *fixed
      )
      total = jax.tree.map(lambda t, g: t + weight * g, total, gradients)
      return (total, errors), jax.tree.map(lambda m: weight * m, (loss, metrics))

    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradients, errors), kept = jax.lax.scan(
      step, (zeros, errors), (split, jnp.arange(parts), weights)
    )
    loss, metrics = jax.tree.map(lambda m: m.sum(axis=0), kept)
    return (loss, (metrics, errors)), gradients

  return accumulated
