"""A forward of one chunk against the cache: what every pass of the sampler runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.layers import attention, fp8_attention, kv_cache, kv_slots, rope
from longlive_jax.layers.projection import numbers
from longlive_jax.models import block_scan, dit
from longlive_jax.parallel.sequence import SINGLE, Layout
from longlive_jax.quant import fp8, weights

Array = jax.Array


def cached_forward(
  model: dit.CausalDiT,
  cache: kv_cache.KVCache,
  placement: kv_cache.Placement,
  latents: Array,
  time: Array,
  text: Array | dit.TextKeys,
  temporal: rope.Rotation,
  *,
  held: list[kv_cache.Held] | None = None,
  full: bool | None = None,
  t_scale: float = 1.0,
  attention_format: str = "",
  keep: bool = False,
  velocity: bool = True,
  remat: str = "none",
  layout: Layout = SINGLE,
  exchange_format: str = "",
) -> tuple[Array | None, tuple[Any, Any] | list[kv_cache.Held] | None]:
  """One forward of a chunk against the cache, which is only read.

  Args:
    latents: (b, f, y, x, c). time: features (b, f, freq_dim).
    text: embedded text (b, segments, text_len, D), or keys of it.
    temporal: rotation of the chunk's frames (b, f, pairs); unused when the cache
      rotates by window position.
    held: windows to attend instead of the cache's slots, see `can_hold`; `full` is then
      True, and nothing is kept.
    full: whether all frames of the window are attended, where that is known.
    t_scale: factor on window positions (relative RoPE). attention_format: see Sampling.
    keep: hand out the chunk's keys and values for `kv_cache.commit`.
    velocity: False leaves out what only serves it.
    remat: see layers/remat.py.
    layout, exchange_format: see parallel/sequence.py; a cache of this device's heads.

  Returns:
    velocity (b, f, y, x, c) or None, and None or (k, v), each (l, b, f, p, n, d) in
    the type of the cache's slots, or held with the chunk's frames in them.
  """
  rules, config = cache.rules, model.config
  b, f, y, x, _ = latents.shape
  p = config.tokens_per_frame(y, x)
  if rules.relative_rope:
    window = np.arange(rules.window_frames) * t_scale
    table = rope.temporal_rotation(window, config.head_dim)

    def by_rank(rank: Array) -> rope.Rotation:
      rank = jnp.clip(rank, 0, rules.window_frames - 1)  # empty slots are not attended
      picked = rope.Rotation(*(jnp.asarray(part)[rank] for part in table))
      return model.rotation(picked, y, x)

    # The chunk's own frames are the newest: last in the window.
    q_rotation = by_rank(placement.length[:, None] - f + jnp.arange(f))
    k_rotation = by_rank(placement.rank)
  else:
    q_rotation = model.rotation(temporal, y, x)

  def forward(compute: Callable[[Array, Array, Array], Any], reads: jnp.dtype):
    def attend(layer, q, k, v):
      k_dtype, v_dtype = (
        kv_slots.attended_dtype(slots, model.dtype, reads) for slots in layer
      )
      q, v = rope.rotate(q, q_rotation, reads), fp8.as_dtype(v, v_dtype)
      if rules.relative_rope:  # unrotated, and not yet what is attended
        k = numbers(k)
      else:
        k = rope.rotate(k, q_rotation, k_dtype)
      k, v = (a.reshape(b, f, p, *a.shape[2:]) for a in (k, v))
      window = kv_cache.Held(*kv_cache.attended(placement, layer, k, v))
      keys, values = (a.reshape(b, -1, *a.shape[3:]) for a in window)
      if rules.relative_rope:
        keys = rope.rotate(keys, k_rotation, reads)
      out = compute(q, keys, values)
      if held is not None:
        return out, window
      if not keep:
        return out, None
      # Encoded here, layer by layer: all layers' plain keys would not fit beside the
      # cache that NVFP4 makes small.
      new = zip(layer, (k, v), strict=True)
      return out, tuple(kv_slots.encode(slots, a, layout.axes) for slots, a in new)

    own = layout.split(latents, config.patch)
    layers = (cache.k, cache.v) if held is None else held
    exchanged = layout.exchanged(attend, f, p, exchange_format)
    out, kept = model(
      own, time, text, exchanged, layers, remat=remat, velocity=velocity
    )
    if held is not None:
      kept = [jax.tree.map(lambda a: a[0], window) for window in kept]
    else:
      kept = block_scan.join(kept)
    return layout.join(out, config.patch, y, x) if velocity else None, kept

  by_length = functools.partial(attention.attention, lengths=placement.length * p)
  plain = functools.partial(forward, by_length, model.dtype)
  cudnn = attention.default_implementation(model.dtype) == "cudnn"
  if full is False or (not attention_format and not cudnn):
    return plain()
  # cuDNN is 12% faster without lengths, and has none in FP8: all but the first chunks
  # fill the window.
  whole = fp8_attention.by_format(attention_format, model.dtype)
  whole = functools.partial(forward, whole, _reads(model, attention_format))
  return whole() if full else lax.cond(is_full(cache, placement, layout), whole, plain)


def is_full(
  cache: kv_cache.KVCache, placement: kv_cache.Placement, layout: Layout
) -> Array:
  """Whether all rows attend a whole window, on all devices: a bool scalar."""
  return layout.everywhere(jnp.all(placement.length == cache.rules.window_frames))


def can_hold(
  model: dit.CausalDiT, cache: kv_cache.KVCache, attention_format: str
) -> bool:
  """Whether windows can be taken out of the cache: `kv_cache.hold`.

  If the network is unrolled and slots are attended as they are stored, and all of them.
  Windows in 16 bits take much memory: only beside plain weights, which are unrolled for
  those who ask for it, not by default.
  """
  rules, reads = cache.rules, _reads(model, attention_format)
  kinds = (Array, jax.ShapeDtypeStruct)
  plain = all(isinstance(a, kinds) for a in weights.matrices(model).values())
  return (
    len(block_scan.block_runs(model)) == model.config.layers
    and rules.window_frames == cache.frame.shape[1]
    and not rules.relative_rope
    and (plain or reads == jnp.float8_e4m3fn)
    and all(isinstance(a, Array) and a.dtype == reads for a in (cache.k, cache.v))
  )


def _reads(model: dit.CausalDiT, attention_format: str) -> jnp.dtype:
  return fp8_attention.operand_dtype(
    attention_format, model.dtype, model.config.head_dim
  )
