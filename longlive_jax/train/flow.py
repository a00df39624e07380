"""The autoregressive flow-matching loss (SPEC 6); train/recycle.py adds errors to it.

A clip is cut into chunks. Every chunk of every sample gets its own noise level, and the
network must say which velocity (noise minus clean) made the noisy chunk, while it sees
the clean chunks before it (teacher forcing).

Times are handled as integer indices into the training grid with one entry more: index
0 is the noisiest, index 1000 (`CLEAN_INDEX`) is t = 0, a clean frame. So a network that
needs float64 timestep features can gather rows of a table made once on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.generate.schedule import (
  NUM_TRAIN_TIMESTEPS,
  add_noise,
  training_grid,
)
from longlive_jax.train import recycle

CLEAN_INDEX = NUM_TRAIN_TIMESTEPS

INDEX_MODES = ("per_block", "shared", "first_frame_separate")
WEIGHTINGS = ("bell", "uniform")


@dataclasses.dataclass(frozen=True)
class FlowSettings:
  """How samples are noised and weighted.

  Attributes:
    frames_per_chunk: latent frames that share one noise level.
    shift: of the training grid; larger means noisier on average.
    teacher_forcing: whether the network also receives the clean clip.
    context_noise_max: K > 0 noises the clean context with a random one of the K
      *noisiest* grid entries (so the reference defines it); 0 leaves it clean.
    conditioning_frames: leading frames that are given, not generated
      (image-to-video); 0 for text-to-video.
    context_jitter: largest sigma of noise that is mixed into the clean context, one
      level drawn for each chunk, without telling the network. It is trained to bear
      the errors that its own chunks will have as context. 0 is off, as in the paper.
    weighting: 'bell' (the paper's, which gives t = 1000 no weight) or 'uniform'.
  """

  frames_per_chunk: int
  shift: float = 5.0
  teacher_forcing: bool = True
  context_noise_max: int = 0
  conditioning_frames: int = 0
  context_jitter: float = 0.0
  weighting: str = "bell"

  def __post_init__(self):
    if self.weighting not in WEIGHTINGS:
      raise ValueError(
        f"weighting={self.weighting!r} is unknown; choose from {', '.join(WEIGHTINGS)}"
      )
    if not 0 <= self.context_noise_max <= NUM_TRAIN_TIMESTEPS:
      raise ValueError(
        f"context_noise_max={self.context_noise_max} must lie in "
        f"[0, {NUM_TRAIN_TIMESTEPS}]; 0 switches it off"
      )
    if self.conditioning_frames < 0:
      raise ValueError(
        f"conditioning_frames={self.conditioning_frames} must be at least 0"
      )

  def check(self, frames: int) -> None:
    """Raises ValueError for sequences of so many frames that are all given."""
    if self.conditioning_frames >= frames:
      raise ValueError(
        f"conditioning_frames={self.conditioning_frames} must be fewer than the "
        f"{frames} frames of a sequence"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowInputs:
  """One noised batch: what the network receives and what it is compared with.

  Attributes:
    noisy: (b, f, ...) latents at `index`.
    index: (b, f) int32 noise level of each frame.
    context: (b, f, ...) clean latents for teacher forcing.
    context_index: (b, f) int32 noise level of the context; CLEAN_INDEX when clean.
    target: (b, f, ...) velocity.
    weight: (b, f) float32 loss weight of each frame.
    mask: (b, f) float32, 1 where a frame counts.
  """

  noisy: jax.Array
  index: jax.Array
  context: jax.Array
  context_index: jax.Array
  target: jax.Array
  weight: jax.Array
  mask: jax.Array


def timestep_table(shift: float) -> np.ndarray:
  """Timestep of every index, (1001,) float32; the last entry is 0."""
  return np.append(training_grid(shift).timesteps, np.float32(0))


def draw_indices(
  key: jax.Array,
  batch: int,
  frames: int,
  frames_per_chunk: int,
  *,
  minimum: int = 0,
  maximum: int = NUM_TRAIN_TIMESTEPS,
  mode: str = "per_block",
) -> jax.Array:
  """Random integers in [minimum, maximum), one for each frame, (b, f) int32.

  Modes: 'per_block' draws one for each chunk; 'shared' one for each sample;
  'first_frame_separate' one for frame 0 and one for each chunk from frame 1 on.

  Raises:
    ValueError: unknown mode, or frames that do not divide into chunks.
  """
  if mode not in INDEX_MODES:
    raise ValueError(f"mode={mode!r} is unknown; choose from {', '.join(INDEX_MODES)}")
  lead = 1 if mode == "first_frame_separate" else 0
  if mode != "shared" and (frames - lead) % frames_per_chunk:
    raise ValueError(
      f"frames={frames} must be {lead} plus a multiple of "
      f"frames_per_chunk={frames_per_chunk} with mode={mode!r}"
    )
  groups = 1 if mode == "shared" else lead + (frames - lead) // frames_per_chunk
  drawn = jax.random.randint(key, (batch, groups), minimum, maximum)
  if mode == "shared":
    return jnp.broadcast_to(drawn, (batch, frames))
  in_chunks = jnp.repeat(drawn[:, lead:], frames_per_chunk, axis=1)
  return jnp.concatenate([drawn[:, :lead], in_chunks], axis=1)  # (b, f)


def flow_inputs(
  clean: jax.Array,
  noise: jax.Array,
  index: jax.Array,
  settings: FlowSettings,
  *,
  context_index: jax.Array | None = None,
  initial: jax.Array | None = None,
  mask: jax.Array | None = None,
  source: jax.Array | None = None,
  context_error: jax.Array | None = None,
) -> FlowInputs:
  """Noises a batch and prepares target, context, weight and mask.

  Args:
    clean: (b, f, ...) latents.
    noise: same shape; also noises the context when `context_index` is given.
    index: (b, f) noise level of each frame.
    settings: FlowSettings.
    context_index: (b, f) noise level of the context, or None for a clean one.
    initial: (b, settings.conditioning_frames, ...) given frames (image-to-video),
      which replace the clean ones; None takes them from `clean`.
    mask: (b, f) 1 where a frame counts, or None for all.
    source: (b, f, ...) what is noised instead of `clean`, which stays the target.
    context_error: (b, f, ...) added to the context.

  Raises:
    ValueError: no frame but given ones.
  """
  grid = training_grid(settings.shift)
  sigmas = jnp.append(grid.sigmas, 0.0)
  weights = jnp.append(grid.weights, 0.0)
  if settings.weighting == "uniform":
    weights = jnp.ones_like(weights)
  clean, noise, index = jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(index)

  noisy = add_noise(clean if source is None else source, noise, sigmas[index])
  target = noise - clean
  if context_index is None:
    context, context_index = clean, jnp.full(index.shape, CLEAN_INDEX, index.dtype)
  else:
    context = add_noise(clean, noise, sigmas[context_index])
  if context_error is not None:
    context = context + context_error
  mask = jnp.ones(index.shape, jnp.float32) if mask is None else mask

  given = settings.conditioning_frames
  settings.check(clean.shape[1])
  if given:
    initial = clean[:, :given] if initial is None else initial
    noisy = noisy.at[:, :given].set(initial)
    context = context.at[:, :given].set(initial)
    target = target.at[:, :given].set(0)
    index = index.at[:, :given].set(CLEAN_INDEX)
    context_index = context_index.at[:, :given].set(CLEAN_INDEX)
    mask = mask.at[:, :given].set(0)
  return FlowInputs(
    noisy=noisy,
    index=index,
    context=context,
    context_index=context_index,
    target=target,
    weight=weights[index],
    mask=mask,
  )


def flow_loss(velocity: jax.Array, inputs: FlowInputs) -> jax.Array:
  """Weighted squared error of the velocity over the frames that count; () float32."""
  error = velocity.astype(jnp.float32) - inputs.target
  per_frame = jnp.mean(jnp.square(error), axis=tuple(range(2, error.ndim)))  # (b, f)
  total = jnp.sum(per_frame * inputs.weight * inputs.mask)
  return total / jnp.maximum(jnp.sum(inputs.mask), 1)


def noise_levels(inputs: FlowInputs, velocity: jax.Array, bins: int = 4) -> jax.Array:
  """Unweighted squared error in equal bins of the index, (bins,), for the log.

  Bin 0 is the noisiest quarter. A bin that got no frame reads 0.
  """
  error = velocity.astype(jnp.float32) - inputs.target
  per_frame = jnp.mean(jnp.square(error), axis=tuple(range(2, error.ndim)))
  member = jax.nn.one_hot(inputs.index * bins // NUM_TRAIN_TIMESTEPS, bins)  # (b, f, n)
  member = member * inputs.mask[..., None]
  total = jnp.einsum("bf,bfn->n", per_frame, member)
  return total / jnp.maximum(member.sum((0, 1)), 1)


def ar_loss(
  model_fn: Callable[[FlowInputs], jax.Array],
  batch: dict[str, Any],
  key: jax.Array,
  settings: FlowSettings,
  errors: recycle.ErrorBuffers | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], recycle.ErrorBuffers | None]]:
  """Draws noise and times for a batch and returns the loss of the network on it.

  Args:
    model_fn: FlowInputs -> velocity (b, f, y, x, c). It looks the timestep features up
      by `index`, and ignores the context when teacher forcing is off.
    batch: 'latents' (b, f, y, x, c), optionally 'mask' (b, f).
    key: random key; the draws depend on nothing else.
    settings: FlowSettings.
    errors: of error recycling; None is without.

  Returns:
    loss () float32; metrics: mse (unweighted) by noise level; the buffers with the
    errors of this batch.
  """
  clean = batch["latents"].astype(jnp.float32)
  b, f = clean.shape[:2]
  key_noise, key_index, key_context, key_jitter = jax.random.split(key, 4)
  noise = jax.random.normal(key_noise, clean.shape, jnp.float32)
  index = draw_indices(key_index, b, f, settings.frames_per_chunk)
  context_index = None
  if settings.context_noise_max:
    context_index = draw_indices(
      key_context, b, f, settings.frames_per_chunk, maximum=settings.context_noise_max
    )
  injected = None
  if errors is not None:
    # Numbers that `split` does not use: the draws above stay what they are without it.
    key_inject, key_keep = (jax.random.fold_in(key, 2**30 + i) for i in range(2))
    injected = recycle.inject(errors, key_inject, clean, noise, index)
  inputs = flow_inputs(
    clean,
    noise if injected is None else injected.noise,
    index,
    settings,
    context_index=context_index,
    mask=batch.get("mask"),
    source=None if injected is None else injected.source,
    context_error=None if injected is None else injected.context,
  )
  if settings.context_jitter:
    context = _jitter(key_jitter, inputs.context, settings)
    inputs = dataclasses.replace(inputs, context=context)
  velocity = model_fn(inputs)
  if injected is not None:
    latent_error, noise_error = prediction_errors(velocity, clean, inputs, settings)
    errors = recycle.remember(
      errors, key_keep, latent_error, noise_error, index, injected.untouched
    )
  levels = noise_levels(inputs, velocity)
  metrics = {f"mse_level{i}": levels[i] for i in range(levels.shape[0])}
  return flow_loss(velocity, inputs), (metrics, errors)


def prediction_errors(
  velocity: jax.Array, clean: jax.Array, inputs: FlowInputs, settings: FlowSettings
) -> tuple[jax.Array, jax.Array]:
  """What the network got wrong: in the clean latents, and in the noise (SPEC 6).

  Returns:
    (b, f, ...) each, float32, without gradient; 0 in frames that do not count, where it
    may say anything.
  """
  sigmas = jnp.append(training_grid(settings.shift).sigmas, 0.0)
  sigma = sigmas[inputs.index][:, :, None, None, None]
  velocity = jax.lax.stop_gradient(velocity).astype(jnp.float32)
  counts = inputs.mask[:, :, None, None, None]
  latent_error = (inputs.noisy - sigma * velocity - clean) * counts
  return latent_error, (velocity - inputs.target) * (1 - sigma) * counts


def _jitter(key: jax.Array, context: jax.Array, settings: FlowSettings) -> jax.Array:
  key_level, key_noise = jax.random.split(key)
  b, f = context.shape[:2]
  chunks = f // settings.frames_per_chunk
  level = jax.random.uniform(key_level, (b, chunks), maxval=settings.context_jitter)
  sigma = jnp.repeat(level, settings.frames_per_chunk, axis=1)  # (b, f)
  sigma = sigma.at[:, : settings.conditioning_frames].set(0)
  noise = jax.random.normal(key_noise, context.shape, context.dtype)
  return add_noise(context, noise, sigma)
