"""What any training script needs around its step: metrics, checkpoints, the loop."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.checkpoint import store
from longlive_jax.generate import report
from longlive_jax.parallel import mesh as meshes
from longlive_jax.stopping import StopRequest

log = logging.getLogger(__name__)


class MetricsLog:
  """Means of step metrics, appended to metrics.jsonl by process 0.

  Metrics stay on the device until a line is written: fetching every step would stall
  the device.

  Args:
    step: what the run goes on from; lines of later steps are forgotten.
    tensorboard: folder of event files besides; needs the package tensorboardX.
  """

  def __init__(self, path: Path, step: int, tensorboard: Path | None = None):
    self.path = path
    self._writes = jax.process_index() == 0
    self._board = None
    if tensorboard is not None and self._writes:
      # Optional, and slow to import where torch is, which it then imports.
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(
        str(tensorboard),
        purge_step=step + 1,
        flush_secs=10,
        filename_suffix=f".{step}",  # else a second one of this second would replace it
      )
    self._pending: list[tuple[int, dict[str, jax.Array], Sequence[str]]] = []
    self._since = (time.perf_counter(), step)
    if self._writes and path.exists():
      # A run that was killed may have logged steps that its checkpoint does not have.
      lines = path.read_text().splitlines()
      kept = [line for line in lines if line and json.loads(line)["step"] <= step]
      path.write_text("".join(line + "\n" for line in kept))

  def add(
    self, step: int, metrics: dict[str, jax.Array], clips: Sequence[str] = ()
  ) -> None:
    """Keeps the metrics of a step, and of what clips they are, for the next line."""
    self._pending.append((step, metrics, clips))

  def write(self, step: int) -> dict[str, float]:
    """Appends one line, of each metric the mean of the steps that had it; returns it.

    Raises:
      FloatingPointError: as `check`. The line is written.
    """
    fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
    now = time.perf_counter()
    began, first = self._since
    self._since = (now, step)
    line: dict[str, float] = {"step": step}
    for name in dict.fromkeys(name for metrics in fetched for name in metrics):
      found = [metrics[name] for metrics in fetched if name in metrics]
      line[name] = float(np.mean(found))
    line["steps_per_second"] = (step - first) / (now - began)
    self.append(line)
    self.check()
    self._pending = []
    return line

  def append(self, line: dict[str, float]) -> None:
    """Appends a line, which names its step."""
    if self._writes:
      with self.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    if self._board is not None:
      for name in line.keys() - {"step"}:
        self._board.add_scalar(name, line[name], line["step"])

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What is done inside does not count as time of the steps."""
    began = time.perf_counter()
    yield
    since, step = self._since
    self._since = (since + time.perf_counter() - began, step)

  def close(self) -> None:
    """Ends the event file."""
    if self._board is not None:
      self._board.close()

  def check(self) -> None:
    """Looks at the losses since the last line: a state after a bad one is worthless.

    Raises:
      FloatingPointError: one is not finite; names the step and its clips.
    """
    for step, metrics, clips in self._pending:
      losses = {name: a for name, a in metrics.items() if name.endswith("loss")}
      for name, loss in jax.device_get(losses).items():
        if not np.isfinite(loss):
          of = f", of clips {', '.join(clips)}" if clips else ""
          raise FloatingPointError(
            f"{name}={loss} in step {step}{of}; go on from the last checkpoint with a "
            "smaller learning_rate or clip of the optimiser"
          )


class Checkpoints:
  """Training checkpoints `folder/<step>`: the state and where the data iterator was.

  They are written while training goes on. A state that is trained on a base, and does
  not hold it, names the base beside it.

  Args:
    keep: how many of the newest stay.
    base: folder of the base; '' is none.
    keep_every: multiples of it stay for good; 0 is none.
  """

  def __init__(self, folder: Path, keep: int, base: str = "", keep_every: int = 0):
    self.folder = folder
    self.keep = keep
    self.base = base
    self.keep_every = keep_every
    self._finish: Callable[[], None] | None = None

  def steps(self) -> list[int]:
    """Steps that are saved, ascending. What bears its final name is whole."""
    return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdecimal())

  def save(self, step: int, state: Any, iterator_state: dict[str, Any]) -> None:
    """Begins to write a checkpoint, once the one before is whole.

    Raises:
      OSError: as `wait`.
    """
    self.wait()
    self.folder.mkdir(parents=True, exist_ok=True)
    metadata = {"step": step, "iterator": iterator_state, "base": self.base}
    self._finish = store.start_save(
      self.folder / str(step), state, metadata, overwrite=True
    )

  def wait(self) -> None:
    """Waits for what is being written; then removes what need not stay.

    Raises:
      OSError: it could not be written, for example on a full disk; names the newest
        checkpoint that is whole.
    """
    if self._finish is None:
      return
    finish, self._finish = self._finish, None
    try:
      finish()
    except OSError as error:
      whole = f"step {self.steps()[-1]}" if self.steps() else "none"
      raise OSError(f"{error}; the newest that is whole: {whole}") from error
    if jax.process_index() == 0:
      for old in self.steps()[: -self.keep]:
        if not self.keep_every or old % self.keep_every:
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
  stop_every: int = 1,
  shown: Sequence[str] = ("loss",),
  clips: Callable[[], Sequence[str]] = tuple,
  evaluate: Callable[[Any, int], dict[str, float]] | None = None,
  evaluate_every: int = 1,
) -> tuple[Any, dict[str, float]]:
  """Runs the steps after `first`; Ctrl-C or SIGTERM in any process saves and ends.

  Args:
    advance: (state, number of the step) -> (state, metrics).
    position: the state of the data iterator.
    stop_every: steps until a signal to one process is heard by all.
    shown: metrics that are reported beside the step and the speed: on a terminal in
      one line that is redrawn, else in a line of their own every `log_every` steps.
    clips: names of the clips of the step just made, for the message.
    evaluate: (state, step) -> more metrics, in a line of their own; at multiples of
      `evaluate_every` and at the end.

  Returns:
    The last state, and the last line of metrics.

  Raises:
    FloatingPointError: a loss that is not finite; the state is kept in the folder
      `failed` beside the checkpoints, which stay as they were.
    OSError: a checkpoint could not be written.
  """
  line: dict[str, float] = {}
  stop = StopRequest()
  bar, text = report.ProgressBar(steps, "steps"), ""
  shows_bar = bar.redraws and jax.process_index() == 0
  before: dict[str, jax.Array] = {}
  with contextlib.closing(metrics_log), stop.on_signals("step"):
    for step in range(first + 1, steps + 1):
      state, metrics = advance(state, step)
      if shows_bar:
        # The step before this one: the device has work, and is not hurried ahead of.
        jax.block_until_ready(before)
        bar.update(step - 1, text)
        before = dict(metrics)
      metrics_log.add(step, metrics, clips())
      logs = step % log_every == 0 or step == steps
      saves = step % checkpoint_every == 0 or step == steps
      asks = logs or saves or step % stop_every == 0
      try:
        if logs:
          line = metrics_log.write(step)
        stopping = meshes.any_process(bool(stop), ask=asks)
        if saves or stopping:
          metrics_log.check()
      except FloatingPointError:
        folder = checkpoints.folder.with_name("failed")
        failed = Checkpoints(folder, 1, checkpoints.base)
        failed.save(step, state, position())
        failed.wait()
        log.error("the state after step %d is kept in %s", step, folder)
        checkpoints.wait()  # the one under way, which may raise, too
        raise
      if logs:
        text = _summary(line, shown, steps)
        if shows_bar:
          bar.update(step, text)
        else:
          log.info("step %d  %s", step, text)
      if saves or stopping:
        checkpoints.save(step, state, position())
      if stopping:
        reason = stop.reason or "another process"
        log.warning("%s: saved step %d; start again to go on", reason, step)
        break
      # Behind the save: it takes long, and may need memory that is not there.
      if evaluate and (step % evaluate_every == 0 or step == steps):
        jax.block_until_ready(metrics)
        with metrics_log.paused():
          if found := evaluate(state, step):
            metrics_log.append({"step": step, **found})
    checkpoints.wait()
  return state, line


def _summary(line: dict[str, float], shown: Sequence[str], steps: int) -> str:
  """"loss 0.1234  20.1 steps/s  12 min left"."""
  found = [f"{name} {line[name]:.4g}" for name in shown if name in line]
  speed = line["steps_per_second"]
  minutes = (steps - line["step"]) / speed / 60
  return "  ".join([*found, f"{speed:.3g} steps/s", f"{minutes:.0f} min left"])
