"""Decoding in bands: several devices share a picture, each has some rows or columns.

The decoder looks beyond its band in two places only. A convolution reads a *halo*, the
rows next to the band, which the neighbours send just before it: numbers that they have
anyway, so nothing is computed twice, unlike in tiles (vae_tiles.py). And the attention
in the middle, where pictures are small, gathers the keys and values of all bands. So a
band comes out as if one device had the whole picture. What is remembered of earlier
frames is split alike and holds no halo.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Band:
  """How pictures are shared: what `jax.shard_map` over `mesh_axis` is given. Static.

  Attributes:
    devices: that share a picture; 1 has all of it, and exchanges nothing.
    mesh_axis: along which they have neighbouring bands, of one size.
    axis: of arrays (b, t, y, x, c) that is shared: 2, rows, or 3, columns.
  """

  devices: int = 1
  mesh_axis: str = ""
  axis: int = 2

  def with_halo(
    self, x: jax.Array, sides: tuple[int, int]
  ) -> tuple[jax.Array, tuple[int, int]]:
    """The band and what a convolution reads beside it; zeros beyond the picture.

    For decoding only: a derivative would miss what neighbours send, which are bits.

    Args:
      x: (b, t, y, x, c).
      sides: how many rows and columns on each side of x are read.

    Returns:
      x: longer along the shared axis.
      sides: rows and columns of zeros that are still missing on each side.
    """
    width = sides[self.axis - 2]
    if self.devices == 1 or not width:
      return x, sides
    first = lax.slice_in_dim(x, 0, width, axis=self.axis)
    last = lax.slice_in_dim(x, x.shape[self.axis] - width, None, axis=self.axis)
    before, after = self._shifted(last, 1), self._shifted(first, -1)
    x = jnp.concatenate([before, x, after], axis=self.axis)
    return x, (0, sides[1]) if self.axis == 2 else (sides[0], 0)

  def gathered(self, pixels: jax.Array) -> jax.Array:
    """Pixels (b, t, s, c) of one band -> of all bands, one band after the other."""
    if self.devices == 1:
      return pixels
    return lax.all_gather(pixels, self.mesh_axis, axis=2, tiled=True)

  def _shifted(self, x: jax.Array, step: int) -> jax.Array:
    """x of the device `step` before this one; zeros where there is none."""
    pairs = [(i, i + step) for i in range(self.devices)]
    pairs = [(i, j) for i, j in pairs if 0 <= j < self.devices]
    # As bits: XLA sends FP8 codes as float16 where a device has no FP8, as CPUs.
    bits = x.view(f"uint{8 * x.dtype.itemsize}")
    return lax.ppermute(bits, self.mesh_axis, pairs).view(x.dtype)


WHOLE = Band()
