"""Measures generation with random weights: speed, stages, memory, beside a prediction.

  python tools/bench_generate.py --size=ti2v-5b --vae=wan2.2 --height=704 --width=1280

prints tables for people and writes all of it as JSON to --out. "FPS" counts video
frames. Chunks before the window is full are left out, except where a name says
otherwise. End to end = from noise to uint8 frames on the host. `dit_chunk_ms_early`
and `_late` compare the first chunks with a full window and the last ones: a longer
video must not be slower. Jitter is what the slowest chunk in a hundred takes beyond
the median. Cold is with nothing compiled, but the networks there.

Each stage is also run by itself and held against its floor (bench_stages.py); "other"
is what a whole chunk takes beyond their sum. The rates of this run are in the JSON as
`hardware`: launch/generate.py plans with them by --config.plan=FILE. Predicted is what
parallel/plan.py says by the rates of its own table, without those of this run.

Peaks of memory are those of the process, with --latents_only without the decoder.
Compiling a decoder of full size needs more
than running it, since convolutions are tried with up to 4 GB of scratch: for the peak
of running, give the same --programs folder to two runs and take the second, with
--memory_only.

  python tools/bench_generate.py --size=ti2v-5b --height=704 --width=1280 \
    --precision=w4a4_native --kv_format=nvfp4 --compile_for=b200

compiles a whole chunk for a GPU that is not there (any CUDA GPU must be) and counts its
4-bit products.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import bench_memory
import bench_networks
import bench_stages
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from longlive_jax.generate import decoding, report
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import kv_slots
from longlive_jax.models import dit, vae_fp8
from longlive_jax.parallel import costs, hardware, plan, sequence
from longlive_jax.parallel import mesh as meshes
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
_UNROLL = flags.DEFINE_boolean(
  "unroll", False, "Layers one by one.", flag_values=_FLAGS
)
_DECODE_TILES = flags.DEFINE_integer(
  "decode_tiles", 1, "Tiles of its last stages.", flag_values=_FLAGS
)
_DECODE_ON = flags.DEFINE_enum(
  "decode_on",
  "same",
  ["same", "other", "split"],
  "Devices of the VAE.",
  flag_values=_FLAGS,
)
_LATENTS_ONLY = flags.DEFINE_bool(
  "latents_only", False, "Leave the decoder out.", flag_values=_FLAGS
)
_PRECISION = flags.DEFINE_enum(
  "precision", "", ["", *weights.MODES], "Of the weights.", flag_values=_FLAGS
)
_VAE_PRECISION = flags.DEFINE_enum(
  "vae_precision", "", list(vae_fp8.PRECISIONS), "Of the decoder.", flag_values=_FLAGS
)
_ATTENTION = flags.DEFINE_enum(
  "attention_format", "", ["", "fp8"], "Of attention's products.", flag_values=_FLAGS
)
_KV_FORMAT = flags.DEFINE_enum(
  "kv_format", "", list(kv_slots.NAMES), "Of the cache.", flag_values=_FLAGS
)
_SEQUENCE_DEVICES = flags.DEFINE_integer(
  "sequence_devices", 1, "Devices that share the video.", flag_values=_FLAGS
)
_EXCHANGE_FORMAT = flags.DEFINE_enum(
  "exchange_format", "", list(sequence.FORMATS), "Between them.", flag_values=_FLAGS
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
_PROFILE = flags.DEFINE_string(
  "profile", "", "Folder for a trace of one more run.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)


def story(config: dit.WanConfig, chunks: int) -> streaming.Story:
  """Three shots with random embeddings."""
  rng = np.random.default_rng(0)
  shot = np.minimum(np.arange(chunks) * 3 // chunks, 2).astype(np.int32)[:, None]
  text = rng.standard_normal((3, config.text_len, config.text_dim), np.float32)
  cut = np.diff(shot, axis=0, prepend=0) > 0
  return streaming.Story(text, None, shot, cut, shot)


def run(model, video_vae, sampling, plot, y, x, on_state=None) -> list[float]:
  """Streams the story; returns the time at which each chunk was on the host."""
  mesh = meshes.generation_mesh(sequence=_SEQUENCE_DEVICES.value)
  model = meshes.replicate(model, mesh)
  state = streaming.init_state(
    model, video_vae, sampling, key=jax.random.key(0), samples=np.arange(1), y=y, x=x,
    mesh=mesh,
  )  # fmt: skip
  if video_vae is not None:
    where = decoding.placement(_DECODE_ON.value, mesh, y, x)
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
    mesh=mesh,
    decode_tiles=_DECODE_TILES.value,
    on_state=on_state,
  )
  for chunk in chunks:
    jax.block_until_ready((chunk.latents, chunk.frames))
    stamps.append(time.perf_counter())
  return stamps


def percentiles(stamps: list[float], window: int) -> dict[str, float]:
  """Milliseconds of a chunk once the window is full.

  Each chunk is waited for, but the next one is dispatched before: differences of stamps
  are the device's time for a chunk.
  """
  steady = 1e3 * np.diff(stamps)[window:]
  median, p90, p99 = (float(np.percentile(steady, q)) for q in (50, 90, 99))
  return {
    "chunk_ms_median": median,
    "chunk_ms_p90": p90,
    "chunk_ms_p99": p99,
    "chunk_ms_early": float(np.median(steady[:8])),
    "chunk_ms_late": float(np.median(steady[-8:])),
    "jitter_ms": p99 - median,
  }


def speed(model, video_vae, sampling, plot, y, x) -> dict[str, Any]:
  """Runs with the decoder, cold and warm, and without it."""
  window = sampling.window_frames // sampling.frames_per_chunk
  frames = 4 * sampling.frames_per_chunk
  figures: dict[str, Any] = {}
  before = streaming.compiled_programs()
  kinds = {"end_to_end": video_vae} if video_vae is not None else {}
  for kind, network in {**kinds, "dit": None}.items():
    first = "programs" not in figures
    if first:
      with bench_memory.compilations() as compiling:
        stamps = run(model, network, sampling, plot, y, x)
      figures["first_chunk_cold_s"] = stamps[1] - stamps[0]
      logging.info("first chunk, cold: %.1f s", stamps[1] - stamps[0])
      figures["compile_s"], figures["compilations"] = sum(compiling), len(compiling)
      warm = streaming.compiled_programs()
      figures["programs"] = {name: warm[name] - before[name] for name in warm}
    stamps = run(model, network, sampling, plot, y, x)
    total = stamps[-1] - stamps[0]
    logging.info("%s: %.2f s for %d chunks", kind, total, plot.chunks)
    steady = percentiles(stamps, window)
    figures |= {f"{kind}_{name}": value for name, value in steady.items()}
    figures[f"{kind}_first_chunk_warm_s"] = stamps[1] - stamps[0]
    figures[f"{kind}_fps"] = 1e3 * frames / steady["chunk_ms_median"]
    dropped = 0 if network is None else 3  # placeholders of the first latent frame
    figures[f"{kind}_fps_all_chunks"] = (frames * plot.chunks - dropped) / total
    if first:  # what comes after is less
      figures["peak_bytes"] = report.peak_bytes()
  after = streaming.compiled_programs()
  figures["programs_after_warm_up"] = sum(after.values()) - sum(warm.values())
  return figures


def stages(figures, model, video_vae, sampling, y, x) -> dict[str, Any]:
  """Each stage beside its floor, this run's rates, and what the planner predicts."""
  config, size = model.config, model.dtype.itemsize
  workload = plan.Workload(
    dit=config,
    vae=video_vae and video_vae.config,
    y=y,
    x=x,
    frames_per_chunk=sampling.frames_per_chunk,
    window_frames=sampling.window_frames,
    steps=sampling.steps,
    itemsize=size,
    vae_precision=_VAE_PRECISION.value,
    unrolled=_UNROLL.value,
  )
  settings = plan.Plan(
    sequence_devices=_SEQUENCE_DEVICES.value,
    decode_on=_DECODE_ON.value,
    decode_frames=_DECODE_FRAMES.value,
    precision=_PRECISION.value,
    kv_format=_KV_FORMAT.value,
    attention_format=_ATTENTION.value,
    exchange_format=_EXCHANGE_FORMAT.value,
  )
  table_rates = hardware.this_machine()
  predicted = plan.predict(workload, table_rates, settings)
  work = plan.work_of(workload, settings)
  known = costs.transformer_stages(config, work)
  inputs = jax.jit(bench_stages.stage_inputs, static_argnums=(1, 2, 3))
  given = inputs(model, sampling, y, x)
  cases = [*bench_stages.transformer_cases(model, given, sampling.attention_format)]
  decode_ms = None
  if video_vae is not None:
    known["vae"] = costs.decode_stage(
      video_vae.config, y, x, videos=1, frames=work.frames,
      frames_per_call=_DECODE_FRAMES.value, itemsize=size,
      precision=_VAE_PRECISION.value,
    )  # fmt: skip
    cases.append(bench_stages.decode_case(video_vae, _DECODE_FRAMES.value, y, x))
    decode_ms = figures["end_to_end_chunk_ms_median"] - figures["dit_chunk_ms_median"]
  rates = bench_stages.measured(table_rates, config, work.chunk_tokens, model.dtype)
  table = bench_stages.stage_table(cases, known, rates)
  denoise_ms = figures["dit_chunk_ms_median"]
  found = sum(row["chunk_ms"] for name, row in table.items() if name != "vae")
  reported = {"stages": table, "other_ms": denoise_ms - found}
  if settings.total == 1 and _DECODE_TILES.value == 1:  # else it is no single device's
    shares = bench_stages.shares(rates, known, table, denoise_ms, decode_ms)
    reported["hardware"] = dataclasses.asdict(shares)
  return reported | {
    "predicted": {
      "plan": dataclasses.asdict(settings),
      "rates": table_rates.source,
      "dit_chunk_ms_median": 1e3 * predicted.denoise_seconds,
      "dit_fps": predicted.denoise_fps,
      "end_to_end_fps": predicted.fps,
      "peak_bytes": predicted.peak,
      "bytes": predicted.memory,
    },
  }


def main(argv: list[str]) -> None:
  del argv
  y, x = _HEIGHT.value // 16, _WIDTH.value // 16
  dtype = jnp.dtype(_DTYPE.value)
  if _PROGRAMS.value:
    jax.config.update("jax_compilation_cache_dir", _PROGRAMS.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  sampling = Sampling(
    steps=_STEPS.value,
    kv_format=_KV_FORMAT.value,
    exchange_format=_EXCHANGE_FORMAT.value,
    attention_format=_ATTENTION.value,
  )
  figures: dict[str, Any] = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "versions": report.environment()["versions"],
    "size": _SIZE.value,
    "vae": _VAE.value,
    "pixels": f"{_HEIGHT.value}x{_WIDTH.value}",
    "chunks": _CHUNKS.value,
    "decode_frames": _DECODE_FRAMES.value,
    "dtype": _DTYPE.value,
    "precision": _PRECISION.value,
    "unroll": _UNROLL.value,
    "vae_precision": _VAE_PRECISION.value,
    "sequence_devices": _SEQUENCE_DEVICES.value,
    "decode_on": _DECODE_ON.value,
    "decode_tiles": _DECODE_TILES.value,
    "sampling": dataclasses.asdict(sampling),
  }
  if _COMPILE_FOR.value:
    figures |= bench_networks.chunk_elsewhere(
      _COMPILE_FOR.value, dit.size(_SIZE.value), dtype, _PRECISION.value, sampling, y, x
    )
    finish(figures)
    return
  window = sampling.window_frames // sampling.frames_per_chunk
  if not _MEMORY_ONLY.value and _CHUNKS.value <= window:
    raise ValueError(
      f"chunks={_CHUNKS.value} must be more than the {window} that fill the window"
    )
  began = time.perf_counter()
  model, video_vae = bench_networks.random_networks(
    _SIZE.value,
    _VAE.value,
    dtype,
    _PRECISION.value,
    _VAE_PRECISION.value,
    _UNROLL.value,
  )
  jax.block_until_ready((model, video_vae))
  figures["networks_s"] = time.perf_counter() - began
  logging.info("networks: %.1f s", figures["networks_s"])
  if _LATENTS_ONLY.value:
    video_vae = None
  plot = story(model.config, _CHUNKS.value)
  everything = (model, video_vae, sampling)
  figures["bytes"] = bench_memory.parts(*everything, y, x)
  if _MEMORY_ONLY.value:
    figures |= memory(*everything, plot, y, x)
  else:
    figures |= speed(*everything, plot, y, x)
    save(figures)  # the stages take minutes more
    if _PROFILE.value:
      with jax.profiler.trace(_PROFILE.value):
        run(*everything, plot, y, x)
    figures["denoise_program"] = bench_memory.denoise_program(model, sampling, y, x)
    figures |= stages(figures, *everything, y, x)
  finish(figures)


def memory(model, video_vae, sampling, plot, y, x) -> dict[str, int | None]:
  """Peak bytes after 16 chunks and at the end of one run."""
  peaks: dict[str, int | None] = {}

  def look(chunk, state):
    if chunk == 16:
      jax.block_until_ready(state.cache.k)
      peaks["peak_bytes_after_16_chunks"] = report.peak_bytes()

  run(model, video_vae, sampling, plot, y, x, on_state=look)
  peaks[f"peak_bytes_after_{plot.chunks}_chunks"] = report.peak_bytes()
  return peaks


def finish(figures: Mapping[str, Any]) -> None:
  """Tables for people, and the JSON."""
  for name, value in figures.items():
    if name not in ("stages", "hardware", "predicted"):
      print(f"{name:34} {json.dumps(value)}")
  if "stages" in figures:
    titles = f"{'ms':>11}{'floor':>11}{'share':>7}{'chunk ms':>11}"
    print(f"\n{'stage':18}{'calls':>7}{titles}")
    for name, row in figures["stages"].items():
      print(
        f"{name:18}{row['calls']:7}{row['ms']:11.4f}{row['floor_ms']:11.4f}"
        f"{row['floor_ms'] / row['ms']:7.2f}{row['chunk_ms']:11.2f}"
      )
    print(f"{'other':47}{figures['other_ms']:18.2f}")
    print(f"\n{'':24}{'predicted':>16}{'measured':>16}")
    for name in ("dit_chunk_ms_median", "dit_fps", "end_to_end_fps", "peak_bytes"):
      if figures.get(name) is not None:
        told = figures["predicted"][name]
        print(f"{name:24}{told:16,.1f}{figures[name]:16,.1f}")
  save(figures)


def save(figures: Mapping[str, Any]) -> None:
  if _OUT.value:
    report.write_json(_OUT.value, figures)


if __name__ == "__main__":
  app.run(main)
