"""Attention among all tokens of a training clip, under the mask of its layout.

  pieces     each chunk's queries against the keys that they see, copied together: one
             plain attention a chunk and half, which is cuDNN's on a GPU
  triton     kernels/flash_attention.py: one kernel forward, two backward
  blockwise  plain JAX, all pairs, masked: the reference, and the default without a GPU

The first two do no work for pairs that the mask rules out. Pieces are the faster ones:
576 TFLOP/s forward and 504 backward at 56,320 tokens of the 5B model on an H200, where
the kernels reach 456 and 418 (tools/bench_kernels.py --kernels=teacher_forcing).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels import flash_attention, launch
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.layers import attention as attn
from longlive_jax.layers.remat import attended, is_fused_attention

Array = jax.Array

IMPLEMENTATIONS = ("pieces", "triton", "blockwise")


def default_implementation(dtype: jnp.dtype) -> str:
  """'pieces' where attention is cuDNN's, else 'blockwise'."""
  cudnn = attn.default_implementation(dtype) == "cudnn"
  return "pieces" if cudnn else "blockwise"


def attention(
  q: Array,
  k: Array,
  v: Array,
  layout: ClipLayout,
  lengths: Array | None = None,
  *,
  implementation: str | None = None,
) -> Array:
  """softmax(q k^T / sqrt(d)) v over the pairs that the layout allows (SPEC 2.2).

  Args:
    q, k, v: (b, s, n, d) of one dtype, s = layout.length.
    lengths: int32 (b,), valid positions of each sample's clip; None = all. What is
      behind them is padding: not attended, its output and its gradients are 0.
    implementation: 'pieces', 'triton', 'blockwise' or None for
      `default_implementation`.

  Returns:
    (b, s, n, d) in the dtype of q. On several devices 'triton' belongs into a
    `shard_map` over samples and heads: XLA would gather its operands.

  Raises:
    ValueError: an unknown implementation, tokens that are not those of the layout, or
      what 'triton' cannot do, see kernels/flash_attention.py.
  """
  if q.shape[1] != layout.length:
    raise ValueError(f"q.shape={q.shape} must have layout.length={layout.length} rows")
  implementation = implementation or default_implementation(q.dtype)
  if implementation == "triton":
    return _triton(q, k, v, lengths, layout)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; use {', '.join(IMPLEMENTATIONS)}"
    )
  if implementation == "pieces":
    out = _pieces(q, k, v, lengths, layout)
  else:
    out = attended(_blockwise(q, k, v, lengths, layout))
  if lengths is None:
    return out
  valid = layout.valid(jnp.arange(layout.length), lengths)
  return jnp.where(valid[..., None, None], out, 0)


# ------------------------------------------------------------------ triton
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _triton(q, k, v, lengths, layout):
  return _triton_forward(q, k, v, lengths, layout)[0]


def _triton_forward(q, k, v, lengths, layout):
  inputs = q, k, v, lengths
  out, lse = flash_attention.forward(*inputs, layout=layout, run=launch.launch)
  # Both: else the backward pass would run the kernel again for the one that is lost.
  out, lse = attended(out), attended(lse)
  return out, (*inputs, out, lse)


def _triton_backward(layout, saved, gradient):
  gradients = flash_attention.backward(
    *saved, gradient, layout=layout, run=launch.launch
  )
  return *gradients, None


_triton.defvjp(_triton_forward, _triton_backward)


# ------------------------------------------------------------------ pieces
def _pieces(q, k, v, lengths, layout):
  # Of all this the outputs of attention are kept, not the copies of keys: over a long
  # clip these would be many times the keys.
  run = functools.partial(_attend_pieces, layout=layout)
  return jax.checkpoint(run, policy=is_fused_attention)(q, k, v, lengths)


def _attend_pieces(q, k, v, lengths, *, layout):
  plain = dataclasses.replace(layout, ranks=1)  # histories in one span, not in `ranks`
  q, k, v = (_swapped(x, layout.ranks, layout.halves) for x in (q, k, v))
  rectangles = sorted(plain.rectangles(), key=lambda rectangle: rectangle.queries)
  ends = [rectangle.queries[1] for rectangle in rectangles]
  queries = jnp.split(q, ends[:-1], axis=1)
  chain_k, chain_v = k.astype(jnp.float32), v.astype(jnp.float32)
  k, v = lax.stop_gradient((k, v))
  found = []
  for query, rectangle in zip(queries, rectangles, strict=True):
    keys, chain_k = _taken(k, chain_k, rectangle.keys)
    values, chain_v = _taken(v, chain_v, rectangle.keys)
    # These are the keys of positions 0, 1, ..., so the valid ones come first. Queries
    # that would see none are padding themselves.
    valid = None if lengths is None else jnp.clip(lengths, 1, keys.shape[1])
    found.append(attn.attention(query, keys, values, lengths=valid))
  return _swapped(jnp.concatenate(found, axis=1), layout.halves, layout.ranks)


def _swapped(x, outer, inner):
  """[outer, inner, ...] -> [inner, outer, ...] along the tokens of x (b, s, n, d)."""
  parts = x.reshape(x.shape[0], outer, inner, -1, *x.shape[2:])
  return parts.swapaxes(1, 2).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(x, chain, spans):
  """Rows of spans of x, and `chain` as it came, for the pieces that follow.

  The chain is float32 of the shape of x, and no number of it is read: gradients of x go
  back along it, and each piece adds its own to one array, in place. Those of all
  pieces, whole arrays that are added up at the end, would be 50 GB a layer for a clip
  of 64 seconds on four GPUs.
  """
  return jnp.concatenate([x[:, first:end] for first, end in spans], axis=1), chain


def _add_gradient(spans, _, gradients):
  gradient, total = gradients
  begin = 0
  for first, end in spans:
    part = gradient[:, begin : begin + end - first].astype(total.dtype)
    total = lax.dynamic_update_slice_in_dim(total, total[:, first:end] + part, first, 1)
    begin += end - first
  return None, total


_taken.defvjp(lambda x, chain, spans: (_taken(x, chain, spans), None), _add_gradient)


# ------------------------------------------------------------------ blockwise
def _blockwise(q, k, v, lengths, layout):
  plain = functools.partial(attn.attention, implementation="blockwise")
  if lengths is None:
    return plain(q, k, v, mask=layout.mask)

  def sample(q, k, v, length):
    def mask(q_index, k_index):
      # Padding sees everything: a softmax over nothing is not a number.
      valid_q = (layout.position(q_index) < length)[:, None]
      valid_k = layout.position(k_index) < length
      return ~valid_q | (valid_k & layout.mask(q_index, k_index))

    return plain(q[None], k[None], v[None], mask=mask)[0]

  return jax.vmap(sample)(q, k, v, lengths)
