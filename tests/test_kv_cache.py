"""The slot cache against a plain simulation of the reference's shifting buffer.

pytestmark = pytest.mark.usefixtures("quick_compiling")

`Buffer` is SPEC 2.3 with one token a frame: it moves data and keeps four integers.
The cache under test never moves anything. Both must attend the same frames, in the
same order, on every call.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layers import kv_cache
from longlive_jax.layers.kv_cache import CacheRules

BATCH = 8  # random stories that one compiled program runs at a time


class Buffer:
  """The reference's cache of one video (SPEC 2.3), holding frame numbers."""

  def __init__(self, capacity: int, window: int, sink: int, global_sink: int):
    self.capacity, self.window = capacity, window
    self.sink, self.global_sink = sink, global_sink
    self.data = [None] * capacity
    self.global_end = self.local_end = self.pinned_len = 0
    self.pinned_start = -1

  def call(self, frames: list[int]) -> list[int]:
    """Writes a chunk; what its queries attend, in the order of the keys."""
    pin, count = self.pinned_start, self.pinned_len
    has_pin = pin >= 0 and count > 0
    if not has_pin:
      head = max(self.global_sink, self.sink)
    else:
      head = self.global_sink + (count if pin == self.global_sink else 0)
    length, end = len(frames), frames[-1] + 1
    evict = 0
    if end > self.global_end and length + self.local_end > self.capacity:
      evict = length + self.local_end - self.capacity
      keep = self.local_end - evict - head
      assert keep >= 0, "the schedule leaves no room; not a valid configuration"
      moved = self.data[head + evict : head + evict + keep]
      self.data[head : head + keep] = moved
      if has_pin and pin >= head:
        self.pinned_start -= evict
    last = self.local_end + (end - self.global_end) - evict
    self.data[last - length : last] = frames
    self.global_end, self.local_end = end, last

    first = max(0, last - self.window)
    sink_apart = head > 0 and first > 0
    pin_apart = has_pin and head <= pin < first
    start, ranges = first, []
    if sink_apart:
      ranges.append((0, head))
    if pin_apart:
      ranges.append((pin, pin + count))
    if sink_apart or pin_apart:
      room = self.window - head * sink_apart - count * pin_apart
      start = max(head if sink_apart else 0, last - room)
    ranges.append((start, last))
    return [frame for a, b in ranges for frame in self.data[a:b]]

  def pin(self, frames: list[int]) -> None:
    self.pinned_start = self.local_end - len(frames)
    self.pinned_len = min(self.sink, len(frames))

  def reset(self, start: int) -> None:
    self.local_end, self.global_end = self.global_sink, start
    self.pinned_start, self.pinned_len = -1, 0


@jax.jit
def _call(cache, frames):
  """One call; keys carry their frame number, values its negative."""
  placement = kv_cache.place(cache, frames)
  own = frames[:, :, None, None, None].astype(jnp.float32)
  keys, values = kv_cache.attended(placement, (cache.k[0], cache.v[0]), own, -own)
  cache = kv_cache.commit(cache, placement, own[None], -own[None])
  return cache, placement, keys[..., 0, 0, 0], values[..., 0, 0, 0]


_pin, _reset = jax.jit(kv_cache.pin), jax.jit(kv_cache.reset)


def new_cache(rules: CacheRules, capacity: int, batch: int = BATCH):
  return kv_cache.init_cache(
    rules,
    layers=1,
    batch=batch,
    capacity_frames=capacity,
    tokens_per_frame=1,
    heads=1,
    head_dim=1,
    dtype=jnp.float32,
  )


def call(cache, frames: list[int]):
  """The cache after a call on all samples, and each sample's attended frames."""
  batch = cache.frame.shape[0]
  cache, placement, keys, values = _call(cache, jnp.tile(jnp.array(frames), (batch, 1)))
  ranks, lengths = np.asarray(placement.rank), np.asarray(placement.length)
  keys, values = np.asarray(keys), np.asarray(values)
  np.testing.assert_array_equal(keys, -values)
  lists = []
  for b in range(batch):
    attended = keys[b, : lengths[b]].astype(int)
    order = ranks[b, : lengths[b]]
    assert sorted(order) == list(range(lengths[b]))  # a position for each, no gaps
    lists.append([int(f) for f in attended[np.argsort(order)]])
  check_storage(cache)
  return cache, lists


def check_storage(cache) -> None:
  """Slots hold what they say, no frame twice, and the filled ones are a prefix."""
  frames = np.asarray(cache.frame)
  k, v = (np.asarray(a)[0, ..., 0, 0, 0] for a in (cache.k, cache.v))  # (b, slots)
  for b, row in enumerate(frames):
    filled = row >= 0
    assert np.all(filled[: filled.sum()])
    assert len(set(row[filled])) == filled.sum()
    np.testing.assert_array_equal(k[b, filled], row[filled])
    np.testing.assert_array_equal(v[b, filled], -row[filled])
  assert not np.any(np.asarray(cache.pinned) & (frames < 0))


@dataclasses.dataclass(frozen=True)
class Case:
  """A cache and how a video runs through it."""

  capacity: int
  window: int
  sink: int
  global_sink: int
  chunk: int
  first: int = 0  # frames of a shorter first chunk
  recache: bool = False
  pins: bool = True

  def rules(self, **options) -> CacheRules:
    return CacheRules(self.window, self.sink, self.global_sink, **options)

  def chunks(self, number: int) -> list[list[int]]:
    lengths = ([self.first] if self.first else []) + [self.chunk] * number
    ends = np.cumsum(lengths)
    return [list(range(e - n, e)) for e, n in zip(ends, lengths, strict=True)]


def name(c: Case) -> str:
  sizes = f"{c.capacity}-{c.window}-{c.sink}-{c.global_sink}-{c.chunk}"
  flags = {"pins": c.pins, "first": c.first, "recache": c.recache}
  return "-".join([sizes, *(flag for flag, on in flags.items() if on)])


CASES = [
  # Generation: the window is the whole cache.
  Case(4, 4, 0, 0, 1, pins=False),
  Case(12, 12, 4, 0, 4, pins=False),
  Case(16, 16, 4, 4, 4),
  Case(16, 16, 4, 4, 4, recache=True),
  Case(12, 12, 2, 2, 4),
  Case(24, 24, 8, 8, 4),
  Case(13, 13, 3, 3, 3),  # capacity - chunk - sink no multiple: pins get lost
  Case(11, 11, 2, 2, 3, recache=True),
  Case(13, 13, 4, 4, 4, first=1),
  Case(10, 10, 1, 1, 3, first=1),
  # Rollouts: the cache holds more than is attended.
  Case(16, 8, 0, 0, 4, pins=False),
  Case(16, 8, 3, 0, 4, pins=False),
  Case(20, 12, 4, 4, 4),
  Case(20, 12, 4, 4, 4, recache=True),
  Case(21, 13, 3, 3, 4),
  Case(15, 9, 2, 3, 4, pins=False),
  Case(17, 9, 2, 2, 3, first=1),
  Case(19, 10, 5, 5, 2),
]


def cuts(case: Case, chunks: int, seed: int) -> np.ndarray:
  """Random cuts (chunks, b), rare to frequent over the samples."""
  rng = np.random.default_rng(seed)
  cut = rng.random((chunks, BATCH)) < np.linspace(0.0, 0.7, BATCH)
  for i, frames in enumerate(case.chunks(chunks)[:chunks]):
    # The reference's reset assumes that the global sink was filled before the cut.
    if frames[0] < max(1, case.recache * case.global_sink):
      cut[i] = False
  return cut & case.pins


# A pin without as long a global sink: its index may fall below 0.
REFERENCE_ONLY = [Case(13, 13, 3, 0, 4), Case(23, 16, 4, 2, 4), Case(9, 8, 4, 0, 4)]


@pytest.mark.parametrize("case", CASES + REFERENCE_ONLY, ids=name)
def test_attends_what_the_reference_attends(case):
  cache = new_cache(case.rules(reference=True), case.capacity)
  buffers = [
    Buffer(case.capacity, case.window, case.sink, case.global_sink)
    for _ in range(BATCH)
  ]
  chunks = case.chunks(16)
  rng = np.random.default_rng(1)
  for frames, cut in zip(chunks, cuts(case, len(chunks), seed=0), strict=True):
    # Denoising passes (any number), then the clean pass between reset and pin.
    for _ in range(rng.integers(1, 4)):
      cache, attended = call(cache, frames)
      assert attended == [buffer.call(frames) for buffer in buffers]
    if case.recache:
      cache = _reset(cache, jnp.asarray(cut))
      for buffer, now in zip(buffers, cut, strict=True):
        if now:
          buffer.reset(frames[0])
    cache, attended = call(cache, frames)
    assert attended == [buffer.call(frames) for buffer in buffers]
    cache = _pin(cache, jnp.tile(jnp.array(frames), (BATCH, 1)), jnp.asarray(cut))
    for buffer, now in zip(buffers, cut, strict=True):
      if now:
        buffer.pin(frames)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_sinks_and_pins_stay_and_the_newest_are_attended(case):
  """The right behaviour, from a list of all frames that ever were."""
  cache = new_cache(case.rules(), case.capacity)
  past: list[list[int]] = [[] for _ in range(BATCH)]  # frames not forgotten by a reset
  pinned: list[list[int]] = [[] for _ in range(BATCH)]
  ever_pinned = [False] * BATCH
  chunks = case.chunks(16)
  for frames, cut in zip(chunks, cuts(case, len(chunks), seed=2), strict=True):
    if case.recache:
      cache = _reset(cache, jnp.asarray(cut))
    cache, attended = call(cache, frames)
    slots, flags = np.asarray(cache.frame), np.asarray(cache.pinned)
    for b in range(BATCH):
      if case.recache and cut[b]:
        past[b], pinned[b], ever_pinned[b] = past[b][: case.global_sink], [], False
      past[b] += frames
      head = case.global_sink if ever_pinned[b] else max(case.sink, case.global_sink)
      kept = sorted({*past[b][:head], *pinned[b]})
      rest = [frame for frame in past[b] if frame not in kept]
      assert len(attended[b]) == min(case.window, len(past[b]))
      want = sorted(kept + rest[len(kept) - case.window :])
      assert attended[b] == want
      assert {*slots[b]} >= {*kept, *attended[b], *frames}
      assert sorted(slots[b][flags[b]]) == pinned[b]
    cache = _pin(cache, jnp.tile(jnp.array(frames), (BATCH, 1)), jnp.asarray(cut))
    for b in np.flatnonzero(cut):
      pinned[b], ever_pinned[b] = frames[: case.sink], True


def test_the_reference_loses_a_pin_that_we_keep():
  """SPEC 13.3: capacity - chunk - sink is no multiple of the chunk."""
  case = Case(13, 13, 3, 3, 3)
  lost = {}
  for reference in (False, True):
    cache = new_cache(case.rules(reference=reference), case.capacity, batch=1)
    for i, frames in enumerate(case.chunks(10)):
      cache, attended = call(cache, frames)
      if i == 2:
        cache = _pin(cache, jnp.array([frames]), jnp.array([True]))
    lost[reference] = not {6, 7, 8} <= set(attended[0])
  assert lost == {False: False, True: True}


@pytest.mark.parametrize("case", [CASES[3], CASES[12], CASES[13]])
def test_samples_of_a_batch_do_not_see_each_other(case):
  chunks = case.chunks(12)
  cut = cuts(case, len(chunks), seed=3)

  def run(samples):
    cache = new_cache(case.rules(), case.capacity, batch=len(samples))
    lists = []
    for frames, now in zip(chunks, jnp.asarray(cut[:, samples]), strict=True):
      cache = _reset(cache, now) if case.recache else cache
      cache, attended = call(cache, frames)
      cache = _pin(cache, jnp.tile(jnp.array(frames), (len(samples), 1)), now)
      lists.append(attended)
    return lists, cache

  together, cache = run(list(range(BATCH)))
  for b in (2, BATCH - 1):
    alone, own = run([b])
    assert [row[0] for row in alone] == [row[b] for row in together]
    np.testing.assert_array_equal(own.frame[0], cache.frame[b])
    np.testing.assert_array_equal(own.pinned[0], cache.pinned[b])


def test_attending_reads_and_does_not_write():
  """Denoising passes leave the cache alone: it is committed by the clean pass only."""
  cache = new_cache(CacheRules(4), 4, batch=1)
  before, _ = call(cache, [0, 1])
  after, attended = call(before, [2, 3])
  assert attended == [[0, 1, 2, 3]]
  np.testing.assert_array_equal(before.frame, [[0, 1, -1, -1]])
  again, attended = call(before, [2, 3])
  assert attended == [[0, 1, 2, 3]]
  np.testing.assert_array_equal(again.k, after.k)


def test_rules_must_fit_the_capacity():
  with pytest.raises(ValueError, match=r"window_frames=9 must be between 1 and"):
    new_cache(CacheRules(9), 8)
  with pytest.raises(ValueError, match="window_frames=0"):
    new_cache(CacheRules(0), 8)


def test_a_chunk_is_written_again_where_it_is_and_sees_nothing_behind_it():
  cache = new_cache(CacheRules(8, 2), 8, batch=1)
  for first in range(0, 14, 2):  # 0, 1 and 8 to 13 are left, in some order
    cache, _ = call(cache, [first, first + 1])
  frames = jnp.array([[10, 11]])
  placement = kv_cache.place_again(cache, frames)
  table = np.asarray(cache.frame)[0]
  assert table[np.asarray(placement.slot)[0]].tolist() == [10, 11]
  length = int(placement.length[0])
  attended = table[np.asarray(placement.order)[0, :length]].tolist()
  assert attended == [0, 1, 8, 9, 10, 11]
  assert np.asarray(placement.rank)[0, :length].tolist() == list(range(6))
  source = np.asarray(placement.source)[0]
  assert [*table[source == 0], *table[source == 1]] == [10, 11]
  assert np.sum(source >= 0) == 2
  for name in ("frame", "pinned", "has_pin"):
    np.testing.assert_array_equal(getattr(placement, name), getattr(cache, name))
  with pytest.raises(ValueError, match="window_frames=4 must be the capacity"):
    kv_cache.place_again(new_cache(CacheRules(4), 8, batch=1), frames)


def test_writes_are_taken_back_bit_for_bit():
  cache = new_cache(CacheRules(6, 2), 6, batch=2)
  states, lost = [cache], []
  for first in range(0, 12, 2):
    frames = [first, first + 1]
    placement = kv_cache.place(cache, jnp.tile(jnp.array(frames), (2, 1)))
    lost.append(kv_cache.overwritten(cache, placement.slot))
    cache, _ = call(cache, frames)
    states.append(cache)
  for before, old in zip(states[-2::-1], lost[::-1], strict=True):
    cache = kv_cache.put_back(cache, old)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
      np.testing.assert_array_equal(a, b)
