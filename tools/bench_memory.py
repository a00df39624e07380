"""What generation compiles, and its memory by part."""

import contextlib
from collections.abc import Iterator

import bench_networks
import jax
import numpy as np

from longlive_jax.generate import sampler
from longlive_jax.generate import stream as streaming
from longlive_jax.quant import weights

COMPILING = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """Seconds of everything that XLA compiles inside, or reads from its cache."""
  seconds: list[float] = []

  def listen(event: str, duration: float, **_) -> None:
    if event == COMPILING:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def denoise_program(model, sampling, y, x) -> dict[str, int]:
  """Bytes that the program of one chunk takes."""
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 1, y, x))
  chunk = bench_networks.chunk_inputs(model.config, sampling, y, x)
  step = jax.jit(sampler.denoise_chunk, static_argnums=3, donate_argnums=1)
  memory = step.lower(model, cache, chunk, sampling).compile().memory_analysis()
  return {
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "aliased_bytes": memory.alias_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }


def parts(model, video_vae, sampling, y, x) -> dict[str, dict[str, int]]:
  """Bytes by part and number format, of all that stays between chunks."""
  state = jax.eval_shape(
    lambda: streaming.init_state(
      model, video_vae, sampling, key=jax.random.key(0), samples=np.arange(1), y=y, x=x
    )
  )
  held = {"transformer": model, "cache": (state.cache.k, state.cache.v)}
  if video_vae is not None:
    held |= {"vae": video_vae, "decoder_state": state.decoder}
  return {name: weights.weight_bytes(part) for name, part in held.items()}
