"""What the backward pass finds of a block, and what it computes once more.

  none       everything is kept
  blocks     the input of each block; the rest is computed again
  attention  besides the input, what attention over a clip gave: of a long clip it takes
             most of a block's time, and no more memory than the input
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_ATTENTION = "attention"


def is_fused_attention(primitive: Any, *_, **__) -> bool:
  """Policy that keeps what cuDNN's attention gives.

  Its backward pass takes the normalisers as well, which have no name: with the result
  alone it would attend again.
  """
  return primitive.name.startswith("dot_product_attention_fwd")


_POLICIES = {
  "blocks": jax.checkpoint_policies.nothing_saveable,
  "attention": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(_ATTENTION), is_fused_attention
  ),
}
NAMES = ("none", *_POLICIES)


def check(name: str) -> None:
  """Raises ValueError for a name that is unknown."""
  if name not in NAMES:
    raise ValueError(f"remat={name!r} is unknown; use {', '.join(NAMES)}")


def rematerialised(step: Callable, name: str) -> Callable:
  """The step of a scan over blocks, with less kept for its backward pass."""
  check(name)
  return step if name == "none" else jax.checkpoint(step, policy=_POLICIES[name])


def attended(x: jax.Array) -> jax.Array:
  """x, marked as a result of attention."""
  return checkpoint_name(x, _ATTENTION)
