"""Rotary positions against complex numbers in extended precision (SPEC 2.1)."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import normal

from longlive_jax.layers import rope
from longlive_jax.models import dit


def reference(x, temporal, rows, cols):
  """x (b, s, n, d) float64 turned by positions: temporal (b, s), rows, cols (s,)."""
  half = x.shape[-1] // 2
  side = half // 3
  groups = [(temporal, half - 2 * side), (rows, side), (cols, side)]
  angles = []
  for position, pairs in groups:
    ladder = np.longdouble(10000) ** (-np.arange(pairs, dtype=np.longdouble) / pairs)
    angle = np.asarray(position, np.longdouble)[..., None] * ladder
    angles.append(np.broadcast_to(angle, (*x.shape[:2], pairs)))
  turn = np.exp(1j * np.concatenate(angles, -1))[:, :, None]
  turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
  return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@pytest.mark.parametrize(
  ("head_dim", "split"),
  [(128, (22, 21, 21)), (64, (12, 10, 10)), (32, (6, 5, 5)), (8, (2, 1, 1))],
)
def test_pair_split(head_dim, split):
  assert rope.pair_split(head_dim) == split
  assert sum(split) == head_dim // 2


@pytest.mark.parametrize("start", [0, 1_000, 100_000])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_rotation_equals_the_reference_at_any_frame(head_dim, start):
  frames, y, x = 3, 2, 3
  positions = start + np.array([[0, 1, 2], [8.5, 9.5, 10.5]])
  rotation = rope.grid_rotation(
    rope.temporal_rotation(positions, head_dim), y, x, head_dim
  )
  assert rotation.cos.shape == (2, frames * y * x, head_dim // 2)
  values = normal(2, frames * y * x, 2, head_dim)
  f, row, col = np.meshgrid(range(frames), range(y), range(x), indexing="ij")
  want = reference(
    values.astype(np.float64), positions[:, f.ravel()], row.ravel(), col.ravel()
  )
  # 1e-6 is float32's rounding of numbers up to 4; a float32 angle is off by 0.008.
  np.testing.assert_allclose(rope.rotate(values, rotation), want, atol=1e-6, rtol=1e-6)


def test_temporal_tables_at_large_frames_are_accurate():
  pairs = rope.pair_split(128)[0]
  found = rope.temporal_rotation(np.array([100_000.0]), 128)
  ladder = np.longdouble(10000) ** (-np.arange(pairs, dtype=np.longdouble) / pairs)
  angles = np.longdouble(100_000) * ladder
  np.testing.assert_allclose(found.cos[0], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(found.sin[0], np.sin(angles), atol=1e-6)


def test_scores_depend_on_differences_only():
  q, k = normal(1, 6, 2, 32), normal(1, 6, 2, 32, seed=1)

  def scores(start):
    temporal = rope.temporal_rotation(start + np.arange(6.0)[None], 32)
    rotation = rope.grid_rotation(temporal, 1, 1, 32)
    return jnp.einsum(
      "bqnd,bknd->bnqk", rope.rotate(q, rotation), rope.rotate(k, rotation)
    )

  near = scores(0.0)
  np.testing.assert_allclose(scores(100_000.0), near, atol=1e-5)
  unrotated = np.einsum("bqnd,bknd->bnqk", q, k)
  same = np.eye(6, dtype=bool)
  np.testing.assert_allclose(near[..., same], unrotated[..., same], atol=1e-5)
  assert np.abs(near - unrotated)[..., ~same].max() > 0.1


def test_positions_are_offset_then_scaled():
  frames = np.array([[0, 1], [4, 5]])
  offset = np.array([[0.0], [8.0]])
  want = [[0, 0.5], [6, 6.5]]
  assert dit.temporal_positions(frames, offset, 0.5).tolist() == want


def test_rotation_keeps_the_dtype():
  rotation = rope.grid_rotation(rope.temporal_rotation(np.ones((1, 1)), 8), 1, 1, 8)
  assert rope.rotate(jnp.ones((1, 1, 1, 8), jnp.bfloat16), rotation).dtype == "bfloat16"
