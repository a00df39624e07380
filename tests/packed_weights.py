"""Networks with 4-bit weights: made in one way, and compared byte for byte."""

from typing import Any

import jax
import numpy as np

from longlive_jax.quant import weights


def quantise(model: Any, mode: str = "w4a16", rule: str = "mse") -> Any:
  """One rule for weights and activations."""
  return weights.quantise_weights(model, mode=mode, rule=rule, activation_rule=rule)


def same(a: Any, b: Any) -> bool:
  """Trees of one structure, every leaf the same bytes."""

  def equal(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(equal, a, b)
  )
