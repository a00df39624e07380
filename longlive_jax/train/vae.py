"""Training the video VAE: batches, loss, step, and what is measured at the end."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.models.pixels import to_unit
from longlive_jax.models.vae import (
  VideoVAE,
  decode,
  decode_chunk,
  encode,
  init_decoder_state,
  init_encoder_state,
  posterior,
  with_placeholders,
)
from longlive_jax.train.state import (
  OptimizerSettings,
  TrainState,
  cast,
  learning_rate,
  make_optimizer,
  update,
)

_LATENTS_PER_CALL = 8  # bounds the memory of whole clips


@dataclasses.dataclass(frozen=True)
class VAESettings:
  """How the VAE is trained.

  Attributes:
    optimizer: AdamW and its schedule.
    seed: of the posterior's noise.
    kl: weight of the posterior's divergence from N(0, 1), in nats a latent number.
      Small: it only keeps the latents bounded and smooth.
    difference: weight of the L1 distance between differences of neighbouring pixels,
      in rows, columns and time. It keeps edges and motion sharp.
    square: weight of the squared error. It counts what is wrong by a lot: without it
      the arms of a small star are too few pixels to matter, and it becomes a disc.
    ema_decay, ema_start: as `state.update`.
    dtype: of the computation, 'bfloat16' or 'float32'; master weights are float32.
  """

  optimizer: OptimizerSettings
  seed: int = 0
  kl: float = 1e-4
  difference: float = 1.0
  square: float = 5.0
  ema_decay: float = 0.999
  ema_start: int = 0
  dtype: str = "float32"


def window_batch(
  videos: np.ndarray, step: int, *, batch: int, frames: int, seed: int
) -> np.ndarray:
  """Windows from random places of random clips; the same for the same step.

  So a resumed run needs no iterator's state.

  Args:
    videos: uint8 (n, t, h, w, 3).

  Returns:
    uint8 (batch, frames, h, w, 3).
  """
  rng = np.random.default_rng((seed, step))
  clips = rng.integers(len(videos), size=batch)
  starts = rng.integers(videos.shape[1] - frames + 1, size=batch)
  return np.stack(
    [videos[c, s : s + frames] for c, s in zip(clips, starts, strict=True)]
  )


def quiet_posterior(model: VideoVAE) -> VideoVAE:
  """A copy of a new model whose posterior begins with a deviation of 0.05.

  It would begin near 1: noise that drowns the means, so that the decoder learns to
  ignore the latents first.
  """
  copy = jax.tree.map(lambda leaf: leaf, model)
  bias = copy.conv1.bias[...]
  copy.conv1.bias = nnx.Param(bias.at[model.config.z_dim :].set(-6.0))
  return copy


def vae_loss(
  model: VideoVAE, video: jax.Array, key: jax.Array, settings: VAESettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Reconstruction through a sample of the posterior, plus divergence.

  loss = mean |x - y| + difference * mean |dx - dy| + square * mean (x - y)^2 + kl * KL

  Args:
    model: computes in the dtype of its parameters; its latent statistics must still
      be 0 and 1.
    video: (b, 1 + 4 k, h, w, 3) float32 in [-1, 1].
    key: of the posterior's noise.

  Returns:
    The loss and its terms, float32; psnr in dB for the range [-1, 1].
  """
  groups = with_placeholders(model.config, video)
  scale = model.config.spatial_factor
  size = video.shape[0], video.shape[2] // scale, video.shape[3] // scale
  mean, logvar, _ = posterior(model, init_encoder_state(model, *size), groups)
  z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  frames, _, _ = decode_chunk(model, init_decoder_state(model, *size), z)
  frames = frames[:, -video.shape[1] :].astype(jnp.float32)

  error = frames - video
  l1 = jnp.mean(jnp.abs(error))
  # Differences are linear, so the difference of differences is that of the error.
  axes = range(1, 4) if video.shape[1] > 1 else range(2, 4)
  difference = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=a))) for a in axes)
  kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
  square = jnp.mean(error**2)
  loss = l1 + settings.difference * difference + settings.square * square
  loss += settings.kl * kl
  psnr = 10 * jnp.log10(4.0 / square)
  terms = {"l1": l1, "difference": difference, "kl": kl, "psnr": psnr}
  return loss, {"loss": loss, **terms}


@functools.partial(jax.jit, static_argnames="settings", donate_argnums=0)
def train_step(
  state: TrainState, frames: jax.Array, settings: VAESettings
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update on uint8 windows (b, 1 + 4 k, h, w, 3)."""
  key = jax.random.fold_in(jax.random.key(settings.seed), state.step)

  def loss_fn(params):
    return vae_loss(cast(params, settings.dtype), to_unit(frames), key, settings)

  gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  metrics["learning_rate"] = learning_rate(settings.optimizer)(state.step)
  state = update(
    state,
    gradients,
    make_optimizer(settings.optimizer),
    ema_decay=settings.ema_decay,
    ema_start=settings.ema_start,
  )
  return state, metrics


def with_statistics(model: VideoVAE, mean: np.ndarray, std: np.ndarray) -> VideoVAE:
  """A copy of the model whose latents are normalised by mean and std (z,)."""
  copy = jax.tree.map(lambda leaf: leaf, model)
  copy.latent_mean = nnx.Param(jnp.asarray(mean, jnp.float32))
  copy.latent_std = nnx.Param(jnp.asarray(std, jnp.float32))
  return copy


def measure_statistics(
  model: VideoVAE, videos: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation (z,) of every latent channel, before normalisation.

  Args:
    model: its latent statistics must still be 0 and 1.
    videos: uint8 (n, t, h, w, 3).
    batch: clips encoded at a time.
  """
  count, total, square = 0, 0.0, 0.0
  for clips in _batches(videos, batch):
    z = np.asarray(_encode(model, clips), np.float64)
    count += z.size // z.shape[-1]
    total = total + z.sum(axis=(0, 1, 2, 3))
    square = square + (z**2).sum(axis=(0, 1, 2, 3))
  mean = total / count
  return mean, np.sqrt(np.maximum(square / count - mean**2, 1e-12))


def measure_psnr(model: VideoVAE, videos: np.ndarray, batch: int) -> dict[str, float]:
  """Reconstruction of whole clips by the posterior's mean, clamped, in dB.

  Returns:
    psnr: over everything; psnr_first, psnr_last: over the first and the last eighth
    of the frames. A stream must not fade: the three should agree.
  """
  errors = []
  for clips in _batches(videos, batch):
    errors.append(np.asarray(_frame_errors(model, clips)))
  error = np.concatenate(errors)  # (n, t)
  eighth = max(1, error.shape[1] // 8)
  parts = {
    "psnr": error,
    "psnr_first": error[:, :eighth],
    "psnr_last": error[:, -eighth:],
  }
  return {name: float(10 * np.log10(4.0 / part.mean())) for name, part in parts.items()}


def _batches(videos: np.ndarray, batch: int) -> Iterator[np.ndarray]:
  """Whole batches where there is one: another size would be another program."""
  batch = min(batch, len(videos))
  for i in range(0, len(videos) - batch + 1, batch):
    yield videos[i : i + batch]


@jax.jit
def _encode(model: VideoVAE, clips: jax.Array) -> jax.Array:
  return encode(model, to_unit(clips), _LATENTS_PER_CALL)


@jax.jit
def _frame_errors(model: VideoVAE, clips: jax.Array) -> jax.Array:
  """Mean squared error of every reconstructed frame, (n, t)."""
  video = to_unit(clips)
  frames = decode(model, encode(model, video, _LATENTS_PER_CALL), _LATENTS_PER_CALL)
  error = frames.astype(jnp.float32) - video[:, : frames.shape[1]]
  return jnp.mean(error**2, axis=(2, 3, 4))
