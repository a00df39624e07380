"""All sessions of the server, on one thread of their own.

What changes a session happens on that thread, one thing after the other: taking turns
(`generate/scheduler.py`), encoding, telling watchers, saving's first half. So events
are in order, and the event loop of the web server never waits for a chunk. Others ask
by `submit`, and read `records`, which are frozen.

A video is played at its frame rate: sessions run a few chunks ahead of a clock, which
stands still while nobody watches.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from longlive_jax.generate import commands
from longlive_jax.generate import session as sessions
from longlive_jax.generate.commands import Command
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.scheduler import Produced, Scheduler
from longlive_jax.generate.session import Session
from longlive_jax.serve import metrics as numbers
from longlive_jax.serve import mp4, news
from longlive_jax.serve.limits import Limits, new_session
from longlive_jax.serve.logs import event
from longlive_jax.serve.metrics import Metrics
from longlive_jax.serve.record import Chunk, Record
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.show import Show
from longlive_jax.serve.watchers import Item, Watcher

TICK = 0.25  # seconds between two looks at the clocks


class Studio:
  """Makes videos until it is stopped.

  Args:
    engine, scheduler: of all sessions.
    shelf: where they are kept.
    limits: how many, how long.
    save_every: a state is saved after the first chunk and every so many.
    encode: as mp4.encode.
  """

  def __init__(
    self,
    engine: Engine,
    scheduler: Scheduler,
    shelf: Shelf,
    limits: Limits | None = None,
    *,
    save_every: int = 8,
    encode: Callable[..., bytes] = mp4.encode,
  ):
    if save_every < 1:
      raise ValueError(f"save_every={save_every} must be at least 1 chunk")
    self.engine, self.shelf, self.limits = engine, shelf, limits or Limits()
    self.metrics = Metrics()
    self.records: dict[str, Record] = {}
    self._scheduler, self._save_every, self._encode = scheduler, save_every, encode
    self._shows: dict[str, Show] = {}
    self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = (
      queue.SimpleQueue()
    )
    self._saver = ThreadPoolExecutor(1, thread_name_prefix="saver")
    self._saving: dict[str, Future] = {}
    self._thread = threading.Thread(target=self._work, name="studio", daemon=True)
    self._ready, self._stopping = threading.Event(), threading.Event()
    self._ended = threading.Event()
    self._step_started = time.monotonic()

  # ---------------------------------------------------------------- for any thread
  def start(self) -> None:
    """Compiles, brings sessions back, and goes on; returns at once."""
    self._thread.start()

  def stop(self) -> None:
    """Saves all sessions and waits for it; a chunk under way is finished."""
    self._stopping.set()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def status(self) -> str:
    """'starting', 'ok', 'stopping' or 'failed'."""
    if self._stopping.is_set():
      return "stopping"
    if not self._thread.is_alive() and self._ready.is_set():
      return "failed"
    return "ok" if self._ready.is_set() else "starting"

  def submit(self, work: Callable[[], Any]) -> Future:
    """Has something done on the studio's thread, between chunks.

    Returns:
      what comes of it: an OSError if the thread has ended.
    """
    future: Future = Future()
    self._inbox.put((work, future))
    if self._ended.is_set():
      self._refuse()
    return future

  def gauges(self) -> Iterable[tuple[str, str, str, float]]:
    """For Metrics.render."""
    records, shows = dict(self.records), dict(self._shows)
    yield "fps", "", "Frames a second made, over ten seconds.", self.metrics.fps()
    yield "sessions", "", "Sessions there are.", len(records)
    ready = sum(state.ready for state in self._scheduler.status().values())
    yield "sessions_ready", "", "Sessions that wait for their turn.", ready
    failed = sum(bool(record.error) for record in records.values())
    yield "sessions_failed", "", "Sessions that do not go on.", failed
    watchers = sum(len(show.watchers) for show in shows.values())
    yield "watchers", "", "Connections that watch.", watchers
    yield "queue", "", "Requests that wait for the studio.", self._inbox.qsize()
    saving = sum(not future.done() for future in list(self._saving.values()))
    yield "saving", "", "States that are being written.", saving
    for kind, used in numbers.memory().items():
      yield "memory_bytes", f'{{of="{kind}"}}', "Memory in use.", used

  # ---------------------------------------------------------------- by submit
  def create(self, prompt: str, seed: int = 0) -> str:
    """Starts a session; its id. Raises ValueError where one more is too many."""
    self._check_count()
    name = new_session()
    future = self._scheduler.add(
      name, lambda: sessions.start(self.engine, prompt, seed)
    )
    self._drain()
    future.result()
    self._admit(name, Record(prompt, seed=seed), asked=time.monotonic())
    event("created", session=name, seed=seed)
    return name

  def watch(self, name: str, watcher: Watcher) -> None:
    """Tells a watcher of the session as it is, and of what happens from now on.

    Raises:
      ValueError: there is no such session.
    """
    record = self.record(name)
    watcher.put(news.whole(self.engine, name, record))
    if record.chunks and record.chunks[-1].media:
      # So that there is a picture; older ones are had by HTTP.
      last = record.chunks[-1]
      with contextlib.suppress(OSError):
        media = self.shelf.chunk(name, last.media)
        watcher.put(self._chunk_made(name, last, media))
    self._shows[name].watchers.add(watcher)

  def leave(self, name: str, watcher: Watcher) -> None:
    """Forgets a watcher."""
    if name in self._shows:
      self._shows[name].watchers.discard(watcher)

  def command(self, name: str, command: Command) -> Any:
    """Has a session follow a command.

    Returns:
      For Branch the new session's id, for Save a Future of the chunks saved, else None.

    Raises:
      ValueError: there is no such session; the command cannot be followed.
    """
    record = self.record(name)
    match command:
      case commands.Save():
        return self._save(name)
      case commands.Branch(chunk):
        return self._branch(name, chunk)
      case commands.Rewind(chunk) if chunk > len(record.chunks):
        raise ValueError(f"chunk={chunk} is not made yet; {len(record.chunks)} are")
      case commands.Resume() if len(record.chunks) >= self.limits.chunks:
        raise ValueError(f"the video has {self.limits.chunks} chunks, the most it may")
    future = self._scheduler.command(name, command)
    self._drain()
    future.result()
    record, show = self.records[name], self._shows[name]
    match command:
      case commands.Pause():
        self._update(name, paused=True)
      case commands.Resume():
        self._update(name, paused=False)
      case commands.Rewind(chunk):
        show.rewind()
        show.told = None
        self._shown(name, chunk)
        self.records[name] = record.until(chunk)
        show.keep(self.records[name])
        self._tell(name, {"event": "rewound", "chunk": chunk})
        self._update(name, error="")
      case _:
        show.told = time.monotonic()
        self._update(name, prompt=command.text)
    kind = type(command).__name__.lower()
    self._tell(name, {"event": "told", "kind": kind, "chunk": len(record.chunks)})
    event("command", session=name, kind=kind, chunk=len(record.chunks))
    return None

  def end(self, name: str) -> None:
    """Deletes a session, also from disk. Raises ValueError if there is none."""
    self.record(name)
    future = self._scheduler.remove(name)
    self._drain()
    future.result()
    self._tell(name, {"event": "ended"})
    del self.records[name], self._shows[name]
    self._saving.pop(name, None)
    self._saver.submit(self.shelf.drop, name)  # after a save that is under way
    event("ended", session=name)

  def record(self, name: str) -> Record:
    """Raises ValueError if there is no such session. For any thread."""
    if name not in self.records:
      raise ValueError(f"there is no session {name!r}")
    return self.records[name]

  # ---------------------------------------------------------------- its thread
  def _work(self) -> None:
    try:
      began = time.monotonic()
      sessions.warm_up(self.engine)
      for name in self.shelf.sessions():
        self._bring_back(name)
      self._ready.set()
      event("ready", seconds=round(time.monotonic() - began, 3))
      while not self._stopping.is_set():
        self._round()
      self._close()
    except Exception:
      logging.getLogger("longlive_jax.serve").exception("the studio failed")
    self._ready.set()
    self._ended.set()
    self._refuse()

  def _refuse(self) -> None:
    """Answers what nobody will do any more."""
    with contextlib.suppress(queue.Empty):
      while True:
        _, future = self._inbox.get_nowait()
        if future.set_running_or_notify_cancel():
          future.set_exception(OSError("the server is stopping; its log says why"))

  def _round(self) -> None:
    """What was asked for, what the clocks allow, and one chunk."""
    try:
      busy = self._scheduler.wait(0)
      wait = 0.0 if busy else self._until_clock()
      try:
        self._do(*self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait())
        for _ in range(self._inbox.qsize()):  # not those that come meanwhile
          self._do(*self._inbox.get_nowait())
      except queue.Empty:
        pass
      self._look_at_clocks()
      if self._scheduler.wait(0):
        self._step()
    except Exception:  # none of the sessions' own: those are caught where they are
      self.metrics.count("errors")
      logging.getLogger("longlive_jax.serve").exception("a round failed")
      time.sleep(TICK)

  def _do(self, work: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
      return
    try:
      future.set_result(work())
    except Exception as error:
      future.set_exception(error)

  def _step(self) -> None:
    before, self._step_started = self._step_started, time.monotonic()
    for made in self._scheduler.step():
      self._publish(made, before)

  def _drain(self) -> None:
    for made in self._scheduler.drain():
      self._publish(made, self._step_started)

  def _publish(self, made: Produced, started: float) -> None:
    """Encodes, keeps and hands out one chunk, or says why there is none."""
    name = made.name
    if name not in self.records:
      return
    if made.chunk is None:
      self.metrics.count("errors")
      event("failed", logging.ERROR, session=name, error=made.error)
      self._update(name, error=made.error)
      return
    record, show, now = self.records[name], self._shows[name], time.monotonic()
    index, frames = made.chunk.index, made.frames
    media, file = b"", ""
    try:
      media = self._encode(frames, fps=self.engine.fps, first_frame=record.frames)
      file = self.shelf.keep_chunk(name, index, media)
    except (OSError, ValueError) as error:
      self.metrics.count("errors")
      event("not_kept", logging.ERROR, session=name, chunk=index, error=str(error))
      self._tell(name, {"event": "problem", "message": f"chunk {index}: {error}"})
    latents = np.asarray(made.chunk.latents, np.float32)[0]
    chunk = Chunk(
      index,
      made.chunk.made,
      record.frames,
      len(frames),
      file,
      round(float(latents.mean()), 4),
      round(float(latents.std()), 4),
      round(show.likeness(made.chunk.made.shot, latents), 4),
      round(now - started, 3),
    )
    asked = {} if show.asked is None else {"first_frame_seconds": now - show.asked}
    self.records[name] = dataclasses.replace(
      record, chunks=(*record.chunks, chunk), **asked
    )
    self.metrics.frames(len(frames))
    self.metrics.latency("chunk", now - started)
    if show.told is not None:
      self.metrics.latency("switch", now - show.told)
    show.asked = show.told = None
    show.add(index + 1, len(frames) / self.engine.fps)
    self._hand_out(name, self._chunk_made(name, chunk, media))
    event("chunk", session=name, chunk=index, seconds=chunk.seconds)
    self._update(name)  # what can be rewound to moved, too
    if index + 1 >= self.limits.chunks:
      self._scheduler.command(name, commands.Pause())
      self._update(name, paused=True)
    if index == 0 or (index + 1) % self._save_every == 0:
      self._save_if_idle(name)

  def _look_at_clocks(self) -> None:
    for name, show in self._shows.items():
      if show.watchers and (played := show.played()) is not None:
        self._shown(name, played)

  def _until_clock(self) -> float:
    waits = [show.wait() for show in self._shows.values() if show.watchers]
    return max(0.001, min([TICK, *waits]))

  # ---------------------------------------------------------------- sessions
  def _check_count(self) -> None:
    if len(self.records) >= self.limits.sessions:
      raise ValueError(
        f"there are {len(self.records)} sessions, as many as the server allows; end "
        "one first"
      )

  def _admit(self, name: str, record: Record, asked: float | None = None) -> None:
    self.records[name] = record
    self._shows[name] = Show(asked)
    self._shown(name, len(record.chunks))

  def _branch(self, name: str, chunk: int | None) -> str:
    self._check_count()
    if self.records[name].error:
      raise ValueError("the session does not go on: rewind it first")
    new = new_session()
    future = self._scheduler.branch(name, new, chunk)
    self._drain()
    future.result()
    record = self.records[name]
    told = record if chunk is None else record.until(chunk)
    chunk = len(told.chunks)
    branch = dataclasses.replace(
      told,
      parent=f"{name}@{chunk}",
      created=time.time(),
      saved=-1,
      error="",
    )
    try:
      self.shelf.share_chunks(name, new, branch)
    except OSError as error:
      self._scheduler.remove(new)
      self.shelf.drop(new)
      raise ValueError(f"the disk refused the branch: {error}") from error
    self._admit(new, branch)
    self._shows[new].anchors = dict(self._shows[name].anchors)
    self._shows[new].keep(branch)
    self._save_if_idle(new)
    self._tell(name, {"event": "branched", "session": new, "chunk": chunk})
    event("branched", session=name, branch=new, chunk=chunk)
    return new

  def _bring_back(self, name: str) -> None:
    """Takes in a session from disk; one that cannot be read stays there, untouched."""
    try:
      found: list[Record] = []

      def make() -> Session:
        session, record = self.shelf.load(self.engine, name)
        found.append(dataclasses.replace(record, paused=session.paused))
        past = session.past.of(session.script.shot_start)
        if past is not None:
          anchors[session.script.shot] = np.asarray(past, np.float32)[0].mean(0).ravel()
        return session

      anchors: dict[int, np.ndarray] = {}
      future = self._scheduler.add(name, make)
      self._scheduler.drain()
      future.result()
      self._admit(name, dataclasses.replace(found[0], saved=len(found[0].chunks)))
      self._shows[name].anchors = anchors
      self.shelf.drop_chunks(name, found[0])
      self._update(name)
      event("restored", session=name, chunk=len(found[0].chunks))
    except FileNotFoundError:
      self.shelf.drop(name)  # killed before its first save: nothing to go on from
    except Exception as error:
      event("not_restored", logging.ERROR, session=name, error=str(error))

  # ---------------------------------------------------------------- saving
  def _save_if_idle(self, name: str) -> None:
    under_way = self._saving.get(name)
    if under_way is None or under_way.done():
      try:
        self._save(name)
      except ValueError as error:
        event("not_saved", logging.WARNING, session=name, error=str(error))

  def _save(self, name: str) -> Future:
    """Starts to write the state; a Future of how many chunks it has."""
    future = self._scheduler.snapshot(name)
    self._drain()
    state = future.result()
    record = self.records[name]
    if len(record.chunks) != state.chunk:
      raise ValueError("the last chunk failed; rewind to before it first")
    self._saving[name] = self._saver.submit(self._write, name, state, record)
    return self._saving[name]

  def _write(self, name: str, state: Session, record: Record) -> int:
    """On the saver's thread."""
    try:
      sizes = self._scheduler.capacity.session
      self.shelf.check_room(sizes["host"] + sizes["history"])
      self.shelf.save(self.engine, name, state, record)
    except Exception as error:
      self.metrics.count("errors")
      event("not_saved", logging.ERROR, session=name, error=str(error))
      message = f"not saved: {error}"
      self.submit(lambda: self._tell(name, {"event": "problem", "message": message}))
      raise OSError(message) from error
    self.metrics.count("saves")
    self.submit(lambda: self._saved(name, record))
    return state.chunk

  def _saved(self, name: str, record: Record) -> None:
    if name in self.records:
      self.shelf.drop_chunks(name, self.records[name], record)
      self._update(name, saved=len(record.chunks))
      event("saved", session=name, chunk=len(record.chunks))

  def _close(self) -> None:
    """Saves all sessions; one that fails keeps its older state."""
    for made in self._scheduler.drain():
      self._publish(made, self._step_started)
    for name in list(self.records):
      try:
        self._save(name)
      except Exception as error:
        event("not_saved", logging.ERROR, session=name, error=str(error))
    self._saver.shutdown(wait=True)
    while True:  # what they had to say, and what nobody waits for any more
      try:
        self._do(*self._inbox.get_nowait())
      except queue.Empty:
        break
    event("stopped", sessions=len(self.records))

  # ---------------------------------------------------------------- telling
  def _update(self, name: str, **changes: Any) -> None:
    """Changes a record, and tells its watchers."""
    status = self._scheduler.status().get(name)
    if status is not None:
      changes.setdefault("oldest", status.oldest)
    self.records[name] = dataclasses.replace(self.records[name], **changes)
    self._tell(name, {"event": "status", **self.records[name].status()})

  def _tell(self, name: str, what: dict[str, Any]) -> None:
    self._hand_out(name, news.event(name, **what))

  def _hand_out(self, name: str, item: Item) -> None:
    for watcher in self._shows[name].watchers if name in self._shows else ():
      if not watcher.put(item):
        now = news.whole(self.engine, name, self.records[name])
        lost = watcher.restart(now, item)
        self.metrics.count("dropped", lost)

  def _chunk_made(self, name: str, chunk: Chunk, media: bytes) -> Item:
    return news.chunk_made(name, chunk, media, self.metrics.fps())

  def _shown(self, name: str, chunks: int) -> None:
    """Lets a session go on behind what was seen of it, but not beyond the limit.

    The next chunk is under way when one is published: pausing would come too late.
    """
    most = self.limits.chunks - self._scheduler.ahead
    self._scheduler.shown(name, min(chunks, most))
