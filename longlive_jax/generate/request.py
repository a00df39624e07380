"""What the user asked for, checked completely before any model is built.

Every function here is cheap and raises `ValueError` naming the field, its value and
what to do instead: a wrong path must not be found after minutes of loading.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from longlive_jax.data.video import read_image, read_video
from longlive_jax.generate import storyboard
from longlive_jax.generate.storyboard import Storyboard

SPATIAL, TEMPORAL = 16, 4  # video pixels and frames a latent pixel and frame
CHUNKS_PER_SHOT = 3


def check_picture(height: int, width: int, fps: float) -> None:
  """Height and width must divide into tokens: 16 pixels a latent, 2 latents a token."""
  for name, value in (("height", height), ("width", width)):
    if value < 32 or value % 32:
      nearest = max(32, round(value / 32) * 32)
      raise ValueError(f"{name}={value} must be a multiple of 32; use {nearest}")
  if not fps > 0:
    raise ValueError(f"fps={fps} must be positive; the models are trained at 24")


def check_folder(path: str | Path, name: str = "output") -> Path:
  """Creates a folder and proves that files can be written to it."""
  folder = Path(path).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise ValueError(
      f"{name}={folder} is not writable ({error.strerror}); choose another folder"
    ) from error
  return folder


def build_storyboard(
  *,
  shots: Sequence[str] = (),
  prompts: str | None = None,
  image: str | None = None,
  images: str | None = None,
  chunks: int | None = None,
  durations: Sequence[int] | None = None,
) -> Storyboard:
  """The storyboard of exactly one source: inline shots, a text source or images.

  Args:
    shots: prompts of one video, one a shot; `image` may be its first frame.
    prompts: text file (one video a line) or caption folder (one subfolder a video).
    images: folder of images and texts.
    chunks: length; default three chunks a shot, or nine for files.
    durations: chunks of each inline shot.

  Raises:
    ValueError: no source or several, or as the storyboard readers.
  """
  given = [bool(shots), prompts is not None, images is not None]
  if image is not None and not shots:
    raise ValueError(f"image={image} has no text; add --prompt")
  if sum(given) != 1:
    raise ValueError(
      f"{sum(given)} prompt sources were given; use exactly one of --prompt, --prompts "
      "and --images"
    )
  if durations and not shots:
    raise ValueError(
      f"durations={tuple(durations)} belong to --prompt; for a caption folder write "
      "shot_durations.txt"
    )
  if shots:
    if chunks is None and not durations:
      chunks = CHUNKS_PER_SHOT * len(shots)
    return storyboard.inline(shots, chunks, durations or None, image=image)
  chunks = 9 if chunks is None else chunks
  if chunks < 1:
    raise ValueError(f"chunks={chunks} must be at least 1")
  if prompts is not None:
    lists = storyboard.read_text_prompts(prompts, chunks)
    if not lists:
      raise ValueError(
        f"prompts={prompts} holds no video; write one prompt a line, or one subfolder "
        "of captions a video"
      )
    return storyboard.from_prompt_lists(lists)
  found = storyboard.read_image_prompts(images, chunks)
  if not found:
    raise ValueError(
      f"images={images} holds no image; use {', '.join(storyboard.IMAGE_SUFFIXES)}"
    )
  return storyboard.from_prompt_lists(
    [texts for _, texts in found], images=[path for path, _ in found]
  )


def first_frames(board: Storyboard, height: int, width: int) -> np.ndarray | None:
  """First frame of every sample, uint8 (b, h, w, 3); None for text-to-video.

  Images are scaled to cover the picture and cropped at the centre.

  Raises:
    ValueError: an image is missing or unreadable.
  """
  if board.images is None:
    return None
  return np.stack([cover(_read_image(p), height, width) for p in board.images])


def continuation(
  path: str | Path,
  *,
  height: int,
  width: int,
  fps: float,
  frames_per_chunk: int,
  window_frames: int,
  latent_channels: int,
) -> np.ndarray:
  """What a video is continued from: the end of an MP4, or latents.

  Of an MP4 the last frames are read that fill whole chunks, at most the window: what
  came earlier would be forgotten at once.

  Returns:
    uint8 frames (1, t, h, w, 3) with t = 1 + 4 (f - 1), or float32 latents
    (b, f, y, x, c) if the path ends in .npy; f is a multiple of `frames_per_chunk`.

  Raises:
    ValueError: unreadable, too short, or of a wrong shape.
  """
  path = Path(path)
  if path.suffix == ".npy":
    return _read_latents(path, height, width, frames_per_chunk, latent_channels)
  window_chunks = max(1, window_frames // frames_per_chunk)
  most = 1 + TEMPORAL * (window_chunks * frames_per_chunk - 1)
  least = 1 + TEMPORAL * (frames_per_chunk - 1)
  try:
    _, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    # A few more than needed: duration times rate is only roughly the frame count.
    start = max(0, int(seconds * fps) - most - 8)
    video, _ = read_video(path, start=start, height=height, width=width, fps=fps)
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(f"continue_from={path} is no readable video: {error}") from error
  if len(video) < least:
    raise ValueError(
      f"continue_from={path} has {len(video)} frames at fps={fps}; at least {least} "
      f"are needed for one chunk of frames_per_chunk={frames_per_chunk}"
    )
  latents = 1 + (min(len(video), most) - 1) // TEMPORAL
  latents -= latents % frames_per_chunk
  return video[None, len(video) - (1 + TEMPORAL * (latents - 1)) :]


def to_model_range(frames: np.ndarray) -> np.ndarray:
  """uint8 0..255 -> float32 -1..1."""
  return frames.astype(np.float32) / 127.5 - 1


def _read_latents(
  path: Path, height: int, width: int, frames_per_chunk: int, channels: int
) -> np.ndarray:
  try:
    latents = np.load(path)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(f"continue_from={path} is no readable array: {error}") from error
  y, x = height // SPATIAL, width // SPATIAL
  if latents.ndim == 4:
    latents = latents[None]
  wanted = (y, x, channels)
  if latents.ndim != 5 or latents.shape[2:] != wanted:
    raise ValueError(
      f"continue_from={path} has shape {latents.shape}; latents must be (b, f, "
      f"{y}, {x}, {channels}) for this size and picture"
    )
  if not latents.shape[1] or latents.shape[1] % frames_per_chunk:
    raise ValueError(
      f"continue_from={path} has {latents.shape[1]} latent frames; they must be a "
      f"multiple of frames_per_chunk={frames_per_chunk}"
    )
  if not np.isfinite(latents).all():
    raise ValueError(f"continue_from={path} holds values that are not finite")
  return latents.astype(np.float32)


def _read_image(path: Path) -> np.ndarray:
  try:
    return read_image(path)
  except (OSError, ValueError) as error:
    raise ValueError(f"image={path} is not readable: {error}") from error


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """A picture (h, w, 3), scaled to cover height x width and cropped at the centre."""
  picture = Image.fromarray(image)
  scale = max(height / picture.height, width / picture.width)
  size = (
    max(width, round(picture.width * scale)),
    max(height, round(picture.height * scale)),
  )
  picture = picture.resize(size, Image.Resampling.LANCZOS)
  left, top = (size[0] - width) // 2, (size[1] - height) // 2
  return np.asarray(picture.crop((left, top, left + width, top + height)))
