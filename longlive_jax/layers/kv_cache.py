"""The KV cache: one slot a latent frame, bounded, with sinks that stay (SPEC 2.4).

Slots are never shifted. A new chunk overwrites the slots of the oldest frames that
nothing protects; attention does not care about the order of keys. Per call:

  placement = place(cache, frames)      which slots the chunk takes, what is attended
  ... forward: `attended` per layer     reads, puts the chunk's own K and V in place
  cache = commit(cache, placement, k, v)   only the clean pass writes

so the denoising passes of a chunk never touch the cache, and it can be donated. What a
slot stores, plain numbers or fewer bits, is `kv_slots`'s business.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from longlive_jax.layers import kv_slots

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CacheRules:
  """What stays and what is attended; all lengths in latent frames. Static.

  Attributes:
    window_frames: how many frames are attended, at most the capacity.
    sink_frames: first frames kept while there is no pin.
    global_sink_frames: first frames kept always (0 without multi-shot sinks).
    relative_rope: keys are stored unrotated and rotated by their rank in the window.
    reference: reproduce the reference's losses of pinned frames (SPEC 2.3, 13.3)
      instead of never evicting a pinned frame.
  """

  window_frames: int
  sink_frames: int = 0
  global_sink_frames: int = 0
  relative_rope: bool = False
  reference: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the frames that are remembered.

  Attributes:
    k, v: (l, b, slots, p, n, d), an array, FP8Array or NVFP4Slots; keys rotated
      unless the rules say relative_rope.
    frame: int32 (b, slots), absolute latent frame or -1 for an empty slot. Filled
      slots are always a prefix.
    pinned: bool (b, slots), the shot sink.
    has_pin: bool (b,).
    rules: static.
  """

  k: Any
  v: Any
  frame: Array
  pinned: Array
  has_pin: Array
  rules: CacheRules = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
  """Where one chunk goes and what it attends; shared by all layers and passes.

  Attributes:
    slot: int32 (b, f), the slot that each chunk frame takes.
    source: int32 (b, slots), the chunk frame that lands in a slot, -1 = keep it.
    frame, pinned: (b, slots) after the write; has_pin: (b,) after it.
    order: int32 (b, window), slots of the attended frames in ascending frame order,
      or None when the window is the whole cache (then slots 0..length are attended).
    rank: int32 (b, slots or window), position of a key in the ascending attended list.
    length: int32 (b,), attended frames, the chunk included.
  """

  slot: Array
  source: Array
  frame: Array
  pinned: Array
  has_pin: Array
  order: Array | None
  rank: Array
  length: Array


def init_cache(
  rules: CacheRules,
  *,
  layers: int,
  batch: int,
  capacity_frames: int,
  tokens_per_frame: int,
  heads: int,
  head_dim: int,
  dtype: jnp.dtype,
  format: kv_slots.KVFormat = kv_slots.PLAIN,
) -> KVCache:
  """An empty cache. Raises ValueError if rules or format do not fit the sizes."""
  if not 0 < rules.window_frames <= capacity_frames:
    raise ValueError(
      f"window_frames={rules.window_frames} must be between 1 and "
      f"capacity_frames={capacity_frames}"
    )
  shape = (layers, batch, capacity_frames, tokens_per_frame, heads, head_dim)
  return KVCache(
    k=kv_slots.zeros(format, shape, dtype, keys=True),
    v=kv_slots.zeros(format, shape, dtype, keys=False),
    frame=jnp.full((batch, capacity_frames), -1, jnp.int32),
    pinned=jnp.zeros((batch, capacity_frames), bool),
    has_pin=jnp.zeros((batch,), bool),
    rules=rules,
  )


def specs(cache: KVCache, rows: Any, heads: Any) -> KVCache:
  """PartitionSpecs of a cache: its rows and heads over these mesh axes."""
  return dataclasses.replace(
    cache,
    k=kv_slots.specs(cache.k, rows, heads),
    v=kv_slots.specs(cache.v, rows, heads),
    frame=P(rows),
    pinned=P(rows),
    has_pin=P(rows),
  )


def _rank(frame: Array) -> Array:
  """Rank by frame number among filled slots; empty slots rank last. (b, slots)."""
  key = jnp.where(frame < 0, jnp.iinfo(jnp.int32).max, frame)
  return jnp.sum(key[:, None, :] < key[:, :, None], axis=-1, dtype=jnp.int32)


def _pin_rank(pinned: Array, rank: Array) -> Array:
  """Rank of the first pinned frame (b,); slots if none."""
  return jnp.min(jnp.where(pinned, rank, rank.shape[1]), axis=1)


def place(cache: KVCache, frames: Array) -> Placement:
  """Finds slots for a chunk and what it will attend.

  Args:
    cache: before the write.
    frames: int32 (b, f), the chunk's absolute frame numbers, ascending. They are all
      present in the cache (then they are overwritten in place) or all new.
  """
  rules = cache.rules
  slots = cache.frame.shape[1]
  rank, filled = _rank(cache.frame), cache.frame >= 0
  pin_rank = _pin_rank(cache.pinned, rank)
  pin_count = jnp.sum(cache.pinned, axis=1)
  head = jnp.where(
    cache.has_pin,
    rules.global_sink_frames,
    max(rules.global_sink_frames, rules.sink_frames),
  )  # (b,) lowest ranks that are never evicted

  # Slots in the order in which a new chunk takes them: empty, then oldest first, then
  # (never reached when the configuration is valid) the protected ones.
  pin_is_next = pin_rank == rules.global_sink_frames
  safe = cache.pinned & (pin_is_next[:, None] if rules.reference else True)
  safe |= filled & (rank < head[:, None])
  index = jnp.arange(slots, dtype=jnp.int32)
  urgency = jnp.where(filled, slots + rank + jnp.where(safe, slots, 0), index)
  new_slots = jnp.argsort(urgency, axis=1)[:, : frames.shape[1]]

  match = cache.frame[:, None, :] == frames[:, :, None]  # (b, f, slots)
  present = jnp.all(jnp.any(match, axis=2), axis=1)  # (b,)
  slot = jnp.where(present[:, None], jnp.argmax(match, axis=2), new_slots)
  slot = slot.astype(jnp.int32)

  hit = slot[:, :, None] == index  # (b, f, slots)
  taken = jnp.any(hit, axis=1)
  source = jnp.where(taken, jnp.argmax(hit, axis=1), -1).astype(jnp.int32)
  new_frame = jnp.take_along_axis(frames, jnp.maximum(source, 0), axis=1)
  frame = jnp.where(taken, new_frame, cache.frame)
  pinned = cache.pinned & ~(taken & ~present[:, None])
  has_pin = cache.has_pin
  if rules.reference:
    # The reference keeps an index, not flags: once a pinned frame is evicted the
    # index points at other data for good, so the whole pin is lost. An index that
    # falls below 0 even means that there never was a pin.
    lost = jnp.any(pinned != cache.pinned, axis=1)
    pinned &= ~lost[:, None]
    evicted = jnp.sum(filled & taken, axis=1)
    has_pin &= ~(lost & (pin_rank < evicted))

  new_rank = _rank(frame)
  length = jnp.sum(frame >= 0, axis=1, dtype=jnp.int32)  # (b,)
  window = rules.window_frames
  if window == slots:
    return Placement(slot, source, frame, pinned, has_pin, None, new_rank, length)
  if rules.reference:
    keep = _reference_keep(frame, new_rank, head, pin_rank, pin_count, window)
  else:
    keep = _keep(frame, pinned | (new_rank < head[:, None]), window)
  order = jnp.argsort(jnp.where(keep, new_rank, slots + new_rank), axis=1)[:, :window]
  list_rank = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), order.shape)
  length = jnp.sum(keep, axis=1, dtype=jnp.int32)
  order = order.astype(jnp.int32)
  return Placement(slot, source, frame, pinned, has_pin, order, list_rank, length)


def place_again(cache: KVCache, frames: Array) -> Placement:
  """A chunk that is in the cache is written again, in its slots.

  It attends what is there up to its own frames, so that chunks that are written again
  one after the other each see those before it as they are by then, and none behind.

  Args:
    frames: int32 (b, f), ascending, all present.

  Raises:
    ValueError: the window is not the whole cache.
  """
  slots = cache.frame.shape[1]
  if cache.rules.window_frames != slots:
    raise ValueError(
      f"window_frames={cache.rules.window_frames} must be the capacity of the cache, "
      f"{slots} frames, for a chunk to be written again"
    )
  hit = cache.frame[:, None, :] == frames[:, :, None]  # (b, f, slots)
  seen = (cache.frame >= 0) & (cache.frame <= frames[:, -1:])
  rank = _rank(jnp.where(seen, cache.frame, -1))
  return Placement(
    slot=jnp.argmax(hit, axis=2).astype(jnp.int32),
    source=jnp.where(jnp.any(hit, axis=1), jnp.argmax(hit, axis=1), -1),
    frame=cache.frame,
    pinned=cache.pinned,
    has_pin=cache.has_pin,
    order=jnp.argsort(rank, axis=1).astype(jnp.int32),
    rank=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), cache.frame.shape),
    length=jnp.sum(seen, axis=1, dtype=jnp.int32),
  )


def _keep(frame, protected, window):
  """Attended slots (b, slots): what is protected, then the newest others."""
  protected &= frame >= 0
  others = jnp.where(protected, -1, frame)
  surplus = jnp.sum(frame >= 0, axis=1) - window  # others that are too many
  return protected | ((others >= 0) & (_rank(others) >= surplus[:, None]))


def _reference_keep(frame, rank, head, pin_rank, pin_count, window):
  """Attended slots (b, slots) in the reference (SPEC 2.4, rule 2).

  pin_rank, pin_count: (b,) of the state before the write.
  """
  count = jnp.sum(frame >= 0, axis=1)
  joined = (pin_count > 0) & (pin_rank == head)
  head = head + jnp.where(joined, pin_count, 0)
  # The reference asks whether the pin lies before the window, although the local part
  # starts `head` frames later: pins in between drop out.
  apart = (pin_count > 0) & (pin_rank >= head) & (pin_rank < count - window)
  local = window - head - jnp.where(apart, pin_count, 0)
  in_pin = (rank >= pin_rank[:, None]) & (rank < (pin_rank + pin_count)[:, None])
  keep = (rank < head[:, None]) | (rank >= (count - local)[:, None])
  keep |= apart[:, None] & in_pin
  return (keep | (count <= window)[:, None]) & (frame >= 0)


class Held(NamedTuple):
  """A full window of one layer, taken out of the cache for all passes over a chunk.

  Attributes:
    k, v: (b, window, p, n, d), the frames of the chunk itself last.
  """

  k: Array
  v: Array


def hold(cache: KVCache, placement: Placement) -> list[Held]:
  """The windows of all layers, with room for a chunk that is not in the cache yet.

  A pass then writes its own frames, and does not copy the others again. For slots that
  are attended as they are stored, and a window that is the whole cache and full.
  """
  rows = jnp.arange(placement.source.shape[0])[:, None]
  order = jnp.argsort(placement.source >= 0, axis=1)  # stable: the chunk's are last

  def taken(slots: Array, layer: int) -> Array:
    return slots.at[layer, rows, order].get(mode="promise_in_bounds")

  layers = range(len(cache.k))
  return [Held(taken(cache.k, layer), taken(cache.v, layer)) for layer in layers]


def attended(
  placement: Placement, layer: tuple[Any, Any] | Held, k: Array, v: Array
) -> tuple[Array, Array]:
  """One layer's keys and values to attend, the chunk's own put in their slots.

  Args:
    placement: of this chunk.
    layer: slots of k and v, each (b, slots, p, n, d), or what is held of them.
    k, v: the chunk's, (b, f, p, n, d), rotated as the cache stores them; each in a
      dtype that `kv_slots.read` gives, see `kv_slots.attended_dtype`.

  Returns:
    keys and values (b, slots or window, p, n, d) in the dtype of k and v. Only the
    first placement.length frames count.
  """
  if isinstance(layer, Held):
    past = layer.k.shape[1] - k.shape[1]
    put_last = functools.partial(
      lax.dynamic_update_slice_in_dim, start_index=past, axis=1
    )
    return put_last(layer.k, k), put_last(layer.v, v)
  order, source = placement.order, placement.source
  if order is not None:  # the order first: fewer slots to read
    rows = jnp.arange(order.shape[0])[:, None]
    layer = jax.tree.map(lambda leaf: leaf[rows, order], layer)
    source = jnp.take_along_axis(source, order, axis=1)
  pick = jnp.maximum(source, 0)[:, :, None, None, None]
  is_own = (source >= 0)[:, :, None, None, None]

  def merge(slots, new):
    # A select in the same pass as the copy of the layer: per-sample slots without a
    # scatter.
    mine = jnp.take_along_axis(kv_slots.own(slots, new), pick, axis=1)
    return jnp.where(is_own, mine, kv_slots.read(slots, new.dtype))

  return merge(layer[0], k), merge(layer[1], v)


def commit(
  cache: KVCache, placement: "Placement | Overwritten", k: Any, v: Any
) -> KVCache:
  """Writes a chunk's frames into their slots.

  Args:
    k, v: (l, b, f, p, n, d), as `kv_slots.encode` made them of each layer.
  """
  batch, frames = placement.slot.shape

  def write(i: Array, written: Any) -> Any:
    row, f = i // frames, i % frames

    def update(slots, new):
      rest = (0,) * (slots.ndim - 3)
      sizes = (slots.shape[0], 1, 1, *slots.shape[3:])
      frame = lax.dynamic_slice(new, (0, row, f, *rest), sizes)
      return lax.dynamic_update_slice(
        slots, frame, (0, row, placement.slot[row, f], *rest)
      )

    return jax.tree.map(update, written, (k, v))

  # Frame by frame, slots of all layers: a scatter looks up the place of every number,
  # and took 3.5 times as long as moving the bytes on an H200.
  new_k, new_v = lax.fori_loop(0, batch * frames, write, (cache.k, cache.v))
  return dataclasses.replace(
    cache,
    k=new_k,
    v=new_v,
    frame=placement.frame,
    pinned=placement.pinned,
    has_pin=placement.has_pin,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Overwritten:
  """What a write into the cache destroys: enough to take it back, bit for bit.

  Attributes:
    slot: int32 (b, f), the slots that are written.
    k, v: (l, b, f, p, n, d), what was in them.
    frame, pinned, has_pin: of the whole cache, before the write.
  """

  slot: Array
  k: Any
  v: Any
  frame: Array
  pinned: Array
  has_pin: Array


def overwritten(cache: KVCache, slot: Array) -> Overwritten:
  """What will be lost when the slots (b, f) are written and others forgotten."""
  rows = jnp.arange(slot.shape[0])[:, None]
  k, v = jax.tree.map(lambda leaf: leaf[:, rows, slot], (cache.k, cache.v))
  return Overwritten(slot, k, v, cache.frame, cache.pinned, cache.has_pin)


def put_back(cache: KVCache, old: Overwritten) -> KVCache:
  """The cache as it was before the write; the last write is taken back first."""
  return commit(cache, old, old.k, old.v)


def pin(cache: KVCache, frames: Array, where: Array) -> KVCache:
  """Makes the first `sink_frames` of these frames the shot sink of some samples.

  Args:
    cache: after the clean pass of the chunk.
    frames: int32 (b, f), the chunk's frames.
    where: bool (b,), the samples with a cut. An earlier pin is forgotten: its frames
      become ordinary.
  """
  first = frames[:, : cache.rules.sink_frames]
  new = jnp.any(cache.frame[:, :, None] == first[:, None, :], axis=2)
  return dataclasses.replace(
    cache,
    pinned=jnp.where(where[:, None], new, cache.pinned),
    has_pin=cache.has_pin | where,
  )


def reset(cache: KVCache, where: Array) -> KVCache:
  """Forgets all but the global-sink frames in some samples (clean recache)."""
  drop = where[:, None] & (_rank(cache.frame) >= cache.rules.global_sink_frames)
  return dataclasses.replace(
    cache,
    frame=jnp.where(drop, -1, cache.frame),
    pinned=cache.pinned & ~where[:, None],
    has_pin=cache.has_pin & ~where,
  )
