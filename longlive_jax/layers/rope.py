"""Rotary positions over (time, row, column), SPEC 2.1.

The d/2 adjacent channel pairs are split into a temporal, a row and a column group,
each with its own frequency ladder. Temporal angles are made on the host in float64:
in float32 they are off by 0.008 rad at frame 100,000. Inside jit only their cosines
and sines travel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant import fp8


class Rotation(NamedTuple):
  """Cosines and sines, float32. Either (..., pairs of one group) or (b, s, d/2)."""

  cos: jax.Array | np.ndarray
  sin: jax.Array | np.ndarray


def pair_split(head_dim: int) -> tuple[int, int, int]:
  """Pairs for time, row, column: 128 -> (22, 21, 21), 64 -> (12, 10, 10)."""
  side = (head_dim // 2) // 3
  return head_dim // 2 - 2 * side, side, side


def group_rotation(positions: np.ndarray, pairs: int) -> Rotation:
  """Rotation of one group on the host: positions (...) -> (..., pairs) float32."""
  frequencies = 10000.0 ** (-np.arange(pairs, dtype=np.float64) / pairs)
  angles = np.asarray(positions, np.float64)[..., None] * frequencies
  return Rotation(
    np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
  )


def temporal_rotation(positions: np.ndarray, head_dim: int) -> Rotation:
  """Host rotation for temporal positions ((frame + offset) * t_scale), any reals."""
  return group_rotation(positions, pair_split(head_dim)[0])


def grid_rotation(temporal: Rotation, y: int, x: int, head_dim: int) -> Rotation:
  """Joins per-frame temporal rotations with rows and columns.

  Args:
    temporal: cos and sin (b, f, temporal pairs).
    y, x: token rows and columns of a frame.

  Returns:
    cos and sin (b, f * y * x, d/2), tokens ordered frame, row, column.
  """
  b, f, pairs = temporal.cos.shape
  side = pair_split(head_dim)[1]

  def join(t, row, col):
    full = (b, f, y, x)
    parts = (
      jnp.broadcast_to(t[:, :, None, None], (*full, pairs)),
      jnp.broadcast_to(row[:, None], (*full, side)),
      jnp.broadcast_to(col, (*full, side)),
    )
    return jnp.concatenate(parts, axis=-1).reshape(b, f * y * x, pairs + 2 * side)

  rows = group_rotation(np.arange(y), side)
  cols = group_rotation(np.arange(x), side)
  return Rotation(
    join(temporal.cos, rows.cos, cols.cos), join(temporal.sin, rows.sin, cols.sin)
  )


@functools.singledispatch
def rotate(
  x: jax.Array, rotation: Rotation, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Rotates channel pairs (2j, 2j+1) of x (b, s, n, d) by rotation (b, s, d/2).

  Args:
    x: an array; another type registers a function of its own.
    dtype: of the result, by default that of x; float8_e4m3fn is `fp8.cast` of that.
  """
  cos = rotation.cos[:, :, None]  # (b, s, 1, d/2)
  sin = rotation.sin[:, :, None]
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return fp8.as_dtype(out.reshape(x.shape).astype(x.dtype), dtype or x.dtype)
