"""What any training script needs around its step: metrics, checkpoints, the loop."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.checkpoint import store
from longlive_jax.parallel import mesh as meshes
from longlive_jax.stopping import StopRequest

log = logging.getLogger(__name__)


class MetricsLog:
  """Means of step metrics, appended to metrics.jsonl by process 0.

  Metrics stay on the device until a line is written: fetching every step would stall
  the device.
  """

  def __init__(self, path: Path, step: int):
    self.path = path
    self._writes = jax.process_index() == 0
    self._pending: list[dict[str, jax.Array]] = []
    self._since = (time.perf_counter(), step)
    if self._writes and path.exists():
      # A run that was killed may have logged steps that its checkpoint does not have.
      lines = path.read_text().splitlines()
      kept = [line for line in lines if line and json.loads(line)["step"] <= step]
      path.write_text("".join(line + "\n" for line in kept))

  def add(self, metrics: dict[str, jax.Array]) -> None:
    self._pending.append(metrics)

  def write(self, step: int) -> dict[str, float]:
    """Appends one line, of each metric the mean of the steps that had it; returns it.

    Raises:
      FloatingPointError: the loss is not finite; names the step. The line is written.
    """
    fetched = jax.device_get(self._pending)
    self._pending = []
    now = time.perf_counter()
    began, first = self._since
    self._since = (now, step)
    line: dict[str, float] = {"step": step}
    for name in dict.fromkeys(name for metrics in fetched for name in metrics):
      found = [metrics[name] for metrics in fetched if name in metrics]
      line[name] = float(np.mean(found))
    line["steps_per_second"] = (step - first) / (now - began)
    if self._writes:
      with self.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if not np.isfinite(line["loss"]):
      raise FloatingPointError(
        f"loss={line['loss']} between steps {first} and {step}; resume from the last "
        "checkpoint with a smaller optimizer.learning_rate or optimizer.clip"
      )
    return line


class Checkpoints:
  """Training checkpoints `folder/<step>`: the state and where the data iterator was.

  A state that is trained on a base, and does not hold it, names the base beside it.
  """

  def __init__(self, folder: Path, keep: int, base: str = ""):
    self.folder = folder
    self.keep = keep
    self.base = base

  def steps(self) -> list[int]:
    """Steps that are saved, ascending. What bears its final name is whole."""
    return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdecimal())

  def save(self, step: int, state: Any, iterator_state: dict[str, Any]) -> None:
    """Writes a checkpoint, then removes all but the newest `keep`."""
    self.folder.mkdir(parents=True, exist_ok=True)
    metadata = {"step": step, "iterator": iterator_state, "base": self.base}
    store.save(self.folder / str(step), state, metadata, overwrite=True)
    if jax.process_index() == 0:
      for old in self.steps()[: -self.keep]:
        shutil.rmtree(self.folder / str(old))

  def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
    """The newest state, in the structure of `state`, and the iterator's state.

    Raises:
      ValueError: it was trained on another base.
    """
    path = self.folder / str(self.steps()[-1])
    metadata = store.load_metadata(path)
    if (base := metadata.get("base", "")) != self.base:
      raise ValueError(
        f"checkpoint {path} was trained on the base {base!r}, not on {self.base!r}; "
        "give that one, or another workdir"
      )
    return store.load(path, state), metadata["iterator"]


def run(
  advance: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]],
  state: Any,
  metrics_log: MetricsLog,
  checkpoints: Checkpoints,
  position: Callable[[], dict[str, Any]] = dict,
  *,
  first: int,
  steps: int,
  log_every: int,
  checkpoint_every: int,
  shown: Sequence[str] = ("loss",),
) -> tuple[Any, dict[str, float]]:
  """Runs the steps after `first`; Ctrl-C or SIGTERM in any process saves and ends.

  Args:
    advance: (state, number of the step) -> (state, metrics).
    position: the state of the data iterator.
    shown: metrics that are reported beside the step and the speed.

  Returns:
    The last state, and the last line of metrics.
  """
  line: dict[str, float] = {}
  stop = StopRequest()
  with stop.on_signals("step"):
    for step in range(first + 1, steps + 1):
      state, metrics = advance(state, step)
      metrics_log.add(metrics)
      if step % log_every == 0 or step == steps:
        line = metrics_log.write(step)
        report = "  ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
        log.info("step %d  %s  %.1f steps/s", step, report, line["steps_per_second"])
      stopping = meshes.any_process(bool(stop))
      if step % checkpoint_every == 0 or step == steps or stopping:
        checkpoints.save(step, state, position())
      if stopping:
        reason = stop.reason or "another process"
        log.warning("%s: saved step %d; start again to go on", reason, step)
        break
  return state, line
