"""Read and write video files: H.264 in MP4 through the ffmpeg of imageio-ffmpeg.

`read_video` and `read_image` give uint8 RGB; `VideoWriter` appends frames to an
MP4 that plays at every moment while it grows.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps


def read_video(
  path: str | Path,
  *,
  start: int = 0,
  frames: int | None = None,
  height: int | None = None,
  width: int | None = None,
  fps: float | None = None,
) -> tuple[np.ndarray, float]:
  """Decodes a video to RGB frames.

  Args:
    path: any file that ffmpeg can read.
    start: index of the first frame wanted, at the rate `fps` (or the file's own).
    frames: how many frames at most; None reads to the end.
    height, width: resize to cover this size, then crop its centre; both or neither.
    fps: resample to this frame rate; None keeps the file's own.

  Returns:
    uint8 (t, h, w, 3) with t >= 1, and the frame rate of what is returned.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is no readable video, or holds no frame at `start`; the
      message names the file and quotes ffmpeg.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"video {str(path)!r} does not exist")
  filters = resize_filters(height, width)
  if fps is not None:
    filters.insert(0, f"fps={fps}")
  # trim counts decoded frames, so it is exact in files without a seek index, which
  # fragmented MP4s are.
  end = "" if frames is None else f":end_frame={start + frames}"
  if start or end:
    filters.append(f"trim=start_frame={start}{end},setpts=PTS-STARTPTS")
  code, output, log = run_ffmpeg(
    *("-threads", "1", "-i", "file:" + str(path), "-map", "0:v:0"),
    *(("-vf", ",".join(filters)) if filters else ()),
    *PICTURES,
  )
  if not output:
    if code == 0:
      raise ValueError(f"video {str(path)!r} holds no frame at start={start}")
    raise ValueError(f"cannot read video {str(path)!r}: {cause(code, log)}")
  video = pictures(output)
  rate = re.search(r"([\d.]+) fps", log[log.index("Output #0") :])
  return video, float(rate[1])


# What ffmpeg is to write: every frame as a PPM file, one behind the other. passthrough:
# ffmpeg 7 otherwise repeats the last frame to fill up time.
PICTURES = (
  *("-fps_mode", "passthrough", "-pix_fmt", "rgb24"),
  *("-c:v", "ppm", "-f", "image2pipe", "pipe:1"),
)


def pictures(output: bytes) -> np.ndarray:
  """uint8 (t, h, w, 3), t >= 1: what ffmpeg wrote as PICTURES."""
  header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", output)
  w, h = map(int, header.groups())
  rows = np.frombuffer(output, np.uint8)
  stride = header.end() + h * w * 3
  rows = rows[: len(rows) // stride * stride].reshape(-1, stride)
  return rows[:, header.end() :].reshape(-1, h, w, 3)


def resize_filters(height: int | None, width: int | None) -> list[str]:
  """Filters of ffmpeg that cover a size and crop its centre; none without a size.

  Raises:
    ValueError: one of both is missing.
  """
  if (height is None) != (width is None):
    raise ValueError(f"height={height} and width={width}: give both or neither")
  if height is None:
    return []
  size = f"{width}:{height}"
  return [f"scale={size}:force_original_aspect_ratio=increase", f"crop={size}"]


def run_ffmpeg(*arguments: str) -> tuple[int, bytes, str]:
  """Runs ffmpeg to its end: its exit status, what it wrote to stdout, and its log."""
  # imageio_ffmpeg.read_frames would run Python between fork and exec, which can
  # deadlock beside JAX's threads.
  program = (imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats")
  run = subprocess.run([*program, *arguments], capture_output=True)
  return run.returncode, run.stdout, run.stderr.decode(errors="replace")


def cause(code: int, log: str) -> str:
  """What ffmpeg said last; a program that crashed said nothing."""
  return (log.strip() or f"ffmpeg ended with status {code}").splitlines()[-1]


def read_image(path: str | Path) -> np.ndarray:
  """Reads an image file as RGB uint8 (h, w, 3), turned upright.

  Raises FileNotFoundError, or ValueError naming a file that is no readable image.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"image {str(path)!r} does not exist")
  try:
    with Image.open(path) as image:
      return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"cannot read image {str(path)!r}: {error}") from error


class VideoWriter:
  """Appends frames to a fragmented MP4 (H.264, yuv420p, BT.709).

  Each fragment (about one second, begun by a keyframe) is complete by itself, so
  what has been written plays after Ctrl-C, after a crash and on a full disk. Use
  it as a context manager; leaving the block flushes the last fragment.

    with VideoWriter("out.mp4", fps=24) as writer:
      for chunk in chunks:
        writer.append(chunk)

  Raises OSError that names the file and the cause: in the constructor if the file
  cannot be created, in `append` and `close` if the encoder or the disk fails.
  """

  def __init__(
    self,
    path: str | Path,
    *,
    fps: float = 24,
    crf: int = 16,
    preset: str = "veryfast",
  ):
    self.path = Path(path)
    self.frames_written = 0
    self._fps, self._crf, self._preset = fps, crf, preset
    self._shape: tuple[int, ...] | None = None
    self._process: subprocess.Popen | None = None
    self._log = tempfile.TemporaryFile()
    try:
      self._file = open(self.path, "wb")
    except OSError as error:
      self._log.close()
      raise OSError(
        error.errno, f"cannot write video: {error.strerror}", str(self.path)
      ) from error

  def append(self, frames: np.ndarray) -> None:
    """Appends frames, uint8 (t, h, w, 3); h and w even and always the same."""
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
      raise ValueError(
        f"frames are {frames.dtype} {frames.shape}; give uint8 (t, h, w, 3)"
      )
    if self._process is None:
      self._start(*frames.shape[1:3])
    if frames.shape[1:] != self._shape:
      raise ValueError(
        f"frames are {frames.shape[1:]} but {str(self.path)!r} began with {self._shape}"
      )
    try:
      self._process.stdin.write(memoryview(frames).cast("B"))
      self._process.stdin.flush()
    except (BrokenPipeError, ConnectionResetError):
      self.close()
      raise OSError(f"cannot write video {str(self.path)!r}: encoder ended") from None
    self.frames_written += len(frames)

  def close(self) -> None:
    """Flushes the last fragment and waits for the encoder; safe to call twice."""
    if self._file.closed:
      return
    code = 0
    if self._process is not None:
      try:
        self._process.stdin.close()
      except BrokenPipeError:
        pass  # the encoder is gone; its exit code and log say why
      code = self._process.wait()
    self._file.close()
    self._log.seek(0)
    cause = self._log.read().decode(errors="replace").strip()
    self._log.close()
    if code:
      raise OSError(
        f"cannot write video {str(self.path)!r}: {cause or f'encoder exit {code}'}"
      )

  def __enter__(self) -> "VideoWriter":
    return self

  def __exit__(self, kind, value, traceback) -> None:
    try:
      self.close()
    except OSError:
      if kind is None:  # never hide the error that ended the block
        raise

  def _start(self, height: int, width: int) -> None:
    if height % 2 or width % 2:
      raise ValueError(f"height={height}, width={width} must be even for yuv420p")
    self._shape = (height, width, 3)
    command = encoder_command(
      height,
      width,
      fps=self._fps,
      keyframes=max(1, round(self._fps)),
      crf=self._crf,
      preset=self._preset,
    )
    # A session of its own: Ctrl-C must end the program's loop, not the encoder,
    # which still has the last fragment to write.
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=self._file,
      stderr=self._log,
      start_new_session=True,
    )


def encoder_command(
  height: int,
  width: int,
  *,
  fps: float,
  keyframes: int,
  crf: int = 16,
  preset: str = "veryfast",
) -> list[str]:
  """ffmpeg from raw RGB frames on stdin to a fragmented MP4 on stdout.

  Args:
    height, width: of the frames, even.
    fps: frame rate.
    keyframes: a fragment, begun by a keyframe, every so many frames.
    crf, preset: of x264.
  """
  rate = str(fps)
  return [
    *(imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"),
    *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
    *("-r", rate, "-i", "pipe:0", "-vf", "scale=out_color_matrix=bt709"),
    *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", preset),
    *("-crf", str(crf), "-tune", "zerolatency"),
    *("-threads", "1" if height * width < 1 << 18 else "0"),
    *("-g", str(keyframes), "-keyint_min", str(keyframes), "-sc_threshold", "0"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    *("-movflags", "frag_keyframe+empty_moov+default_base_moof"),
    # Else a time scale that depends on the rate: see serve/mp4.py.
    *("-video_track_timescale", str(round(1000 * fps))),
    *("-flush_packets", "1", "-f", "mp4", "pipe:1"),
  ]
