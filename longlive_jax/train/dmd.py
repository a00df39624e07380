"""Distribution matching distillation: the losses of generator and critic (SPEC 7).

A generator that needs few steps makes a sample. Two score networks say where a noised
copy of it would be denoised to: the teacher, as real videos are, and the critic, as the
generator's own are. Their difference is the direction in which the generator's
distribution must move; the critic learns to keep up with it by the flow-matching loss
on the samples. Networks are not called here: their predictions come in.

  noised = noise_sample(sample, noise, raw_timestep, settings)
  gradient = matching_gradient(noised.sample, fake=..., real=..., settings=settings)
  loss = generator_loss(noised.sample, gradient, noised.mask)
"""

import dataclasses

import jax
import jax.numpy as jnp

from longlive_jax.generate.schedule import (
  NUM_TRAIN_TIMESTEPS,
  add_noise,
  sigma_at,
  training_grid,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DMDSettings:
  """How samples are noised and scores are combined. Static.

  Attributes:
    frames_per_chunk: latent frames whose gradient has a normaliser of its own.
    shift: of the timesteps; 1 leaves them as they are drawn.
    teacher_guidance: the teacher's score is cond + g (cond - uncond): 3 is what
      elsewhere is called a scale of 4.
    critic_guidance: the same of the critic; 0 needs no unconditional prediction.
    min_timestep, max_timestep: between these.
    first_frame_alone: frame 0 is a chunk of its own, which is not normalised.
    conditioning_frames: leading frames that are given (image-to-video).
    reference: sigmas by the nearest entry of the training grid instead of exactly.
  """

  frames_per_chunk: int
  shift: float = 5.0
  teacher_guidance: float = 3.0
  critic_guidance: float = 0.0
  min_timestep: float = 20.0
  max_timestep: float = 980.0
  first_frame_alone: bool = False
  conditioning_frames: int = 0
  reference: bool = False

  def __post_init__(self):
    if self.frames_per_chunk < 1 or self.conditioning_frames < 0:
      raise ValueError(
        f"frames_per_chunk={self.frames_per_chunk} must be at least 1 and "
        f"conditioning_frames={self.conditioning_frames} at least 0"
      )
    if not 0 < self.min_timestep <= self.max_timestep < NUM_TRAIN_TIMESTEPS:
      raise ValueError(
        f"min_timestep={self.min_timestep} and max_timestep={self.max_timestep} must "
        f"ascend within (0, {NUM_TRAIN_TIMESTEPS}); the usual ones are 20 and 980"
      )
    if self.first_frame_alone and self.conditioning_frames:
      raise ValueError(
        f"first_frame_alone=True and conditioning_frames={self.conditioning_frames} "
        "exclude each other: the first chunk is whole in image-to-video"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisedSample:
  """A sample as the score networks see it.

  Attributes:
    sample: (b, f, ...) float32, the given frames in it.
    noisy: (b, f, ...) at `timestep`; given frames are as given.
    noise: (b, f, ...); 0 in given frames.
    timestep: (b, f) float32; 0 in given frames.
    mask: bool, of the shape of `sample` or with 1 for axes: where losses count.
  """

  sample: Array
  noisy: Array
  noise: Array
  timestep: Array
  mask: Array


def score_timestep(raw: Array, settings: DMDSettings) -> Array:
  """Drawn integers 0 to 999 as timesteps, shifted towards noise and clamped."""
  u = raw.astype(jnp.float32) / NUM_TRAIN_TIMESTEPS
  if settings.shift > 1:
    u = settings.shift * u / (1 + (settings.shift - 1) * u)
  return jnp.clip(
    NUM_TRAIN_TIMESTEPS * u, settings.min_timestep, settings.max_timestep
  )


def noise_sample(
  sample: Array,
  noise: Array,
  raw: Array,
  settings: DMDSettings,
  *,
  initial: Array | None = None,
  mask: Array | None = None,
) -> NoisedSample:
  """Noises a generated sample for the score networks.

  Args:
    sample, noise: (b, f, ...).
    raw: int32 (b, f), 0 to 999: one draw a sample for text-to-video, one a chunk for
      image-to-video (`flow.draw_indices`).
    initial: (b, settings.conditioning_frames, ...), which replace those of the sample.
    mask: bool (b, f, ...), where losses count besides; None is everywhere.

  Raises:
    ValueError: initial frames that are not as many as the settings say.
  """
  found = 0 if initial is None else initial.shape[1]
  if found != settings.conditioning_frames:
    raise ValueError(
      f"initial has {found} frames; must be "
      f"conditioning_frames={settings.conditioning_frames}"
    )
  timestep = score_timestep(raw, settings)
  given = jnp.arange(sample.shape[1]) < settings.conditioning_frames
  spread = given.reshape(1, -1, *[1] * (sample.ndim - 2))
  if settings.conditioning_frames:
    held = jnp.zeros_like(sample).at[:, : settings.conditioning_frames].set(initial)
    sample = jnp.where(spread, held, sample)
    noise = jnp.where(spread, 0.0, noise)
    timestep = jnp.where(given, 0.0, timestep)
  sigma = sigma_at(
    timestep, grid=training_grid(settings.shift), reference=settings.reference
  )
  noisy = jnp.where(spread, sample, add_noise(sample, noise, sigma))
  counts = ~spread if mask is None else ~spread & (mask != 0)
  return NoisedSample(sample, noisy, noise, timestep, counts)


def guided(cond: Array, uncond: Array | None, guidance: float) -> Array:
  """cond + guidance (cond - uncond); uncond is not looked at if guidance is 0."""
  return cond if guidance == 0 else cond + guidance * (cond - uncond)


def matching_gradient(
  sample: Array, fake: Array, real: Array, settings: DMDSettings
) -> Array:
  """Where the sample must move away from, chunk by chunk of unit size (SPEC 7).

  Args:
    sample: (b, f, ...), given frames in it; they count in the normaliser.
    fake, real: clean latents that critic and teacher predict, guided.

  Returns:
    (b, f, ...) float32, without gradient; 0 where it is not a number.

  Raises:
    ValueError: frames that do not divide into chunks.
  """
  sample, fake, real = jax.lax.stop_gradient((sample, fake, real))
  alone, n = int(settings.first_frame_alone), settings.frames_per_chunk
  b, f = sample.shape[:2]
  if (f - alone) % n:
    raise ValueError(
      f"frames={f} must be {alone} plus a multiple of frames_per_chunk={n}"
    )
  distance = jnp.abs(sample - real).reshape(b, f, -1).mean(-1)  # (b, f)
  chunks = distance[:, alone:].reshape(b, -1, n).mean(-1)
  norm = jnp.concatenate(
    [jnp.ones((b, alone)), jnp.repeat(chunks, n, axis=1)], axis=1
  )
  gradient = (fake - real) / norm.reshape(b, f, *[1] * (sample.ndim - 2))
  return jnp.nan_to_num(gradient)


def generator_loss(sample: Array, gradient: Array, mask: Array) -> Array:
  """0.5 mean(gradient^2) over the mask, whose derivative is gradient / count.

  The reference writes it as a distance of the sample to a target moved by the gradient,
  in float64, since the difference cancels; the value and the derivative are those.

  Args:
    sample: (b, f, ...). gradient: from `matching_gradient`.
    mask: bool, broadcastable to them.
  """
  mask = jnp.broadcast_to(mask, sample.shape)
  count = jnp.maximum(jnp.sum(mask), 1)
  gradient = jnp.where(mask, jax.lax.stop_gradient(gradient), 0.0)
  slope = jnp.sum(gradient * sample) / count
  value = 0.5 * jnp.sum(jnp.square(gradient)) / count
  return value + slope - jax.lax.stop_gradient(slope)


def critic_loss(velocity: Array, noised: NoisedSample) -> Array:
  """Mean squared error of the critic's velocity on a sample, over the mask.

  Without a weight for timesteps. The reference converts the velocity to clean latents
  and back.

  Args:
    velocity: (b, f, ...), of `noised.noisy`.
  """
  mask = jnp.broadcast_to(noised.mask, velocity.shape)
  target = jax.lax.stop_gradient(noised.noise - noised.sample)
  error = jnp.where(mask, velocity.astype(jnp.float32) - target, 0.0)
  return jnp.sum(jnp.square(error)) / jnp.maximum(jnp.sum(mask), 1)
