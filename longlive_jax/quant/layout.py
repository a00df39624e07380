"""The order in which NVIDIA's block-scaled instructions read scales (SPEC 9).

A scale matrix (rows, columns), a column for every 16 numbers, is cut into tiles of 128
rows and 4 columns, tiles row-major. Within a tile, row r and column c are at position
(r % 32) * 16 + (r // 32) * 4 + c. Rows and columns that fill up the last tiles belong
to whoever pads the matrix of numbers: to 128 rows and 64 columns.
"""

from typing import TypeVar

import jax
import numpy as np

Scales = TypeVar("Scales", jax.Array, np.ndarray)

TILE_ROWS, TILE_COLUMNS = 128, 4


def swizzle_scales(scales: Scales) -> Scales:
  """Scales in rows and columns to the order of the hardware.

  Args:
    scales: (..., rows, columns) of any dtype, NumPy's or JAX's; rows a multiple of 128,
      columns of 4.

  Returns:
    (..., rows * columns).

  Raises:
    ValueError: other numbers of rows or columns.
  """
  *lead, rows, columns = scales.shape
  _check(rows, columns)
  tiles = scales.reshape(*lead, rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, 4)
  # (row tile, r // 32, r % 32, column tile, c) -> (row tile, column tile, ...)
  tiles = tiles.swapaxes(-4, -2)  # (row tile, column tile, r % 32, r // 32, c)
  return tiles.reshape(*lead, rows * columns)


def unswizzle_scales(swizzled: Scales, rows: int, columns: int) -> Scales:
  """The inverse of `swizzle_scales`: (..., rows * columns) -> (..., rows, columns).

  Raises:
    ValueError: rows or columns do not fill tiles, or are not those of `swizzled`.
  """
  *lead, size = swizzled.shape
  _check(rows, columns)
  if size != rows * columns:
    raise ValueError(
      f"rows={rows}, columns={columns} must have a product of {size}, the number of "
      "scales; use those of the padded matrix"
    )
  tiles = swizzled.reshape(*lead, rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, 4)
  return tiles.swapaxes(-4, -2).reshape(*lead, rows, columns)


def _check(rows: int, columns: int) -> None:
  if rows % TILE_ROWS or columns % TILE_COLUMNS:
    raise ValueError(
      f"rows={rows}, columns={columns} must be multiples of {TILE_ROWS} and "
      f"{TILE_COLUMNS}; pad the numbers with zeros to 128 rows and 64 columns"
    )
