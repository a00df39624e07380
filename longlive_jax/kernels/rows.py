"""How kernels walk over rows: a program holds a row, and loads the next meanwhile.

So a sum or a largest magnitude over a row costs no pass of its own, and what all rows
share, as modulation, is loaded once for several of them.
"""

from __future__ import annotations

import dataclasses

from longlive_jax.kernels.launch import jit, tl


@dataclasses.dataclass(frozen=True)
class Walk:
  """How rows are shared out among programs.

  Attributes:
    rows: consecutive ones of a program.
    num_warps: of a program; None: see `warps`.
  """

  rows: int = 1
  num_warps: int | None = None

  def warps(self, n: int) -> int:
    """Warps for rows of n numbers, each thread with 8 numbers, 16 bytes, at a time.

    As many as share n numbers evenly: a tile is a power of two, and what is behind the
    end of a row is left out of the program if it is whole turns of all threads. At most
    64 numbers a thread, so that a row stays in registers; at most 8 warps, so that
    several programs share a multiprocessor and some load while others count.
    """
    if self.num_warps is not None:
      return self.num_warps
    even, least = (n & -n) // 256, tile_of(-(-n // 2048))
    return min(8, max(even, least))

  def programs(self, count: int) -> int:
    """For `count` rows."""
    return -(-count // self.rows)

  def constants(self, count: int, n: int) -> dict[str, int]:
    """Of every kernel that walks over `count` rows of n numbers."""
    return {"N": n, "COUNT": count, "TILE": tile_of(n), "ROWS": self.rows}


def tile_of(n: int) -> int:
  """The smallest power of two that is not below n."""
  return 1 << (n - 1).bit_length()


@jit
def columns_of(TILE: tl.constexpr):
  """Numbers of a row (TILE,), 8 to a thread: 16 bytes of 16-bit numbers.

  Without the limit a thread gets 16, as many codes as 16 bytes have: then a warp reads
  every other 16 bytes, and rows of 3,072 do not divide among 128 threads.
  """
  return tl.max_contiguous(tl.arange(0, TILE), 8)


@jit
def row_of(i, COUNT: tl.constexpr, ROWS: tl.constexpr):
  """The i-th row of this program, int64. Behind the last row it is the last again."""
  return tl.minimum(tl.program_id(0) * ROWS + i, COUNT - 1).to(tl.int64)


@jit
def load_row(x_ptr, row, column, N: tl.constexpr):
  """Numbers (TILE,) of a row of x (rows, N); 0 behind its end."""
  at = x_ptr + row * N + column
  return tl.load(at, mask=column < N, other=0.0, eviction_policy="evict_first")


@jit
def load_shared(x_ptr, column, N: tl.constexpr):
  """Numbers (TILE,) of what all rows share; 0 behind its end.

  To be kept in the caches that rows stream through.
  """
  return tl.load(
    x_ptr + column, mask=column < N, other=0.0, eviction_policy="evict_last"
  )
