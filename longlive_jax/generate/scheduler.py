"""Many sessions on one device: whose turn it is, and where their memory is.

A chunk of a large model fills the device, so sessions take turns at the one program of
batch 1: nothing compiles, and no session's numbers change, when others come and go.

  scheduler = Scheduler(engine, device_bytes=40e9, host_bytes=200e9)
  scheduler.add("a", lambda: start(engine, "A red star"))  # any thread
  scheduler.command("a", Cut("..."))                       # a Future
  scheduler.shown("a", 3)                                  # the watcher saw 3 chunks
  for made in scheduler.step(): ...                        # one thread, again and again

Of the sessions that are ready the one goes next that had the fewest turns since it was
ready. Ready is what is not paused, has not failed, and is less than `ahead` chunks
before its watcher: a video is played at its frame rate, and what is made long before it
is shown could not follow a command.

On the device are as many sessions as fit; for another one, the session that went least
lately goes to host memory. What fails is one session: the others do not notice.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from longlive_jax.generate import session as sessions
from longlive_jax.generate.commands import Command, Rewind
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.session import Session, SessionChunk

MOST_WAITING = 64  # commands of a session


@dataclasses.dataclass(frozen=True)
class Life:
  """What is done with sessions; another one where the scheduler is tested alone."""

  advance: Callable[[Engine, Session], tuple[Session, SessionChunk]] = sessions.advance
  apply: Callable[[Engine, Session, Command], Session] = sessions.apply
  branch: Callable[[Engine, Session, int | None], Session] = sessions.branch
  to_host: Callable[[Session], Session] = sessions.to_host
  bytes_of: Callable[[Engine], dict[str, int]] = sessions.bytes_of


@dataclasses.dataclass(frozen=True)
class Produced:
  """What came of a turn.

  Attributes:
    name: of the session.
    chunk, frames: with uint8 (t, h, w, 3) on the host; None after an error.
    error: why there is none.
  """

  name: str
  chunk: SessionChunk | None = None
  frames: np.ndarray | None = None
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Capacity:
  """How many sessions fit.

  Attributes:
    session: bytes of one, as `session.bytes_of`.
    on_device: so many at a time. in_all: with those that wait on the host.
  """

  session: dict[str, int]
  on_device: int
  in_all: int


@dataclasses.dataclass(frozen=True)
class Status:
  """Where a session stands.

  Attributes:
    chunk, oldest: chunks done; the oldest that it can be rewound to.
    paused, on_host, ready: ready is waiting for its turn.
    error: why it goes no further; '' if it does.
  """

  chunk: int
  oldest: int
  paused: bool
  on_host: bool
  ready: bool
  error: str


@dataclasses.dataclass
class _Entry:
  """One session and its place in the queue; only the scheduler changes it.

  Attributes:
    session: None before it is made, and after a failure that took its memory.
    start: number on the clock of all turns at which it may have its next one.
    last: count of turns of all sessions when it had its last one.
    shown: chunks that its watcher has seen.
    waiting: work, and where its result goes.
  """

  session: Session | None = None
  start: int = 0
  last: int = 0
  shown: int = 0
  error: str = ""
  waiting: collections.deque[tuple[Callable[..., Any], Future]] = dataclasses.field(
    default_factory=collections.deque
  )


class Scheduler:
  """Takes turns. `step` and `drain` are for one thread, the rest for any.

  Args:
    engine: of all sessions.
    device_bytes: what sessions may take on the device, beside the networks.
    host_bytes: likewise in host memory, for their past and for those that wait.
    ahead: chunks that a session may be before its watcher.

  Raises:
    ValueError: there is no room for a single session, or ahead < 1.
  """

  def __init__(
    self,
    engine: Engine,
    *,
    device_bytes: float,
    host_bytes: float,
    ahead: int = 2,
    life: Life | None = None,
  ):
    if ahead < 1:
      raise ValueError(f"ahead={ahead} must be at least 1 chunk")
    self._engine, self.ahead, self._life = engine, ahead, life or Life()
    self.capacity = _capacity(self._life.bytes_of(engine), device_bytes, host_bytes)
    self._entries: dict[str, _Entry] = {}
    self._changed = threading.Condition()
    self._pending: tuple[str, SessionChunk] | None = None
    self._clock = self._turns = 0

  # ---------------------------------------------------------------- for any thread
  def add(self, name: str, make: Callable[[], Session]) -> Future:
    """Takes in a session, which `make` starts or loads when its turn comes.

    Raises:
      ValueError: the name is taken, or no more sessions fit.
    """
    return self._admit(name, make)

  def branch(self, name: str, new: str, chunk: int | None = None) -> Future:
    """Takes in a branch of a session under a name of its own; raises as `add`.

    The future raises ValueError for a chunk that cannot be.
    """
    parent = self._entry(name)
    return self._admit(
      new, lambda: self._life.branch(self._engine, _alive(parent), chunk)
    )

  def command(self, name: str, command: Command) -> Future:
    """Has a command applied between chunks. The future raises as `session.apply`.

    Raises:
      ValueError: there is no such session, or MOST_WAITING commands wait already.
    """

    def work(entry: _Entry) -> None:
      try:
        session = self._life.apply(self._engine, _alive(entry), command)
      except ValueError:
        raise
      except Exception as failed:  # its memory may be gone
        self._fail(entry, failed)
        raise
      with self._changed:
        entry.session = session
        if isinstance(command, Rewind):
          entry.error, entry.shown = "", min(entry.shown, session.chunk)

    return self._enqueue(name, work)

  def snapshot(self, name: str) -> Future:
    """The session as it is between two chunks, in host memory: to be saved."""
    return self._enqueue(name, lambda entry: self._life.to_host(_alive(entry)))

  def remove(self, name: str) -> Future:
    """Takes a session out; the future has it as it is, or None if it failed."""

    def work(entry: _Entry) -> Session | None:
      with self._changed:
        del self._entries[name]
      return entry.session

    return self._enqueue(name, work)

  def shown(self, name: str, chunks: int) -> None:
    """Says that the watcher of a session has seen so many chunks."""
    entry = self._entry(name)
    with self._changed:
      entry.shown = chunks
      self._changed.notify_all()

  def status(self) -> dict[str, Status]:
    """Of all sessions that are made."""
    with self._changed:
      return {
        name: self._status(entry)
        for name, entry in self._entries.items()
        if entry.session is not None or entry.error
      }

  # ---------------------------------------------------------------- for one thread
  def wait(self, timeout: float) -> bool:
    """Waits until there is something to do, at most `timeout` seconds; whether."""
    with self._changed:
      return self._changed.wait_for(self._has_work, timeout)

  def step(self) -> list[Produced]:
    """Applies what waits, starts one chunk, and hands out the one before.

    So the device is busy while frames are fetched. With no session ready it hands out
    what is left, and then nothing.
    """
    out = self._do_waiting()
    name = self._next()
    if name is None:
      return out + self._finish()
    entry = self._entries[name]
    try:
      self._make_room(entry)
      session, chunk = self._life.advance(self._engine, entry.session)
    except Exception as failed:  # whatever it was, the other sessions go on
      self._fail(entry, failed)
      return [*out, *self._finish(), Produced(name, error=entry.error)]
    with self._changed:
      entry.session = session
    out += self._finish()
    self._pending = name, chunk
    return out

  def drain(self) -> list[Produced]:
    """Applies what waits and hands out what is under way, without a new chunk."""
    return self._do_waiting() + self._finish()

  # ---------------------------------------------------------------- details
  def _entry(self, name: str) -> _Entry:
    with self._changed:
      if name not in self._entries:
        raise ValueError(f"there is no session {name!r}")
      return self._entries[name]

  def _admit(self, name: str, make: Callable[[], Session]) -> Future:
    with self._changed:
      if name in self._entries:
        raise ValueError(f"there is a session {name!r} already; choose another name")
      if len(self._entries) >= self.capacity.in_all:
        raise ValueError(
          f"{len(self._entries)} sessions are all that fit, each with "
          f"{_megabytes(self.capacity.session)}; end one first"
        )
      self._entries[name] = _Entry(start=self._clock)

    def work(entry: _Entry) -> None:
      try:
        self._make_room(entry)
        session = make()
      except BaseException:
        with self._changed:
          del self._entries[name]
        raise
      with self._changed:
        entry.session = session

    return self._enqueue(name, work)

  def _enqueue(self, name: str, work: Callable[[_Entry], Any]) -> Future:
    future: Future = Future()
    with self._changed:
      entry = self._entry(name)
      if len(entry.waiting) >= MOST_WAITING:
        raise ValueError(f"{MOST_WAITING} commands wait already; send fewer")
      entry.waiting.append((work, future))
      self._changed.notify_all()
    return future

  def _do_waiting(self) -> list[Produced]:
    with self._changed:
      busy = [(name, entry) for name, entry in self._entries.items() if entry.waiting]
    out = []
    for name, entry in busy:
      if self._pending is not None and self._pending[0] == name:
        out += self._finish()  # what was made before comes out before
      for _ in range(len(entry.waiting)):  # not those that come meanwhile
        work, future = entry.waiting.popleft()
        if future.set_running_or_notify_cancel():
          try:
            future.set_result(work(entry))
          except Exception as error:
            future.set_exception(error)
        if self._entries.get(name) is not entry:
          for _, late in entry.waiting:  # nothing joins them: it is not there any more
            if late.set_running_or_notify_cancel():
              late.set_exception(ValueError(f"session {name!r} has ended"))
          break
    return out

  def _next(self) -> str | None:
    """Whose turn it is, which counts as taken."""
    with self._changed:
      ready = [
        (max(entry.start, self._clock), entry.last, name)
        for name, entry in self._entries.items()
        if self._ready(entry)
      ]
      if not ready:
        return None
      # Who was not ready for a while has saved up no turns: it starts with the others.
      self._clock, _, name = min(ready)
      self._turns += 1
      entry = self._entries[name]
      entry.start, entry.last = self._clock + 1, self._turns
      return name

  def _finish(self) -> list[Produced]:
    """Waits for the frames of the chunk that is under way."""
    if self._pending is None:
      return []
    (name, chunk), self._pending = self._pending, None
    entry = self._entries[name]
    if entry.error:
      return []  # it was made from what failed
    try:
      return [Produced(name, chunk, chunk.frames)]
    except FloatingPointError as failed:  # a rewind helps
      with self._changed:
        entry.error = str(failed)
    except Exception as failed:
      self._fail(entry, failed)
    return [Produced(name, error=entry.error)]

  def _make_room(self, entry: _Entry) -> None:
    """Moves sessions to the host until one more fits on the device."""
    with self._changed:
      entries = list(self._entries.values())
    others = [
      other
      for other in entries
      if other is not entry and other.session is not None and not other.session.on_host
    ]
    others.sort(key=lambda other: (self._ready(other), other.last))
    for other in others[: max(0, len(others) + 1 - self.capacity.on_device)]:
      session = self._life.to_host(other.session)
      with self._changed:
        other.session = session

  def _fail(self, entry: _Entry, error: Exception) -> None:
    with self._changed:
      entry.session, entry.error = None, f"{type(error).__name__}: {error}"

  def _ready(self, entry: _Entry) -> bool:
    session = entry.session
    if session is None or entry.error or session.paused:
      return False
    return session.chunk - entry.shown < self.ahead

  def _has_work(self) -> bool:
    entries = self._entries.values()
    return self._pending is not None or any(
      entry.waiting or self._ready(entry) for entry in entries
    )

  def _status(self, entry: _Entry) -> Status:
    session = entry.session
    if session is None:
      return Status(0, 0, False, True, False, entry.error)
    return Status(
      session.chunk,
      session.oldest,
      session.paused,
      session.on_host,
      self._ready(entry),
      entry.error,
    )


def _alive(entry: _Entry) -> Session:
  if entry.session is None:
    raise ValueError(f"the session is gone: {entry.error or 'it was never made'}")
  return entry.session


def _capacity(
  session: dict[str, int], device_bytes: float, host_bytes: float
) -> Capacity:
  on_device = int(device_bytes // session["device"])
  in_all = int(host_bytes // (session["host"] + session["history"]))
  for name, given, fit in (
    ("device_bytes", device_bytes, on_device),
    ("host_bytes", host_bytes, in_all),
  ):
    if not fit:
      raise ValueError(
        f"{name}={given:.3g} has no room for a session, which takes "
        f"{_megabytes(session)}; give more, or fewer history_chunks"
      )
  return Capacity(session, on_device, in_all)


def _megabytes(session: dict[str, int]) -> str:
  return ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in session.items())
