"""Attention with a choice of implementation, by length or under a mask.

`cudnn` is the fused kernel on NVIDIA GPUs. `blockwise` is plain JAX: an online softmax
over blocks of keys for blocks of queries, so that the logits of a chunk against its
window (7,040 x 28,160 at 5B shapes) are never materialised on CPU or TPU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# mask(query token indices (q,), key token indices (k,)) -> bool (q, k), true = attend.
Mask = Callable[[jax.Array, jax.Array], jax.Array]

BLOCK_Q = 1024
BLOCK_K = 1024


def default_implementation(dtype: jnp.dtype) -> str:
  """'cudnn' on a GPU with 16-bit inputs, else 'blockwise'."""
  half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
  return "cudnn" if half and jax.default_backend() == "gpu" else "blockwise"


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  lengths: jax.Array | None = None,
  mask: Mask | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v.

  Args:
    q: (b, q, n, d). k, v: (b, k, n, d), same dtype.
    lengths: int32 (b,), attend only the first `lengths` keys; None = all. Not zero.
    mask: function of token indices, see `Mask`; not together with lengths.
    implementation: 'cudnn', 'blockwise' or None for `default_implementation`.

  Returns:
    (b, q, n, d) in the dtype of q.

  Raises:
    ValueError: for an unknown implementation or lengths together with a mask.
  """
  if lengths is not None and mask is not None:
    raise ValueError("attention takes lengths or mask, not both")
  if implementation is None:
    implementation = default_implementation(q.dtype)
  if implementation == "cudnn":
    return _cudnn(q, k, v, lengths, mask)
  if implementation == "blockwise":
    return _blockwise(q, k, v, lengths, mask)
  raise ValueError(
    f"implementation={implementation!r} is unknown; use 'cudnn' or 'blockwise'"
  )


def _cudnn(q, k, v, lengths, mask):
  options = {}
  if lengths is not None:
    queries = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
    options = {"query_seq_lengths": queries, "key_value_seq_lengths": lengths}
  if mask is not None:
    allowed = mask(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    options = {"mask": allowed[None, None]}
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)


def _blockwise(q, k, v, lengths, mask):
  b, sq, n, d = q.shape
  sk = k.shape[1]
  scale = d**-0.5
  if sq <= BLOCK_Q and sk <= 4 * BLOCK_K:  # one block: no loop, cheap gradients
    keep = _keep(jnp.arange(sq), jnp.arange(sk), sk, lengths, mask)
    weights = jax.nn.softmax(_logits(q, k, scale, keep), axis=-1)  # (b, n, q, k)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
    return out.astype(q.dtype)

  q_blocks = _blocks(q, BLOCK_Q)  # (blocks, b, block, n, d)
  k_blocks, v_blocks = _blocks(k, BLOCK_K), _blocks(v, BLOCK_K)
  k_starts = jnp.arange(k_blocks.shape[0]) * BLOCK_K

  @jax.checkpoint  # nor the running sums of every pair of blocks
  def query_block(args):
    q_start, q_block = args
    q_index = q_start + jnp.arange(BLOCK_Q)

    @jax.checkpoint  # the backward pass must not keep the logits of every block
    def key_block(carry, block):
      total, weight, top = carry
      k_start, k_block, v_block = block
      k_index = k_start + jnp.arange(BLOCK_K)
      keep = _keep(q_index, k_index, sk, lengths, mask)
      logits = _logits(q_block, k_block, scale, keep)
      new_top = jnp.maximum(top, logits.max(axis=-1))
      # A block may be masked as a whole: keep exp(-inf - -inf) out of it.
      base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
      p = jnp.exp(logits - base[..., None])
      shrink = jnp.exp(top - base)
      part = jnp.einsum(
        "bnqk,bknd->bnqd",
        p.astype(v_block.dtype),
        v_block,
        preferred_element_type=jnp.float32,
      )
      carry = (total * shrink[..., None] + part, weight * shrink + p.sum(-1), new_top)
      return carry, None

    start = (
      jnp.zeros((b, n, BLOCK_Q, d), jnp.float32),
      jnp.zeros((b, n, BLOCK_Q), jnp.float32),
      jnp.full((b, n, BLOCK_Q), -jnp.inf, jnp.float32),
    )
    (total, weight, _), _ = lax.scan(key_block, start, (k_starts, k_blocks, v_blocks))
    # Rows that see nothing are padding queries: give 0 instead of 0 / 0.
    out = total / jnp.where(weight > 0, weight, 1.0)[..., None]
    return jnp.moveaxis(out, 1, 2).astype(q.dtype)  # (b, block, n, d)

  q_starts = jnp.arange(q_blocks.shape[0]) * BLOCK_Q
  out = lax.map(query_block, (q_starts, q_blocks))
  return jnp.moveaxis(out, 0, 1).reshape(b, -1, n, d)[:, :sq]


def _logits(q, k, scale, keep):
  dots = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
  return scale * dots if keep is None else jnp.where(keep, scale * dots, -jnp.inf)


def _keep(q_index, k_index, keys, lengths, mask):
  """Which logits count: bool, broadcastable to (b, n, q, k); None = all."""
  parts = []
  if k_index.shape[0] != keys:
    parts.append((k_index < keys)[None, None, None])
  if lengths is not None:
    parts.append((k_index < lengths[:, None])[:, None, None])
  if mask is not None:
    parts.append(mask(q_index, k_index)[None, None])
  return functools.reduce(jnp.logical_and, parts) if parts else None


def _blocks(x: jax.Array, size: int) -> jax.Array:
  b, s, n, d = x.shape
  x = jnp.pad(x, ((0, 0), (0, -s % size), (0, 0), (0, 0)))
  return jnp.moveaxis(x.reshape(b, -1, size, n, d), 1, 0)
