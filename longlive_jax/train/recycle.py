"""Error recycling: a network is trained to bear its own errors (SPEC 6).

In training the history is clean; in generation it is what the network made, errors
included, and they add up over minutes. So the errors that the network makes in training
are kept, by noise level, and added to later samples: to what is noised, to the context,
and now and then to the noise. The target stays the clean video, so that it learns to
undo them. (After Stable Video Infinity, as LongLive 2.0 uses it.)

  injected = inject(buffers, key, clean, noise, index)     before the network
  buffers = remember(buffers, key, latent_error, ...)      after it

Draws depend on the key and the sample alone, not on the number of devices.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from longlive_jax.generate.schedule import NUM_TRAIN_TIMESTEPS

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RecycleSettings:
  """How errors are kept and injected. Static.

  Attributes:
    buckets: of equal width in the noise level; 0 turns recycling off.
    capacity: errors of a chunk that a bucket holds.
    clean_prob: share of samples that get nothing.
    noise_prob, latent_prob, context_prob: of the others, share of samples that get an
      error in the noise, in what is noised, and in the context.
    spread: errors are scaled by a uniform factor in 1 - spread to 1 + spread.
    clean_keep_prob: share of the samples without injection whose errors are kept: they
      are small, and would drive out those that matter.
  """

  buckets: int = 50
  capacity: int = 500
  clean_prob: float = 0.2
  noise_prob: float = 0.01
  latent_prob: float = 0.9
  context_prob: float = 0.9
  spread: float = 0.3
  clean_keep_prob: float = 0.1

  def __post_init__(self):
    if not 0 <= self.buckets <= NUM_TRAIN_TIMESTEPS:
      raise ValueError(
        f"recycle.buckets={self.buckets} must lie in [0, {NUM_TRAIN_TIMESTEPS}]; 0 "
        "turns recycling off"
      )
    if self.capacity < 1:
      raise ValueError(f"recycle.capacity={self.capacity} must be at least 1")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is float and not 0 <= value <= 1:
        raise ValueError(f"recycle.{field.name}={value} must lie in [0, 1]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorBuffers:
  """Errors of whole chunks by noise level; part of the training state.

  Attributes:
    latent, noise: (buckets, capacity, numbers), a chunk's latents in one row, so that
      any number of devices can share it.
    filled: int32 (buckets,), how many of each are filled.
    settings: static.
  """

  latent: Array
  noise: Array
  filled: Array
  settings: RecycleSettings = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Injection:
  """A batch with errors in it.

  Attributes:
    source: (b, f, ...) what is noised.
    noise: (b, f, ...).
    context: (b, f, ...) what is added to the context.
    untouched: bool (b,), samples that get nothing.
  """

  source: Array
  noise: Array
  context: Array
  untouched: Array


def init_buffers(
  settings: RecycleSettings, chunk_shape: tuple[int, ...], dtype: jnp.dtype
) -> ErrorBuffers | None:
  """Empty buffers for chunks of a shape (frames, y, x, c); None if turned off."""
  if not settings.buckets:
    return None
  shape = (settings.buckets, settings.capacity, math.prod(chunk_shape))
  return ErrorBuffers(
    latent=jnp.zeros(shape, dtype),
    noise=jnp.zeros(shape, dtype),
    filled=jnp.zeros((settings.buckets,), jnp.int32),
    settings=settings,
  )


def bucket_of(index: Array, buckets: int) -> Array:
  """Bucket of a noise level 0 to 1000; a clean one, 1000, goes with the last."""
  return jnp.minimum(index * buckets // NUM_TRAIN_TIMESTEPS, buckets - 1)


def inject(
  buffers: ErrorBuffers, key: Array, clean: Array, noise: Array, index: Array
) -> Injection:
  """Adds kept errors to a batch.

  Chunks get errors of their own noise level, the context those of any: it is the
  outcome of all levels. Where nothing is kept yet, nothing is added.

  Args:
    clean, noise: (b, f, ...) float32.
    index: int32 (b, f), noise level, the same within a chunk.
  """
  settings = buffers.settings
  b, chunks = clean.shape[0], _chunks(buffers, clean)
  keys = jax.random.split(key, 7)
  untouched = jax.random.bernoulli(keys[0], settings.clean_prob, (b,))
  level = bucket_of(index.reshape(b, chunks, -1)[:, :, 0], settings.buckets)

  def share(key: Array, probability: float) -> Array:
    """Which samples get it, (b,)."""
    return jax.random.bernoulli(key, probability, (b,)) & ~untouched

  def drawn(key: Array, kept: Array, bucket: Array, slot: Array, which: Array) -> Array:
    factor = jax.random.uniform(
      key, (b, chunks, 1), minval=1 - settings.spread, maxval=1 + settings.spread
    )
    which = which[:, None] & (buffers.filled[bucket] > 0)
    errors = kept[bucket, slot].astype(jnp.float32) * factor
    return jnp.where(which[..., None], errors, 0.0).reshape(clean.shape)

  def of_level(key: Array, kept: Array, which: Array) -> Array:
    slot_key, factor_key = jax.random.split(key)
    most = jnp.maximum(buffers.filled[level], 1)
    slot = jax.random.randint(slot_key, (b, chunks), 0, most)
    return drawn(factor_key, kept, level, slot, which)

  def of_any(key: Array, kept: Array, which: Array) -> Array:
    slot_key, factor_key = jax.random.split(key)
    ends = jnp.cumsum(buffers.filled)
    number = jax.random.randint(slot_key, (b, chunks), 0, jnp.maximum(ends[-1], 1))
    bucket = jnp.minimum(
      jnp.searchsorted(ends, number, side="right"), settings.buckets - 1
    )
    slot = number - (ends - buffers.filled)[bucket]
    return drawn(factor_key, kept, bucket, slot, which)

  return Injection(
    source=clean
    + of_level(keys[1], buffers.latent, share(keys[2], settings.latent_prob)),
    noise=noise + of_level(keys[3], buffers.noise, share(keys[4], settings.noise_prob)),
    context=of_any(keys[5], buffers.latent, share(keys[6], settings.context_prob)),
    untouched=untouched,
  )


def remember(
  buffers: ErrorBuffers,
  key: Array,
  latent_error: Array,
  noise_error: Array,
  index: Array,
  untouched: Array,
) -> ErrorBuffers:
  """Keeps the errors of a batch; in a full bucket each replaces one at random.

  Args:
    latent_error: (b, f, ...), predicted minus clean latents.
    noise_error: (b, f, ...), predicted minus true noise.
    index: int32 (b, f), noise level.
    untouched: bool (b,), see `Injection`.
  """
  settings = buffers.settings
  b, chunks = latent_error.shape[0], _chunks(buffers, latent_error)
  key_keep, key_slot = jax.random.split(key)
  keep = jax.random.bernoulli(key_keep, settings.clean_keep_prob, (b,)) | ~untouched
  keep = jnp.repeat(keep, chunks)  # (m,), m = b * chunks
  bucket = bucket_of(index.reshape(b * chunks, -1)[:, 0], settings.buckets)
  # The n-th of a bucket takes its n-th free place.
  member = jax.nn.one_hot(bucket, settings.buckets, dtype=jnp.int32) * keep[:, None]
  before = jnp.cumsum(member, axis=0) - member
  place = buffers.filled[bucket] + jnp.take_along_axis(before, bucket[:, None], 1)[:, 0]
  anywhere = jax.random.randint(key_slot, place.shape, 0, settings.capacity)
  slot = jnp.where(place < settings.capacity, place, anywhere)
  # Of several errors for one place the last stays: a scatter with equal indices would
  # leave the choice to the GPU's scheduling, and runs would not repeat.
  same = (bucket[:, None] == bucket) & (slot[:, None] == slot) & keep
  later = jnp.triu(same, k=1).any(axis=1)
  slot = jnp.where(keep & ~later, slot, settings.capacity)  # out of bounds: dropped

  def write(kept: Array, errors: Array) -> Array:
    rows = errors.reshape(b * chunks, -1).astype(kept.dtype)
    return kept.at[bucket, slot].set(rows, mode="drop")

  return dataclasses.replace(
    buffers,
    latent=write(buffers.latent, latent_error),
    noise=write(buffers.noise, noise_error),
    filled=jnp.minimum(buffers.filled + member.sum(0), settings.capacity),
  )


def _chunks(buffers: ErrorBuffers, latents: Array) -> int:
  """Chunks of a sample.

  Raises:
    ValueError: latents that are no whole number of the buffers' chunks.
  """
  numbers, sample = buffers.latent.shape[-1], latents[0].size
  if sample % numbers:
    raise ValueError(
      f"latents={latents.shape} are no whole number of chunks of {numbers} numbers, "
      "which the error buffers hold"
    )
  return sample // numbers
