"""How long a GPU is busy, which a slow or busy host does not change."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax


def clocked(run: Callable[[], None], repeats: int) -> tuple[list[float], float | None]:
  """Calls `run` several times, which waits for what it starts.

  Returns:
    the host's seconds of each call, and for how many seconds JAX's profiler saw the
    GPUs run kernels and copies in all of them; None without a GPU.
  """
  if jax.default_backend() != "gpu":
    return _host_seconds(run, repeats), None
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      times = _host_seconds(run, repeats)
    return times, _busy_seconds(directory)


def _host_seconds(run: Callable[[], None], repeats: int) -> list[float]:
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return times


def _busy_seconds(directory: str) -> float | None:
  (path,) = Path(directory).rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  streams = [
    line
    for plane in planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
  ]
  if not streams:
    return None
  return sum(event.duration_ns for line in streams for event in line.events) / 1e9
