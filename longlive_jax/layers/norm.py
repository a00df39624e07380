"""Normalisation. Statistics are float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
from flax import nnx


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Layer norm without affine part over the last axis, in the dtype of x.

  The result is rounded to x.dtype before anything multiplies it, as the reference
  does (SPEC 2.4): fusing the modulation in float32 gives other bf16 numbers.
  """
  h = x.astype(jnp.float32)
  h = h - jnp.mean(h, axis=-1, keepdims=True)
  h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
  return h.astype(x.dtype)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
  """layer_norm(x) * (1 + scale) + shift of x (..., c); the others broadcast."""
  return layer_norm(x, eps) * (1 + scale) + shift


class LayerNorm(nnx.Module):
  """Layer norm with weight (c,) and bias (c,)."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype = jnp.float32):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.bias = nnx.Param(jnp.zeros((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    return layer_norm(x, self.eps) * self.weight[...] + self.bias[...]


class RMSNorm(nnx.Module):
  """x / rms(x) * weight; the weight multiplies after the cast back (SPEC 2.5)."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype = jnp.float32):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
    return h.astype(x.dtype) * self.weight[...]
