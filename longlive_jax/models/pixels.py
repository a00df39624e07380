"""Pixels: bytes and the numbers of the VAE, and its folding of 2 x 2 into channels."""

import jax
import jax.numpy as jnp


def to_unit(frames: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return frames.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(frames: jax.Array) -> jax.Array:
  """[-1, 1] (clamped) -> uint8 by x * 0.5 + 0.5, times 255, rounded (SPEC 3)."""
  x = jnp.clip(frames.astype(jnp.float32), -1.0, 1.0) * 0.5 + 0.5
  return jnp.round(x * 255.0).astype(jnp.uint8)


def fold_pixels(video: jax.Array) -> jax.Array:
  """(b, t, h, w, 3) -> (b, t, h/2, w/2, 12), channel = c * 4 + column * 2 + row."""
  b, t, h, w, c = video.shape
  x = video.reshape(b, t, h // 2, 2, w // 2, 2, c)
  return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(b, t, h // 2, w // 2, 4 * c)


def unfold_pixels(x: jax.Array) -> jax.Array:
  """The inverse of `fold_pixels`."""
  b, t, h, w, c = x.shape
  x = x.reshape(b, t, h, w, c // 4, 2, 2)
  return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(b, t, 2 * h, 2 * w, c // 4)
