"""Cached chunks are written again under another prompt, as a recache rule says.

In their slots, one after the other, by one program whatever the rule: each chunk sees
what the cache holds up to its own frames (`sampler.write_again`), and so the chunks
before it as they are by then.
"""

import functools

import jax
import numpy as np

from longlive_jax.generate import history, recache, sampler
from longlive_jax.generate import script as scripts
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.history import History
from longlive_jax.generate.recache import Recache
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.script import Script
from longlive_jax.layers.kv_cache import KVCache, Overwritten


def follow(
  rule: Recache, engine: Engine, cache: KVCache, script: Script, past: History
) -> tuple[KVCache, tuple[Overwritten, ...]]:
  """The cache after a change of prompt, in the memory of the one before.

  Args:
    script: with the new prompt.
    past: with the latents of what the cache holds of the shot.

  Returns:
    the cache, and what was overwritten, in that order.
  """
  if rule.kind in ("none", "blend"):
    return cache, ()
  lost: list[Overwritten] = []
  sampling, n = engine.sampling, engine.sampling.frames_per_chunk
  # Latents alone come to the host: what was overwritten is hundreds of times as much.
  latents = {each.chunk: each.latents for each in past.latents}
  held = np.array(cache.frame)[0]  # waits; a view would keep the cache's memory
  remembered = {int(frame) // n for frame in held if frame >= 0} & latents.keys()
  sinks = engine.sink_chunks if script.shot == 0 else int(sampling.pins)
  for chunk in recache.chunks_to_rewrite(rule, remembered, script.shot_start, sinks):
    starts = script.shot > 0 and chunk == script.shot_start
    moment = scripts.moment(engine, script, ((script.prompt, 1.0),), cut=starts)
    clean = jax.device_get(latents[chunk])
    inputs = streaming.chunk_inputs(
      engine.model.config, sampling, moment, chunk * n, clean
    )
    # A cut is made once: written again, its chunk forgets nothing.
    lost.append(history.look(cache, inputs.frames, np.array([False]), sampling))
    cache = write_again(engine.model, cache, clean, inputs, sampling)
  return cache, tuple(lost)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def write_again(model, cache, latents, chunk, sampling: Sampling):
  """`sampler.write_again`, compiled; the memory of the cache is reused."""
  return sampler.write_again(model, cache, latents, chunk, sampling)
