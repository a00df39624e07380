"""Regression onto the teacher's videos: a start for distillation (distill.py).

The teacher turns noise into a video in many guided steps along its ODE. The generator
learns to go from the same noise to that video at once: at each noise level that it will
see, on the straight line between the two, it is to point from the video to the noise.
Its solver's first step moves along just this line, if what it predicted was right.
(Rectified flow's second stage, arXiv 2209.03003.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.generate import sampler, schedule
from longlive_jax.models import dit
from longlive_jax.parallel import sharded_weights
from longlive_jax.parallel.mesh import DATA
from longlive_jax.train import flow, self_forcing
from longlive_jax.train import state as train_state
from longlive_jax.train.distill import (
  DistillSettings,
  Fixed,
  Stories,
  Trained,
  velocity,
)

Array = jax.Array


def teacher_videos(
  fixed: Fixed,
  stories: Stories,
  noise: Array,
  settings: DistillSettings,
  steps: int,
  mesh: Mesh | None = None,
) -> Array:
  """The teacher's videos (b, f, y, x, c) from this noise, guided, in so many steps."""
  rollout = settings.rollout
  sampling = dataclasses.replace(
    rollout.sampling,
    steps=steps,
    timesteps=(),
    guidance=1 + settings.scores.teacher_guidance,
  )

  def run(none, fixed, stories, noise):
    b, _, y, x, _ = noise.shape
    chunks = self_forcing.make_chunks(
      fixed.base.config,
      rollout,
      noise=noise,
      context_noise=noise,  # not used
      text=stories.text,
      cuts=stories.cuts,
      exit_step=jnp.zeros(stories.cuts.shape[1], jnp.int32),
      given=stories.given,
    ).chunk
    negative = None
    if sampling.branches > 1:
      negative = jnp.broadcast_to(fixed.negative, chunks.text.shape)
    chunks = dataclasses.replace(chunks, negative=negative)
    cache = sampler.init_cache(fixed.base, sampling, b, y, x)
    latents, _ = sampler.rollout(fixed.base, cache, chunks, sampling)
    return jnp.moveaxis(latents, 0, 1).reshape(noise.shape)

  run = sharded_weights.over(mesh, run, (P(), P(DATA), P(DATA)))
  return jax.lax.stop_gradient(run(None, fixed, stories, noise))


def draw(
  key: Array, stories: Stories, settings: DistillSettings
) -> tuple[Array, Array]:
  """Noise (b, f, y, x, c), and which of the generator's steps each frame is at (b, f).

  All frames of a chunk are at the same one.
  """
  (b, chunks), n = stories.cuts.shape, settings.chunk_frames
  noise_key, level_key = jax.random.split(key)
  noise = jax.random.normal(noise_key, (b, chunks * n, *stories.given.shape[2:]))
  steps = settings.rollout.sampling.steps
  return noise, flow.draw_indices(level_key, b, chunks * n, n, maximum=steps)


def ode_loss(
  generator: Trained,
  fixed: Fixed,
  stories: Stories,
  key: Array,
  settings: DistillSettings,
  steps: int,
  mesh: Mesh | None = None,
) -> Array:
  """Mean squared error of the generator's velocity between noise and video.

  The noise level of each chunk is one of those of the generator's steps.

  Args:
    key: the draws depend on nothing else.
    steps: of the teacher.
  """
  noise, level = draw(key, stories, settings)
  videos = teacher_videos(fixed, stories, noise, settings, steps, mesh)

  table = settings.rollout.sampling.solver_table()
  given = settings.scores.conditioning_frames
  known = jnp.arange(noise.shape[1]) < given
  sigma = jnp.where(known, 0.0, jnp.asarray(table.sigmas)[level])
  times = dit.time_features([*table.timesteps, 0.0], fixed.base.config.freq_dim)
  features = jnp.asarray(times)[jnp.where(known, table.steps, level)]
  noisy = schedule.add_noise(videos, noise, sigma)
  v = velocity(generator, fixed.base, noisy, videos, features, stories.text, settings,
               mesh)  # fmt: skip
  return jnp.mean(jnp.square(v - (noise - videos))[:, given:])


def ode_step(
  state: train_state.TrainState,
  stories: Stories,
  fixed: Fixed,
  key: Array,
  settings: DistillSettings,
  optimizer: optax.GradientTransformation,
  *,
  steps: int,
  ema_decay: float,
  ema_start: int = 0,
  mesh: Mesh | None = None,
) -> tuple[train_state.TrainState, dict[str, Array]]:
  """One update of the generator and of its average, and metrics."""
  loss, gradients = jax.value_and_grad(ode_loss)(
    state.params, fixed, stories, key, settings, steps, mesh
  )
  state = train_state.update(
    state, gradients, optimizer, ema_decay=ema_decay, ema_start=ema_start
  )
  return state, {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
