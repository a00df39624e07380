"""Training on one's own history: the self-forcing rollout (SPEC 8).

Chunks are made one after the other against the cache, as in generation, but each stops
at a drawn *exit step*: the solver runs there without gradient, the network predicts
clean latents with gradient, and these are the chunk. A pass without gradient writes it
into the cache. So a few passes train all steps of a few-step generator.

Two conventions for what the history passes on:

  detached        the cache is a constant. Chunks are then independent in the backward
                  pass: it replays the rollout and takes one chunk's derivative at a
                  time, in memory that does not grow with the length.
  through_cache   keys and values have the numbers of the clean pass and the derivative
                  of the exit pass, as the reference has it. The backward pass goes from
                  the last chunk to the first and takes back what each one wrote: what
                  it overwrote is kept for that.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.checkpoint.lora import Lora, attach_lora
from longlive_jax.generate import schedule
from longlive_jax.generate.cached_forward import cached_forward
from longlive_jax.generate.sampler import ChunkInputs, Sampling
from longlive_jax.layers import kv_cache, rope
from longlive_jax.models import dit

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """How a training rollout is made. Static.

  Attributes:
    sampling: as in generation; without guidance.
    gradient_frames: last latent frames that have a gradient, whole chunks; -1: all.
    context_noise: timestep at which a finished chunk is written into the cache.
    through_cache: the convention, see above; it needs a cache of plain numbers.
    remat: see layers/remat.py.
  """

  sampling: Sampling
  gradient_frames: int = -1
  context_noise: float = 0.0
  through_cache: bool = False
  remat: str = "none"

  def __post_init__(self):
    if self.sampling.branches > 1:
      raise ValueError(
        f"guidance={self.sampling.guidance} must be 1 in a training rollout: it is "
        "distilled into a few-step generator"
      )
    if self.sampling.clean_recache:
      raise ValueError("clean_recache=True is for generation; rollouts do without")
    for name in ("attention_format", "exchange_format"):
      if getattr(self.sampling, name):
        raise ValueError(
          f"{name}={getattr(self.sampling, name)!r} has no derivative; use '' in a "
          "training rollout"
        )
    if self.through_cache and self.sampling.kv_format:
      raise ValueError(
        f"through_cache=True has no derivative through kv_format="
        f"{self.sampling.kv_format!r}; use kv_format='' or through_cache=False"
      )
    if not 0 <= self.context_noise < schedule.NUM_TRAIN_TIMESTEPS:
      raise ValueError(
        f"context_noise={self.context_noise} must be a timestep in [0, "
        f"{schedule.NUM_TRAIN_TIMESTEPS})"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutChunks:
  """All chunks of a rollout, on a leading axis of every leaf.

  Attributes:
    chunk: inputs as in generation, (chunks, b, ...).
    exit_step: int32 (chunks,), solver step whose prediction is the chunk.
    context_noise: (chunks, b, f, y, x, c), mixed into what is written to the cache.
    trains: bool (chunks,), whether the chunk has a gradient; see `trains`.
  """

  chunk: ChunkInputs
  exit_step: Array
  context_noise: Array
  trains: Array


def trains(frames: np.ndarray, settings: RolloutSettings) -> np.ndarray:
  """Which chunks have a gradient: bool (chunks,), from frames (chunks, b, f)."""
  first, end = frames[:, 0, 0], frames[-1, 0, -1] + 1
  if settings.gradient_frames < 0:
    return np.ones(len(frames), bool)
  return first >= end - settings.gradient_frames


def make_chunks(
  config: dit.WanConfig,
  settings: RolloutSettings,
  *,
  noise: Array,
  context_noise: Array,
  text: Array,
  cuts: Array,
  exit_step: Array,
  given: Array,
) -> RolloutChunks:
  """The inputs of a rollout from those of whole videos.

  Args:
    config: of the generator.
    settings: static.
    noise, context_noise: (b, f, y, x, c).
    text: prompt embeddings (b, chunks, k, text_dim).
    cuts: bool (b, chunks). exit_step: int32 (chunks,).
    given: first frames (b, g, y, x, c), none for text-to-video.
  """
  (b, total), sampling = noise.shape[:2], settings.sampling
  count = text.shape[1]

  def by_chunk(x: Array) -> Array:  # (b, f, ...) -> (chunks, b, n, ...)
    return jnp.moveaxis(x.reshape(b, count, -1, *x.shape[2:]), 1, 0)

  frames = np.arange(total, dtype=np.int32)
  # Angles need float64, so all that can occur are made on the host.
  offsets = np.arange(count) * sampling.shot_rope_offset
  positions = dit.temporal_positions(frames[:, None], offsets, sampling.t_scale)
  table = rope.temporal_rotation(positions, config.head_dim)  # (f, shots, pairs)
  shot = jnp.repeat(jnp.cumsum(cuts, axis=1), total // count, axis=1)  # (b, f)
  temporal = jax.tree.map(lambda part: by_chunk(jnp.asarray(part)[frames, shot]), table)
  frames = np.broadcast_to(frames, (b, total))
  known = frames < given.shape[1]
  later = total - given.shape[1]
  given = jnp.pad(given, [(0, 0), (0, later), (0, 0), (0, 0), (0, 0)])
  chunk = ChunkInputs(
    noise=by_chunk(noise),
    text=jnp.moveaxis(text, 1, 0),
    negative=None,
    frames=by_chunk(frames),
    temporal=temporal,
    cut=cuts.T,
    known=by_chunk(known),
    given=by_chunk(given),
  )
  in_chunks = np.moveaxis(frames.reshape(b, count, -1), 1, 0)
  trained = jnp.asarray(trains(in_chunks, settings))
  return RolloutChunks(chunk, exit_step, by_chunk(context_noise), trained)


def rollout(
  model: dit.CausalDiT,
  cache: kv_cache.KVCache,
  chunks: RolloutChunks,
  settings: RolloutSettings,
  adapter: Lora | None = None,
) -> tuple[Array, kv_cache.KVCache]:
  """Generates a training sample; differentiable in the model.

  Args:
    model: the generator.
    cache: empty.
    chunks: their inputs; every chunk has the same length.
    settings: static.
    adapter: of the generator, beside the model. It alone is differentiable then: no
      derivative of a weight of the model, which may be quantised, is made.

  Returns:
    clean latents (chunks, b, f, y, x, c) float32, and the cache after the last one,
    which passes no derivative on.
  """
  trained, fixed = (model, None) if adapter is None else (adapter, model)
  run = _through_cache if settings.through_cache else _detached
  return run(trained, fixed, cache, chunks, settings)


def _generator(trained, fixed):
  return trained if fixed is None else attach_lora(fixed, trained)


def _run(trained, fixed, cache, chunks, settings):
  model = _generator(trained, fixed)

  def step(cache, inputs):
    latents = _chunk(model, cache, inputs, settings)
    return _remember(model, cache, inputs, latents, settings), latents

  cache, latents = lax.scan(step, cache, chunks)
  return latents, cache


# --------------------------------------------------------------------- detached

_detached = jax.custom_vjp(_run, nondiff_argnums=(4,))


def _detached_forward(trained, fixed, cache, chunks, settings):
  found = _detached(trained, fixed, cache, chunks, settings)
  return found, (trained, fixed, cache, chunks)


def _made_anew(cache: kv_cache.KVCache, after: Array) -> kv_cache.KVCache:
  """A cache of zeros once more, which does not exist before `after`.

  XLA would make one of two that are equal, and keep it from the first use to the last,
  beside a copy for each of them.
  """
  zero, _ = lax.optimization_barrier((jnp.zeros((), jnp.int32), after))
  k, v = jax.tree.map(
    lambda leaf: jnp.broadcast_to(zero.astype(leaf.dtype), leaf.shape),
    (cache.k, cache.v),
  )
  return dataclasses.replace(cache, k=k, v=v)


def _detached_backward(settings, saved, cotangents):
  """Replays the rollout and adds up the derivatives of its chunks."""
  trained, fixed, cache, chunks = saved
  model = _generator(trained, fixed)
  slopes, _ = cotangents  # of the latents; the last cache passes none on
  cache = _made_anew(cache, slopes)

  def step(carry, inputs):
    cache, total = carry
    inputs, slope = inputs
    start = _until_exit(model, cache, inputs, settings)

    def latents_of(trained):
      generator = _generator(trained, fixed)
      return _exit(generator, cache, inputs, start, settings)[0]

    def derive(_):
      latents, pull = jax.vjp(latents_of, trained)
      return latents, jax.tree.map(jnp.add, total, pull(slope)[0])

    latents, total = lax.cond(
      inputs.trains, derive, lambda _: (latents_of(trained), total), None
    )
    # The derivative reads the cache: written before, it would have to be copied.
    latents, total = lax.optimization_barrier((latents, total))
    return (_remember(model, cache, inputs, latents, settings), total), None

  zeros = jax.tree.map(jnp.zeros_like, trained)
  (_, total), _ = lax.scan(step, (cache, zeros), (chunks, slopes))
  return total, None, None, None


_detached.defvjp(_detached_forward, _detached_backward)


# ---------------------------------------------------------------- through the cache

_through_cache = jax.custom_vjp(_run, nondiff_argnums=(4,))


def _through_cache_forward(trained, fixed, cache, chunks, settings):
  model = _generator(trained, fixed)

  def step(cache, inputs):
    latents = _chunk(model, cache, inputs, settings)
    slot = kv_cache.place(cache, inputs.chunk.frames).slot
    # What is overwritten is read first: else the cache would have to be copied.
    old, cache = lax.optimization_barrier((kv_cache.overwritten(cache, slot), cache))
    return _remember(model, cache, inputs, latents, settings), (latents, old)

  cache, (latents, old) = lax.scan(step, cache, chunks)
  return (latents, cache), (trained, fixed, cache, old, chunks)


def _through_cache_backward(settings, saved, cotangents):
  """Takes back the chunks, and adds up their derivatives."""
  trained, fixed, cache, old, chunks = saved
  model = _generator(trained, fixed)
  latents_slopes, _ = cotangents  # of the latents; the last cache passes none on
  nothing = _made_anew(cache, latents_slopes)

  def step(carry, inputs):
    cache, slopes, total = carry
    inputs, old, latents_slope = inputs
    cache = kv_cache.put_back(cache, old)
    start = _until_exit(model, cache, inputs, settings)
    # The derivative of what the chunk wrote; none is left to what it overwrote.
    rows = jnp.arange(len(old.slot))[:, None]
    own = jax.tree.map(lambda leaf: leaf[:, rows, old.slot], slopes)
    own, slopes = lax.optimization_barrier((own, slopes))
    slopes = jax.tree.map(lambda leaf: leaf.at[:, rows, old.slot].set(0), slopes)

    def exit_pass(trained, numbers):
      generator = _generator(trained, fixed)
      k, v = numbers
      before = dataclasses.replace(cache, k=k, v=v)
      return _exit(generator, before, inputs, start, settings)

    def derive(sums):
      _, pull = jax.vjp(exit_pass, trained, (cache.k, cache.v))
      return jax.tree.map(jnp.add, sums, pull((latents_slope, own)))

    total, slopes = lax.cond(
      inputs.trains, derive, lambda sums: sums, (total, slopes)
    )
    # All that reads the cache comes before the next chunk is taken back.
    return lax.optimization_barrier((cache, slopes, total)), None

  zeros = jax.tree.map(jnp.zeros_like, trained)
  (_, _, total), _ = lax.scan(
    step,
    (cache, (nothing.k, nothing.v), zeros),
    (chunks, old, latents_slopes),
    reverse=True,
  )
  return total, None, None, None


_through_cache.defvjp(_through_cache_forward, _through_cache_backward)


# --------------------------------------------------------------------- one chunk


def _chunk(model, cache, inputs, settings) -> Array:
  """A chunk's clean latents (b, f, y, x, c)."""
  start = _until_exit(model, cache, inputs, settings)
  return _exit(model, cache, inputs, start, settings)[0]


def _until_exit(model, cache, inputs, settings) -> Array:
  """The sample (b, f, y, x, c) that the exit step starts from."""
  chunk, table = inputs.chunk, settings.sampling.solver_table()
  text, placements = _text(model, chunk), _placements(cache, chunk)

  def step(i, state):
    row = jax.tree.map(lambda a: jnp.asarray(a)[i], table.rows)
    state = dataclasses.replace(state, x=_given(chunk, state.x))
    velocity, _ = _pass(
      model, cache, _at(placements, i), state.x, _times(model, chunk, i, settings),
      text, chunk, settings, keep=False,
    )  # fmt: skip
    return schedule.solver_step(row, state, velocity)

  start = schedule.solver_init(chunk.noise)
  return _given(chunk, lax.fori_loop(0, inputs.exit_step, step, start).x)


def _exit(model, cache, inputs, start, settings):
  """The chunk's clean latents as predicted from `start`, and its keys and values."""
  chunk, table, i = inputs.chunk, settings.sampling.solver_table(), inputs.exit_step
  velocity, kept = _pass(
    model, cache, _at(_placements(cache, chunk), i), start,
    _times(model, chunk, i, settings), _text(model, chunk), chunk, settings,
    keep=settings.through_cache,
  )  # fmt: skip
  sigma = _sigma(jnp.asarray(table.timesteps, jnp.float32)[i], settings)
  latents = schedule.velocity_to_clean(start, velocity, sigma)
  return _given(chunk, latents), kept if settings.through_cache else (None, None)


def _remember(model, cache, inputs, latents, settings) -> kv_cache.KVCache:
  """Writes a finished chunk into the cache."""
  chunk, sampling = inputs.chunk, settings.sampling
  noise_level = jnp.float32(settings.context_noise)
  noisy = schedule.add_noise(
    latents, inputs.context_noise, _sigma(noise_level, settings)
  )
  time = dit.time_features(np.float64(settings.context_noise), model.config.freq_dim)
  time = _known_or(chunk, jnp.asarray(time), model)
  # Every pass of a chunk but the first finds its frames in the cache.
  _, placement = _placements(cache, chunk)
  _, (k, v) = _pass(
    model, cache, placement, _given(chunk, noisy), time, _text(model, chunk), chunk,
    settings, keep=True, velocity=False,
  )  # fmt: skip
  cut = chunk.cut & sampling.pins
  return kv_cache.pin(kv_cache.commit(cache, placement, k, v), chunk.frames, cut)


def _pass(
  model, cache, placement, latents, time, text, chunk, settings, *, keep, velocity=True
):
  return cached_forward(
    model,
    cache,
    placement,
    latents,
    time,
    text,
    chunk.temporal,
    t_scale=settings.sampling.t_scale,
    keep=keep,
    velocity=velocity,
    remat=settings.remat,
  )


def _times(model, chunk, i, settings) -> Array:
  """Time features (b, f, freq_dim) of solver step i."""
  timesteps = settings.sampling.solver_table().timesteps
  features = dit.time_features(timesteps, model.config.freq_dim)
  return _known_or(chunk, jnp.asarray(features)[i], model)


def _known_or(chunk, features, model) -> Array:
  """Features of a pass (freq_dim,) for all frames; given frames are at timestep 0."""
  clean = dit.time_features(np.zeros(()), model.config.freq_dim)
  return jnp.where(chunk.known[:, :, None], clean, features)


def _sigma(timestep: Array, settings: RolloutSettings) -> Array:
  grid = schedule.training_grid(settings.sampling.shift)
  reference = settings.sampling.reference
  return schedule.sigma_at(timestep, grid=grid, reference=reference)


def _given(chunk: ChunkInputs, latents: Array) -> Array:
  """Latents (b, f, y, x, c) with the given frames in them."""
  return jnp.where(chunk.known[:, :, None, None, None], chunk.given, latents)


def _text(model: dit.CausalDiT, chunk: ChunkInputs) -> dit.TextKeys:
  return model.text_keys(model.embed_text(chunk.text[:, None]))


def _placements(cache: kv_cache.KVCache, chunk: ChunkInputs):
  """Where the chunk goes in its first pass, and in all others.

  They differ under the reference's rules only, which look at the pin as it was before
  the pass.
  """
  first = kv_cache.place(cache, chunk.frames)
  written = dataclasses.replace(
    cache, frame=first.frame, pinned=first.pinned, has_pin=first.has_pin
  )
  return first, kv_cache.place(written, chunk.frames)


def _at(placements, i: Array) -> kv_cache.Placement:
  """The placement of solver step i."""
  return jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), *placements)
