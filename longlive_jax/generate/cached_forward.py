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
from longlive_jax.models import dit
from longlive_jax.parallel.sequence import SINGLE, Layout
from longlive_jax.quant import fp8

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
  t_scale: float = 1.0,
  attention_format: str = "",
  keep: bool = False,
  velocity: bool = True,
  remat: str = "none",
  layout: Layout = SINGLE,
  exchange_format: str = "",
) -> tuple[Array | None, tuple[Any, Any] | None]:
  """One forward of a chunk against the cache, which is only read.

  Args:
    latents: (b, f, y, x, c). time: features (b, f, freq_dim).
    text: embedded text (b, segments, text_len, D), or keys of it.
    temporal: rotation of the chunk's frames (b, f, pairs); unused when the cache
      rotates by window position.
    t_scale: factor on window positions (relative RoPE). attention_format: see Sampling.
    keep: hand out the chunk's keys and values for `kv_cache.commit`.
    velocity: False leaves out what only serves it.
    remat: see layers/remat.py.
    layout, exchange_format: see parallel/sequence.py; a cache of this device's heads.

  Returns:
    velocity (b, f, y, x, c) or None, and None or (k, v), each (l, b, f, p, n, d) in
    the type of the cache's slots.
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
      keys, values = kv_cache.attended(placement, layer, k, v)
      keys, values = (a.reshape(b, -1, *a.shape[3:]) for a in (keys, values))
      if rules.relative_rope:
        keys = rope.rotate(keys, k_rotation, reads)
      out = compute(q, keys, values)
      if not keep:
        return out, None
      # Encoded here, layer by layer: all layers' plain keys would not fit beside the
      # cache that NVFP4 makes small.
      new = zip(layer, (k, v), strict=True)
      return out, tuple(kv_slots.encode(slots, a, layout.axes) for slots, a in new)

    own, layers = layout.split(latents, config.patch), (cache.k, cache.v)
    exchanged = layout.exchanged(attend, f, p, exchange_format)
    out, kept = model(
      own, time, text, exchanged, layers, remat=remat, velocity=velocity
    )
    return layout.join(out, config.patch, y, x) if velocity else None, kept

  by_length = functools.partial(attention.attention, lengths=placement.length * p)
  plain = functools.partial(forward, by_length, model.dtype)
  cudnn = attention.default_implementation(model.dtype) == "cudnn"
  if not attention_format and not cudnn:
    return plain()
  # cuDNN is 12% faster without lengths, and has none in FP8: all but the first chunks
  # fill the window.
  whole = fp8_attention.by_format(attention_format, model.dtype)
  reads = fp8_attention.operand_dtype(attention_format, model.dtype, config.head_dim)
  full = layout.everywhere(jnp.all(placement.length == rules.window_frames))
  return lax.cond(full, functools.partial(forward, whole, reads), plain)
