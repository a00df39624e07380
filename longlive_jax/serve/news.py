"""What watchers are told, as items for their queues; app.py lists all events."""

import dataclasses
import json
from typing import Any

from longlive_jax.generate.engine import Engine
from longlive_jax.serve import metrics as numbers
from longlive_jax.serve import mp4
from longlive_jax.serve.record import Chunk, Record
from longlive_jax.serve.watchers import Item


def event(session: str, /, **what: Any) -> Item:
  """An event of a session, whose id `what` may replace by another one."""
  return Item(json.dumps({"session": session, **what}))


def whole(engine: Engine, session: str, record: Record) -> Item:
  """All of a session, for who knows nothing of it."""
  return event(
    session,
    event="state",
    fps=engine.fps,
    width=engine.width,
    height=engine.height,
    chunks=[dataclasses.asdict(chunk) for chunk in record.chunks],
    **record.status(),
  )


def chunk_made(session: str, chunk: Chunk, media: bytes, made_fps: float) -> Item:
  """A chunk, and its media, which follows as a binary message if there is any.

  Args:
    made_fps: frames a second that all sessions make together.
  """
  about = event(
    session,
    event="chunk",
    chunk=dataclasses.asdict(chunk),
    media=len(media),
    codec=mp4.codec(media) if media else "",
    made_fps=round(made_fps, 2),
    memory=numbers.memory(),
  )
  return about._replace(media=media)
