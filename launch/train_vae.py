"""Trains the video VAE on clips of a folder, on one device.

The commands are in configs/train_vae.py. A run that is started again with the same
workdir goes on where its last checkpoint was, to the same losses bit for bit. Ctrl-C
or SIGTERM saves first. At the end `config.out` holds the averaged weights in
bfloat16, with the statistics of their latents, and `workdir/result.json` what was
measured on clips that training never saw.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from longlive_jax.checkpoint import store
from longlive_jax.data.clip import Chunking
from longlive_jax.data.clips import ClipSource, load_clips, stack, video_source
from longlive_jax.models.vae import VAE_SIZES, VAEConfig, VideoVAE
from longlive_jax.programs import keep_programs
from longlive_jax.train import loop
from longlive_jax.train import state as train_state
from longlive_jax.train import vae as train_vae

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config", str(Path(__file__).parents[1] / "configs" / "train_vae.py") + ":toy",
  "Settings; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_CLIPS_PER_CALL = 4  # whole clips encoded at a time when measuring


def train(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Runs a training from start or checkpoint to its end; returns what was measured."""
  # ------------------------------------------------------------------ settings
  vae_config = check(config)
  settings = train_vae.VAESettings(
    optimizer=train_state.OptimizerSettings(steps=config.steps, **config.optimizer),
    seed=config.seed,
    ema_decay=config.ema_decay,
    ema_start=config.ema_start,
    dtype=config.dtype,
    **config.loss,
  )
  workdir = Path(config.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")

  # ------------------------------------------------------------------ data
  videos = read_videos(config)
  holdout = config.data.holdout
  held_out, videos = videos[:holdout], videos[holdout:]

  # ------------------------------------------------------------------ network
  network = jax.jit(lambda: VideoVAE(vae_config, rngs=nnx.Rngs(config.seed)))()
  network = train_vae.quiet_posterior(network)
  # The published statistics belong to the published weights (48 channels).
  z = vae_config.z_dim
  network = train_vae.with_statistics(network, np.zeros(z), np.ones(z))
  count = sum(leaf.size for leaf in jax.tree.leaves(network))
  logging.info("%.2f million parameters", count / 1e6)
  optimizer = train_state.make_optimizer(settings.optimizer)
  state = train_state.init_state(network, optimizer)

  # ------------------------------------------------------------------ resume
  checkpoints = loop.Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
  if checkpoints.steps():
    state, _ = checkpoints.restore(state)
    logging.info("resumed at step %d", state.step)
  first = int(state.step)

  # ------------------------------------------------------------------ the loop
  def advance(state, step):
    frames = train_vae.window_batch(
      videos, step, batch=config.batch_size, frames=config.frames, seed=config.seed
    )
    return train_vae.train_step(state, frames, settings)

  state, _ = loop.run(
    advance,
    state,
    loop.MetricsLog(workdir / "metrics.jsonl", first),
    checkpoints,
    first=first,
    steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    shown=("loss", "psnr"),
  )

  # ------------------------------------------------------------------ result
  if int(state.step) < config.steps:
    return {}
  # Measured with the rounded weights that are shipped, computing in float32.
  shipped = train_state.cast(state.ema, jnp.bfloat16)
  rounded = train_state.cast(shipped, jnp.float32)
  mean, std = train_vae.measure_statistics(
    rounded, videos[: config.data.statistics], _CLIPS_PER_CALL
  )
  rounded = train_vae.with_statistics(rounded, mean, std)
  result = train_vae.measure_psnr(rounded, held_out, _CLIPS_PER_CALL)
  logging.info("held-out clips: %s", result)
  logging.info("latent std from %.3f to %.3f", std.min(), std.max())
  (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
  shipped = train_vae.with_statistics(shipped, mean, std)
  store.save_network(config.out, shipped, source="launch/train_vae.py", overwrite=True)
  logging.info("wrote %s", config.out)
  return result


# -------------------------------------------------------------------------- parts


def check(config: ml_collections.ConfigDict) -> VAEConfig:
  """Refuses settings that cannot work, before anything is read or built.

  Raises:
    ValueError: names the field, its value and what to use instead.
  """
  if config.size not in VAE_SIZES:
    raise ValueError(f"size={config.size!r} is unknown; use {sorted(VAE_SIZES)}")
  if config.dtype not in ("bfloat16", "float32"):
    raise ValueError(f"dtype={config.dtype!r}; use 'bfloat16' or 'float32'")
  vae_config = VAE_SIZES[config.size]
  for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
    if config[name] < 1:
      raise ValueError(f"{name}={config[name]} must be at least 1")
  factor = vae_config.temporal_factor
  if config.frames % factor != 1:
    raise ValueError(
      f"frames={config.frames} must be 1 + {factor} k; "
      f"use {config.frames // factor * factor + 1}"
    )
  for name in ("holdout", "statistics"):
    if config.data[name] < 1:
      raise ValueError(f"data.{name}={config.data[name]} must be at least 1")
  length = factor * (config.data.chunks * config.data.frames_per_chunk - 1) + 1
  if config.frames > length:
    raise ValueError(
      f"frames={config.frames} is more than the {length} frames of "
      f"data.chunks={config.data.chunks}; use at most {length}"
    )
  for name in ("height", "width"):
    if config.data[name] % vae_config.spatial_factor:
      raise ValueError(
        f"data.{name}={config.data[name]} must be a multiple of "
        f"{vae_config.spatial_factor}"
      )
  return vae_config


def read_videos(config: ml_collections.ConfigDict) -> np.ndarray:
  """The first clips of the folder, uint8 (n, t, h, w, 3).

  Raises:
    ValueError: too few of them can be read, or they are latents.
  """
  data = config.data
  source = video_source(data.folder, height=data.height, width=data.width)
  source = ClipSource(source[: data.clips])
  chunking = Chunking(data.frames_per_chunk, data.chunks)
  clips = load_clips(source, chunking, threads=data.threads)
  if len(clips) <= data.holdout:
    raise ValueError(
      f"data.folder={data.folder!r} has {len(clips)} usable clips, "
      f"data.holdout={data.holdout} of them held out; give more clips"
    )
  logging.info("read %d clips, skipped %d", len(clips), len(source.skipped))
  return stack(clips, "frames")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  keep_programs(_CONFIG.value.programs_dir)
  train(_CONFIG.value)


if __name__ == "__main__":
  app.run(main)
