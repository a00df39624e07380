"""Clips from a folder of videos and captions, and a grain pipeline over them.

The folder (SPEC 4, one caption folder a video; what `toy_world.py` writes):

  DIR/videos/<name>.mp4                    or a folder <name>/ with 0.mp4, 1.mp4, ...
  DIR/caption/<name>/0.json, 1.json, ...   {"caption": text}, one file a shot
  DIR/caption/<name>/shot_durations.txt    chunks of every shot (may be missing)

or, as tools/encode_latents.py makes it of such a folder, DIR/latents/<name>.npz.

  source = clip_source(DIR)                      # a sequence of Clip
  clip = load_clip(source[0], Chunking())        # dict, see data/clip.py
  clips = load_clips(source, chunking)           # all, in order, skips bad ones
  batches = clip_batches(source, 8, Chunking(chunks=12), seed=0)  # shuffled
  state = batches.get_state(); batches.set_state(state)           # resumes exactly

Batches hold the same samples in the same order however many processes share them. A
file that cannot be read is reported by name, counted in `source.skipped`, and the
next clip of the folder takes its place.

That is decided by the packets of the clip's files and by their first pictures, which
every process reads alike. A picture in the middle that does not decode is seen only by
the processes that decode it: in batches such a clip stays in its place, with the
picture before instead, and is counted in `source.damaged`. `load_clips` reads whole
clips and skips it.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np

from longlive_jax.data.clip import LATENTS_SUFFIX, Chunking, Clip, load_clip

_log = logging.getLogger(__name__)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


class ClipSource(Sequence):
  """The clips of a folder, by name, and the account of those that failed.

  Attributes:
    skipped: cause of the failure by name of the clip.
    damaged: by name of a clip that is used, how many pictures did not decode.
  """

  def __init__(self, clips: Iterable[Clip]):
    self._clips = tuple(clips)
    self.skipped: dict[str, str] = {}
    self.damaged: dict[str, int] = {}

  def __len__(self) -> int:
    return len(self._clips)

  def __getitem__(self, index):
    return self._clips[index]

  def skip(self, name: str, error: Exception) -> None:
    """Reports a clip that cannot be used; once, however often it comes up."""
    if name not in self.skipped:
      self.skipped[name] = str(error)
      _log.warning("skipped clip %s: %s", name, error)

  def damage(self, name: str, pictures: int) -> None:
    """Reports a clip that is used although pictures of it do not decode; once."""
    if name not in self.damaged:
      self.damaged[name] = pictures
      _log.warning("clip %s: %d pictures do not decode", name, pictures)


def clip_source(
  folder: str | Path,
  *,
  height: int | None = None,
  width: int | None = None,
  fps: float | None = None,
) -> ClipSource:
  """Lists the clips of a folder, sorted by name.

  What has no caption, and captions that have no video, are reported and skipped.

  Raises:
    ValueError: the folder holds no video with captions; height without width.
  """
  if (height is None) != (width is None):
    raise ValueError(f"height={height} and width={width}: give both or neither")
  folder = Path(folder)
  latents = sorted(folder.glob(f"latents/*{LATENTS_SUFFIX}"))
  if latents:
    return ClipSource(Clip(path.stem, (path,), folder) for path in latents)
  clips, failed = {}, {}
  for path in sorted(folder.glob("videos/*"), key=lambda path: path.name):
    files = _videos(path)
    name = path.name if path.is_dir() else path.stem
    captions = folder / "caption" / name
    if not files:
      continue
    clips[name] = Clip(name, files, captions, height, width, fps)
    if not captions.is_dir():
      failed[name] = f"no caption folder {str(captions)!r}"
    elif path.is_dir():
      wanted = (captions / f"{file.stem}.json" for file in files)
      if missing := [str(file) for file in wanted if not file.is_file()]:
        failed[name] = f"no caption {missing[0]!r}"
  for captions in sorted(folder.glob("caption/*/")):
    if captions.name not in clips:
      failed[captions.name] = f"captions {str(captions)!r} have no video"
  source = ClipSource(clip for name, clip in clips.items() if name not in failed)
  for name, cause in failed.items():
    source.skip(name, ValueError(cause))
  if not source:
    raise ValueError(
      f"data={str(folder)!r} holds no clip; it needs videos/<name>.mp4 and "
      "caption/<name>/0.json"
    )
  return source


def video_source(folder: str | Path, **size: float | None) -> ClipSource:
  """`clip_source` for what needs frames.

  Raises:
    ValueError: as there; also for a folder of latents.
  """
  source = clip_source(folder, **size)
  if source[0].encoded:
    raise ValueError(
      f"data={str(folder)!r} holds latents; give the folder of videos that they were "
      "made of"
    )
  return source


def _videos(path: Path) -> tuple[Path, ...]:
  """A video file, or those of a folder in the order of their numbers."""
  if not path.is_dir():
    return (path,) if path.suffix.lower() in VIDEO_SUFFIXES else ()
  files = [file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES]
  files.sort(key=lambda f: (int(f.stem) if f.stem.isdecimal() else -1, f.stem))
  return tuple(files)


def load_clips(
  source: ClipSource, chunking: Chunking, *, threads: int = 8
) -> list[dict[str, Any]]:
  """Loads every readable clip, in the order of `source`, several at a time.

  A 12-chunk clip of 128 x 128 pixels takes 19 MB; for a set larger than the memory,
  slice: `load_clips(ClipSource(source[:500]))`.
  """

  def load(clip: Clip) -> dict[str, Any] | None:
    try:
      loaded = load_clip(clip, chunking)
      if loaded["damaged"]:
        raise ValueError(f"{loaded['damaged']} pictures of it do not decode")
      return loaded
    except (ValueError, OSError) as error:
      source.skip(clip.name, error)
      return None

  with ThreadPoolExecutor(threads) as pool:  # decoding happens in ffmpeg processes
    return [clip for clip in pool.map(load, source) if clip is not None]


def clip_batches(
  source: ClipSource,
  batch_size: int,
  chunking: Chunking,
  *,
  seed: int,
  rows: Sequence[int] | None = None,
  frames: Sequence[int] | None = None,
  threads: int = 8,
) -> grain.DatasetIterator:
  """Endless shuffled batches of clips; each epoch has its own order.

  Args:
    rows: the samples of every batch that are read here; None: all.
    frames: the video frames of every clip that are read here; None: all.

  Each batch: what `load_clip` gives, of b rows, as lists or stacked.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1")
  rows = range(batch_size) if rows is None else rows

  def load_or_next(index: int) -> dict[str, Any]:
    # The next clip takes the place of a bad one, so that every process still counts
    # the same samples.
    for step in range(len(source)):
      clip = source[(index + step) % len(source)]
      if clip.name not in source.skipped:
        try:
          loaded = load_clip(clip, chunking, frames)
        except (ValueError, OSError) as error:
          source.skip(clip.name, error)
          continue
        if loaded["damaged"]:
          source.damage(clip.name, int(loaded["damaged"]))
        return loaded
    raise ValueError(f"none of {len(source)} clips can be used: {source.skipped}")

  samples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  samples = samples.map(load_or_next)

  def own(number: int) -> dict[str, Any]:
    batch, row = divmod(number, len(rows))
    return samples[batch * batch_size + rows[row]]

  numbers = grain.MapDataset.range(len(samples) // batch_size * len(rows))
  batches = numbers.map(own).batch(len(rows), drop_remainder=True, batch_fn=_collate)
  # At most two batches a thread wait in memory: clips are large.
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  return iter(batches.to_iter_dataset(options))


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
  return {key: stack(samples, key) for key in samples[0]}


def stack(samples: Sequence[dict[str, Any]], key: str) -> Any:
  """One entry of several clips: arrays stacked, else a list.

  Raises:
    ValueError: arrays of different shapes; names the clips.
  """
  column = [sample[key] for sample in samples]
  if not isinstance(column[0], np.ndarray):
    return column
  for sample, value in zip(samples, column, strict=True):
    if value.shape != column[0].shape:
      raise ValueError(
        f"clips {samples[0].get('name')!r} and {sample.get('name')!r} have {key} of "
        f"shapes {column[0].shape} and {value.shape}; give height and width for all"
      )
  return np.stack(column)
