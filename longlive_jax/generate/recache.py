"""What becomes of the memory when the prompt changes inside a shot.

Keys and values in the cache were computed under the old prompt, and hold the video to
it. A rule says which of them are computed again, from the clean latents of their
chunks, under the new one:

  none           nothing; the memory follows as its chunks are replaced
  last:M         the last M chunks
  window         all that is remembered of the shot, but its sink
  window+sinks   its sink, too
  blend:N        nothing; the text goes over from the old prompt to the new one in N
                 even parts, the last of which is the new one

Chunks of earlier shots, and so the global sink of later shots, keep their prompts.
`rewriting.follow` does it.
"""

import dataclasses
from collections.abc import Collection

KINDS = ("none", "last", "window", "window+sinks", "blend")
MOST_CHUNKS = 16  # of last and blend


@dataclasses.dataclass(frozen=True)
class Recache:
  """A rule.

  Attributes:
    kind: of KINDS.
    chunks: M or N of 'last' and 'blend', from 1 to MOST_CHUNKS; 0 of the others.

  Raises:
    ValueError: another kind or number.
  """

  kind: str
  chunks: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"recache={self.kind[:40]!a} is unknown; use none, last:M, window, "
        "window+sinks or blend:N"
      )
    most = MOST_CHUNKS if self.kind in ("last", "blend") else 0
    if not min(1, most) <= self.chunks <= most:
      raise ValueError(
        f"recache={self} has {self.chunks} chunks; "
        + (f"use 1 to {most}" if most else f"{self.kind!r} takes no number")
      )

  def __str__(self) -> str:
    return f"{self.kind}:{self.chunks}" if self.chunks else self.kind


# In the toy world no rule followed a prompt better (tools/eval_switch.py); this one is
# free.
DEFAULT = Recache("none")


def parse(text: str) -> Recache:
  """'last:2' and the like; raises ValueError for anything else."""
  kind, colon, number = text.partition(":")
  if not colon:
    return Recache(kind)
  if not (number.isascii() and number.isdecimal() and len(number) <= 3):
    raise ValueError(f"recache={text[:40]!a} must be KIND or KIND:NUMBER, as 'last:2'")
  return Recache(kind, int(number))


def chunks_to_rewrite(
  rule: Recache, remembered: Collection[int], shot_start: int, sinks: int
) -> list[int]:
  """Which chunks a rule computes again, ascending.

  Args:
    remembered: chunks that the cache holds.
    shot_start: first chunk of the shot under way.
    sinks: how many chunks from there on are sinks.
  """
  own = sorted(chunk for chunk in remembered if chunk >= shot_start)
  if rule.kind == "last":
    return own[-rule.chunks :]
  if rule.kind == "window":
    return [chunk for chunk in own if chunk >= shot_start + sinks]
  return own if rule.kind == "window+sinks" else []
