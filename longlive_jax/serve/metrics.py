"""Numbers about the running server, in Prometheus' text format."""

import collections
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

RECENT = 512  # chunks of which latencies are known
SECONDS = 10.0  # over which the frame rate is taken

COUNTERS = {
  "chunks": "Chunks made.",
  "frames": "Video frames made.",
  "errors": "Chunks, saves and rounds that failed.",
  "refused": "Requests and messages that were refused.",
  "dropped": "Events that slow watchers lost.",
  "saves": "States written.",
}


class Metrics:
  """Counts and recent latencies; any thread may write and read."""

  def __init__(self):
    self._lock = threading.Lock()
    self._counts = dict.fromkeys(COUNTERS, 0)
    self._latencies: dict[str, collections.deque[float]] = {
      "chunk": collections.deque(maxlen=RECENT),  # from its start to its frames
      "switch": collections.deque(maxlen=RECENT),  # from a new prompt to its frames
    }
    self._made: collections.deque[tuple[float, int]] = collections.deque()

  def count(self, name: str, number: int = 1) -> None:
    with self._lock:
      self._counts[name] += number

  def latency(self, name: str, seconds: float) -> None:
    with self._lock:
      self._latencies[name].append(seconds)

  def frames(self, number: int) -> None:
    """Says that frames were made just now."""
    now = time.monotonic()
    with self._lock:
      self._counts["chunks"] += 1
      self._counts["frames"] += number
      self._made.append((now, number))
      while self._made[0][0] < now - SECONDS:
        self._made.popleft()

  def fps(self) -> float:
    """Frames a second, of all sessions, over the last SECONDS."""
    since = time.monotonic() - SECONDS
    with self._lock:
      return sum(number for then, number in self._made if then >= since) / SECONDS

  def render(self, gauges: Iterable[tuple[str, str, str, float]]) -> str:
    """All of it as text; gauges are (name, labels, help, value)."""
    with self._lock:
      counts = dict(self._counts)
      latencies = {name: list(values) for name, values in self._latencies.items()}
    lines = []
    for name, help_text in COUNTERS.items():
      full = f"longlive_{name}_total"
      lines += [f"# HELP {full} {help_text}", f"# TYPE {full} counter"]
      lines.append(f"{full} {counts[name]}")
    for name, values in latencies.items():
      full = f"longlive_{name}_seconds"
      lines += [f"# HELP {full} The last {RECENT}.", f"# TYPE {full} summary"]
      for part in (0.5, 0.99):
        value = np.quantile(values, part) if values else float("nan")
        lines.append(f'{full}{{quantile="{part}"}} {value:.6g}')
    told = set()
    for name, labels, help_text, value in gauges:
      full = f"longlive_{name}"
      if full not in told:
        lines += [f"# HELP {full} {help_text}", f"# TYPE {full} gauge"]
        told.add(full)
      lines.append(f"{full}{labels} {value:.10g}")
    return "\n".join(lines) + "\n"


def memory() -> dict[str, int]:
  """Bytes in use: of this process, and of the device where its backend says so."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  used = {"process": pages * 4096}
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    used["device"] = stats["bytes_in_use"]
  return used
