"""Which chunks of a clip a generator would be looking at.

While a long video is generated, the cache holds a few chunks only: the first of the
video (global sink), the first of the current shot (shot sink) and the newest ones. With
window-relative RoPE they sit at contiguous positions. A small model that is trained on
contiguous clips has never seen "first chunk, then chunk 9 right behind it". So training
sequences are made the way the cache is: the chunks it would hold, laid side by side.
"""

from collections.abc import Sequence

import numpy as np


def window_chunks(
  cuts: Sequence[bool],
  current: int,
  window: int,
  *,
  sink: bool = True,
  multi_shot_sink: bool = True,
  clean_recache: bool = True,
) -> tuple[int, ...]:
  """Chunks that the cache holds while chunk `current` is denoised, itself included.

  Replays SPEC 2.4 with whole chunks: a full window drops its oldest chunk that is no
  sink; after a cut chunk was made, `clean_recache` forgets everything but the global
  sink, and `multi_shot_sink` pins the new chunk in place of the last pinned one.

  Args:
    cuts: (chunks,) whether a chunk starts a new shot; the first never counts.
    current: chunk number.
    window: chunks that the cache holds, the current one included; at least 3 with
      both sinks, else 2.
    sink: keep the first chunk of the video.
    multi_shot_sink: keep the first chunk of the current shot, too; needs `sink`.
    clean_recache: forget the last shot once its successor's first chunk is made;
      needs `multi_shot_sink`.

  Returns:
    Ascending chunk numbers, at most `window` of them, ending in `current`.

  Raises:
    ValueError: `current` outside the clip, or a window too small for the sinks.
  """
  if not 0 <= current < len(cuts):
    raise ValueError(f"current={current} must lie in [0, {len(cuts)})")
  pins = sink and multi_shot_sink
  least = 3 if pins else 2
  if window < least:
    raise ValueError(f"window={window} chunks cannot hold the sinks; use {least}")
  held: list[int] = []
  pinned = -1
  for chunk in range(current + 1):
    held.append(chunk)
    if len(held) > window:
      held.remove(next(c for c in held if c != pinned and not (sink and c == 0)))
    if pins and 0 < chunk < current and cuts[chunk]:
      held = [0, chunk] if clean_recache else held
      pinned = chunk
  return tuple(held)


def context_view(
  cuts: Sequence[bool], current: int, window: int, length: int, **rules: bool
) -> tuple[np.ndarray, np.ndarray]:
  """A training sequence of `length` chunks in which `current` sees its true cache.

  The sequence is the cache of `current`; where that is shorter than `length`, the
  chunks that follow `current` in the clip fill it up (or the last one is repeated, at
  the end of the clip). A chunk of the sequence counts in the loss only where the chunks
  before it are exactly its own cache: "chunk 9 right after chunk 0" as a *target* would
  teach the model to jump.

  Args:
    cuts: (chunks,) whether a chunk starts a new shot.
    current: chunk number.
    window: chunks that the cache holds, the current one included.
    length: chunks of the sequence, at least `window`.
    **rules: sink, multi_shot_sink, clean_recache of `window_chunks`.

  Returns:
    chunks (length,) int32 and counts (length,) float32.
  """
  if length < window:
    raise ValueError(f"length={length} chunks must be at least window={window}")
  chunks = list(window_chunks(cuts, current, window, **rules))
  chunks += [c for c in range(current + 1, len(cuts))][: length - len(chunks)]
  chunks += [chunks[-1]] * (length - len(chunks))
  counts = [
    tuple(chunks[: i + 1]) == window_chunks(cuts, chunk, window, **rules)
    for i, chunk in enumerate(chunks)
  ]
  return np.asarray(chunks, np.int32), np.asarray(counts, np.float32)


def draw_view(
  cuts: Sequence[bool],
  rng: np.random.Generator,
  window: int,
  *,
  plain: float = 0.0,
  no_sink: float = 0.0,
  at_cut: float = 0.0,
  **rules: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """A random training sequence of `window` chunks: `context_view` of a random chunk.

  Args:
    cuts: (chunks,) whether a chunk starts a new shot. A clip shorter than the window
      is filled up with its last chunk, which does not count again.
    rng: random generator.
    window: chunks that the cache holds.
    plain: probability of the first `window` chunks as they are, all of them counted.
    no_sink: probability of a view without any sink, so that generation without sinks
      (for comparison) is no surprise to the network.
    at_cut: probability that the chunk is the first one of a later shot, if there is
      any. Only there must the subject be drawn anew from memory: anywhere else it is
      enough to carry on the chunk before.
    **rules: sink, multi_shot_sink, clean_recache of `window_chunks`.

  Returns:
    chunks (window,) int32 and counts (window,) float32, see `context_view`.
  """
  cuts = [bool(cut) for cut in cuts]  # numpy scalars are slow to test
  kind, current = rng.random(), int(rng.integers(len(cuts)))
  if rng.random() < at_cut:
    first_chunks = [c for c, cut in enumerate(cuts) if c and cut]
    current = int(rng.choice(first_chunks)) if first_chunks else current
  if kind < plain:
    chunks = np.arange(window, dtype=np.int32)
    return np.minimum(chunks, len(cuts) - 1), np.float32(chunks < len(cuts))
  if kind < plain + no_sink:
    rules = {**rules, "sink": False}
  return context_view(cuts, current, window, window, **rules)
