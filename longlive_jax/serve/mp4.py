"""A chunk as a small MP4 of its own, to be played at its place in the video.

Every chunk is encoded by itself: it starts with a keyframe, so a watcher may begin
anywhere; it is whole when the encoder ends, where one encoder for all would hold it
back until the next chunk; and after a rewind there is nothing to undo. ffmpeg's start
costs 40 ms on a CPU, beside seconds of video.

  chunk = encode(frames, fps=24, first_frame=61)   # H.264, fragmented
  video = join([chunk, another])                   # one header, all fragments

Sizes and times in an MP4 are big-endian; a box is its length, its kind, its content.
"""

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from longlive_jax.data.video import encoder_command

SECONDS = 120  # for an encoder that hangs
TICKS = 1000  # of the time scale, a frame: `video.encoder_command`
_NESTED = {b"moof", b"traf", b"moov", b"trak", b"mdia", b"minf", b"stbl"}


def encode(frames: np.ndarray, *, fps: float, first_frame: int) -> bytes:
  """One chunk as a fragmented MP4 that starts `first_frame` frames into the video.

  Args:
    frames: uint8 (t, h, w, 3), h and w even.

  Raises:
    OSError: the encoder failed; quotes it.
  """
  count, height, width, _ = frames.shape
  command = encoder_command(height, width, fps=fps, keyframes=count)
  chunk = _run(command, np.ascontiguousarray(frames).tobytes())
  return _moved(chunk, first_frame * TICKS)


def join(chunks: Iterable[bytes]) -> Iterator[bytes]:
  """The pieces of one fragmented MP4 of many chunks."""
  for number, chunk in enumerate(chunks):
    wanted = {b"moof", b"mdat"} if number else {b"ftyp", b"moov", b"moof", b"mdat"}
    for kind, start, end in _boxes(chunk, 0, len(chunk)):
      if kind in wanted:
        yield chunk[start:end]


def plain(chunks: Iterable[bytes], path: Path) -> None:
  """Writes an MP4 without fragments, which every player can seek in; no new encoding.

  Raises:
    OSError: ffmpeg or the disk failed.
  """
  with tempfile.NamedTemporaryFile(dir=path.parent) as fragmented:
    for piece in join(chunks):
      fragmented.write(piece)
    fragmented.flush()
    _run([
      *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y"),
      *("-i", fragmented.name, "-c", "copy", "-movflags", "+faststart"),
      *("-f", "mp4", str(path)),
    ])  # fmt: skip


def codec(chunk: bytes) -> str:
  """What Media Source Extensions call it, as 'avc1.64000c'."""
  at = chunk.index(b"avcC") + 4
  return "avc1." + chunk[at + 1 : at + 4].hex()


def _run(command: list[str], data: bytes = b"") -> bytes:
  try:
    done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS)
  except subprocess.TimeoutExpired as error:
    raise OSError(f"the encoder hung for {SECONDS} seconds") from error
  if done.returncode:
    cause = done.stderr.decode(errors="replace").strip()
    raise OSError(f"the encoder failed: {cause or f'exit {done.returncode}'}")
  return done.stdout


def _moved(chunk: bytes, ticks: int) -> bytes:
  """The same chunk later in time: its fragments' decode times are shifted."""
  out = bytearray(chunk)
  for kind, start, _ in _boxes(chunk, 0, len(chunk), nested=True):
    if kind == b"tfdt":  # version 1: 64 bits, after version and flags
      time = int.from_bytes(out[start + 12 : start + 20], "big")
      out[start + 12 : start + 20] = (time + ticks).to_bytes(8, "big")
  return bytes(out)


def _boxes(
  data: bytes, at: int, end: int, nested: bool = False
) -> Iterator[tuple[bytes, int, int]]:
  """(kind, start, end) of the boxes between two places."""
  while at < end:
    size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
    yield kind, at, at + size
    if nested and kind in _NESTED:
      yield from _boxes(data, at + 8, at + size, nested)
    at += size
