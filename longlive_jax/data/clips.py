"""Clips from a folder of videos and captions, and a grain pipeline over them.

The folder (SPEC 4, one caption folder a video; what `toy_world.py` writes):

  DIR/videos/<name>.mp4
  DIR/caption/<name>/0.json, 1.json, ...   {"caption": text}, one file a shot
  DIR/caption/<name>/shot_durations.txt    chunks of every shot (may be missing)

A video of 1 + 4 (f - 1) frames has f latent frames; with 8 to a chunk the first
chunk has 29 frames and the others 32. Frames beyond the last whole chunk are cut.

  source = clip_source(DIR)                  # a sequence of Clip
  clip = load_clip(source[0])                # dict: name, frames, prompts, cuts
  clips = load_clips(source, threads=16)     # all in memory, in order, skips bad ones
  batches = clip_batches(source, 8, seed=0, chunks=12)     # for the DiT
  batches = window_batches(source, 16, seed=0, frames=17)  # for the VAE
  state = batches.get_state(); batches.set_state(state)    # resumes exactly

Batches hold the same samples in the same order however many processes share them. A
file that cannot be read is reported by name, counted in `source.skipped`, and the
next clip of the folder takes its place.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from longlive_jax.data.video import read_video
from longlive_jax.generate.storyboard import (
  SCENE_CUT_PREFIX,
  read_captions,
  read_durations,
  spread_shots,
)

_log = logging.getLogger(__name__)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class Clip:
  """Where one clip lies; nothing is read yet.

  Attributes:
    name: stem of the video file.
    video: the file.
    captions: folder with one JSON file a shot.
    height, width, fps: what frames are resized, cropped and resampled to; None
      keeps what the file has.
  """

  name: str
  video: Path
  captions: Path
  height: int | None = None
  width: int | None = None
  fps: float | None = None


class ClipSource(Sequence):
  """The clips of a folder, by name, and the account of those that failed.

  Attributes:
    skipped: cause of the failure by name of the clip.
  """

  def __init__(self, clips: Iterable[Clip]):
    self._clips = tuple(clips)
    self.skipped: dict[str, str] = {}

  def __len__(self) -> int:
    return len(self._clips)

  def __getitem__(self, index):
    return self._clips[index]

  def skip(self, clip: Clip, error: Exception) -> None:
    """Reports a clip that cannot be used; once, however often it comes up."""
    if clip.name not in self.skipped:
      self.skipped[clip.name] = str(error)
      _log.warning("skipped clip %s: %s", clip.name, error)


def clip_source(
  folder: str | Path,
  *,
  height: int | None = None,
  width: int | None = None,
  fps: float | None = None,
) -> ClipSource:
  """Lists the clips of a folder, sorted by name.

  Raises:
    ValueError: the folder holds no video with captions.
  """
  folder = Path(folder)
  videos = sorted(folder.glob("videos/*"), key=lambda path: path.name)
  clips = [
    Clip(path.stem, path, folder / "caption" / path.stem, height, width, fps)
    for path in videos
    if path.suffix.lower() in VIDEO_SUFFIXES
  ]
  source = ClipSource(clip for clip in clips if clip.captions.is_dir())
  for clip in clips:
    if not clip.captions.is_dir():
      source.skip(clip, ValueError(f"no caption folder {str(clip.captions)!r}"))
  if not source:
    raise ValueError(
      f"data={str(folder)!r} holds no clip; it needs videos/<name>.mp4 and "
      "caption/<name>/0.json"
    )
  return source


def load_clip(
  clip: Clip, *, chunks: int | None = None, frames_per_chunk: int = 8
) -> dict[str, Any]:
  """Reads a clip and its prompts.

  Args:
    clip: an entry of `clip_source`.
    chunks: how many chunks from the start of the clip; None takes all whole ones.
    frames_per_chunk: latent frames of a chunk.

  Returns:
    name: str.
    frames: uint8 (1 + 4 (chunks * frames_per_chunk - 1), h, w, 3).
    prompts: list of `chunks` strings, the first chunk of every later shot with the
      scene-cut prefix.
    cuts: bool (chunks,), the chunk starts a new shot; never chunk 0.

  Raises:
    ValueError, FileNotFoundError: unreadable or too short; names the file.
  """
  per_chunk = 4 * frames_per_chunk
  video, _ = _read(clip, None if chunks is None else per_chunk * chunks - 3)
  found = (len(video) + 3) // per_chunk
  wanted = max(1, found if chunks is None else chunks)
  if found < wanted:
    raise ValueError(
      f"video {str(clip.video)!r} has {len(video)} frames; {wanted} chunks need "
      f"{per_chunk * wanted - 3}"
    )
  durations = read_durations(clip.captions / "shot_durations.txt")
  prompts = spread_shots(read_captions(clip.captions), found, durations=durations)
  cuts = [i > 0 and p.startswith(SCENE_CUT_PREFIX) for i, p in enumerate(prompts)]
  return {
    "name": clip.name,
    "frames": video[: per_chunk * wanted - 3],
    "prompts": prompts[:wanted],
    "cuts": np.array(cuts[:wanted]),
  }


def load_window(clip: Clip, rng: np.random.Generator, *, frames: int) -> np.ndarray:
  """Consecutive frames from a random place of a clip, uint8 (frames, h, w, 3)."""
  video, _ = _read(clip, None)
  if len(video) < frames:
    raise ValueError(
      f"video {str(clip.video)!r} has {len(video)} frames; {frames} are needed"
    )
  start = int(rng.integers(len(video) - frames + 1))
  return video[start : start + frames]


def load_clips(
  source: ClipSource,
  *,
  chunks: int | None = None,
  frames_per_chunk: int = 8,
  threads: int = 8,
) -> list[dict[str, Any]]:
  """Loads every readable clip, in the order of `source`, several at a time.

  A 12-chunk clip of 128 x 128 pixels takes 19 MB; for a set larger than the memory,
  slice: `load_clips(ClipSource(source[:500]))`.
  """

  def load(clip: Clip) -> dict[str, Any] | None:
    try:
      return load_clip(clip, chunks=chunks, frames_per_chunk=frames_per_chunk)
    except (ValueError, OSError) as error:
      source.skip(clip, error)
      return None

  with ThreadPoolExecutor(threads) as pool:  # decoding happens in ffmpeg processes
    return [clip for clip in pool.map(load, source) if clip is not None]


def clip_batches(
  source: ClipSource,
  batch_size: int,
  *,
  seed: int,
  chunks: int,
  frames_per_chunk: int = 8,
  rows: Sequence[int] | None = None,
  threads: int = 8,
) -> grain.DatasetIterator:
  """Endless shuffled batches of clips; each epoch has its own order.

  Args:
    rows: the samples of every batch that are read here; None: all.

  Each batch: name list[str], frames uint8 (b, t, h, w, 3), prompts list of b lists
  of `chunks` strings, cuts bool (b, chunks); b rows.
  """

  def load(clip: Clip, rng: np.random.Generator) -> dict[str, Any]:
    return load_clip(clip, chunks=chunks, frames_per_chunk=frames_per_chunk)

  return _batches(source, load, batch_size, rows, seed, threads)


def window_batches(
  source: ClipSource,
  batch_size: int,
  *,
  seed: int,
  frames: int = 17,
  rows: Sequence[int] | None = None,
  threads: int = 8,
) -> grain.DatasetIterator:
  """Endless shuffled batches {"frames": uint8 (b, frames, h, w, 3)} from random
  places of the clips; b rows, see `clip_batches`."""

  def load(clip: Clip, rng: np.random.Generator) -> dict[str, Any]:
    return {"frames": load_window(clip, rng, frames=frames)}

  return _batches(source, load, batch_size, rows, seed, threads)


def _batches(
  source: ClipSource,
  load: Callable[[Clip, np.random.Generator], dict[str, Any]],
  batch_size: int,
  rows: Sequence[int] | None,
  seed: int,
  threads: int,
) -> grain.DatasetIterator:
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1")
  rows = range(batch_size) if rows is None else rows

  def load_or_next(index: int, rng: np.random.Generator) -> dict[str, Any]:
    # The next clip takes the place of a bad one, so that every process still counts
    # the same samples.
    for step in range(len(source)):
      clip = source[(index + step) % len(source)]
      if clip.name not in source.skipped:
        try:
          return load(clip, rng)
        except (ValueError, OSError) as error:
          source.skip(clip, error)
    raise ValueError(f"none of {len(source)} clips can be used: {source.skipped}")

  samples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  samples = samples.random_map(load_or_next)

  def own(number: int) -> dict[str, Any]:
    # By its place among all samples, which its random numbers come from, too.
    batch, row = divmod(number, len(rows))
    return samples[batch * batch_size + rows[row]]

  numbers = grain.MapDataset.range(len(samples) // batch_size * len(rows))
  batches = numbers.map(own).batch(len(rows), drop_remainder=True, batch_fn=_collate)
  # At most two batches a thread wait in memory: clips are large.
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  return iter(batches.to_iter_dataset(options))


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
  stacked = {}
  for key, value in samples[0].items():
    column = [sample[key] for sample in samples]
    stacked[key] = np.stack(column) if isinstance(value, np.ndarray) else column
  return stacked


def _read(clip: Clip, frames: int | None) -> tuple[np.ndarray, float]:
  size = {"height": clip.height, "width": clip.width, "fps": clip.fps}
  return read_video(clip.video, frames=frames, **size)
