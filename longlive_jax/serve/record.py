"""What is known about a session without its state: for clients, and kept with it."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from longlive_jax.generate.session import Made


@dataclasses.dataclass(frozen=True)
class Chunk:
  """One chunk of a video.

  Attributes:
    index: its number, from 0.
    made: how it came about.
    first_frame, frames: its place in the video.
    media: name of its file; '' if it could not be written.
    mean, std: of its clean latents.
    sink: cosine of the angle between its latents and those of the shot's first chunk,
      each averaged over time: 1 is no drift.
    seconds: from its start to its frames.
  """

  index: int
  made: Made
  first_frame: int
  frames: int
  media: str
  mean: float
  std: float
  sink: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Record:
  """A session, as everyone but the scheduler sees it.

  Attributes:
    chunks: done, in order.
    prompt: that it was told last.
    seed: of the noise.
    parent: session and chunk that it branched off at, or ''.
    created: seconds since 1970.
    first_frame_seconds: from the request to the first frames; 0 before.
    paused: it waits to be resumed.
    oldest: chunk that it can be rewound to.
    saved: chunks in the newest state, or -1.
    error: why it does not go on; '' if it does.
  """

  prompt: str
  chunks: tuple[Chunk, ...] = ()
  seed: int = 0
  parent: str = ""
  created: float = dataclasses.field(default_factory=time.time)
  first_frame_seconds: float = 0.0
  paused: bool = False
  oldest: int = 0
  saved: int = -1
  error: str = ""

  @property
  def frames(self) -> int:
    if not self.chunks:
      return 0
    return self.chunks[-1].first_frame + self.chunks[-1].frames

  def until(self, chunk: int) -> "Record":
    """The record when so many chunks were done, and nothing told since."""
    if not self.chunks:
      return self
    prompt = self.chunks[max(0, chunk - 1)].made.prompt
    return dataclasses.replace(self, chunks=self.chunks[:chunk], prompt=prompt)

  def status(self) -> dict[str, Any]:
    """All but the chunks, as JSON."""
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != "chunks"
    }
    return {**fields, "length": len(self.chunks), "frames": self.frames}

  @classmethod
  def read(cls, saved: Mapping[str, Any]) -> "Record":
    """From JSON; raises KeyError, TypeError or ValueError for anything else."""
    chunks = [
      Chunk(**{**chunk, "made": Made(**chunk["made"])}) for chunk in saved["chunks"]
    ]
    return cls(**{**saved, "chunks": tuple(chunks)})
