"""How far a session has been played, and how far it has drifted."""

import collections
import time

import numpy as np

from longlive_jax.serve.record import Record
from longlive_jax.serve.watchers import Watcher

ANCHORS = 16  # shots of which the first chunk is remembered


class Show:
  """A session's clock, its watchers, and its drift meter; for one thread.

  The clock plays a video at its frame rate from when its first chunk was made, and
  waits where the next one is late.

  Attributes:
    watchers: who is told.
    anchors: mean latent frame of each shot's first chunk, flat.
    asked: when the session was asked for, until its first frames; told: likewise a
      prompt.
  """

  def __init__(self, asked: float | None = None):
    self.watchers: set[Watcher] = set()
    self.anchors: dict[int, np.ndarray] = {}
    self.asked, self.told = asked, None
    self.rewind()

  def rewind(self) -> None:
    """Nothing is left to be played, and the clock starts with the next chunk."""
    self._free = time.monotonic()
    self._ends: collections.deque[tuple[float, int]] = collections.deque()

  def keep(self, record: Record) -> None:
    """Forgets shots that the video has no more."""
    shots = {chunk.made.shot for chunk in record.chunks}
    self.anchors = {shot: a for shot, a in self.anchors.items() if shot in shots}

  def add(self, chunks: int, seconds: float) -> None:
    """One more chunk to play: then they are `chunks`."""
    self._free = max(self._free, time.monotonic()) + seconds
    self._ends.append((self._free, chunks))

  def played(self) -> int | None:
    """How many chunks the clock has played, if they are more than when last asked."""
    now, chunks = time.monotonic(), None
    while self._ends and self._ends[0][0] <= now:
      chunks = self._ends.popleft()[1]
    return chunks

  def wait(self) -> float:
    """Seconds until `played` has something to say."""
    return self._ends[0][0] - time.monotonic() if self._ends else float("inf")

  def likeness(self, shot: int, latents: np.ndarray) -> float:
    """Cosine of the angle between a chunk and its shot's first, averaged over time.

    Args:
      latents: float32 (f, y, x, c).
    """
    mean = latents.mean(0).ravel()
    anchor = self.anchors.setdefault(shot, mean)
    for old in list(self.anchors)[:-ANCHORS]:
      del self.anchors[old]
    lengths = np.linalg.norm(mean) * np.linalg.norm(anchor)
    return float(mean @ anchor / lengths) if lengths else 1.0
