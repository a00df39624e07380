"""Generates videos from prompts, chunk by chunk, into MP4 files that grow.

Three shots of the shipped toy model, about 12 seconds of video:

  python launch/generate.py --output outputs/quickstart \
    --prompt "A red star slides from side to side on the grass." \
    --prompt "A red star bounces up and down in the night sky." \
    --prompt "A red star circles around in front of a brick wall."

writes video.mp4, shots.png (all shots at a glance) and run.json (settings, versions,
device, speed, bytes by precision) to the output folder. Others:

  ... --prompts prompts.txt                   one video a line
  ... --prompts folder --chunks=12            caption folders: one video a subfolder
  ... --prompt "..." --image first.png        from an image; --images folder for many
  ... --prompt "..." --continue_from old.mp4  go on where a video (or .npy latents) ends
  ... --save_state DIR --save_every 4         then --resume DIR, --rewind_to 8
  ... --config configs/generate.py:ti2v-5b --config.weights=DIR --config.steps=4
  ... --config configs/generate.py:toy,nvfp4,kv=nvfp4     4-bit weights, 4-bit cache
  ... --config.loras='("lora.safetensors", "ckpt/lora:0.8")'   adapters, not merged
  ... --config.sequence_devices=4             four GPUs share each video
  ... --distributed=HOST:PORT,0,2             process 0 of 2, each with its own GPUs
  ... --mode bidirectional                    one clip by the plain base model

Ctrl-C ends after the chunk under way; the MP4 plays and the state can be resumed.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Collection, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from longlive_jax.checkpoint import store
from longlive_jax.generate import (
  adapters,
  bidirectional,
  decoding,
  networks,
  on_mesh,
  planning,
  recorder,
  report,
  request,
  resuming,
  sampler,
  snapshots,
  worker,
)
from longlive_jax.generate import stream as streams
from longlive_jax.generate.options import (
  Options,
  check_overwrites,
  expand_paths,
  find_storyboard,
  parse_durations,
)
from longlive_jax.models import pixels, text, vae, vae_tiles
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel import plan
from longlive_jax.programs import keep_programs
from longlive_jax.quant.weights import weight_bytes
from longlive_jax.stopping import StopRequest

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Settings; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)

# What Orbax, tensorstore and the file system raise when a disk is full.
DISK_ERRORS = (OSError, ValueError, RuntimeError)


def define_flags() -> None:
  flags.DEFINE_multi_string("prompt", [], "One shot of one video; repeat for more.")
  flags.DEFINE_string("prompts", None, "Text file or caption folder, many videos.")
  flags.DEFINE_string("image", None, "First frame of the --prompt video.")
  flags.DEFINE_string("images", None, "Folder of images and texts, many videos.")
  flags.DEFINE_integer("chunks", None, "Length; default 3 a shot, 9 for files.")
  flags.DEFINE_list("durations", [], "Chunks of each --prompt, as 3,2,4.")
  flags.DEFINE_string("continue_from", None, "MP4 or .npy latents to go on from.")
  flags.DEFINE_enum("mode", "stream", ["stream", "bidirectional"], "How to sample.")
  flags.DEFINE_string("output", "outputs/generate", "Folder for the results.")
  flags.DEFINE_string("save_state", None, "Folder to save the stream's state in.")
  flags.DEFINE_integer(
    "save_every", 0, "Also save every so many chunks; 0: at the end."
  )
  flags.DEFINE_string("resume", None, "Folder of saved states to go on from.")
  flags.DEFINE_integer("rewind_to", None, "Chunk to resume at; default the last saved.")
  flags.DEFINE_string(
    "distributed", "", "'auto' or HOST:PORT,PROCESS,PROCESSES, on several hosts."
  )


def run(
  config: ml_collections.ConfigDict,
  options: Options,
  asked: Collection[str] = (),
  imports: float = 0.0,
) -> dict[str, Any]:
  """Generates and writes everything; returns the report.

  Args:
    asked: names of settings that the planner must leave as they are.
    imports: seconds from the start of the process to this call, for the report.

  Raises:
    ValueError: something asked for is impossible; found before any network is built.
  """
  watch = report.Stopwatch(imports)

  # ------------------------------------------------------------------ check it all
  options = expand_paths(options)
  check_modes(config, options)
  request.check_picture(config.height, config.width, config.fps)
  board, snapshot = find_storyboard(options)
  if snapshot is not None:
    resuming.check_resumed(config, store.load_metadata(snapshot).get("config", {}))
  sampling, sources = find_networks(config)
  if options.mode == "bidirectional" and any(len(set(s.prompts)) > 1
                                             for s in board.samples):  # fmt: skip
    raise ValueError("mode=bidirectional makes one shot; give one prompt a video")
  if config.i2v and board.images is None:
    raise ValueError("i2v=True but no image was given; add --image or --images")
  first = request.first_frames(board, config.height, config.width)
  given = None
  if options.continue_from:
    given = request.continuation(
      options.continue_from,
      height=config.height,
      width=config.width,
      fps=config.fps,
      frames_per_chunk=config.frames_per_chunk,
      window_frames=config.window_frames,
      latent_channels=sources.dit.config.in_channels,
    )
    if len(given) not in (1, board.batch):
      raise ValueError(
        f"continue_from={options.continue_from} holds {len(given)} videos for "
        f"{board.batch} storyboards; give one, or as many"
      )
  y, x = config.height // request.SPATIAL, config.width // request.SPATIAL
  mesh = find_mesh(config, sources, board.batch)
  decode_on = decoding.placement(config.decode_on, mesh, y, x)
  planned = None
  if options.mode == "stream":
    resumed = snapshot is not None
    planned = planning.plan_run(config, sources, board.batch, asked, resumed=resumed)
  if planned is not None:
    print(plan.describe(planned.prediction), file=sys.stderr)
  if planned is not None and planned.changes:
    config = ml_collections.ConfigDict({**config, **planned.changes})
    sampling, sources = find_networks(config)
    mesh = find_mesh(config, sources, board.batch)
    decode_on = decoding.placement(config.decode_on, mesh, y, x)
  if config.decode_tiles != 1:
    decoder = store.abstract_network("vae", sources.vae.config).decoder
    vae_tiles.check(decoder.upsamples, decoder.head, y, x, config.decode_tiles)
  output = request.check_folder(options.output)
  check_overwrites(options, output, snapshot)
  if options.save_state:
    request.check_folder(options.save_state, "save_state")
  cache_dir = request.check_folder(config.cache_dir, "cache_dir")
  watch.part("checks")

  # ------------------------------------------------------------------ prompts
  # The encoder is read, run and gone before the other networks come.
  arrays = board.arrays()
  prompts = [*arrays.prompts, config.negative_prompt]
  if sources.tokenizer is None:
    embeddings = networks.random_embeddings(prompts, sources.text)
  else:
    embeddings = text.embed_prompts(
      prompts,
      sources.tokenizer,
      lambda: networks.load(sources.text, config.dtype),
      encoder_id=text.fingerprint(sources.text.path, sources.tokenizer.path)
      + config.dtype,
      cache_dir=cache_dir,
    )
  story = streams.Story(
    embeddings=embeddings[:-1],
    negative=embeddings[-1] if sampling.branches == 2 else None,
    prompt_index=arrays.prompt_index,
    cut=arrays.cut,
    shot=arrays.shot,
  )
  watch.part("prompts")

  # ------------------------------------------------------------------ networks
  init_state = functools.partial(
    streams.init_state,
    sampling=sampling,
    key=jax.random.key(config.seed),
    samples=np.arange(board.batch),
    y=y,
    x=x,
  )
  # What is compiled needs no weights: they are read in the meantime.
  parts = [networks.abstract(part, config.dtype) for part in (sources.dit, sources.vae)]
  empty = jax.eval_shape(lambda: init_state(*parts))
  how = {name: config[name] for name in ("decode_frames", "decode_tiles")}
  with futures.ThreadPoolExecutor(1) as thread:
    if options.mode == "stream":
      steps = (*parts, empty, story, sampling)
      programs = thread.submit(
        streams.compile_ahead, *steps, **how, mesh=mesh, decode_on=decode_on
      )
    video_vae = networks.load(sources.vae, config.dtype)
    model = networks.load(sources.dit, config.dtype)
    watch.part("load")
  if options.mode == "stream":
    programs.result()  # raises what went wrong
  watch.part("compile")
  image = encode(video_vae, first)
  if given is not None:
    given = encode(video_vae, given) if given.dtype == np.uint8 else given
    given = np.repeat(given, board.batch // len(given), axis=0)
  memory = {"transformer": weight_bytes(model), "vae": weight_bytes(video_vae)}
  if options.mode == "stream":
    memory["cache"] = weight_bytes((empty.cache.k, empty.cache.v))
  print(memory_line(memory), file=sys.stderr)

  # ------------------------------------------------------------------ generate
  writes = jax.process_index() == 0
  record = recorder.Recorder(output, board.batch if writes else 0, config.fps)
  about = {"config": config.to_dict(), "storyboard": board.record()}
  about["loras"] = adapters.records(sources.dit.loras)
  about["planned"] = list(planned.changes) if planned else []
  stop = StopRequest()
  first_chunk, done, state, saved, error = 0, 0, None, None, ""
  with stop.on_signals("chunk"):
    if options.mode == "bidirectional":
      frames = sample_clip(model, video_vae, story, sampling, config, (y, x))
      record.add(frames, story.shot[0])
      watch.frames(frames.shape[0] * frames.shape[1])
    else:
      if snapshot is None:
        state = init_state(model, video_vae, mesh=mesh)
      else:
        state = store.load(snapshot, streams.shard_state(empty, mesh))
        first_chunk = done = int(state.chunk)
        if writes and (left := snapshots.unwritten(snapshot)):
          record.add(left)
      model = meshes.replicate(model, mesh)
      video_vae, decoder = decoding.place(video_vae, state.decoder, decode_on)
      state = dataclasses.replace(state, decoder=decoder)
      bar = report.ProgressBar(story.chunks, "chunks")

      def keep(chunks_done: int, new: streams.StreamState) -> None:
        nonlocal done, state, saved
        done, state = chunks_done, new
        if not options.save_every or done % options.save_every or not bool(new.finite):
          return
        try:
          saved = snapshots.save(options.save_state, done, state, about)
        except DISK_ERRORS as failed:
          stop.reason = stop.reason or f"state after chunk {done} not saved: {failed}"

      def write(chunk: streams.StreamedChunk) -> None:
        """Waits for frames and encodes them, while later chunks are denoised."""
        frames = chunk.frames
        record.add(frames if writes else (), story.shot[chunk.index or 0])
        watch.frames(frames.shape[0] * frames.shape[1])
        if record.failure is not None and not stop:
          stop.reason = str(record.failure)
        speed = f"{watch.loop_fps:.1f} FPS" if watch.loop_fps else ""
        bar.update((chunk.index or 0) + 1, speed)

      try:
        with worker.Worker(write) as writer:
          # Several processes fetch frames together, so in the order of all else.
          hand_over = write if jax.process_count() > 1 else writer.put
          for chunk in streams.stream(
            model,
            video_vae,
            state,
            story,
            sampling,
            image=image,
            given=given,
            **how,
            mesh=mesh,
            should_stop=lambda: meshes.any_process(bool(stop)),
            on_state=keep,
          ):
            hand_over(chunk)
      except FloatingPointError as failed:
        error, state = str(failed), None  # what came before is worth keeping
      except Exception:
        record.close()  # the videos so far play, whatever ended the run
        raise
  unwritten = record.close()
  error = error or (str(record.failure) if record.failure else "")

  # ------------------------------------------------------------------ leave
  if options.save_state and state is not None and done > first_chunk:
    try:
      saved = snapshots.save(options.save_state, done, state, about, unwritten)
    except DISK_ERRORS as failed:
      error = f"{error}; state after chunk {done} not saved: {failed}".lstrip("; ")
  result = {
    "command": sys.argv,
    "options": dataclasses.asdict(options),
    **about,
    "seed": config.seed,
    **report.environment(),
    "speed": watch.summary(),
    "plan": planning.comparison(planned, watch.loop_fps),
    "bytes": memory,
    "chunks": [first_chunk, done],
    "stopped_by": stop.reason,
    "error": error,
    "videos": [str(path) for path in record.paths],
    "state": saved and str(saved),
  }
  if not writes:
    return result
  try:
    record.sheet.save(output / "shots.png")
  except (OSError, ValueError) as failed:  # a full disk, or no frame at all
    result["error"] = error or str(failed)
  try:
    report.write_json(output / "run.json", result)
  except OSError as failed:
    result["error"] = result["error"] or str(failed)
  return result


def find_networks(
  config: ml_collections.ConfigDict,
) -> tuple[sampler.Sampling, networks.Sources]:
  """How to sample, and from which networks: settings checked, nothing built."""
  sampling = sampler.Sampling(**networks.pick(sampler.Sampling, config))
  choice = networks.Choice(**networks.pick(networks.Choice, config))
  return sampling, networks.find_all(choice)


def find_mesh(
  config: ml_collections.ConfigDict, sources: networks.Sources, batch: int
) -> jax.sharding.Mesh | None:
  """The devices that share the work; raises ValueError where they cannot."""
  count = config.devices * config.guidance_devices * config.sequence_devices
  if jax.process_count() > 1 and (
    count != jax.device_count() or config.decode_on == "other"
  ):
    raise ValueError(
      f"devices={config.devices} x guidance_devices={config.guidance_devices} x "
      f"sequence_devices={config.sequence_devices} must be all "
      f"{jax.device_count()} devices of the {jax.process_count()} processes, and "
      f"decode_on={config.decode_on!r} 'same' or 'split'"
    )
  return on_mesh.mesh_for(
    devices=config.devices,
    guidance_devices=config.guidance_devices,
    sequence_devices=config.sequence_devices,
    batch=batch,
    heads=sources.dit.config.heads,
    guidance=config.guidance,
  )


def memory_line(memory: Mapping[str, Mapping[str, int]]) -> str:
  """One line for people: bytes by part and precision."""
  parts = [
    f"{part} " + " + ".join(f"{n / 1e6:,.1f} MB {name}" for name, n in sizes.items())
    for part, sizes in memory.items()
  ]
  return "; ".join(parts)


def overrides(flag: flags.Flag) -> dict[str, Any]:
  """What the command line sets: options in --config FILE:SIZE,OPTION and names."""
  given = config_flags.get_config_filename(flag)
  path, _, argument = given.partition(":")
  size, _, options = argument.partition(",")
  named = config_flags.get_override_values(flag)
  if not options:
    return named
  plain, asked = flag.parser.parse(f"{path}:{size}"), flag.parser.parse(given)
  changed = {name: asked[name] for name in asked if asked[name] != plain.get(name)}
  return {**changed, **named}


def check_modes(config: ml_collections.ConfigDict, options: Options) -> None:
  """Raises ValueError for flags that exclude each other."""
  start = [n for n in ("image", "images", "continue_from", "resume")
           if getattr(options, n)]  # fmt: skip
  if len(start) > 1:
    raise ValueError(f"--{start[0]} and --{start[1]} exclude each other; use one")
  stream_only = [*start, *(["save_state"] if options.save_state else [])]
  if options.mode == "bidirectional" and stream_only:
    raise ValueError(f"--{stream_only[0]} needs --mode=stream")
  if options.mode == "bidirectional" and config.precision_plain_steps:
    raise ValueError(
      f"precision_plain_steps={config.precision_plain_steps} needs --mode=stream"
    )
  if options.rewind_to is not None and not options.resume:
    raise ValueError(f"rewind_to={options.rewind_to} needs --resume")
  if options.save_every < 0 or (options.save_every and not options.save_state):
    raise ValueError(f"save_every={options.save_every} needs --save_state")
  if options.continue_from and config.independent_first_frame:
    raise ValueError(
      "continue_from needs config.independent_first_frame=False: whole chunks"
    )
  if options.save_state and jax.process_count() > 1:
    raise ValueError(
      f"save_state={options.save_state} needs a run of one process, not of "
      f"{jax.process_count()}; leave it out"
    )
  if config.decode_on == "split" and config.decode_tiles != 1:
    raise ValueError(
      f"decode_tiles={config.decode_tiles} needs decode_on='same' or 'other': 'split' "
      "shares the picture already"
    )
  if options.mode == "bidirectional" and config.decode_on != "same":
    raise ValueError(f"decode_on={config.decode_on!r} needs --mode=stream")
  if options.mode == "bidirectional" and config.decode_tiles != 1:
    raise ValueError(f"decode_tiles={config.decode_tiles} needs --mode=stream")
  if config.decode_frames < 1:
    raise ValueError(
      f"decode_frames={config.decode_frames} must be at least 1; use 1 for the least "
      "memory"
    )
  if config.dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype={config.dtype!r} is unknown; use float32 or bfloat16")


def encode(video_vae: vae.VideoVAE, frames: np.ndarray | None) -> np.ndarray | None:
  """uint8 frames (b, t, h, w, 3) or (b, h, w, 3) -> latents; None stays None."""
  if frames is None:
    return None
  if frames.ndim == 4:
    frames = frames[:, None]
  program = jax.jit(vae.encode, static_argnums=2)
  return np.asarray(program(video_vae, request.to_model_range(frames), 1))


def sample_clip(model, video_vae, story, sampling, config, shape) -> np.ndarray:
  """A clip of all chunks at once by the non-causal base model, uint8 frames."""
  batch, frames = story.cut.shape[1], story.chunks * sampling.frames_per_chunk
  numbers = np.tile(np.arange(frames, dtype=np.int32), (batch, 1))
  noise = sampler.frame_noise(
    jax.random.key(config.seed),
    np.arange(batch, dtype=np.int32),
    numbers,
    (*shape, model.config.in_channels),
  )
  prompt = story.embeddings[story.prompt_index[0]]
  negative = None
  if sampling.branches == 2:
    negative = np.broadcast_to(story.negative, prompt.shape)
  program = jax.jit(bidirectional.sample, static_argnums=4)
  latents = program(model, noise, prompt, negative, sampling)
  if not np.isfinite(latents).all():
    raise FloatingPointError("chunk=0: the clip has latents that are not finite")
  decode = jax.jit(vae.decode, static_argnums=2)
  return np.asarray(pixels.to_uint8(decode(video_vae, latents, config.decode_frames)))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; quote the prompts")
  logging.set_verbosity(logging.WARNING)  # Orbax logs a page for every save
  values = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Options)}
  config = _CONFIG.value
  try:
    meshes.initialize(flags.FLAGS.distributed)
    values["durations"] = parse_durations(values["durations"])
    options = expand_paths(Options(**{**values, "prompt": tuple(values["prompt"])}))
    asked = overrides(flags.FLAGS["config"])
    if options.resume:
      saved = snapshots.find(options.resume, options.rewind_to)
      made_with = planning.kept_settings(store.load_metadata(saved))
      config.update(resuming.resumed_settings(config, made_with, asked))
    keep_programs(config.programs_dir)
    result = run(config, options, asked, report.process_age())
  except (ValueError, OSError, FloatingPointError) as error:
    sys.exit(f"error: {error}")
  print(json.dumps({k: result[k] for k in ("videos", "speed", "state")}, indent=2))
  if result["stopped_by"] or result["error"]:
    sys.exit(f"stopped: {result['error'] or result['stopped_by']}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
