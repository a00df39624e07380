"""What a run shows and leaves behind: progress, timing, contact sheet, JSON report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import imageio.v3 as iio
import jax
import numpy as np
from PIL import Image

import longlive_jax


class ProgressBar:
  """One line that is redrawn; on anything but a terminal, one line an update.

  Attributes:
    redraws: whether it is a terminal.
  """

  def __init__(self, total: int, unit: str, out: TextIO = sys.stderr):
    self.total, self.unit, self.out = total, unit, out
    self.redraws = out.isatty()

  def update(self, done: int, note: str = "") -> None:
    width = 24
    bar = ("#" * (width * done // self.total)).ljust(width, ".")
    line = f"[{bar}] {done}/{self.total} {self.unit} {note:<40}"
    end = "\n"
    if self.redraws:
      # A line that the terminal breaks in two could not be redrawn.
      line = line[: shutil.get_terminal_size().columns - 1]
      end = "\r" if done < self.total else "\n"
    print(line, end=end, file=self.out)
    self.out.flush()


class Stopwatch:
  """Times of one run, in seconds from its start.

  `frames(n)` is called whenever n more video frames are ready. The first call also
  pays for compilation, so the loop's speed counts what came after it.

  Args:
    imports: seconds that had passed before, from the start of the process.
  """

  def __init__(self, imports: float = 0.0):
    self.start = time.monotonic() - imports
    self.first: float | None = None
    self.last = self.start
    self.first_frames = self.count = self.calls = 0
    self.startup = {"imports": imports}

  def part(self, name: str) -> None:
    """Ends a part of the start-up, which began where the one before ended."""
    passed = time.monotonic() - self.start
    self.startup[name] = passed - sum(self.startup.values())

  def frames(self, n: int) -> None:
    self.last = time.monotonic()
    self.count += n
    self.calls += 1
    if self.first is None:
      self.part("first_chunk")
      self.first, self.first_frames = self.last, n

  @property
  def loop_fps(self) -> float | None:
    """Frames per second after the first chunk; None before there are two more.

    The second is often done when the first is written: alone it would say nothing.
    """
    if self.calls < 3 or self.last == self.first:
      return None
    return (self.count - self.first_frames) / (self.last - self.first)

  def summary(self) -> dict[str, Any]:
    total = time.monotonic() - self.start
    return {
      "frames": self.count,
      "time_to_first_frame_s": self.first and self.first - self.start,
      "startup_s": self.startup,
      "loop_fps": self.loop_fps,
      "end_to_end_fps": self.count / total,
      "total_s": total,
    }


class ContactSheet:
  """A picture of all shots: one row a shot, frames from left to right in time.

  Memory is bounded: a shot keeps at most `2 * columns` small frames, evenly spaced.
  """

  def __init__(self, columns: int = 4, width: int = 256):
    self.columns, self.width = columns, width
    self._rows: dict[tuple[int, int], list[np.ndarray]] = {}
    self._stride: dict[tuple[int, int], int] = {}
    self._seen: dict[tuple[int, int], int] = {}

  def add(self, sample: int, shot: int, frames: np.ndarray) -> None:
    """Takes the middle of a chunk's frames, uint8 (t, h, w, 3)."""
    key = (sample, shot)
    seen = self._seen.get(key, 0)
    self._seen[key] = seen + 1
    stride = self._stride.setdefault(key, 1)
    if seen % stride:
      return
    image = Image.fromarray(frames[len(frames) // 2])
    height = round(image.height * min(1, self.width / image.width))
    width = min(self.width, image.width)
    row = self._rows.setdefault(key, [])
    row.append(np.asarray(image.resize((width, height))))
    if len(row) > 2 * self.columns:
      self._rows[key], self._stride[key] = row[::2], 2 * stride

  def image(self) -> np.ndarray:
    """The sheet so far, uint8 (h, w, 3); unused places are black.

    Raises:
      ValueError: nothing was added.
    """
    if not self._rows:
      raise ValueError("the contact sheet is empty; add frames first")
    picked = []
    for key in sorted(self._rows):
      row = self._rows[key]
      count = min(self.columns, len(row))
      picked.append([row[i] for i in np.linspace(0, len(row) - 1, count).astype(int)])
    h, w, _ = picked[0][0].shape
    columns = max(map(len, picked))
    sheet = np.zeros((len(picked) * h, columns * w, 3), np.uint8)
    for i, row in enumerate(picked):
      for j, small in enumerate(row):
        sheet[i * h : (i + 1) * h, j * w : (j + 1) * w] = small
    return sheet

  def save(self, path: str | Path) -> None:
    iio.imwrite(path, self.image(), extension=".png")


def process_age() -> float:
  """Seconds since this process was started; 0 where only Linux tells."""
  try:
    status = Path("/proc/self/stat").read_text()
    ticks = int(status.rpartition(")")[2].split()[19])  # field 22: man 5 proc
    booted = time.clock_gettime(time.CLOCK_BOOTTIME)
  except (OSError, AttributeError):
    return 0.0
  return booted - ticks / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, Any]:
  """Versions and device of this run, for the report."""
  packages = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")
  versions = {
    "python": platform.python_version(),
    "longlive_jax": longlive_jax.__version__,
    **{name: importlib.metadata.version(name) for name in packages},
  }
  device = jax.devices()[0]
  return {
    "versions": versions,
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "host_cpus": os.cpu_count(),
    },
  }


def peak_bytes() -> int | None:
  """The most that any device has had in use; None where the backend does not say."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  return max((s["peak_bytes_in_use"] for s in stats if s), default=None)


def write_json(path: str | Path, content: Any) -> None:
  """Writes beside, then renames: the file is never half there."""
  path = Path(path)
  beside = path.with_name(path.name + ".part")
  beside.write_text(json.dumps(content, indent=2, default=_plain) + "\n")
  os.replace(beside, path)


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return dataclasses.asdict(value)
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  return str(value)
