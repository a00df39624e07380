"""Trains the causal DiT by teacher-forced flow matching, with its text encoder.

Clips and captions from a folder, latents from a frozen VAE, any number of devices. The
commands are in configs/train.py. A run that is started again with the same workdir goes
on where its last checkpoint was, to the same losses bit for bit; on another number of
devices with the same data, to the same losses but for rounding (of which that of NVFP4
gradients is drawn anew). Ctrl-C or SIGTERM saves first. At the end (and only then)
`workdir/model` holds the averaged weights as inference checkpoints, with tokenizer.json
beside them, or the adapter alone.
"""

import dataclasses
import functools
import importlib.util
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import config_flags

from longlive_jax.checkpoint import store
from longlive_jax.data.clip import Chunking, captions_of
from longlive_jax.data.clips import ClipSource, clip_source
from longlive_jax.generate import networks, request
from longlive_jax.generate.precision import check_edges
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX
from longlive_jax.layers import remat
from longlive_jax.models import dit
from longlive_jax.models.text import Tokenizer, fingerprint, train_toy_tokenizer
from longlive_jax.models.vae import VideoVAE
from longlive_jax.parallel import balanced
from longlive_jax.parallel import mesh as meshes
from longlive_jax.programs import keep_programs
from longlive_jax.quant import training
from longlive_jax.quant.training import FP8TrainingSettings, TrainingSettings
from longlive_jax.train import flow, latents, loop, recycle, start
from longlive_jax.train import lora as train_lora
from longlive_jax.train import state as train_state
from longlive_jax.train import step as train_step
from longlive_jax.train.evaluation import (
  EvalSettings,
  Evaluation,
  find_task,
  generating,
)
from longlive_jax.train.stories import encode_images

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config", str(Path(__file__).parents[1] / "configs" / "train.py") + ":toy",
  "Settings; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed", "", "'auto' or HOST:PORT,PROCESS,PROCESSES, on several hosts.",
  flag_values=_FLAGS,
)  # fmt: skip
log = logging.getLogger("train")
DTYPES = ("bfloat16", "float32")


def train(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Runs a training from start or checkpoint to its end; returns the last metrics."""
  # ------------------------------------------------------------------ settings
  sources = check(config)
  mesh = meshes.training_mesh(config.devices, config.sequence_devices)
  frames_per_chunk = config.data.frames_per_chunk
  chunking = chunking_of(config)
  views = latents.ViewSettings(**config.view)
  how = loss_settings(config)
  recycling = recycle.RecycleSettings(**config.recycle)
  optimizer_settings = train_state.OptimizerSettings(
    steps=config.steps, **config.optimizer
  )
  workdir = Path(config.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")

  # ------------------------------------------------------------------ data
  data = config.data
  source = clip_source(
    data.folder,
    height=data.height or None,
    width=data.width or None,
    fps=data.fps or None,
  )
  vae = networks.load(sources.vae, config.dtype)
  with meshes.first_process_first():
    tokenizer = make_tokenizer(config, sources, source, workdir)
  if data.encode_once:
    began = time.perf_counter()
    content = fingerprint(data.folder, sources.vae.path)
    with meshes.first_process_first():
      clips = latents.cached_clips(
        Path(data.latents) if data.latents else None,
        f"{content} {chunking} {data.height} {data.width} {data.fps} {config.dtype}",
        lambda: latents.encode_clips(
          source, vae, chunking, batch=data.encode_batch, threads=data.threads
        ),
      )
    log.info("%d clips ready in %.0f s", len(clips), time.perf_counter() - began)
    batches = latents.EncodedBatches(
      clips,
      tokenizer,
      config.batch_size,
      views,
      frames_per_chunk=frames_per_chunk,
      seed=config.seed,
    )
  else:
    batches = latents.StreamedBatches(
      source,
      vae,
      tokenizer,
      config.batch_size,
      views,
      chunking,
      seed=config.seed,
      threads=data.threads,
      mesh=mesh,
    )

  # ------------------------------------------------------------------ networks
  params, base = start_networks(config, sources, mesh)
  for name, network in params.items():
    count = sum(a.size for a in jax.tree.leaves(network))
    log.info("%s: %.2f million parameters", name, count / 1e6)
  optimizer = train_state.make_optimizer(optimizer_settings)
  frame_shape, errors = (), None
  if recycling.buckets or config.eval.every:
    begin = batches.get_state()
    frame_shape = next(batches)["latents"].shape[2:]
    batches.set_state(begin)
  if recycling.buckets:
    errors = recycle.init_buffers(
      recycling, (frames_per_chunk, *frame_shape), jnp.dtype(config.dtype)
    )
  state = train_state.init_state_on(mesh, params, optimizer, errors)
  specs = meshes.last_axis_specs(state, mesh)

  # ------------------------------------------------------------------ one step
  loss_fn = train_step.make_loss(sources.dit.config, how, mesh)
  names = ("seed", "accumulate", "ema_decay", "ema_start")
  step_settings = train_step.StepSettings(
    optimizer_settings, **{name: config[name] for name in names}
  )
  step_fn = train_step.make_step(loss_fn, step_settings, optimizer, specs, mesh)

  # ------------------------------------------------------------------ resume
  checkpoints = loop.Checkpoints(
    workdir / "checkpoints",
    config.keep_checkpoints,
    base_folder(config, sources),
    config.keep_every,
  )
  if checkpoints.steps():
    state, iterator_state = checkpoints.restore(state)
    batches.set_state(iterator_state)
    log.info("resumed at step %d", state.step)
  first = int(state.step)

  # ------------------------------------------------------------------ evaluation
  evaluate = None
  if config.eval.every:
    evaluation = make_evaluation(config, vae, tokenizer, frame_shape)

    def evaluate(state, step):
      networks = functools.partial(generating, state.ema, base, config.dtype)
      if jax.process_index() == 0:
        return evaluation(networks, step)
      networks()  # of all processes
      return {}

  # ------------------------------------------------------------------ the loop
  def advance(state, step):
    # A streamed batch is on its devices already. Of encoded clips every process has
    # the same whole batch, so its order is always the same.
    return step_fn(state, meshes.spread(next(batches), meshes.CLIPS, mesh), base)

  state, line = loop.run(
    advance,
    state,
    loop.MetricsLog(
      workdir / "metrics.jsonl",
      first,
      workdir / "tensorboard" if config.tensorboard else None,
    ),
    checkpoints,
    batches.get_state,
    first=first,
    steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    stop_every=config.stop_every,
    shown=("loss", "gradient_norm"),
    clips=lambda: batches.clips,
    evaluate=evaluate,
    evaluate_every=config.eval.every,
  )
  if source.skipped:
    names = ", ".join(sorted(source.skipped))
    log.warning("%d clips were skipped: %s", len(source.skipped), names)
  if source.damaged:
    names = ", ".join(sorted(source.damaged))
    log.warning("%d clips were damaged: %s", len(source.damaged), names)

  # ------------------------------------------------------------------ result
  if int(state.step) == config.steps:
    if config.lora.rank:
      made_by, made_on = "launch/train.py", base_folder(config, sources)
      train_lora.export(state.ema, workdir / "model", made_by, made_on)
    else:
      trained = {**base, **state.ema}
      export(trained, tokenizer, workdir / "model", config.export_dtype)
    log.info("wrote %s", workdir / "model")
  return line


# -------------------------------------------------------------------------- parts


def check(config: ml_collections.ConfigDict) -> networks.Sources:
  """Refuses settings that cannot work, before anything is read or built.

  Returns:
    The networks, found but not loaded.

  Raises:
    ValueError: names the field, its value and what to use instead.
  """
  if config.train_text not in ("joint", "frozen"):
    raise ValueError(f"train_text={config.train_text!r}; use 'joint' or 'frozen'")
  for name in ("dtype", "export_dtype"):
    if config[name] not in DTYPES:
      raise ValueError(f"{name}={config[name]!r}; use {' or '.join(DTYPES)}")
  if config.data.chunks < config.view.window:
    raise ValueError(
      f"data.chunks={config.data.chunks} must be at least "
      f"view.window={config.view.window}"
    )
  if config.data.height and config.data.width:
    request.check_picture(config.data.height, config.data.width, config.data.fps or 24)
  counts = "steps", "batch_size", "accumulate"
  for name in (*counts, "log_every", "checkpoint_every", "stop_every"):
    if config[name] < 1:
      raise ValueError(f"{name}={config[name]} must be at least 1")
  balanced.check(
    config.view.window * config.data.frames_per_chunk,
    config.data.frames_per_chunk,
    dit.size(config.size).heads,
    config.sequence_devices,
    config.sp_layout,
  )
  if config.devices < 1 or config.batch_size % (config.devices * config.accumulate):
    raise ValueError(
      f"batch_size={config.batch_size} must be a multiple of devices={config.devices} "
      f"x accumulate={config.accumulate}"
    )
  loss_settings(config).flow.check(config.view.window * config.data.frames_per_chunk)
  remat.check(config.remat)
  quantise = training_settings(config)
  if config.tensorboard and not importlib.util.find_spec("tensorboardX"):
    raise ValueError(
      "tensorboard=True needs the package tensorboardX: pip install -e '.[tensorboard]'"
    )
  check_evaluation(config)
  choice = networks.pick(networks.Choice, config) | {"steps": config.sampling.steps}
  sources = networks.find_all(networks.Choice(**choice))
  if sources.vae.path is None:
    raise ValueError(
      "the VAE has random weights, whose latents mean nothing; set vae_weights, or "
      "train one with launch/train_vae.py"
    )
  check_adapter(config, sources)
  if quantise:  # finds layers that are not there or do not fit, without building any
    prepare = functools.partial(
      training.prepare_training, patterns=config.quantise.layers, settings=quantise
    )
    network = networks.abstract(sources.dit, config.dtype)
    jax.eval_shape(prepare, network, key=jax.random.key(0))
    layers = network.config.layers
    check_edges("quantise.plain_edges", config.quantise.plain_edges, layers)
  return sources


def check_adapter(config: ml_collections.ConfigDict, sources: networks.Sources) -> None:
  """Raises ValueError for an adapter that does not fit its base, or a base to train."""
  settings = train_lora.LoraSettings(**config.lora)
  if not settings.rank:
    if config.precision:
      raise ValueError(
        f"precision={config.precision!r} is for the base of an adapter; set lora.rank, "
        "or quantise.mode to train in low precision"
      )
    for source in sources.dit, sources.text:
      start.check_trainable(source)
    return
  if None in (sources.dit.path, sources.text.path):
    raise ValueError(
      f"lora.rank={settings.rank} needs networks to start from; set weights to a "
      "folder with dit, text and tokenizer.json"
    )
  if config.train_text != "frozen":
    raise ValueError(
      f"lora.rank={settings.rank} trains the adapter alone, so "
      f"train_text={config.train_text!r} cannot be; set train_text='frozen'"
    )
  train_lora.check_layers(networks.abstract(sources.dit, config.dtype), settings)


def check_evaluation(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for videos that cannot be made."""
  settings = EvalSettings(**config.eval)
  if not settings.every:
    return
  sampling_of(config)
  if config.flow.conditioning_frames > 1:
    raise ValueError(
      f"flow.conditioning_frames={config.flow.conditioning_frames} must be at most 1 "
      "for evaluation, whose videos start from an image; set eval.every=0"
    )
  task = find_task(settings, from_image=bool(config.flow.conditioning_frames))
  if config.data.height:
    task.check_picture(config.data.height, config.data.width)


def sampling_of(config: ml_collections.ConfigDict) -> Sampling:
  """How videos are sampled for evaluation."""
  return Sampling(config.data.frames_per_chunk, **config.sampling)


def make_evaluation(
  config: ml_collections.ConfigDict,
  video_vae: VideoVAE,
  tokenizer: Tokenizer,
  frame_shape: tuple[int, ...],
) -> Evaluation:
  """Videos as large as the clips, whose latents are `frame_shape`."""
  settings = EvalSettings(**config.eval)
  task = find_task(settings, from_image=bool(config.flow.conditioning_frames))
  y, x, _ = frame_shape
  height, width = (n * video_vae.config.spatial_factor for n in (y, x))
  task.check_picture(height, width)
  images = task.first_frames(height, width)
  return Evaluation(
    task,
    settings,
    sampling_of(config),
    video_vae,
    tokenizer,
    Path(config.workdir) / "eval",
    None if images is None else encode_images(video_vae, images),
    (y, x),
    fps=config.data.fps or 24,
    decode_frames=config.decode_frames,
  )


def chunking_of(config: ml_collections.ConfigDict) -> Chunking:
  """How many chunks are taken of a clip."""
  names = [field.name for field in dataclasses.fields(Chunking)]
  return Chunking(**{name: config.data[name] for name in names})


def training_settings(
  config: ml_collections.ConfigDict,
) -> TrainingSettings | FP8TrainingSettings | None:
  """How products with weights are quantised; None if they are not."""
  mode = config.quantise.mode
  if not mode:
    return None
  if mode not in training.MODES:
    known = ", ".join(map(repr, training.MODES))
    raise ValueError(f"quantise.mode={mode!r} is unknown; use '', {known}")
  kind = training.MODES[mode]
  return kind(**networks.pick(kind, config.quantise))


def loss_settings(config: ml_collections.ConfigDict) -> train_step.LossSettings:
  """What a step computes, and how."""
  return train_step.LossSettings(
    flow.FlowSettings(config.data.frames_per_chunk, **config.flow),
    config.dtype,
    config.train_text,
    config.sp_layout,
    config.remat,
    training_settings(config),
    tuple(config.quantise.layers),
    config.quantise.plain_edges,
  )


def make_tokenizer(
  config: ml_collections.ConfigDict,
  sources: networks.Sources,
  clips: ClipSource,
  workdir: Path,
) -> Tokenizer:
  """The text encoder's; of a random one the given one, or one learned from captions."""
  text_config, tokenizer = sources.text.config, sources.tokenizer
  if tokenizer is None:
    path = Path(config.tokenizer or workdir / "tokenizer.json")
    if not config.tokenizer and not path.exists():
      captions = [c for clip in clips for c in captions_of(clip)]
      train_toy_tokenizer([SCENE_CUT_PREFIX, *captions], path, text_config.vocab_size)
    tokenizer = Tokenizer(path, text_config.text_len)
  if tokenizer.vocab_size > text_config.vocab_size:
    raise ValueError(
      f"tokenizer={str(tokenizer.path)!r} has {tokenizer.vocab_size} tokens, more than "
      f"the {text_config.vocab_size} of text={config.text!r}; use a matching pair"
    )
  return tokenizer


def start_networks(
  config: ml_collections.ConfigDict, sources: networks.Sources, mesh: Mesh | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What is trained, in float32, and what it stands on and does not change."""
  dit_key, text_key = jax.random.split(jax.random.key(config.seed))
  if config.lora.rank:
    settings = train_lora.LoraSettings(**config.lora)
    base = {
      "dit": start.load(sources.dit, mesh, dit_key, config.dtype),
      "text": start.load(sources.text, mesh, text_key, config.dtype),
    }
    key = jax.random.key(config.seed)
    return {"lora": train_lora.init_lora(base["dit"], settings, key)}, base
  params = {"dit": start.load(sources.dit, mesh, dit_key, "float32")}
  if config.train_text == "frozen":  # no gradient, average or moments of it
    return params, {"text": start.load(sources.text, mesh, text_key)}
  return params | {"text": start.load(sources.text, mesh, text_key, "float32")}, {}


def base_folder(config: ml_collections.ConfigDict, sources: networks.Sources) -> str:
  """What a checkpoint stands on, and does not hold; '' if it holds everything."""
  if config.lora.rank:
    return str(sources.dit.path)
  frozen = config.train_text == "frozen" and sources.text.path is not None
  return str(sources.text.path) if frozen else ""


def export(
  trained: dict[str, nnx.Module], tokenizer: Tokenizer, folder: Path, dtype: str
) -> None:
  """Writes both networks as inference checkpoints, and the tokenizer."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, network in train_state.cast(trained, dtype).items():
    store.save_network(folder / name, network, source="launch/train.py", overwrite=True)
  if jax.process_index() == 0:
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config.NAME=VALUE")
  absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every rename
  meshes.initialize(_DISTRIBUTED.value)
  for name in ("train", "longlive_jax"):
    logging.getLogger(name).setLevel(logging.INFO)
  keep_programs(_CONFIG.value.programs_dir)
  train(_CONFIG.value)


if __name__ == "__main__":
  app.run(main)
