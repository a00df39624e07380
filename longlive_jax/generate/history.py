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

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.generate import sampler
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.script import Script
from longlive_jax.layers import kv_cache
from longlive_jax.layers.kv_cache import KVCache, Overwritten

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
  """How to get from after `chunk + 1` chunks to after `chunk`.

  Attributes:
    chunk: chunks that were done.
    script: what the session was being told, right after these.
    overwritten: by recaching and by the chunk itself, in the order of the writes.
    finite: bool (), every latent up to then.
  """

  chunk: int
  script: Script
  overwritten: tuple[Overwritten, ...]
  finite: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Latents:
  """Clean latents (1, f, y, x, c) of a chunk."""

  chunk: int
  latents: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
  """Steps and latents, oldest first; the newest ones may be on the device."""

  steps: tuple[Step, ...] = ()
  latents: tuple[Latents, ...] = ()

  def on_host(self, *, but: int = 0) -> "History":
    """As numpy arrays, `but` for the newest; waits for what is under way of them."""
    done = len(self.steps) - but, len(self.latents) - but
    steps = tuple(
      dataclasses.replace(
        step,
        overwritten=jax.device_get(step.overwritten),
        finite=jax.device_get(step.finite),
      )
      for step in self.steps[: done[0]]
    )
    latents = tuple(
      Latents(each.chunk, jax.device_get(each.latents))
      for each in self.latents[: done[1]]
    )
    return History(steps + self.steps[done[0] :], latents + self.latents[done[1] :])

  def bounded(self, steps: int, latents: int, starts: set[int]) -> "History":
    """The newest steps, the newest latents, and those of the chunks `starts`."""
    newest = max((each.chunk for each in self.latents), default=0)
    return History(
      self.steps[max(0, len(self.steps) - steps) :],
      tuple(
        each
        for each in self.latents
        if each.chunk > newest - latents or each.chunk in starts
      ),
    )

  def of(self, chunk: int) -> np.ndarray | None:
    """Latents (1, f, y, x, c) of a chunk on the host, waited for; None: not kept."""
    found = [each.latents for each in self.latents if each.chunk == chunk]
    return jax.device_get(found[0]) if found else None


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
