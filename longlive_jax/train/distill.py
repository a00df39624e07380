"""Distillation into a generator of few steps: the updates (SPEC 7, 8).

The generator makes videos by itself (self_forcing.py). Noised again, they are put to
two networks (dmd.py): the teacher says what they would be as real videos, the critic
what they would be as the generator's own.

  critic_step      the critic learns what the generator makes
  generator_step   the generator moves from what the critic says to what the teacher
                   says; once in several critic steps

All three are one transformer. It is the teacher as it is; generator and critic are
adapters beside it, or copies that are trained whole. So with adapters its weights are
in memory once, and may be quantised.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.checkpoint.lora import Lora, attach_lora
from longlive_jax.generate import sampler, schedule
from longlive_jax.models import dit, vae
from longlive_jax.parallel import mesh as meshes
from longlive_jax.parallel import sharded_weights
from longlive_jax.parallel.mesh import DATA
from longlive_jax.train import dmd, flow, self_forcing
from longlive_jax.train import state as train_state

Array = jax.Array
Trained = Lora | dit.CausalDiT

EXIT_STEPS = ("shared", "per_chunk", "last")


@dataclasses.dataclass(frozen=True)
class DistillSettings:
  """How videos are made and scored. Static.

  Attributes:
    rollout: how the generator makes a video.
    scores: how it is noised, and how scores are combined.
    exit_step: 'shared', one draw for all chunks of a rollout; 'per_chunk'; or 'last',
      without a draw.
    timesteps: of the scores, 'per_block' or 'shared' by all frames of a video. The
      reference has the latter, except for image-to-video.
    teacher_forcing: teacher and critic see a noised chunk behind the video's own clean
      chunks, as in the teacher's training. The reference shows them noised chunks
      behind noised chunks, which such a teacher has never seen.
    score_chunks: most chunks that are scored, the last ones. What precedes them is one
      frame then, decoded and encoded again as the first of a video; its chunk does not
      count.
  """

  rollout: self_forcing.RolloutSettings
  scores: dmd.DMDSettings
  exit_step: str = "shared"
  timesteps: str = "per_block"
  teacher_forcing: bool = True
  score_chunks: int = 4

  def __post_init__(self):
    if self.exit_step not in EXIT_STEPS:
      raise ValueError(
        f"exit_step={self.exit_step!r} is unknown; use {', '.join(EXIT_STEPS)}"
      )
    if self.timesteps not in ("per_block", "shared"):
      raise ValueError(
        f"timesteps={self.timesteps!r} is unknown; use 'per_block' or 'shared'"
      )
    if self.score_chunks < 1:
      raise ValueError(f"score_chunks={self.score_chunks} must be at least 1")

  @property
  def chunk_frames(self) -> int:
    return self.rollout.sampling.frames_per_chunk

  def for_length(self, chunks: int) -> "DistillSettings":
    """The settings of a rollout of so many chunks: one whose start is cut off has
    gradients only where it counts, and no frames that are given."""
    if chunks <= self.score_chunks:
      return self
    counted = (self.score_chunks - 1) * self.chunk_frames
    rollout = dataclasses.replace(self.rollout, gradient_frames=counted)
    scores = dataclasses.replace(self.scores, conditioning_frames=0)
    return dataclasses.replace(self, rollout=rollout, scores=scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stories:
  """What a batch of videos is to show.

  Attributes:
    text: prompt embeddings (b, chunks, k, text_dim).
    cuts: bool (b, chunks), the chunk starts a new shot.
    given: first frames (b, g, y, x, c); g = 0 is text-to-video.
  """

  text: Array
  cuts: Array
  given: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
  """What no step changes.

  Attributes:
    base: the teacher, of weights of any type.
    negative: embedding of the negative prompt (k, text_dim).
    video_vae: makes the frame in front of scored chunks; None if none is cut off.
  """

  base: dit.CausalDiT
  negative: Array
  video_vae: vae.VideoVAE | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
  """Everything that a step changes; `params` are adapters or transformers.

  Attributes:
    generator: its step counts its own updates.
    critic: without average. Its step is that of the run.
  """

  generator: train_state.TrainState
  critic: train_state.TrainState

  @property
  def step(self) -> Array:
    return self.critic.step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """All that is random in a loss.

  Attributes:
    noise, context_noise: of the rollout, (b, f, y, x, c).
    exit_step: int32 (chunks,).
    score_noise: (b, scored frames, y, x, c).
    timestep: raw ones of the scores, int32 (b, scored frames), 0 to 999.
  """

  noise: Array
  context_noise: Array
  exit_step: Array
  score_noise: Array
  timestep: Array


def draw(key: Array, stories: Stories, settings: DistillSettings) -> Draws:
  """Draws for a batch; they depend on nothing else, such as the number of devices."""
  b, chunks = stories.cuts.shape
  n, shape = settings.chunk_frames, stories.given.shape[2:]
  scored = n * min(chunks, settings.score_chunks)
  keys = jax.random.split(key, 5)
  steps = settings.rollout.sampling.steps
  if settings.exit_step == "last":
    exit_step = jnp.full((chunks,), steps - 1)
  else:
    count = 1 if settings.exit_step == "shared" else chunks
    exit_step = jax.random.randint(keys[2], (count,), 0, steps)
    exit_step = jnp.broadcast_to(exit_step, (chunks,))
  return Draws(
    noise=jax.random.normal(keys[0], (b, chunks * n, *shape)),
    context_noise=jax.random.normal(keys[1], (b, chunks * n, *shape)),
    exit_step=exit_step,
    score_noise=jax.random.normal(keys[3], (b, scored, *shape)),
    timestep=flow.draw_indices(keys[4], b, scored, n, mode=settings.timesteps),
  )


# ------------------------------------------------------------------------ networks


def network(trained: Trained | None, base: dit.CausalDiT) -> dit.CausalDiT:
  """A transformer: the base, or with an adapter beside it, or trained as a whole."""
  if trained is None:
    return base
  if isinstance(trained, Lora):
    return attach_lora(base, trained)
  return train_state.cast(trained, base.dtype)


def make_videos(
  trained: Trained,
  base: dit.CausalDiT,
  stories: Stories,
  draws: Draws,
  settings: DistillSettings,
  mesh: Mesh | None = None,
) -> Array:
  """The generator's rollout: clean latents (b, f, y, x, c) float32."""
  known = stories.given.shape[1]
  # XLA for GPUs crashes where shard_map takes an array without numbers, as those of no
  # given frames are (jax 0.11.2): such as do not count are put behind them.
  later = [(0, 0)] * stories.given.ndim
  later[1] = (0, draws.noise.shape[1] - known)
  stories = dataclasses.replace(stories, given=jnp.pad(stories.given, later))

  def run(trained, base, stories, noise, context_noise, exit_step):
    adapted = isinstance(trained, Lora)
    model = base if adapted else network(trained, base)
    chunks = self_forcing.make_chunks(
      model.config,
      settings.rollout,
      noise=noise,
      context_noise=context_noise,
      text=stories.text,
      cuts=stories.cuts,
      exit_step=exit_step,
      given=stories.given[:, :known],
    )
    b, _, y, x, _ = noise.shape
    cache = sampler.init_cache(model, settings.rollout.sampling, b, y, x)
    adapter = trained if adapted else None
    latents, _ = self_forcing.rollout(model, cache, chunks, settings.rollout, adapter)
    return jnp.moveaxis(latents, 0, 1).reshape(noise.shape)

  videos = P(DATA)
  run = sharded_weights.over(mesh, run, (P(), videos, videos, videos, P()))
  return run(
    trained, base, stories, draws.noise, draws.context_noise, draws.exit_step
  )


def velocity(
  trained: Trained | None,
  base: dit.CausalDiT,
  noisy: Array,
  clean: Array,
  features: Array,
  text: Array,
  settings: DistillSettings,
  mesh: Mesh | None = None,
) -> Array:
  """What a transformer, the base if trained is None, says of a noised video.

  Args:
    noisy, clean: the video with and without noise, (b, f, y, x, c).
    features: of the timesteps, (b, f, freq_dim).
    text: (b, segments, k, text_dim).

  Returns:
    (b, f, y, x, c) float32.
  """

  def run(trained, base, noisy, clean, features, text):
    return dit.train_forward(
      network(trained, base),
      noisy,
      features,
      text,
      frames_per_chunk=settings.chunk_frames,
      clean=clean if settings.teacher_forcing else None,
      remat=settings.rollout.remat,
    )

  run = sharded_weights.over(mesh, run, (P(), *[P(DATA)] * 4))
  return run(trained, base, noisy, clean, features, text)


def last_chunks(
  videos: Array, frames: int, video_vae: vae.VideoVAE, mesh: Mesh | None = None
) -> Array:
  """The last frames of videos, the first of them encoded anew as a video's first.

  The VAE's first latent frame is one picture, all others are four (SPEC 7).

  Args:
    videos: (b, f, y, x, c).
  """

  def run(none, video_vae, start):
    frame = vae.decode(video_vae, start, frames_per_call=1)[:, -1:]
    return vae.encode(video_vae, frame)

  run = sharded_weights.over(mesh, run, (P(), P(DATA)))
  start = jax.lax.stop_gradient(videos[:, : 1 - frames])
  return jnp.concatenate([run(None, video_vae, start), videos[:, 1 - frames :]], axis=1)


# ------------------------------------------------------------------------ losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
  """A noised video with what the networks are told about it.

  Attributes:
    noised: the video.
    features: of its timesteps, (b, f, freq_dim).
    text: prompt embeddings of its chunks, (b, chunks, k, text_dim).
  """

  noised: dmd.NoisedSample
  features: Array
  text: Array


def make_scored(
  generator: Trained,
  fixed: Fixed,
  stories: Stories,
  draws: Draws,
  settings: DistillSettings,
  mesh: Mesh | None = None,
) -> Scored:
  """A video of the generator, cut to what is scored, and noised."""
  chunks, n = stories.cuts.shape[1], settings.chunk_frames
  settings = settings.for_length(chunks)
  videos = make_videos(generator, fixed.base, stories, draws, settings, mesh)
  initial = stories.given if settings.scores.conditioning_frames else None
  mask = None
  if chunks > settings.score_chunks:
    frames = settings.score_chunks * n
    videos = last_chunks(videos, frames, fixed.video_vae, mesh)
    mask = (jnp.arange(frames) >= n).reshape(1, -1, 1, 1, 1)
  noised = dmd.noise_sample(
    videos, draws.score_noise, draws.timestep, settings.scores, initial=initial,
    mask=mask,
  )  # fmt: skip
  given = np.arange(videos.shape[1]) < settings.scores.conditioning_frames
  row = jnp.where(given, schedule.NUM_TRAIN_TIMESTEPS, draws.timestep)
  table = dit.time_features(_timesteps(settings.scores), fixed.base.config.freq_dim)
  text = stories.text[:, -settings.score_chunks :]
  return Scored(noised, jnp.asarray(table)[row], text)


def _timesteps(scores: dmd.DMDSettings) -> np.ndarray:
  """What raw timesteps 0 to 999 become; and behind them 0, of frames that are given."""
  with jax.ensure_compile_time_eval():
    raw = jnp.arange(schedule.NUM_TRAIN_TIMESTEPS)
    return np.append(np.asarray(dmd.score_timestep(raw, scores)), np.float32(0))


def generator_loss(
  generator: Trained,
  critic: Trained,
  fixed: Fixed,
  stories: Stories,
  draws: Draws,
  settings: DistillSettings,
  mesh: Mesh | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The loss whose derivative is the matching gradient, and metrics."""
  scores = settings.scores
  scored = make_scored(generator, fixed, stories, draws, settings, mesh)
  seen, text = jax.lax.stop_gradient(scored.noised), scored.text
  sigma = schedule.sigma_at(
    seen.timestep, grid=schedule.training_grid(scores.shift), reference=scores.reference
  )
  negative = jnp.broadcast_to(fixed.negative, (len(text), 1, *fixed.negative.shape))

  def clean(trained: Trained | None, guidance: float) -> Array:
    def predict(text: Array) -> Array:
      v = velocity(
        trained, fixed.base, seen.noisy, seen.sample, scored.features, text, settings,
        mesh,
      )  # fmt: skip
      return schedule.velocity_to_clean(seen.noisy, v, sigma)

    unguided = predict(negative) if guidance else None
    return dmd.guided(predict(text), unguided, guidance)

  gradient = dmd.matching_gradient(
    seen.sample,
    fake=clean(critic, scores.critic_guidance),
    real=clean(None, scores.teacher_guidance),
    settings=scores,
  )
  loss = dmd.generator_loss(scored.noised.sample, gradient, scored.noised.mask)
  return loss, {"matching_gradient": jnp.mean(jnp.abs(gradient))}


def critic_loss(
  critic: Trained,
  generator: Trained,
  fixed: Fixed,
  stories: Stories,
  draws: Draws,
  settings: DistillSettings,
  mesh: Mesh | None = None,
) -> Array:
  """The flow-matching loss of the critic on what the generator makes."""
  scored = make_scored(generator, fixed, stories, draws, settings, mesh)
  scored = jax.lax.stop_gradient(scored)
  noised = scored.noised
  v = velocity(
    critic, fixed.base, noised.noisy, noised.sample, scored.features, scored.text,
    settings, mesh,
  )  # fmt: skip
  return dmd.critic_loss(v, noised)


# ------------------------------------------------------------------------ updates


def critic_step(
  state: DistillState,
  stories: Stories,
  fixed: Fixed,
  key: Array,
  settings: DistillSettings,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> tuple[DistillState, dict[str, Array]]:
  """One update of the critic, and its metrics."""
  draws = draw(key, stories, settings)
  loss, gradients = jax.value_and_grad(critic_loss)(
    state.critic.params, state.generator.params, fixed, stories, draws, settings, mesh
  )
  critic = train_state.update(state.critic, gradients, optimizer)
  metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
  return dataclasses.replace(state, critic=critic), metrics


def generator_step(
  state: DistillState,
  stories: Stories,
  fixed: Fixed,
  key: Array,
  settings: DistillSettings,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float,
  ema_start: int = 0,
  mesh: Mesh | None = None,
) -> tuple[DistillState, dict[str, Array]]:
  """One update of the generator and of its average, and metrics."""
  draws = draw(key, stories, settings)
  (loss, metrics), gradients = jax.value_and_grad(generator_loss, has_aux=True)(
    state.generator.params, state.critic.params, fixed, stories, draws, settings, mesh
  )
  generator = train_state.update(
    state.generator, gradients, optimizer, ema_decay=ema_decay, ema_start=ema_start
  )
  metrics |= {
    "generator_loss": loss,
    "generator_gradient_norm": optax.global_norm(gradients),
  }
  return dataclasses.replace(state, generator=generator), metrics


def program(
  step: Callable[..., tuple[Any, dict[str, Array]]],
  number: int,
  settings: DistillSettings,
  key: Array,
  specs: Any,
  mesh: Mesh | None = None,
) -> Any:
  """run(state, stories, fixed) -> (state, metrics), jitted; the state is given away.

  Args:
    step: `critic_step`, `generator_step` or `ode.ode_step`, with all that they are not
      given here.
    number: tells draws of the steps of an iteration apart.
    key: of all iterations.
    specs: PartitionSpecs of the state on the mesh.
  """

  def run(state: Any, stories: Stories, fixed: Fixed) -> tuple[Any, dict[str, Array]]:
    own = jax.random.fold_in(jax.random.fold_in(key, state.step), number)
    result = step(state, stories, fixed, own, settings, mesh=mesh)
    return meshes.constrain(result, (specs, P()), mesh)

  return jax.jit(run, donate_argnums=0)
