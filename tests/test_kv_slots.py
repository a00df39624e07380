"""Slots of the KV cache in few bits: what is stored, what is read, and how exact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layers import attention, kv_cache, kv_slots
from longlive_jax.layers.kv_cache import CacheRules
from longlive_jax.layers.kv_slots import KVFormat
from longlive_jax.models import dit
from longlive_jax.quant import nvfp4

L, B, SLOTS, P, N, D = 2, 3, 4, 5, 2, 32
NVFP4 = KVFormat("nvfp4", "none")
TOKEN_MEAN = KVFormat("nvfp4", "token_mean")
CHANNEL_MEAN = KVFormat("nvfp4", "channel_mean")
FP8 = KVFormat("fp8")


def frames(seed: int, f: int = 2, offset: float = 0.0) -> jax.Array:
  """Keys (b, f, p, n, d) with a common offset a head and channel."""
  rng = np.random.default_rng(seed)
  common = offset * rng.normal(size=(1, 1, 1, N, D))
  return jnp.asarray(rng.normal(size=(B, f, P, N, D)) + common, jnp.float32)


def new_slots(format: KVFormat, *, keys: bool = True):
  return kv_slots.zeros(format, (L, B, SLOTS, P, N, D), jnp.float32, keys=keys)


def layer_of(slots):
  return jax.tree.map(lambda leaf: leaf[0], slots)


encode = jax.jit(kv_slots.encode)


@functools.partial(jax.jit, static_argnames="rule")
def rounded(x: jax.Array, rule: str) -> jax.Array:
  return nvfp4.dequantise(nvfp4.quantise(x, rule=rule))


def round_trip(format: KVFormat, x: jax.Array) -> jax.Array:
  return kv_slots.read(encode(layer_of(new_slots(format)), x), x.dtype)


def test_plain_slots_are_the_numbers():
  x = frames(0)
  np.testing.assert_array_equal(round_trip(KVFormat(), x), x)


@pytest.mark.parametrize("format", [NVFP4, TOKEN_MEAN, CHANNEL_MEAN], ids=str)
def test_a_frame_reads_as_its_own_quantisation(format):
  x = frames(0)
  want = x
  if format.smoothing == "token_mean":
    mean = jnp.mean(x, axis=2, keepdims=True).astype(jnp.bfloat16).astype(jnp.float32)
    want = x - mean
  want = np.stack(
    [
      [rounded(frame, rule=format.rule) for frame in sample]
      for sample in want
    ]
  )
  if format.smoothing == "token_mean":
    want = want + mean
  np.testing.assert_array_equal(round_trip(format, x), want)


def test_the_reference_scales_a_chunk_as_a_whole():
  x = frames(0) * jnp.array([1.0, 100.0])[:, None, None, None]
  slots = layer_of(new_slots(dataclasses.replace(CHANNEL_MEAN, chunk_amax=True)))
  found = encode(slots, x).array.amax
  np.testing.assert_array_equal(found, np.repeat(nvfp4.largest(x, 1)[:, None], 2, 1))
  own = encode(layer_of(new_slots(CHANNEL_MEAN)), x).array.amax
  np.testing.assert_array_equal(own, nvfp4.largest(x, 2))


def test_token_mean_keeps_attention_nearer_than_the_alternatives():
  """Keys with a common offset, the case that SPEC 9 measured."""
  k, v = frames(1, f=8, offset=4.0), frames(2, f=8)
  q = frames(3, f=1)[:, 0]
  flat = lambda x: x.reshape(B, -1, N, D)  # noqa: E731
  want = attention.attention(q, flat(k), flat(v))

  def error(format):
    slots = layer_of(new_slots(format))
    keys = kv_slots.read(encode(slots, k), k.dtype)
    found = attention.attention(q, flat(keys), flat(v))
    return float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want))

  assert error(TOKEN_MEAN) < 0.5 * min(error(NVFP4), error(CHANNEL_MEAN))


@pytest.mark.parametrize("format", [NVFP4, TOKEN_MEAN, CHANNEL_MEAN, FP8], ids=str)
def test_the_cache_reads_back_what_was_committed_to_each_sample(format):
  rules = CacheRules(window_frames=SLOTS, sink_frames=2, global_sink_frames=2)
  cache = kv_cache.init_cache(
    rules,
    layers=L,
    batch=B,
    capacity_frames=SLOTS,
    tokens_per_frame=P,
    heads=N,
    head_dim=D,
    dtype=jnp.float32,
    format=format,
  )
  layers = [(layer_of(cache.k), layer_of(cache.v))] * L
  seen = {}
  for chunk in range(4):  # frames 0 1 stay, the others take turns
    numbers = np.tile(np.arange(2 * chunk, 2 * chunk + 2, dtype=np.int32), (B, 1))
    placement = kv_cache.place(cache, numbers)
    k, v = frames(10 + chunk), frames(20 + chunk)
    keys, values = kv_cache.attended(
      placement, (layer_of(cache.k), layer_of(cache.v)), k, v
    )
    own = k - jnp.mean(k, axis=-1, keepdims=True) if format == CHANNEL_MEAN else k
    encoded = [
      (encode(lk, k * (i + 1)), encode(lv, v * (i + 1)))
      for i, (lk, lv) in enumerate(layers)
    ]
    new_k, new_v = jax.tree.map(lambda *leaves: jnp.stack(leaves), *encoded)
    cache = kv_cache.commit(cache, placement, new_k, new_v)
    for f in range(2):
      slot = int(placement.slot[0, f])
      np.testing.assert_array_equal(keys[:, slot], own[:, f])  # new: exact
      np.testing.assert_array_equal(values[:, slot], v[:, f])
      seen[2 * chunk + f] = (round_trip(format, k)[:, f], k[:, f] * 0 + chunk)
    for slot, frame in enumerate(cache.frame[0].tolist()):
      if 0 <= frame < 2 * chunk:  # remembered: as it was quantised
        np.testing.assert_array_equal(keys[:, slot], seen[frame][0])
  assert sorted(cache.frame[0].tolist()) == [0, 1, 6, 7]
  second = kv_slots.read(jax.tree.map(lambda leaf: leaf[1], cache.k), jnp.float32)
  first = kv_slots.read(layer_of(cache.k), jnp.float32)
  np.testing.assert_allclose(second, 2 * first, rtol=1e-6)  # powers of two are exact


def test_bytes_at_the_size_of_the_5b_model():
  config = dit.size("ti2v-5b")

  def nbytes(format):
    cache = jax.eval_shape(
      lambda: kv_cache.init_cache(
        CacheRules(32),
        layers=config.layers,
        batch=1,
        capacity_frames=32,
        tokens_per_frame=config.tokens_per_frame(44, 80),
        heads=config.heads,
        head_dim=config.head_dim,
        dtype=jnp.bfloat16,
        format=format,
      )
    )
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))

  for format in (TOKEN_MEAN, CHANNEL_MEAN):
    assert nbytes(format) / nbytes(KVFormat()) < 0.29
  assert nbytes(FP8) / nbytes(KVFormat()) < 0.5001


def test_an_empty_slot_reads_as_zeros():
  for format in (KVFormat(), TOKEN_MEAN, FP8):
    np.testing.assert_array_equal(kv_slots.read(new_slots(format), jnp.float32), 0)


def test_a_frame_that_is_not_finite_is_not_hidden():
  x = frames(0).at[1, 0, 2, 1, 20].set(jnp.inf)
  bad = ~np.isfinite(round_trip(NVFP4, x))
  assert bad[1, 0, 2, 1, 16:].all() and bad.sum() == 16


def test_the_head_dim_must_hold_whole_blocks():
  with pytest.raises(ValueError, match="head_dim=24 must be a multiple of 16"):
    kv_slots.zeros(NVFP4, (L, B, SLOTS, P, N, 24), jnp.float32, keys=True)
