"""Frames of a video file by their numbers, decoded from the keyframe before them.

  video = open_video("a.mp4", height=704, width=1280, fps=24)
  len(video)                         # exact, with one picture decoded
  frames, _ = video.read(285, 381)   # what the whole file has there, to the bit

The times of all frames come from the file's packets, which are listed many times as
fast as they are decoded. Frames are then found by their time. Keyframes that promise
more than they hold (open groups of pictures, refresh in stripes) are found out by what
the decoder complains about or leaves out: such a file is decoded from its start.
"""

import dataclasses
import re
import signal
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from longlive_jax.data.video import (
  PICTURES,
  cause,
  pictures,
  resize_filters,
  run_ffmpeg,
)

# Formats whose every packet is one picture. Others are decoded to list their frames:
# VP8 has packets that show nothing.
_LISTED_BY_PACKETS = ("h264", "hevc", "vp9", "av1")
_KEY, _CORRUPT, _DISCARD = 1, 2, 4  # flags of a packet
_NO_TIME = -(2**63)
_MOST_SELECTED = 2000  # Linux takes 128 KB an argument
# What ends ffmpeg because of what a file holds, and so in every process alike.
_FAULTS = (
  signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGBUS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class VideoFrames:
  """A video of which nothing is held yet.

  Attributes:
    path: the file.
    height, width: of what `read` returns.
    times: int64 (n,), ascending, of the file's frames, in `unit` seconds.
    keys: int64 (k,), ascending, of the frames that decoding can begin at.
    unit: the file's unit of time.
    shown: int64 (t,), number of the file's frame that is shown at each step of the
      rate that was asked for.
    filters: of ffmpeg, to the size that was asked for.
  """

  path: Path
  height: int
  width: int
  times: np.ndarray
  keys: np.ndarray
  unit: Fraction
  shown: np.ndarray
  filters: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.shown)

  def read(self, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Decodes frames [start, stop).

    Returns:
      uint8 (stop - start, h, w, 3), and how many of the file's pictures among them do
      not decode. Of these frames the one before stands in for such a picture, or the
      one behind where none is before; black where there is none at all.

    Raises:
      ValueError: the video is shorter.
      RuntimeError: as `open_video`.
    """
    if not 0 <= start <= stop <= len(self):
      raise ValueError(
        f"start={start} and stop={stop} must be frames of {str(self.path)!r}; it has "
        f"{len(self)}"
      )
    shape = (stop - start, self.height, self.width, 3)
    wanted = self.times[self.shown[start:stop]]
    times = np.unique(wanted)
    if not len(times):
      return np.zeros(shape, np.uint8), 0
    first, last = np.searchsorted(self.times, times[[0, -1]])
    select = last - first >= len(times)  # the rate leaves frames between them out
    count = -(-len(times) // _MOST_SELECTED) if select else 1
    parts = [self._find(part, select) for part in np.array_split(times, count)]
    found, frames = parts[0]
    if count > 1:
      found, frames = map(np.concatenate, zip(*parts, strict=True))
    missing = int(np.isin(times, found, invert=True).sum())
    if not len(found):
      return np.zeros(shape, np.uint8), missing
    if np.array_equal(found, wanted):
      return frames, 0
    order = np.argsort(found, kind="stable")
    rows = np.searchsorted(found, wanted, side="right", sorter=order) - 1
    return frames[order[np.maximum(rows, 0)]], missing

  def _find(self, times: np.ndarray, select: bool) -> tuple[np.ndarray, np.ndarray]:
    """Times and frames of those of `times` that decode; not `select`: it is all there
    are from the first to the last."""
    filters = [f"trim=start_pts={times[0]}:end_pts={times[-1] + 1}"]
    if select:
      filters.append("select=" + _sum([f"eq(pts\\,{time})" for time in times]))
    keys = self.keys[1:]  # the first is where the file starts
    keys = keys[keys <= times[0]]
    found, frames, clean = self._decode(filters, keys[-1] if len(keys) else None)
    if len(keys) and not (clean and np.array_equal(found, times)):
      found, frames, _ = self._decode(filters, None)
    return found, frames

  def _decode(
    self, filters: Sequence[str], key: int | None
  ) -> tuple[np.ndarray, np.ndarray, bool]:
    """What passes the filters, from a keyframe on; None is the start of the file.

    Returns:
      times (n,) and frames (n, h, w, 3), and whether the decoder complained of nothing.
    """
    # A little later: ffmpeg rounds, and takes the last keyframe up to there.
    seconds = (
      () if key is None else ("-ss", f"{float(int(key) * self.unit) + 1e-3:.6f}")
    )
    _, output, log = _run(
      self.path,
      *("-copyts", "-seek_timestamp", "1", "-noaccurate_seek"),
      *(*seconds, "-threads", "1", "-i", "file:" + str(self.path), "-map", "0:v:0"),
      *("-vf", ",".join((*filters, *self.filters))),
      *("-stats_enc_pre", "pipe:2", "-stats_enc_pre_fmt", "time {pts}"),
      *("-enc_time_base", "demux"),
      *PICTURES,
    )
    line = re.compile(r"time (-?\d+)\n")
    found = np.array(line.findall(log), np.int64)
    clean = not line.sub("", log).strip()
    if not output:
      return found[:0], np.zeros((0, self.height, self.width, 3), np.uint8), clean
    frames = pictures(output)
    count = min(len(found), len(frames))  # a crash may come between the two
    return found[:count], frames[:count], clean


def open_video(
  path: str | Path,
  *,
  height: int | None = None,
  width: int | None = None,
  fps: float | None = None,
) -> VideoFrames:
  """Lists the frames of a video.

  Its packets are read to the end, and its first picture is decoded, to know its size
  and that there is one. What is returned or raised depends on the file alone: processes
  that will read different frames of it agree.

  Args:
    path: any file that ffmpeg can read.
    height, width: resize to cover this size, then crop its centre; both or neither.
    fps: resample to this frame rate; None keeps the file's own.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is no readable video; names it and quotes ffmpeg.
    RuntimeError: ffmpeg was killed or did not start, which says nothing about the file.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"video {str(path)!r} does not exist")
  filters = tuple(resize_filters(height, width))
  listing, log = _list(
    path,
    *("-c", "copy", "-f", "framecrc", "pipe:1"),
    *("-map", "0:v:0", "-frames:v", "1", "-c:v", "rawvideo"),
    *(("-vf", ",".join(filters)) if filters else ()),
    *("-f", "framecrc", "pipe:2"),
  )
  packets = _packets(listing)
  times = {packet[0] for packet in packets}
  codec = re.search(r"#codec_id 0: (\S+)", listing)
  if (
    codec
    and codec[1] in _LISTED_BY_PACKETS
    and len(times) == len(packets)
    and _NO_TIME not in times
  ):
    keys = sorted(time for time, _, flags in packets if flags & _KEY)
  else:
    decoded = ("-c:v", "wrapped_avframe", "-fps_mode", "passthrough")
    units = ("-enc_time_base", "demux")
    listing, _ = _list(path, *decoded, *units, "-f", "framecrc", "pipe:1")
    packets, keys = _packets(listing), []
  frames = sorted(
    (time, length)
    for time, length, flags in packets
    if not flags & (_CORRUPT | _DISCARD)
  )
  size = re.search(r"#dimensions 0: (\d+)x(\d+)", log)
  if not frames or not size:
    why = "it lists no picture" if size else cause(0, log)
    raise ValueError(f"cannot read video {str(path)!r}: {why}")
  unit = Fraction(re.search(r"#tb 0: (\S+)", listing)[1])
  return VideoFrames(
    path=path,
    height=int(size[2]),
    width=int(size[1]),
    times=np.array([time for time, _ in frames], np.int64),
    keys=np.array(keys, np.int64),
    unit=unit,
    shown=np.arange(len(frames)) if fps is None else _resample(frames, unit, fps),
    filters=filters,
  )


def _list(path: Path, *outputs: str) -> tuple[str, str]:
  """What ffmpeg writes about a video, and its log.

  Raises:
    ValueError: it crashed, which may leave a part of a list; a part would be taken for
      a shorter video.
    RuntimeError: of `_run`.
  """
  source = ("-copyts", "-i", "file:" + str(path), "-map", "0:v:0")
  code, output, log = _run(path, *source, *outputs)
  if code < 0:
    raise ValueError(f"cannot read video {str(path)!r}: {cause(code, log)}")
  return output.decode(), log


def _run(path: Path, *arguments: str) -> tuple[int, bytes, str]:
  """`run_ffmpeg` on a video.

  Raises:
    RuntimeError: it did not start, or was killed. Where one process of several went on
      without the file, the parts of a sample would be of different clips.
  """
  # Else it ends, amid a list, where most of what it has decoded so far is broken.
  patient = ("-loglevel", "error", "-max_error_rate", "1")
  try:
    code, output, log = run_ffmpeg(*patient, *arguments)
  except OSError as error:
    raise RuntimeError(f"ffmpeg does not start for {str(path)!r}: {error}") from error
  if code < 0 and -code not in _FAULTS:
    raise RuntimeError(f"ffmpeg was stopped at {str(path)!r}: {cause(code, log)}")
  return code, output, log


def _sum(terms: Sequence[str]) -> str:
  """In parentheses: ffmpeg takes no more than 100 terms in a row."""
  half = len(terms) // 2
  return f"({_sum(terms[:half])}+{_sum(terms[half:])})" if half else terms[0]


def _packets(listing: str) -> list[tuple[int, int, int]]:
  """(time, length, flags) of each packet, as the muxer framecrc writes them."""
  packets = []
  for line in listing.splitlines():
    if line.startswith("#"):
      continue
    _, _, time, length, _, _, *more = line.replace(" ", "").split(",")
    flags = [int(field[2:], 16) for field in more if field.startswith("F=")]
    packets.append((int(time), int(length), flags[0] if flags else _KEY))
  return packets


def _resample(
  frames: Sequence[tuple[int, int]], unit: Fraction, fps: float
) -> np.ndarray:
  """Number of the frame shown at each step of a rate.

  By the rule of ffmpeg's filter `fps`: a frame is shown from the step that is nearest
  to its time. Steps count from the first frame.

  Args:
    frames: (time, length), not empty.
  """
  steps = unit * Fraction(fps).limit_denominator(1_001_000)

  def step(time: int) -> int:
    whole = 2 * (time - frames[0][0]) * steps.numerator + steps.denominator
    return whole // (2 * steps.denominator)

  begins = [step(time) for time, _ in frames]
  numbers = np.arange(step(sum(frames[-1])))
  return np.searchsorted(begins, numbers, side="right") - 1
