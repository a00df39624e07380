"""Measures generation with random weights: speed of each part and peak memory.

  python tools/bench_generate.py --size=ti2v-5b --vae=wan2.2 --height=704 --width=1280

prints one JSON line a figure and writes all to --out. "FPS" counts video frames. Chunks
before the window is full are left out, except where a name says otherwise. End to end =
from noise to uint8 frames on the host. `dit_chunk_ms_early` and `_late` compare the
first chunks with a full window and the last ones: a longer video must not be slower.

Peaks of memory are those of the process. Compiling a decoder of full size needs more
than running it, since convolutions are tried with up to 4 GB of scratch: for the peak
of running, give the same --programs folder to two runs and take the second.

  python tools/bench_generate.py --size=ti2v-5b --height=704 --width=1280 \
    --precision=w4a4_native --kv_format=nvfp4 --compile_for=b200

compiles a whole chunk for a GPU that is not there (any CUDA GPU must be) and counts its
4-bit products.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

import compile_for
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from longlive_jax.checkpoint import store
from longlive_jax.generate import decoding, networks, sampler
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import kv_slots
from longlive_jax.models import dit, vae
from longlive_jax.quant import weights

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "test", "Transformer size.", flag_values=_FLAGS)
_VAE = flags.DEFINE_string("vae", "test", "VAE size.", flag_values=_FLAGS)
_HEIGHT = flags.DEFINE_integer("height", 64, "Pixels.", flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 64, "Pixels.", flag_values=_FLAGS)
_CHUNKS = flags.DEFINE_integer("chunks", 8, "To generate.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 4, "Solver steps.", flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision.", flag_values=_FLAGS
)
_DECODE_FRAMES = flags.DEFINE_integer(
  "decode_frames", 1, "Latent frames a decode.", flag_values=_FLAGS
)
_DECODE_TILES = flags.DEFINE_integer(
  "decode_tiles", 1, "Tiles of its last stages.", flag_values=_FLAGS
)
_DECODE_ON = flags.DEFINE_enum(
  "decode_on", "same", ["same", "other"], "Device of the VAE.", flag_values=_FLAGS
)
_LATENTS_ONLY = flags.DEFINE_bool(
  "latents_only", False, "Leave the decoder out.", flag_values=_FLAGS
)
_PRECISION = flags.DEFINE_enum(
  "precision", "", ["", *weights.MODES], "Of the weights.", flag_values=_FLAGS
)
_KV_FORMAT = flags.DEFINE_enum(
  "kv_format", "", list(kv_slots.NAMES), "Of the cache.", flag_values=_FLAGS
)
_MEMORY_ONLY = flags.DEFINE_bool(
  "memory_only", False, "One run with the decoder, for its memory.", flag_values=_FLAGS
)
_PROGRAMS = flags.DEFINE_string(
  "programs", "", "Folder that keeps compiled programs.", flag_values=_FLAGS
)
_COMPILE_FOR = flags.DEFINE_string(
  "compile_for", "", "Compile for this GPU instead.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)


def abstract_model(config: dit.WanConfig, dtype, precision: str) -> dit.CausalDiT:
  """Shapes of the transformer."""
  model = store.abstract_network("dit", config, dtype)
  if not precision:
    return model
  quantise = functools.partial(weights.quantise_weights, mode=precision)
  return jax.eval_shape(quantise, model)


def random_networks(size: str, vae_size: str, dtype, precision: str = ""):
  """Both networks with random weights, made on the device.

  With a precision the transformer's weights are random codes from the start.
  The VAE has no encoder: generating from text does not load it.
  """
  config = dit.size(size)
  video_vae = vae.VAE_SIZES[vae_size]
  if video_vae.z_dim != config.in_channels:
    raise ValueError(
      f"vae={vae_size!r} has z_dim={video_vae.z_dim}; {size} has {config.in_channels}"
    )

  def build():
    model = dit.CausalDiT(config, dtype=dtype, rngs=nnx.Rngs(0))
    # A fresh head is zero, and matrix units run faster on zeros than on data.
    head = model.head.linear.weight
    head.set_value(0.02 * jax.random.normal(jax.random.key(1), head.shape, dtype))
    return model

  def build_vae():
    network = vae.VideoVAE(video_vae, dtype=dtype, rngs=nnx.Rngs(2))
    network.encoder = network.conv1 = None
    return network

  if precision:
    model = networks.random_like(abstract_model(config, dtype, precision))
  else:
    model = jax.jit(build)()
  return model, jax.jit(build_vae)()


def chunk_elsewhere(
  gpu: str, config: dit.WanConfig, dtype, precision: str, sampling: Sampling, y, x
) -> dict[str, object]:
  """Compiles a chunk for another GPU; what it calls, and the bytes it needs."""
  mesh = compile_for.described(gpu)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    model = abstract_model(config, dtype, precision)
  cache = jax.eval_shape(lambda: sampler.init_cache(model, sampling, 1, y, x))
  frames = np.arange(sampling.frames_per_chunk, dtype=np.int32)[None]
  shot = np.zeros(1, np.int32)
  latents = np.zeros((*frames.shape, y, x, config.in_channels), np.float32)
  chunk = sampler.ChunkInputs(
    noise=latents,
    text=np.zeros((1, config.text_len, config.text_dim), np.float32),
    negative=None,
    frames=frames,
    temporal=sampler.chunk_temporal(config, sampling, frames, shot),
    cut=shot > 0,
    known=np.zeros(frames.shape, bool),
    given=latents,
  )
  step = functools.partial(sampler.denoise_chunk, sampling=sampling)
  compiled = compile_for.compile_for(mesh, step, model, cache, chunk)
  memory = compiled.memory_analysis()
  return {
    "compile_for": gpu,
    "custom_calls": compile_for.custom_calls(compiled.as_text()),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }


def story(config: dit.WanConfig, chunks: int) -> streaming.Story:
  """Three shots with random embeddings."""
  rng = np.random.default_rng(0)
  shot = np.minimum(np.arange(chunks) * 3 // chunks, 2).astype(np.int32)[:, None]
  text = rng.standard_normal((3, config.text_len, config.text_dim), np.float32)
  cut = np.diff(shot, axis=0, prepend=0) > 0
  return streaming.Story(text, None, shot, cut, shot)


def peak_bytes() -> int | None:
  stats = jax.devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] if stats else None


def run(model, video_vae, sampling, plot, y, x, on_state=None) -> list[float]:
  """Streams the story; returns the time at which each chunk was on the host."""
  state = streaming.init_state(
    model, video_vae, sampling, key=jax.random.key(0), samples=np.arange(1), y=y, x=x
  )
  if video_vae is not None:
    where = decoding.placement(_DECODE_ON.value, None, y, x)
    video_vae, decoder = decoding.place(video_vae, state.decoder, where)
    state = dataclasses.replace(state, decoder=decoder)
  stamps = [time.perf_counter()]
  chunks = streaming.stream(
    model,
    video_vae,
    state,
    plot,
    sampling,
    decode_frames=_DECODE_FRAMES.value,
    decode_tiles=_DECODE_TILES.value,
    on_state=on_state,
  )
  for chunk in chunks:
    jax.block_until_ready((chunk.latents, chunk.frames))
    stamps.append(time.perf_counter())
  return stamps


def main(argv: list[str]) -> None:
  del argv
  y, x = _HEIGHT.value // 16, _WIDTH.value // 16
  dtype = jnp.dtype(_DTYPE.value)
  if _PROGRAMS.value:
    jax.config.update("jax_compilation_cache_dir", _PROGRAMS.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  sampling = Sampling(steps=_STEPS.value, kv_format=_KV_FORMAT.value)
  if _COMPILE_FOR.value:
    config, precision = dit.size(_SIZE.value), _PRECISION.value
    labels = {"size": _SIZE.value, "precision": precision, "steps": _STEPS.value}
    labels["kv_format"] = _KV_FORMAT.value
    report(
      labels
      | chunk_elsewhere(_COMPILE_FOR.value, config, dtype, precision, sampling, y, x)
    )
    return
  model, video_vae = random_networks(
    _SIZE.value, _VAE.value, dtype, _PRECISION.value
  )
  plot = story(model.config, _CHUNKS.value)
  frames = 4 * sampling.frames_per_chunk
  figures: dict[str, object] = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "size": _SIZE.value,
    "vae": _VAE.value,
    "pixels": f"{_HEIGHT.value}x{_WIDTH.value}",
    "chunks": _CHUNKS.value,
    "steps": _STEPS.value,
    "dtype": _DTYPE.value,
    "precision": _PRECISION.value,
    "kv_format": _KV_FORMAT.value,
    "decode_on": _DECODE_ON.value,
    "decode_tiles": _DECODE_TILES.value,
    "bytes_dit": weights.weight_bytes(model),
    "parameters_vae": sum(p.size for p in jax.tree.leaves(video_vae)),
  }

  if _MEMORY_ONLY.value:
    figures |= memory(model, video_vae, sampling, plot, y, x)
    report(figures)
    return

  compiled = streaming.compiled_programs()
  stamps = run(model, None, sampling, plot, y, x)
  figures["dit_first_chunk_cold_s"] = stamps[1] - stamps[0]
  stamps = run(model, None, sampling, plot, y, x)
  # Each chunk is waited for, but the next one is dispatched before: differences of
  # stamps are the device's time for a chunk.
  window = sampling.window_frames // sampling.frames_per_chunk
  steady = np.diff(stamps)[window:]
  figures["dit_chunk_ms_median"] = 1e3 * float(np.median(steady))
  figures["dit_chunk_ms_early"] = 1e3 * float(np.median(steady[:8]))
  figures["dit_chunk_ms_late"] = 1e3 * float(np.median(steady[-8:]))
  figures["dit_fps"] = frames / float(np.median(steady))
  figures["dit_fps_all_chunks_warm"] = frames * _CHUNKS.value / (stamps[-1] - stamps[0])
  figures["dit_peak_bytes"] = peak_bytes()

  if not _LATENTS_ONLY.value:
    run(model, video_vae, sampling, plot, y, x)  # compiles the decoder
    stamps = run(model, video_vae, sampling, plot, y, x)
    total = stamps[-1] - stamps[0]
    steady = float(np.median(np.diff(stamps)[window:]))
    figures["end_to_end_first_chunk_warm_s"] = stamps[1] - stamps[0]
    figures["end_to_end_fps_all_chunks"] = (frames * _CHUNKS.value - 3) / total
    figures["end_to_end_fps_steady"] = frames / steady
    figures["peak_bytes"] = peak_bytes()
  programs = streaming.compiled_programs()
  figures["programs"] = {name: programs[name] - compiled[name] for name in programs}
  report(figures)


def memory(model, video_vae, sampling, plot, y, x) -> dict[str, int | None]:
  """Peak bytes after 16 chunks and at the end of one decoded run."""
  peaks: dict[str, int | None] = {}

  def look(chunk, state):
    if chunk == 16:
      jax.block_until_ready(state.cache.k)
      peaks["peak_bytes_after_16_chunks"] = peak_bytes()

  run(model, video_vae, sampling, plot, y, x, on_state=look)
  peaks[f"peak_bytes_after_{plot.chunks}_chunks"] = peak_bytes()
  return peaks


def report(figures: dict[str, object]) -> None:
  for name, value in figures.items():
    print(json.dumps({name: value}), flush=True)
  if _OUT.value:
    Path(_OUT.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
