"""The past of a session: what was overwritten, so that it can be rewound bit for bit.

A cache of 32 frames is not copied every chunk. A chunk takes a few slots; what they
held before, and the cache's small tables, are read out first and go to host memory.
Rewinding puts them back, last write first. Keys and values that were computed again
from latents would be close, but not the same bytes.

The decoder's state is not kept at all: it is the recent inputs of convolutions, which
are had again, the same bytes, by decoding the last latents (`decoding.
frames_remembered`). Latents are small, and serve the recache rules, too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.generate import sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import kv_cache
from longlive_jax.layers.kv_cache import KVCache, Overwritten

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
  """How to get from after `chunk + 1` chunks to after `chunk`.

  Attributes:
    chunk: chunks that were done.
    script: what the session was being told, right after these (session.Script).
    overwritten: by recaching and by the chunk itself, in the order of the writes.
    finite: bool (), every latent up to then.
  """

  chunk: int
  script: Any
  overwritten: tuple[Overwritten, ...]
  finite: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Latents:
  """Clean latents (1, f, y, x, c) of a chunk."""

  chunk: int
  latents: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
  """Steps and latents, oldest first; the newest may still be on the device."""

  steps: tuple[Step, ...] = ()
  latents: tuple[Latents, ...] = ()

  def on_host(self) -> "History":
    """All of it as numpy arrays; waits for what is under way."""
    return History(
      tuple(
        dataclasses.replace(
          step,
          overwritten=_fetch(step.overwritten),
          finite=_fetch(step.finite),
        )
        for step in self.steps
      ),
      tuple(Latents(each.chunk, _fetch(each.latents)) for each in self.latents),
    )

  def bounded(self, steps: int, latents: int, starts: set[int]) -> "History":
    """The newest steps, the newest latents, and those of the chunks `starts`."""
    newest = max((each.chunk for each in self.latents), default=0)
    return History(
      self.steps[len(self.steps) - steps :] if len(self.steps) > steps else self.steps,
      tuple(
        each
        for each in self.latents
        if each.chunk > newest - latents or each.chunk in starts
      ),
    )

  def of(self, chunk: int) -> np.ndarray | None:
    """Latents of a chunk on the host, if they are kept."""
    for each in self.latents:
      if each.chunk == chunk:
        return _fetch(each.latents)
    return None


def _fetch(tree: Any) -> Any:
  """On the host. jax.device_get waits for what is on a device, and copies no numpy."""
  return jax.device_get(tree)


@functools.partial(jax.jit, static_argnums=3)
def look(cache: KVCache, frames: Array, cut: Array, sampling: Sampling) -> Overwritten:
  """What writing a chunk will overwrite; see `sampler.clean_pass`.

  Args:
    frames: int32 (b, f), in the cache already or new. cut: bool (b,).
  """
  frames, cut = (jnp.repeat(a, sampling.branches, axis=0) for a in (frames, cut))
  _, placement = sampler.make_room(cache, frames, cut & sampling.pins, sampling)
  return kv_cache.overwritten(cache, placement.slot)


@functools.partial(jax.jit, donate_argnums=0)
def put_back(cache: KVCache, old: Overwritten) -> KVCache:
  """The cache before the write; its memory is reused."""
  return kv_cache.put_back(cache, old)
