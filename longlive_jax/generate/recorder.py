"""Writes a stream to MP4 files while it runs; survives a full disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from longlive_jax.data.video import VideoWriter
from longlive_jax.generate.report import ContactSheet


class Recorder:
  """One MP4 per video and a contact sheet of all shots.

  A disk that is full must not end the program: `failure` says what happened, the frames
  that did not arrive are kept, and the caller decides.

  Args:
    folder: where video.mp4 (or video_000.mp4, ...) go.
    batch: number of videos.
    fps: frame rate.
  """

  def __init__(self, folder: Path, batch: int, fps: float):
    names = (
      ["video.mp4"] if batch == 1 else [f"video_{i:03d}.mp4" for i in range(batch)]
    )
    self.paths = [folder / name for name in names]
    self.sheet = ContactSheet()
    self.failure: OSError | None = None
    self._writers = [VideoWriter(path, fps=fps) for path in self.paths]
    # The encoder holds back up to a fragment (a second), and a full disk is noticed
    # even later: what was sent lately may have to be sent again.
    self._keep = int(3 * fps)
    self._sent = [0] * batch
    self._tails: list[list[np.ndarray]] = [[] for _ in range(batch)]

  def add(
    self, frames: Sequence[np.ndarray] | np.ndarray, shots: np.ndarray | None = None
  ) -> None:
    """Takes the next frames of all videos.

    Args:
      frames: per video, uint8 (t, h, w, 3).
      shots: (b,) shot of each video, for the contact sheet.
    """
    for b, video in enumerate(frames):
      tail = self._tails[b]
      tail.append(video)
      self._sent[b] += len(video)
      if shots is not None:
        self.sheet.add(b, int(shots[b]), video)
      if self.failure is not None:
        continue
      while sum(map(len, tail[1:])) >= self._keep:
        del tail[0]
      try:
        self._writers[b].append(video)
      except OSError as error:
        self.failure = error

  def close(self) -> list[np.ndarray]:
    """Ends the files.

    Returns:
      After a failure the frames of each video that its MP4 lacks, uint8
      (t, h, w, 3); else an empty list.
    """
    for writer in self._writers:
      try:
        writer.close()
      except OSError as error:
        self.failure = self.failure or error
    if self.failure is None:
      return []
    unwritten = []
    for path, sent, tail in zip(self.paths, self._sent, self._tails, strict=True):
      kept = np.concatenate(tail)
      unwritten.append(kept[max(0, len(kept) - sent + _playable(path)) :])
    return unwritten


def _playable(path: Path) -> int:
  try:
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
  except (OSError, RuntimeError):  # not even a header arrived
    return 0
