"""Memory of generation by part: what stays between chunks, and what programs take."""

import time

import bench_networks
import bench_stages
import jax
import numpy as np

from longlive_jax.generate import sampler
from longlive_jax.generate import stream as streaming
from longlive_jax.quant import weights


def programs(
  model, video_vae, sampling, decode_frames, y, x
) -> dict[str, dict[str, float]]:
  """Both programs compiled apart: seconds, and the bytes that they take."""
  found = {}
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 1, y, x))
  chunk = bench_networks.chunk_inputs(model.config, sampling, y, x)
  step = jax.jit(sampler.denoise_chunk, static_argnums=3, donate_argnums=1)
  lowered = {"denoise": lambda: step.lower(model, cache, chunk, sampling)}
  if video_vae is not None:
    case = bench_stages.decode_case(video_vae, decode_frames, y, x)
    decode = jax.jit(case.function, donate_argnums=0)
    lowered["decode"] = lambda: decode.lower(*case.arguments)
  for name, lower in lowered.items():
    began = time.perf_counter()
    compiled = lower().compile()
    elapsed, memory = time.perf_counter() - began, compiled.memory_analysis()
    found[name] = {
      "compile_s": elapsed,
      "argument_bytes": memory.argument_size_in_bytes,
      "output_bytes": memory.output_size_in_bytes,
      "aliased_bytes": memory.alias_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes,
    }
  return found


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
