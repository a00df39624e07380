"""The method: noise becomes a chunk of clean latents, and the chunk becomes memory.

A chunk is denoised in a few solver steps by a transformer that attends to itself and to
the cached keys and values of earlier frames. Then it passes once more, clean, at
timestep 0, to write its own keys and values (SPEC 3). `denoise_chunk` is that one step.
`rollout` scans it; `generate/stream.py` calls it chunk by chunk.

With guidance every sample has two rows in the batch of the network, one for its prompt
and one for the negative prompt, with a cache of their own: row 2 i and row 2 i + 1.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.generate import schedule
from longlive_jax.generate.cached_forward import cached_forward, can_hold, is_full
from longlive_jax.generate.step_models import Model, choice_of, models_of
from longlive_jax.layers import fp8_attention, kv_cache, kv_slots, rope
from longlive_jax.models import dit
from longlive_jax.parallel import sequence
from longlive_jax.parallel.sequence import SINGLE, Layout

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a video is sampled; lengths in latent frames. Static under jit.

  Attributes:
    frames_per_chunk: latent frames that are generated together.
    window_frames: frames that a query attends, the chunk included; also what the
      cache holds.
    sink_frames: frames of the first chunk (and, with multi_shot_sink, of the first
      chunk of the shot) that are never evicted.
    multi_shot_sink: keep both a global sink and a shot sink.
    shot_rope_offset: temporal gap opened in front of every shot. Without effect with
      relative_rope.
    relative_rope: positions count from the start of the window: unlimited length.
    t_scale: factor on temporal positions.
    clean_recache: on a cut, forget everything but the global sink before the clean
      pass (needs multi_shot_sink).
    guidance: classifier-free guidance scale; 1 turns the negative pass off.
    steps, shift, solver: see generate/schedule.py.
    timesteps: of the steps, falling; none are the solver's own.
    independent_first_frame: the first chunk is a single frame.
    kv_format, kv_smoothing, kv_rule: what the cache stores, see layers/kv_slots.py.
    attention_format: '', or 'fp8': attention to a full window multiplies in 8 bits,
      see layers/fp8_attention.py. Best with kv_format='e4m3', read as it is stored.
    reference: the reference's eviction of pinned frames and one tensor scale a chunk
      in an NVFP4 cache, for parity only.
    exchange_format: what keys and values of a chunk become before they are attended
      and stored, so that devices that share a video exchange fewer bits; '' leaves
      them, else 'fp8' or 'nvfp4'.
  """

  frames_per_chunk: int = 8
  window_frames: int = 32
  sink_frames: int = 8
  multi_shot_sink: bool = True
  shot_rope_offset: float = 8.0
  relative_rope: bool = False
  t_scale: float = 1.0
  clean_recache: bool = False
  guidance: float = 1.0
  steps: int = 4
  shift: float = 5.0
  solver: str = "unipc"
  timesteps: tuple[float, ...] = ()
  independent_first_frame: bool = False
  kv_format: str = ""
  kv_smoothing: str = "token_mean"
  kv_rule: str = "mse"
  attention_format: str = ""
  reference: bool = False
  exchange_format: str = ""

  def __post_init__(self):
    n = self.frames_per_chunk
    if n < 1:
      raise ValueError(f"frames_per_chunk={n} must be at least 1")
    for name in ("window_frames", "sink_frames"):
      value = getattr(self, name)
      if value < 0:
        raise ValueError(f"{name}={value} must not be negative")
      if value % n and not self.reference:
        raise ValueError(
          f"{name}={value} must be a multiple of frames_per_chunk={n}; "
          f"use {value - value % n} or {value + n - value % n}"
        )
    kept = self.global_sink_frames + min(self.sink_frames, n)
    kept = max(kept, self.sink_frames) + n
    if self.window_frames < kept and not self.reference:
      raise ValueError(
        f"window_frames={self.window_frames} has no room for the sinks "
        f"(sink_frames={self.sink_frames}) and a chunk of {n}; use {kept} or more"
      )
    if self.clean_recache and not self.multi_shot_sink:
      raise ValueError("clean_recache=True needs multi_shot_sink=True")
    if not np.isfinite(self.guidance):
      raise ValueError(f"guidance={self.guidance} must be a number; 1 turns it off")
    self.solver_table()  # checks what it reads
    kv_slots.KVFormat(self.kv_format, self.kv_smoothing, self.kv_rule)  # and these
    sequence.check_format(self.exchange_format)
    fp8_attention.by_format(self.attention_format)

  def solver_table(self) -> schedule.SolverTable:
    return schedule.solver_table(self.solver, self.steps, self.shift, self.timesteps)

  @property
  def global_sink_frames(self) -> int:
    return self.sink_frames if self.multi_shot_sink else 0

  @property
  def pins(self) -> bool:
    """Whether a cut moves the shot sink."""
    return self.multi_shot_sink and self.sink_frames > 0

  @property
  def branches(self) -> int:
    """Rows of the network's batch for each sample."""
    return 1 if self.guidance == 1.0 else 2

  @property
  def cache_format(self) -> kv_slots.KVFormat:
    return kv_slots.KVFormat(
      self.kv_format, self.kv_smoothing, self.kv_rule, chunk_amax=self.reference
    )

  @property
  def cache_rules(self) -> kv_cache.CacheRules:
    return kv_cache.CacheRules(
      window_frames=self.window_frames,
      sink_frames=self.sink_frames,
      global_sink_frames=self.global_sink_frames,
      relative_rope=self.relative_rope,
      reference=self.reference,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkInputs:
  """All that distinguishes one chunk from another; the same shapes for every chunk.

  Attributes:
    noise: float32 (b, f, y, x, c).
    text: prompt embeddings (b, k, text_dim).
    negative: embeddings of the negative prompt (b, k, text_dim), or None if unguided.
    frames: int32 (b, f), absolute latent frame numbers.
    temporal: rotation of those frames (b, f, pairs), from the host (float64 inside).
    cut: bool (b,), the chunk starts a new shot.
    known: bool (b, f), frames that are given (image-to-video) ...
    given: ... and their latents (b, f, y, x, c).
  """

  noise: Array
  text: Array
  negative: Array | None
  frames: Array
  temporal: rope.Rotation
  cut: Array
  known: Array
  given: Array


def init_cache(
  model: Model, sampling: Sampling, batch: int, y: int, x: int
) -> kv_cache.KVCache:
  """An empty cache for `batch` videos of y rows and x columns of latents."""
  config = model.config
  return kv_cache.init_cache(
    sampling.cache_rules,
    layers=config.layers,
    batch=batch * sampling.branches,
    capacity_frames=sampling.window_frames,
    tokens_per_frame=config.tokens_per_frame(y, x),
    heads=config.heads,
    head_dim=config.head_dim,
    dtype=model.dtype,
    format=sampling.cache_format,
  )


def clean_pass(
  model: Model,
  cache: kv_cache.KVCache,
  latents: Array,
  chunk: ChunkInputs,
  sampling: Sampling,
  text: dit.TextKeys | None = None,
  *,
  layout: Layout = SINGLE,
) -> kv_cache.KVCache:
  """Writes finished latents (b, f, y, x, c) into the cache, at timestep 0.

  On a cut the cache is reset first (clean_recache) and the chunk becomes the shot sink
  afterwards.

  Args:
    text: keys of the chunk's prompts, if they are known already.
    layout: see parallel/sequence.py.
  """
  rows = functools.partial(_rows, sampling=sampling, layout=layout)
  frames, cut = rows(chunk.frames), rows(chunk.cut) & sampling.pins
  cache, placement = make_room(cache, frames, cut, sampling)
  k, v = _remembered(model, cache, placement, latents, chunk, sampling, text, layout)
  return kv_cache.pin(kv_cache.commit(cache, placement, k, v), frames, cut)


def make_room(
  cache: kv_cache.KVCache, frames: Array, cut: Array, sampling: Sampling
) -> tuple[kv_cache.KVCache, kv_cache.Placement]:
  """Where the clean pass writes, in a cache without what a cut forgets.

  Args:
    frames: int32 (rows, f) of the network's batch. cut: bool (rows,).
  """
  if sampling.clean_recache:
    cache = kv_cache.reset(cache, cut)
  return cache, kv_cache.place(cache, frames)


def write_again(
  model: Model,
  cache: kv_cache.KVCache,
  latents: Array,
  chunk: ChunkInputs,
  sampling: Sampling,
) -> kv_cache.KVCache:
  """Recomputes the keys and values of a chunk in the cache, under chunk's text.

  What stays and what is pinned does not change; see `kv_cache.place_again`.

  Args:
    latents: clean, (b, f, y, x, c).
  """
  placement = kv_cache.place_again(cache, _rows(chunk.frames, sampling=sampling))
  k, v = _remembered(model, cache, placement, latents, chunk, sampling)
  return kv_cache.commit(cache, placement, k, v)


def _remembered(
  model, cache, placement, latents, chunk, sampling, text=None, layout=SINGLE
):
  """What the cache's slots store of clean latents: keys and values of timestep 0."""
  rows = functools.partial(_rows, sampling=sampling, layout=layout)
  model = models_of(model)[choice_of(model, sampling.steps)[-1]]
  time = np.zeros((placement.length.shape[0], latents.shape[1]))
  _, kept = cached_forward(
    model,
    cache,
    placement,
    rows(latents),
    dit.time_features(time, model.config.freq_dim),
    _text(model, chunk, layout) if text is None else text,
    rows(chunk.temporal),
    t_scale=sampling.t_scale,
    attention_format=sampling.attention_format,
    keep=True,
    velocity=False,
    layout=layout,
    exchange_format=sampling.exchange_format,
  )
  return kept


def denoise_chunk(
  model: Model,
  cache: kv_cache.KVCache,
  chunk: ChunkInputs,
  sampling: Sampling,
  layout: Layout = SINGLE,
) -> tuple[Array, kv_cache.KVCache]:
  """Generates one chunk and remembers it.

  Args:
    model: the transformer, or StepModels.
    cache: of `batch * sampling.branches` rows.
    chunk: inputs; `noise` decides the chunk's length.
    sampling: static.
    layout: static, see parallel/sequence.py; the cache is then this device's part.

  Returns:
    clean latents float32 (b, f, y, x, c) and the cache with the chunk in it.
  """
  rows = functools.partial(_rows, sampling=sampling, layout=layout)
  config = model.config
  table = sampling.solver_table()
  times = dit.time_features(np.append(table.timesteps, 0.0), config.freq_dim)
  known = chunk.known[:, :, None, None, None]

  placement = kv_cache.place(cache, rows(chunk.frames))
  temporal = rows(chunk.temporal)

  def velocity(
    model: dit.CausalDiT,
    text: dit.TextKeys,
    latents: Array,
    features: Array,
    held: list[kv_cache.Held] | None,
    full: bool | None,
  ) -> tuple[Array, list[kv_cache.Held] | None]:
    # Given frames are clean: their timestep is 0 in every pass.
    time = jnp.where(chunk.known[:, :, None], times[-1], features)
    v, held = cached_forward(
      model,
      cache,
      placement,
      rows(latents),
      rows(time),
      text,
      temporal,
      held=held,
      full=full,
      t_scale=sampling.t_scale,
      attention_format=sampling.attention_format,
      layout=layout,
      exchange_format=sampling.exchange_format,
    )
    if sampling.branches == 1:
      return v, held
    v = layout.all_rows(v)
    positive, negative = v[0::2], v[1::2]
    return negative + sampling.guidance * (positive - negative), held

  def step(
    model: dit.CausalDiT, text: dit.TextKeys, full: bool | None, carried, row
  ):
    (state, held), (solver_row, features) = carried, row
    clamped = jnp.where(known, chunk.given, state.x)
    state = dataclasses.replace(state, x=clamped)
    v, held = velocity(model, text, state.x, features, held, full)
    return (schedule.solver_step(solver_row, state, v), held), None

  choice, models = choice_of(model, len(table.timesteps)), models_of(model)
  texts = [_text(each, chunk, layout) for each in models]  # once, not in each pass

  def denoised(held: list[kv_cache.Held] | None, full: bool | None) -> Array:
    carried, first = (schedule.solver_init(chunk.noise), held), 0
    for which, group in itertools.groupby(choice[:-1]):
      end = first + len(list(group))
      inputs = jax.tree.map(lambda a, i=first, j=end: a[i:j], (table.rows, times[:-1]))
      run = functools.partial(step, models[which], texts[which], full)
      (carried, _), first = lax.scan(run, carried, inputs), end
    return carried[0].x

  with jax.named_scope("denoise"):
    if all(can_hold(each, cache, sampling.attention_format) for each in models):
      x = lax.cond(
        is_full(cache, placement, layout),
        lambda: denoised(kv_cache.hold(cache, placement), True),
        lambda: denoised(None, False),
      )
    else:
      x = denoised(None, None)
    latents = jnp.where(known, chunk.given, x)
  with jax.named_scope("clean_pass"):
    text = texts[choice[-1]]
    cache = clean_pass(model, cache, latents, chunk, sampling, text, layout=layout)
    return latents, cache


def rollout(
  model: Model,
  cache: kv_cache.KVCache,
  chunks: ChunkInputs,
  sampling: Sampling,
) -> tuple[Array, kv_cache.KVCache]:
  """`denoise_chunk` scanned over chunks (leading axis of every leaf of `chunks`).

  Returns:
    latents (chunks, b, f, y, x, c) and the cache after the last one.
  """

  def step(cache, chunk):
    latents, cache = denoise_chunk(model, cache, chunk, sampling)
    return cache, latents

  cache, latents = lax.scan(step, cache, chunks)
  return latents, cache


def frame_noise(key: Array, samples: Array, frames: Array, shape: tuple) -> Array:
  """Standard normal noise that depends on (key, sample, frame) alone.

  So a video does not change with the number of devices, the chunk length or a restart.

  Args:
    key: a typed jax.random key.
    samples: int32 (b,), identity of each video. frames: int32 (b, f).
    shape: (y, x, c).

  Returns:
    float32 (b, f, y, x, c).
  """

  def one(sample, frame):
    return jax.random.normal(
      jax.random.fold_in(jax.random.fold_in(key, sample), frame), shape
    )

  return jax.vmap(lambda s, fs: jax.vmap(lambda frame: one(s, frame))(fs))(
    samples, frames
  )


def chunk_temporal(
  config: dit.WanConfig, sampling: Sampling, frames: np.ndarray, shot: np.ndarray
) -> rope.Rotation:
  """Host rotation of a chunk: frames (b, f), shot index (b,) -> (b, f, pairs)."""
  offset = np.asarray(shot)[:, None] * sampling.shot_rope_offset
  positions = dit.temporal_positions(frames, offset, sampling.t_scale)
  return rope.temporal_rotation(positions, config.head_dim)


def _text(model: dit.CausalDiT, chunk: ChunkInputs, layout: Layout) -> dit.TextKeys:
  """Keys of the prompts of this device's rows, of b * branches."""
  text = chunk.text[:, None]
  if chunk.negative is not None:
    text = jnp.stack([chunk.text, chunk.negative], axis=1)
  text = layout.own_rows(text.reshape(-1, 1, *text.shape[2:]))
  return model.text_keys(model.embed_text(text))


def _rows(samples: Any, *, sampling: Sampling, layout: Layout = SINGLE) -> Any:
  """What this device's rows of the network's batch have of arrays (b, ...)."""
  return jax.tree.map(
    lambda a: layout.own_rows(jnp.repeat(a, sampling.branches, axis=0)), samples
  )
