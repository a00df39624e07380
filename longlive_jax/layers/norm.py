"""Normalisation. Statistics are float32 whatever the dtype of the activations."""

import dataclasses

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AffineNorm:
  """layer_norm(x) * factor + shift: a norm as those see it who compute it with more.

  Attributes:
    factor, shift: (..., 1, c), a row for all tokens of a frame, or (c,), one for all.
    eps: static.
  """

  factor: jax.Array
  shift: jax.Array
  eps: float = dataclasses.field(metadata={"static": True})

  def __call__(self, x: jax.Array) -> jax.Array:
    """Of x (..., c), in its dtype."""
    return layer_norm(x, self.eps) * self.factor + self.shift


def modulation(scale: jax.Array, shift: jax.Array, eps: float) -> AffineNorm:
  """layer_norm(x) * (1 + scale) + shift, of (..., 1, c)."""
  return AffineNorm(1 + scale, shift, eps)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float) -> jax.Array:
  """layer_norm(x) * (1 + scale) + shift of x (..., c); the others broadcast."""
  return modulation(scale, shift, eps)(x)


class LayerNorm(nnx.Module):
  """Layer norm with weight (c,) and bias (c,)."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype = jnp.float32):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.bias = nnx.Param(jnp.zeros((dim,), dtype))
    self.eps = eps

  def affine(self) -> AffineNorm:
    return AffineNorm(self.weight[...], self.bias[...], self.eps)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.affine()(x)


class RMSNorm(nnx.Module):
  """x / rms(x) * weight; the weight multiplies after the cast back (SPEC 2.5)."""

  def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype = jnp.float32):
    self.weight = nnx.Param(jnp.ones((dim,), dtype))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
    return h.astype(x.dtype) * self.weight[...]
