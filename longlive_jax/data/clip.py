"""One clip of a training set: where it lies, and the whole chunks that are taken of it.

A clip is a video with several shots in it, a folder with one video a shot, or latents
that tools/encode_latents.py made of either. A video of 1 + 4 (f - 1) frames has f
latent frames; with 8 to a chunk the first chunk has 29 frames and the others 32. Frames
beyond the last whole chunk of a shot's file are cut.

Processes that share a clip each decode only their own frames of it. All else about the
clip, and whether it can be used at all, they know from the packets of its files, which
each of them lists to the end: so they agree.
"""

import dataclasses
import functools
import itertools
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.data.video_frames import VideoFrames, open_video
from longlive_jax.generate.storyboard import (
  SCENE_CUT_PREFIX,
  read_caption,
  read_captions,
  read_durations,
  spread_shots,
)

LATENTS_SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class Clip:
  """Where one clip lies; nothing is read yet.

  Attributes:
    name: stem of the file, or name of the folder.
    files: one video, or one a shot, or one file of latents.
    captions: folder with one JSON file a shot; latents have their own.
    height, width, fps: what frames are resized, cropped and resampled to; None
      keeps what the file has.
  """

  name: str
  files: tuple[Path, ...]
  captions: Path
  height: int | None = None
  width: int | None = None
  fps: float | None = None

  @property
  def encoded(self) -> bool:
    """Whether it is latents."""
    return self.files[0].suffix == LATENTS_SUFFIX


@dataclasses.dataclass(frozen=True)
class Chunking:
  """How many chunks are taken of a clip.

  Attributes:
    frames_per_chunk: latent frames.
    chunks: from the start of the clip; None takes all whole ones.
    min_chunks: a shorter clip is filled up to `chunks`, with chunks that do not count,
      unless it has fewer than these; 0 fills up none.
    chunks_per_shot: of a video with several captions and no shot_durations.txt; 0
      splits it evenly.
    max_chunks_per_shot: what a shot has beyond them is left out; 0 leaves out nothing.
  """

  frames_per_chunk: int = 8
  chunks: int | None = None
  min_chunks: int = 0
  chunks_per_shot: int = 0
  max_chunks_per_shot: int = 0

  def __post_init__(self):
    for name, least in (
      ("frames_per_chunk", 1), ("min_chunks", 0), ("chunks_per_shot", 0),
      ("max_chunks_per_shot", 0),
    ):  # fmt: skip
      if getattr(self, name) < least:
        raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
    if self.chunks is not None and not self.min_chunks <= self.chunks:
      raise ValueError(
        f"chunks={self.chunks} must be at least min_chunks={self.min_chunks}"
      )

  @property
  def video_frames(self) -> int:
    """Of a chunk, but for the first one of a clip, which has 3 less."""
    return 4 * self.frames_per_chunk


def load_clip(
  clip: Clip, chunking: Chunking, frames: Sequence[int] | None = None
) -> dict[str, Any]:
  """Reads a clip and its prompts.

  Args:
    frames: which of the clip's video frames are read, ascending; None: all. Latents
      are read whole.

  Returns:
    name: str.
    frames: uint8 (1 + 4 (chunks * frames_per_chunk - 1), h, w, 3), or those asked for;
      or
    latents: float32 (chunks * frames_per_chunk, y, x, c), of a file of latents.
    prompts: list of `chunks` strings, the first chunk of every later shot with the
      scene-cut prefix.
    cuts: bool (chunks,), the chunk starts a new shot; never chunk 0.
    valid: int32 (), chunks that are the clip's own; those behind repeat its end.
    damaged: int32 (), pictures among those read that do not decode; others stand in.

  Raises:
    ValueError, FileNotFoundError: unreadable or too short; names the file. It does not
      depend on `frames`.
    RuntimeError: ffmpeg was killed or did not start; see `video_frames.open_video`.
  """
  kind, per_chunk, missing = "frames", chunking.video_frames, 3
  if clip.encoded:
    kind, per_chunk, missing = "latents", chunking.frames_per_chunk, 0
    read, prompts, length = _find_latents(clip, chunking)
  elif len(clip.files) > 1:
    read, prompts, length = _find_shots(clip, chunking)
  else:
    read, prompts, length = _find_video(clip, chunking)
  wanted = chunking.chunks or len(prompts)
  least = chunking.min_chunks or wanted or 1
  if len(prompts) < least:
    raise ValueError(
      f"clip {_place(clip)!r} has {length} {kind}; {least} chunks need "
      f"{per_chunk * least - missing}"
    )
  valid = min(wanted, len(prompts))
  prompts = prompts[:valid] + [prompts[valid - 1]] * (wanted - valid)
  if frames is None or clip.encoded:
    frames = range(per_chunk * wanted - missing)
  # What fills up a short clip is its last frame.
  numbers = np.asarray(frames, np.int64)
  rows, damaged = read(np.minimum(numbers, per_chunk * valid - missing - 1))
  starts = [prompt.startswith(SCENE_CUT_PREFIX) for prompt in prompts]
  numbers = np.arange(wanted)
  return {
    "name": clip.name,
    kind: rows,
    "prompts": prompts,
    "cuts": np.array(starts) & (0 < numbers) & (numbers < valid),
    "valid": np.array(valid, np.int32),
    "damaged": np.array(damaged, np.int32),
  }


def captions_of(clip: Clip) -> list[str]:
  """Captions of a clip's shots, without the scene-cut prefix.

  Raises:
    ValueError: latents that cannot be read.
  """
  if not clip.encoded:
    return read_captions(clip.captions)
  (prompts,) = _arrays(clip, "prompts")
  return [p.removeprefix(SCENE_CUT_PREFIX) for p in json.loads(str(prompts))]


def save_latents(path: Path, latents: np.ndarray, prompts: list[str]) -> None:
  """Writes the latents (f, y, x, c) of a clip; the file is whole, or not there."""
  beside = path.with_suffix(".part")
  with beside.open("wb") as file:
    np.savez(file, latents=latents, prompts=json.dumps(prompts))
  beside.replace(path)


# read(numbers): these rows of a clip, ascending, and how many of them do not decode.
_Read = Callable[[np.ndarray], tuple[np.ndarray, int]]


# Each returns how to read a clip, the prompts of its whole chunks, and the number of
# rows there are, for the message.
def _find_video(clip: Clip, chunking: Chunking) -> tuple[_Read, list[str], int]:
  """One video, whose shots follow each other in it."""
  per_chunk, most = chunking.video_frames, chunking.max_chunks_per_shot
  video = _open(clip, clip.files[0])
  count = (len(video) + 3) // per_chunk
  if chunking.chunks is not None and not most:
    # Else later shots make up for what is left out of the first ones.
    count = min(count, chunking.chunks)
  prompts = spread_shots(
    read_captions(clip.captions),
    count,
    durations=read_durations(clip.captions / "shot_durations.txt"),
    chunks_per_shot=chunking.chunks_per_shot or None,
  )
  kept, length = [], 0
  for chunk, prompt in enumerate(prompts):
    length = 1 if prompt.startswith(SCENE_CUT_PREFIX) else length + 1
    if not most or length <= most:
      kept.append(chunk)
  left = len(video) if len(kept) == len(prompts) else per_chunk * len(kept) - 3
  chunks = [(video, max(0, per_chunk * c - 3)) for c in kept]
  read = functools.partial(_read_chunks, chunks, per_chunk)
  return read, [prompts[c] for c in kept], left


def _find_shots(clip: Clip, chunking: Chunking) -> tuple[_Read, list[str], int]:
  """A video a shot."""
  per_chunk, most = chunking.video_frames, chunking.max_chunks_per_shot
  size, chunks, prompts = None, [], []
  for file in clip.files:
    if chunking.chunks is not None and len(prompts) >= chunking.chunks:
      break
    missing = 0 if prompts else 3
    video = _open(clip, file)
    size = size or _size(video)
    if _size(video) != size:
      raise ValueError(
        f"video {str(file)!r} is {_size(video)}, the shots before it {size}; give "
        "height and width for all"
      )
    count = (len(video) + missing) // per_chunk
    count = min(count, most) if most else count
    chunks += [(video, max(0, per_chunk * c - missing)) for c in range(count)]
    caption = read_caption(clip.captions / f"{file.stem}.json")
    shot = [caption] * count
    if prompts and shot:
      shot[0] = SCENE_CUT_PREFIX + caption
    prompts += shot
  read = functools.partial(_read_chunks, chunks, per_chunk)
  return read, prompts, max(0, per_chunk * len(chunks) - 3)


def _find_latents(clip: Clip, chunking: Chunking) -> tuple[_Read, list[str], int]:
  latents, prompts = _arrays(clip, "latents", "prompts")
  prompts = json.loads(str(prompts))
  if len(latents) != len(prompts) * chunking.frames_per_chunk:
    raise ValueError(
      f"latents {_place(clip)!r} have {len(latents)} frames for {len(prompts)} chunks, "
      f"not frames_per_chunk={chunking.frames_per_chunk} each; encode them again"
    )
  return lambda rows: (latents[rows].astype(np.float32), 0), prompts, len(latents)


def _read_chunks(
  chunks: Sequence[tuple[VideoFrames, int]], per_chunk: int, numbers: np.ndarray
) -> tuple[np.ndarray, int]:
  """Frames of a clip by their numbers.

  Args:
    chunks: where each begins: a video, and the number of a frame in it.
  """
  chunk, offset = np.divmod(numbers + 3, per_chunk)
  # The first chunk has no frames 0 to 2.
  place = np.array([start for _, start in chunks])[chunk] + offset - 3 * (chunk == 0)
  videos = [chunks[c][0] for c in chunk]
  # What follows each other in a file is decoded at once; what fills up stays in place.
  cut = np.array([a is not b for a, b in itertools.pairwise(videos)], bool)
  cut |= ~np.isin(np.diff(place), (0, 1))
  first = chunks[0][0]
  frames = np.empty((len(numbers), first.height, first.width, 3), np.uint8)
  damaged, begin = 0, 0
  for end in (*(1 + np.flatnonzero(cut)), len(numbers)):
    if begin < end:
      start = place[begin]
      found, bad = videos[begin].read(start, place[end - 1] + 1)
      frames[begin:end] = found[place[begin:end] - start]
      damaged += bad
    begin = end
  return frames, damaged


def _arrays(clip: Clip, *names: str) -> list[np.ndarray]:
  try:
    with np.load(clip.files[0]) as file:
      return [file[name] for name in names]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"cannot read latents {_place(clip)!r}: {error}") from error


def _place(clip: Clip) -> str:
  return str(clip.files[0] if len(clip.files) == 1 else clip.files[0].parent)


def _size(video: VideoFrames) -> str:
  return f"{video.height}x{video.width}"


def _open(clip: Clip, file: Path) -> VideoFrames:
  return open_video(file, height=clip.height, width=clip.width, fps=clip.fps)
