"""Networks with random weights in every parameter, drawn by NumPy: nothing compiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.models import dit, vae

# 4 pixels a latent row, 2 video frames a latent frame, as many channels as 'test'.
TINY_VAE = vae.VAEConfig(2, 2, 8, (1, 1), 1, (True,))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  """Standard normal float32 numbers."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fill(abstract: Any, seed: int = 0, gain: float = 1.0) -> Any:
  """Draws every array of an abstract tree: no zero head or bias hides a missing term.

  Matrices have variance gain / columns; norm weights lie around 1, the rest around 0.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    name = jax.tree_util.keystr(path)
    if "norm" in name and ".weight" in name:
      noise = 1 + 0.2 * noise
    elif name.endswith(".weight.value") or name.endswith(".weight"):
      noise *= (gain / np.prod(leaf.shape[-1:])) ** 0.5
    else:
      noise *= 0.3
    return jnp.asarray(noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract)


def random_dit(size: str = "test", dtype: Any = jnp.float32) -> dit.CausalDiT:
  """A transformer whose every term matters."""
  config = dit.SIZES[size]
  return fill(
    jax.eval_shape(lambda: dit.CausalDiT(config, dtype=dtype, rngs=nnx.Rngs(0)))
  )


def random_vae() -> vae.VideoVAE:
  """A decoder that compiles in a second."""
  abstract = jax.eval_shape(lambda: vae.VideoVAE(TINY_VAE, rngs=nnx.Rngs(0)))
  model = fill(abstract, seed=1, gain=0.3)
  model.latent_std[...] = jnp.abs(model.latent_std[...]) + 0.5
  return model
