"""Where the tokens of a training clip stand, and which keys each query sees (SPEC 2.2).

A clip is cut into chunks. Teacher-forced it is there twice, clean and noisy: a clean
chunk sees the clean chunks up to itself, a noisy one the clean chunks before it and
itself. Otherwise a chunk sees the chunks up to itself.

So the mask is dense rectangles: a chunk against the clean tokens before it (its
history), and against itself. Everything follows from `ClipLayout`: the mask token by
token, the rectangles, the loops of kernels/flash_attention.py.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

A = TypeVar("A", int, jax.Array)
Span = tuple[int, int]  # first index and the one behind the last


@dataclasses.dataclass(frozen=True)
class Rectangle:
  """Queries of one chunk, and all keys that they see.

  Attributes:
    queries: span of indices.
    keys: spans of indices in the order of positions, as long as they can be: the
      history, rank by rank, then the chunk itself.
  """

  queries: Span
  keys: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class ClipLayout:
  """The order of a clip's tokens: [rank 0 clean, rank 0 noisy, rank 1 clean, ...].

  A position is a token's place in the clip, an index its place in the sequence.
  Hashable: static under jit.

  Attributes:
    chunk: tokens of a chunk.
    chunks: how many, a shorter first one included.
    first_chunk: tokens of a shorter first chunk (independent first frame), or 0.
    teacher_forced: whether there is a clean and a noisy token for each position.
    ranks: equal spans of the clip, each with its clean, then its noisy tokens: what the
      devices of Balanced SP hold. 1 is [all clean, all noisy].

  Raises:
    ValueError: numbers that do not fit together.
  """

  chunk: int
  chunks: int
  first_chunk: int = 0
  teacher_forced: bool = True
  ranks: int = 1

  def __post_init__(self):
    for name in ("chunk", "chunks", "ranks"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if not 0 <= self.first_chunk <= self.chunk:
      raise ValueError(
        f"first_chunk={self.first_chunk} must lie between 0 and chunk={self.chunk}"
      )
    if self.teacher_forced and self.first_chunk:
      raise ValueError(
        f"first_chunk={self.first_chunk} must be 0: teacher forcing is not defined "
        "with an independent first frame"
      )
    if self.ranks > 1 and not self.teacher_forced:
      raise ValueError(
        f"ranks={self.ranks} must be 1 without teacher forcing: the order is the clip's"
      )
    if self.chunks % self.ranks:
      raise ValueError(
        f"chunks={self.chunks} must be a multiple of ranks={self.ranks}, so that every "
        "rank holds whole chunks"
      )

  @classmethod
  def of_frames(
    cls,
    frames: int,
    frames_per_chunk: int,
    tokens_per_frame: int,
    *,
    teacher_forced: bool = True,
    independent_first_frame: bool = False,
    ranks: int = 1,
  ) -> "ClipLayout":
    """The layout of a clip of latent frames.

    Raises:
      ValueError: when frames do not divide into chunks, or chunks into ranks, or for
        teacher forcing together with an independent first frame.
    """
    first = 1 if independent_first_frame else 0
    if (frames - first) % frames_per_chunk:
      raise ValueError(
        f"frames={frames} must be {first} plus a multiple of "
        f"frames_per_chunk={frames_per_chunk}"
      )
    if teacher_forced and independent_first_frame:
      raise ValueError(
        "teacher forcing is not defined with independent_first_frame=True"
      )
    return cls(
      chunk=frames_per_chunk * tokens_per_frame,
      chunks=first + (frames - first) // frames_per_chunk,
      first_chunk=first * tokens_per_frame,
      teacher_forced=teacher_forced,
      ranks=ranks,
    )

  @property
  def halves(self) -> int:
    """Clean and noisy, or 1."""
    return 2 if self.teacher_forced else 1

  @property
  def shift(self) -> int:
    """Tokens that the first chunk is short of."""
    return -self.first_chunk % self.chunk

  @property
  def tokens(self) -> int:
    """Positions of the clip."""
    return self.chunks * self.chunk - self.shift

  @property
  def length(self) -> int:
    """Tokens of the sequence."""
    return self.halves * self.tokens

  @property
  def span(self) -> int:
    """Positions of a rank."""
    return self.tokens // self.ranks

  def index(self, position: A, half: A) -> A:
    """Where the token of a position stands; half is 0 (clean, or the only) or 1."""
    rank = position // self.span
    return position + (rank * (self.halves - 1) + half) * self.span

  def position(self, index: A) -> A:
    """The inverse of `index`, whichever the half."""
    per_rank = self.halves * self.span
    return index // per_rank * self.span + index % self.span

  def mask(self, q: jax.Array, k: jax.Array) -> jax.Array:
    """Which keys k (k,) the queries q (q,) see, given by index: bool (q, k)."""
    chunk_q, chunk_k = ((self.position(i) + self.shift) // self.chunk for i in (q, k))
    chunk_q, chunk_k = chunk_q[:, None], chunk_k[None, :]
    if not self.teacher_forced:
      return chunk_k <= chunk_q
    noisy_q, noisy_k = (q // self.span % 2 == 1)[:, None], (k // self.span % 2 == 1)
    history = jnp.where(noisy_q, chunk_k < chunk_q, chunk_k <= chunk_q)
    return jnp.where(noisy_k, noisy_q & (chunk_k == chunk_q), history)

  def valid(self, index: jax.Array, lengths: jax.Array) -> jax.Array:
    """Which tokens are no padding: bool, (s,) and (b,) -> (b, s).

    Args:
      lengths: valid positions of each sample, the same for both halves.
    """
    return self.position(index) < lengths[:, None]

  def chunk_span(self, chunk: int) -> Span:
    """Positions of a chunk."""
    end = (chunk + 1) * self.chunk - self.shift
    return max(0, end - self.chunk), end

  def rectangles(self) -> list[Rectangle]:
    """What the mask allows: chunk by chunk, clean before noisy."""
    found = []
    for chunk in range(self.chunks):
      start, end = self.chunk_span(chunk)
      history = [
        (self.index(first, 0), self.index(min(first + self.span, start) - 1, 0) + 1)
        for first in range(0, start, self.span)
      ]
      for half in range(self.halves):
        own = self.index(start, half), self.index(end - 1, half) + 1
        keys = [*history, own]
        if history and history[-1][1] == own[0]:
          keys[-2:] = [(history[-1][0], own[1])]
        found.append(Rectangle(own, tuple(keys)))
    return found

  def pairs(self) -> int:
    """Pairs of a query and a key that it sees. 4 n d operations each, forward."""
    spans = map(self.chunk_span, range(self.chunks))
    return self.halves * sum((end - start) * end for start, end in spans)

  def unmasked_fraction(self) -> float:
    """Share of the square of all pairs that is seen."""
    return self.pairs() / self.length**2
