"""Sessions on disk: what was made of each, and states to go on from.

  DIR/0123456789ab/chunks/000012-89abcdef.mp4   one chunk, never changed
  DIR/0123456789ab/states/000003                the third save, and what it knows about

A state lists the chunks that lead to it, and a file that it lists stays until a later
state is whole. So the folder can be used whenever the process was killed: chunks after
the state, and states that were never finished, are dropped.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from longlive_jax.generate import saved_sessions
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.session import Session
from longlive_jax.serve.limits import check_session
from longlive_jax.serve.record import Record

_STATE = re.compile(r"[0-9]{6}")
_CHUNK = re.compile(r"[0-9]{6}-[0-9a-f]{8}\.mp4")


class Shelf:
  """A folder of sessions. Names are checked: nothing outside can be reached.

  Args:
    folder: made if it is not there.
    most_bytes: that it may hold, videos and states.
  """

  def __init__(self, folder: Path, most_bytes: float):
    self._folder, self._most = folder, most_bytes
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    self._used = self._measure()

  def sessions(self) -> list[str]:
    """All ids on disk, the oldest first."""
    found = [path for path in self._folder.iterdir() if _is_session(path.name)]
    return [path.name for path in sorted(found, key=lambda p: p.stat().st_mtime)]

  def check_room(self, more: int) -> None:
    """Looks at all files. Raises OSError if so many bytes more are too many."""
    self._used = self._measure()
    self._check(more)

  def _check(self, more: int) -> None:
    free = shutil.disk_usage(self._folder).free
    if more > min(free, self._most - self._used):
      raise OSError(
        f"{more / 1e6:,.1f} MB do not fit: {self._used / 1e6:,.1f} MB of "
        f"{self._most / 1e6:,.1f} are used, {free / 1e6:,.1f} MB of the disk are free"
      )

  def _measure(self) -> int:
    used = 0
    for file in self._folder.rglob("*"):
      with contextlib.suppress(OSError):  # deleted meanwhile
        used += file.stat().st_size
    return used

  # ---------------------------------------------------------------- chunks
  def keep_chunk(self, session: str, index: int, media: bytes) -> str:
    """Writes one chunk; its file name. Raises OSError, also where it does not fit.

    What is used is what the last look at all files found, and the chunks since: a look
    for every chunk would take longer than the chunk. Whatever deletes looks again.
    """
    self._check(len(media))
    folder = self._path(session, "chunks")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{index:06d}-{secrets.token_hex(4)}.mp4"
    (folder / name).write_bytes(media)
    self._used += len(media)
    return name

  def chunk(self, session: str, name: str) -> bytes:
    """Raises ValueError for a name that cannot be, OSError if it is gone."""
    if not _CHUNK.fullmatch(name):
      raise ValueError("chunk must be a file name that the server gave")
    return (self._path(session, "chunks") / name).read_bytes()

  def chunks(self, session: str, record: Record) -> Iterator[bytes]:
    """The chunks of a video in order, without those that could not be written."""
    for chunk in record.chunks:
      if chunk.media:
        yield self.chunk(session, chunk.media)

  def share_chunks(self, session: str, other: str, record: Record) -> None:
    """Gives another session the same files. Raises OSError."""
    source, target = self._path(session, "chunks"), self._path(other, "chunks")
    target.mkdir(parents=True, exist_ok=True)
    for chunk in record.chunks:
      if chunk.media:
        os.link(source / chunk.media, target / chunk.media)

  def drop_chunks(self, session: str, *records: Record) -> None:
    """Deletes all chunks but those of the records."""
    kept = {chunk.media for record in records for chunk in record.chunks}
    folder = self._path(session, "chunks")
    for path in folder.iterdir() if folder.is_dir() else ():
      if path.name not in kept:
        path.unlink(missing_ok=True)
    self._used = self._measure()

  # ---------------------------------------------------------------- states
  def save(self, engine: Engine, session: str, state: Session, record: Record) -> None:
    """Saves a state; the one before goes when this one is whole. Raises as `save`."""
    folder = self._path(session, "states")
    folder.mkdir(parents=True, exist_ok=True)
    before = self.states(session)
    number = 1 + int(before[-1].name) if before else 1
    path = folder / f"{number:06d}"
    try:
      about = dataclasses.asdict(record)
      saved_sessions.save(engine, state, path, about)
    except BaseException:
      shutil.rmtree(path, ignore_errors=True)
      raise
    for other in folder.iterdir():
      if other != path:  # what a killed save left, too
        shutil.rmtree(other, ignore_errors=True)

  def states(self, session: str) -> list[Path]:
    """Saves, the oldest first; the last may not be whole after a crash."""
    folder = self._path(session, "states")
    if not folder.is_dir():
      return []
    return sorted(path for path in folder.iterdir() if _STATE.fullmatch(path.name))

  def saved_chunks(self, state: Path) -> int:
    """How many chunks one of `states` has; raises as `saved_sessions.about`."""
    return len(Record.read(saved_sessions.about(state)).chunks)

  def load(self, engine: Engine, session: str) -> tuple[Session, Record]:
    """The newest state that is whole.

    Raises:
      FileNotFoundError: none was ever saved. ValueError or OSError: none can be read.
    """
    failed: Exception = FileNotFoundError(f"session {session} was never saved")
    for path in reversed(self.states(session)):
      try:
        record = Record.read(saved_sessions.about(path))
        return saved_sessions.load(engine, path), record
      except (ValueError, OSError, KeyError, TypeError) as error:
        failed = error
    raise failed

  def drop(self, session: str) -> None:
    """Deletes a session."""
    shutil.rmtree(self._path(session), ignore_errors=True)
    self._used = self._measure()

  def _path(self, session: str, *parts: str) -> Path:
    return self._folder.joinpath(check_session(session), *parts)


def _is_session(name: str) -> bool:
  try:
    return bool(check_session(name))
  except ValueError:
    return False
