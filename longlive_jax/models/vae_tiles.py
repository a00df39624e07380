"""Decoding in tiles: the same frames from less working memory.

The middle of the decoder attends to whole frames, and what precedes the last stages is
small beside them: all that runs on whole frames. The last stages run on one tile after
the other, bands along the longer side of the picture. Nothing in them sees further than
`halo` pixels, so a tile that is given as many more on its inner sides comes out as if
the frame were whole: there is no seam to hide.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.models.vae_blocks import Head, UpStage

# Before the last 1, 2, 3, 4 stages of the published decoder the halo is 7, 10, 12, 13
# pixels of 640, 320, 160, 80 columns (704 x 1280). Four tiles then compute these stages
# 1.1, 1.25, 1.6, 2.3 times. Temporary memory of the light decoder (float32, one latent
# frame, XLA for CPU) is 2.3 GB, with the last 1, 2, 3 stages in eight tiles 1.9, 1.1,
# 1.3 GB.
TILED_STAGES = 2


def split_stages(
  stages: Sequence[UpStage],
) -> tuple[Sequence[UpStage], Sequence[UpStage]]:
  """The stages that run on whole frames, and those that run on tiles."""
  whole = max(len(stages) - TILED_STAGES, 0)
  return stages[:whole], stages[whole:]


def halo(stages: Sequence[UpStage], head: Head) -> int:
  """How far the result sees, in pixels of what goes into the first of `stages`."""
  reach = _reach(head)
  for stage in reversed(stages):
    if stage.resample is not None:
      reach = -(-(reach + _reach(stage.resample)) // 2)
    reach += _reach((stage.blocks, stage.time_conv))
  return reach


def _reach(layers: Any) -> int:
  """Of convolutions in a row: half a kernel each; weights are (out, ky, kx, ...)."""
  return sum(w.shape[1] // 2 for w in jax.tree.leaves(layers) if w.ndim > 1)


def check(stages: Sequence[UpStage], head: Head, y: int, x: int, tiles: int) -> None:
  """Raises ValueError when y x x latents cannot be decoded in so many tiles.

  Args:
    stages, head: of the decoder; shapes are enough.
  """
  whole, tiled = split_stages(stages)
  _tile_size(max(y, x) << len(whole), tiles, halo(tiled, head))


def _tile_size(size: int, tiles: int, halo: int) -> int:
  """Pixels of a tile, of `size` along the longer side.

  Raises:
    ValueError: tiles would not be equal, or narrower than the halo, so that one needs
      more than its neighbours.
  """
  fit = [1, *(n for n in range(2, size // halo + 1) if size % n == 0)]
  if tiles not in fit:
    raise ValueError(
      f"decode_tiles={tiles} does not make equal tiles, at least {halo} wide, of the "
      f"longer side of the picture ({size} wide where tiles begin); use one of {fit}"
    )
  return size // tiles


def in_tiles(
  part: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  x: jax.Array,
  history: Any,
  tiles: int,
  halo: int,
) -> tuple[jax.Array, Any]:
  """part(x, history), tile by tile.

  Args:
    part: maps (x, history) to (y, history) and sees no further than `halo`.
    x: (b, t, rows, columns, c).
    history: tree of arrays (b, t, rows, columns, c), in the resolution of x or a
      multiple of it, as is y.
    tiles: how many, along the longer side.
    halo: in pixels of x.

  Returns:
    What part(x, history) returns.

  Raises:
    ValueError: tiles that are not equal, or narrower than the halo.
  """
  if tiles == 1:
    return part(x, history)
  axis = 3 if x.shape[3] >= x.shape[2] else 2
  size = x.shape[axis]
  tile = _tile_size(size, tiles, halo)
  # A window ends where the picture does, never beyond: its padding is the right one.
  window = tile + halo * min(tiles - 1, 2)

  def cut(tree, whole: int, start, length: int):
    """What lies in pixels [start, start + length) of the `whole` of x or its window."""

    def leaf(a):
      scale = a.shape[axis] // whole
      return lax.dynamic_slice_in_dim(a, start * scale, length * scale, axis)

    return jax.tree.map(leaf, tree)

  def put(tree, whole: int, start, pieces):
    """Replaces what lies from pixel `start` on."""

    def leaf(a, piece):
      scale = a.shape[axis] // whole
      return lax.dynamic_update_slice_in_dim(a, piece, start * scale, axis)

    return jax.tree.map(leaf, tree, pieces)

  def step(carry, number):
    # The history of a tile is replaced one step late, before anything is read: within
    # its own step XLA copies all of the history first (2.6 GB at full size), not seeing
    # that it was read before. What this tile needs as it was comes along in `before`.
    history, late, before = carry
    first = number * tile
    history = put(history, size, jnp.maximum(first - tile, 0), late)
    start = jnp.clip(first - halo, 0, size - window)
    inside = first - start
    past = cut(history, size, start, window)
    past = put(past, window, jnp.maximum(inside - halo, 0), before)
    before = cut(past, window, inside + tile - halo, halo)
    y, new = part(cut(x, size, start, window), past)
    late, y = cut((new, y), window, inside, tile)
    return (history, late, before), y

  # Before the first tile there is nothing late: it writes what is there already.
  carry = history, cut(history, size, 0, tile), cut(history, size, 0, halo)
  (history, late, _), y = lax.scan(step, carry, jnp.arange(tiles))
  history = put(history, size, size - tile, late)
  y = jnp.moveaxis(y, 0, axis)  # (b, t, rows, tiles, columns, c) or before the rows
  return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :]), history
