"""Trains the causal DiT by teacher-forced flow matching, with its text encoder.

Clips and captions from a folder, latents from a frozen VAE, any number of devices. The
commands are in configs/train.py. A run that is started again with the same workdir goes
on where its last checkpoint was, to the same losses bit for bit; on another number of
devices with the same data, to the same losses but for rounding. Ctrl-C or SIGTERM saves
first. At the end (and only then) `workdir/model` holds the averaged weights as
inference checkpoints, with tokenizer.json beside them.
"""

import dataclasses
import functools
import logging
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from flax import nnx
from ml_collections import config_flags

from longlive_jax.checkpoint import store
from longlive_jax.data.clip import Chunking, captions_of
from longlive_jax.data.clips import ClipSource, clip_source
from longlive_jax.generate import networks
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX
from longlive_jax.layers import remat
from longlive_jax.models import dit, umt5
from longlive_jax.models.text import Tokenizer, fingerprint, train_toy_tokenizer
from longlive_jax.parallel import balanced
from longlive_jax.parallel import mesh as meshes
from longlive_jax.programs import keep_programs
from longlive_jax.quant.training import TrainingSettings, prepare_training
from longlive_jax.train import flow, latents, loop, recycle
from longlive_jax.train import lora as train_lora
from longlive_jax.train import state as train_state
from longlive_jax.train import step as train_step

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
  dit_config, text_config = check(config)
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
  vae = store.load_vae(config.vae, dtype=jnp.dtype(config.dtype))
  if vae.config.z_dim != dit_config.in_channels:
    raise ValueError(
      f"vae={config.vae!r} makes {vae.config.z_dim} channels, dit={config.dit!r} reads "
      f"{dit_config.in_channels}; choose a pair that fits"
    )
  with meshes.first_process_first():
    tokenizer = make_tokenizer(config, text_config, source, workdir)
  if data.encode_once:
    began = time.perf_counter()
    content = fingerprint(data.folder, config.vae)
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
  adapter = train_lora.LoraSettings(**config.lora)
  if adapter.rank:
    params, base = train_lora.start(
      adapter, config.init, config.dit, config.dtype, config.seed
    )
  else:
    params, base = init_params(config, dit_config, text_config), {}
    if config.train_text == "frozen":  # no gradient, average or moments of it
      base = {"text": params.pop("text")}
    params = train_state.cast(params, jnp.float32)
  for name, network in params.items():
    count = sum(a.size for a in jax.tree.leaves(network))
    log.info("%s: %.2f million parameters", name, count / 1e6)
  base = meshes.spread(base, meshes.last_axis_specs(base, mesh), mesh)
  optimizer = train_state.make_optimizer(optimizer_settings)
  errors = None
  if recycling.buckets:
    begin = batches.get_state()
    frame_shape = next(batches)["latents"].shape[2:]
    batches.set_state(begin)
    errors = recycle.init_buffers(
      recycling, (frames_per_chunk, *frame_shape), jnp.dtype(config.dtype)
    )
  state = train_state.init_state_on(mesh, params, optimizer, errors)
  specs = meshes.last_axis_specs(state, mesh)

  # ------------------------------------------------------------------ one step
  loss_fn = train_step.make_loss(dit_config, how, mesh)
  names = ("seed", "accumulate", "ema_decay", "ema_start")
  step_settings = train_step.StepSettings(
    optimizer_settings, **{name: config[name] for name in names}
  )
  step_fn = train_step.make_step(loss_fn, step_settings, optimizer, specs, mesh)

  # ------------------------------------------------------------------ resume
  checkpoints = loop.Checkpoints(
    workdir / "checkpoints",
    config.keep_checkpoints,
    config.init if base else "",
    config.keep_every,
  )
  if checkpoints.steps():
    state, iterator_state = checkpoints.restore(state)
    batches.set_state(iterator_state)
    log.info("resumed at step %d", state.step)
  first = int(state.step)

  # ------------------------------------------------------------------ the loop
  def advance(state, step):
    # A streamed batch is on its devices already. Of encoded clips every process has
    # the same whole batch, so its order is always the same.
    return step_fn(state, meshes.spread(next(batches), meshes.CLIPS, mesh), base)

  state, line = loop.run(
    advance,
    state,
    loop.MetricsLog(workdir / "metrics.jsonl", first),
    checkpoints,
    batches.get_state,
    first=first,
    steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    stop_every=config.stop_every,
    shown=("loss", "gradient_norm"),
    clips=lambda: batches.clips,
  )
  if source.skipped:
    names = ", ".join(sorted(source.skipped))
    log.warning("%d clips were skipped: %s", len(source.skipped), names)

  # ------------------------------------------------------------------ result
  if int(state.step) == config.steps:
    if adapter.rank:
      train_lora.export(state.ema, workdir / "model", "launch/train.py", config.init)
    else:
      trained = {**base, **state.ema}
      export(trained, tokenizer, workdir / "model", config.export_dtype)
    log.info("wrote %s", workdir / "model")
  return line


# -------------------------------------------------------------------------- parts


def check(
  config: ml_collections.ConfigDict,
) -> tuple[dit.WanConfig, umt5.UMT5Config]:
  """Refuses settings that cannot work, before anything is read or built.

  Raises:
    ValueError: names the field, its value and what to use instead.
  """
  dit_config = dit.size(config.dit)
  if config.text not in umt5.UMT5_SIZES:
    raise ValueError(f"text={config.text!r} is unknown; use {sorted(umt5.UMT5_SIZES)}")
  text_config = umt5.UMT5_SIZES[config.text]
  if text_config.dim != dit_config.text_dim:
    raise ValueError(
      f"text={config.text!r} has width {text_config.dim}, dit={config.dit!r} reads "
      f"{dit_config.text_dim}; choose sizes that belong together"
    )
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
  counts = "steps", "batch_size", "accumulate"
  for name in (*counts, "log_every", "checkpoint_every", "stop_every"):
    if config[name] < 1:
      raise ValueError(f"{name}={config[name]} must be at least 1")
  balanced.check(
    config.view.window * config.data.frames_per_chunk,
    config.data.frames_per_chunk,
    dit_config.heads,
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
  several = config.devices * config.sequence_devices > 1
  network = store.abstract_network("dit", dit_config)
  adapter = train_lora.LoraSettings(**config.lora)
  if adapter.rank:
    source = train_lora.find_base(adapter, config.init, config.dit)
    network = networks.abstract(source, config.dtype)
    if config.train_text != "frozen":
      raise ValueError(
        f"lora.rank={adapter.rank} trains the adapter alone, so "
        f"train_text={config.train_text!r} cannot be; set train_text='frozen'"
      )
    if several:
      raise ValueError(
        f"lora.rank={adapter.rank} needs devices=1 and sequence_devices=1: its base is "
        "not spread over devices"
      )
  quantise = training_settings(config)
  if quantise and several:
    raise ValueError(
      f"quantise.mode={config.quantise.mode!r} needs devices=1 and sequence_devices=1: "
      "its scales would depend on how many devices share the tokens"
    )
  if quantise:  # finds layers that are not there or do not fit, without building any
    prepare = functools.partial(
      prepare_training, patterns=config.quantise.layers, settings=quantise
    )
    jax.eval_shape(prepare, network, key=jax.random.key(0))
  return dit_config, text_config


def chunking_of(config: ml_collections.ConfigDict) -> Chunking:
  """How many chunks are taken of a clip."""
  names = [field.name for field in dataclasses.fields(Chunking)]
  return Chunking(**{name: config.data[name] for name in names})


def training_settings(config: ml_collections.ConfigDict) -> TrainingSettings | None:
  """How products with weights are quantised; None if they are not."""
  mode = config.quantise.mode
  if mode not in ("", "nvfp4"):
    raise ValueError(f"quantise.mode={mode!r} is unknown; use '' or 'nvfp4'")
  names = [field.name for field in dataclasses.fields(TrainingSettings)]
  settings = TrainingSettings(**{name: config.quantise[name] for name in names})
  return settings if mode else None


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
  )


def make_tokenizer(
  config: ml_collections.ConfigDict,
  text_config: umt5.UMT5Config,
  source: ClipSource,
  workdir: Path,
) -> Tokenizer:
  """The given tokenizer, or one learned from the captions and kept in workdir."""
  path = Path(config.tokenizer or workdir / "tokenizer.json")
  if not config.tokenizer and config.init:
    path = Path(config.init) / "tokenizer.json"
  elif not config.tokenizer and not path.exists():
    captions = [c for clip in source for c in captions_of(clip)]
    train_toy_tokenizer([SCENE_CUT_PREFIX, *captions], path, text_config.vocab_size)
  tokenizer = Tokenizer(path, text_config.text_len)
  if tokenizer.vocab_size > text_config.vocab_size:
    raise ValueError(
      f"tokenizer={str(path)!r} has {tokenizer.vocab_size} tokens, more than the "
      f"{text_config.vocab_size} of text={config.text!r}; use a matching pair"
    )
  return tokenizer


def init_params(
  config: ml_collections.ConfigDict,
  dit_config: dit.WanConfig,
  text_config: umt5.UMT5Config,
) -> dict[str, nnx.Module]:
  """Both networks, random in float32 or as they are in `config.init`."""
  if config.init:
    folder = Path(config.init)
    return {
      "dit": store.load_dit(folder / "dit"),
      "text": store.load_umt5(folder / "text"),
    }

  @jax.jit  # one program instead of one for every shape
  def init(key):
    dit_key, text_key = jax.random.split(key)
    return {
      "dit": dit.CausalDiT(dit_config, rngs=nnx.Rngs(dit_key)),
      "text": umt5.UMT5Encoder(text_config, rngs=nnx.Rngs(text_key)),
    }

  return init(jax.random.key(config.seed))


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
